"""Images with other values than whole numbers from 0 to 255 are read by a rule, and are neither black nor white."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from small_run import call
from sslrun.data.levels import in_8_bits
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.transforms import Resize
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

RAMP = np.tile(np.linspace(0, 1, 64), (40, 1))  # from black to white


def encoded(values, kind):
    file = io.BytesIO()
    if kind == "PGM":
        largest = int(values.max())
        dtype = ">u2" if largest > 255 else "u1"
        return b"P5 # a remark\n%d %d\n%d\n" % (*values.shape[::-1], largest) + values.astype(dtype).tobytes()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def decoded(content):
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode) == ("PPM", "RGB")
        return np.asarray(image)


def integers(largest):
    return np.rint(RAMP * largest).astype(np.uint16)


CASES = {
    "8 bits in 16": (encoded(integers(255), "PNG"), "auto"),
    "12 bits in 16": (encoded(integers(4095), "PNG"), "auto"),
    "16 bits": (encoded(integers(65535), "PNG"), "auto"),
    "12 bits in a TIFF": (encoded(integers(4095), "TIFF"), "auto"),
    "10 bits, as stated": (encoded(integers(1023), "PNG"), [0, 1023]),
    "shifted, as stated": (encoded(integers(1000) + np.uint16(500), "PNG"), [500, 1500]),
    "floats to 1": (encoded(RAMP.astype(np.float32), "TIFF"), "auto"),
    "floats to 255": (encoded((RAMP * 255).astype(np.float32), "TIFF"), "auto"),
    "floats to 4095": (encoded((RAMP * 4095).astype(np.float32), "TIFF"), "auto"),
    "negative floats, as stated": (encoded((RAMP * 2 - 1).astype(np.float32), "TIFF"), [-1, 1]),
    "a PGM of 12 bits": (encoded(integers(4095), "PGM"), "auto"),
    "a PGM up to 100": (encoded(integers(100), "PGM"), "full"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_ramp_from_black_to_white_is_one(case):
    pixels = decoded(in_8_bits(*CASES[case]))
    expected = np.rint(RAMP * 255)
    steps = 1.3 if "100" in case else 0.51  # a hundred values are fewer than 256
    assert pixels.shape == (40, 64, 3) and (pixels == pixels[..., :1]).all()
    assert np.abs(pixels[..., 0] - expected).max() <= np.ceil(steps)


def test_color_keeps_its_channels_and_its_low_bits():
    """Pillow itself reads the upper 8 of 16 bits of color, all black here; written by hand, since it writes none."""
    import struct
    import zlib

    values = np.stack([RAMP * 4095, RAMP[:, ::-1] * 4095, RAMP * 0], axis=2).round().astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 64, 40, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels = decoded(in_8_bits(png, "auto"))
    assert np.abs(pixels - np.rint(values / 4095 * 255)).max() <= 1


def test_16_bits_are_those_of_the_decoder():
    """With and without the detour, for every value."""
    values = np.arange(65536).astype(np.uint16).reshape(256, 256)
    ours = decoded(in_8_bits(encoded(values, "PNG"), "auto"))[..., 0]
    assert np.array_equal(ours, np.rint(values / 257))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_other_files_stay_as_they_are(kind):
    file = io.BytesIO()
    Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").save(file, kind)
    content = file.getvalue()
    assert in_8_bits(content, "auto") is content
    wide = encoded(integers(4095), "PNG")
    assert in_8_bits(wide, "full") is wide


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 2 - 1, "values from -1 to 1: set range"),
        (RAMP * 1e6, "values from 0 to 1e\\+06: set range"),
    ],
)
def test_what_no_rule_fits_is_a_bad_image(values, message):
    with pytest.raises(ValueError, match=message):
        in_8_bits(encoded(values.astype(np.float32), "TIFF"), "auto")


def test_a_damaged_file_is_a_bad_image_and_the_next_one_is_read():
    good = encoded(integers(4095), "PNG")
    for damaged in (good[:60], good[:26] + b"\0" * 40):
        with pytest.raises(ValueError):
            in_8_bits(damaged, "auto")
    assert decoded(in_8_bits(good, "auto")).max() == 255


def test_nothing_but_not_a_number_is_black():
    values = (RAMP * 200).astype(np.float32)
    values[0] = np.nan
    assert decoded(in_8_bits(encoded(values, "TIFF"), "auto"))[0].max() == 0


def write(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


def means(source):
    """Mean gray of each image as a run decodes it."""
    source.open()
    views = [ViewGroup(1, [Resize([8, 8])])]
    loader = Loader(source, views, sampler=Sequential(len(source)), seed=0, batch_size=8)
    ((_, images),) = loader.decoded([(0, np.arange(len(source)))])
    return [round(float(image.float().mean())) for image in images]


def test_a_run_reads_them_by_the_range_of_its_source(tmp_path, caplog):
    folder = write(
        tmp_path / "a", low=encoded(integers(4095), "PNG"), plain=encoded(integers(255).astype(np.uint8), "PNG")
    )
    with caplog.at_level(logging.INFO, logger="sslrun"):
        assert means(ImageFolder(str(folder))) == [128, 128]
    (said,) = [line for line in caplog.messages if "8 bits" in line]
    assert "low.png: integers up to 65535" in said and said.endswith("range = 'auto'")
    assert means(ImageFolder(str(folder), range="full")) == [8, 128]
    assert means(ImageFolder(str(folder), range=[0, 8190])) == [64, 128]
    (tmp_path / "list.txt").write_text("low.png\n")
    assert means(ImageList(str(folder), str(tmp_path / "list.txt"), range=[0, 8190])) == [64]


@pytest.mark.parametrize("wrong", ["wide", [1], [2, 1], [0, 1, 2]])
def test_a_wrong_range_is_one_line(wrong):
    with pytest.raises(UsageError, match=r'range must be "auto", "full" or \[black, white\]'):
        ImageFolder("x", range=wrong)


def test_data_check_says_it_and_reads_them_as_a_run_does(capsys, tmp_path):
    good = encoded(integers(4095), "PNG")
    folder = write(tmp_path / "a", good=good, bad=good[:60])
    code, out, _ = call(capsys, "data", "check", folder)
    assert code == 1 and "1 unreadable" in out and "2 images, 1 good" in out, out
    assert "note: not all images have 8 bits (bad.png: integers up to 65535)" in out
