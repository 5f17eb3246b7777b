"""Bad images are named, counted and replaced, always by the same substitutes; readable formats are read correctly."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from sslrun.data.bad_samples import BadSamples
from sslrun.data.decoding import Trial
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import RandomResizedCrop, Resize
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed

NUM_IMAGES = 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


def smooth(random, height, width, channels=3):
    coarse = random.integers(0, 256, (4, 5, channels), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    random = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        smooth(random, 30 + i % 5, 40).save(root / f"{i:02d}.jpg", quality=90)
    return root


def opened(folder):
    source = ImageFolder(str(folder))
    source.open()
    return source


def loader_of(source, bad, **options):
    options = {"sampler": Sequential(len(source)), "seed": 3, "batch_size": 8} | options
    return Loader(source, [ViewGroup(2, [RandomResizedCrop(12)])], bad=bad, **options)


def epoch(batch_size=8, start=0):
    return [(0, np.arange(i, i + batch_size)) for i in range(start, NUM_IMAGES, batch_size)]


def rows(batches):
    """(sample, pixels) at each position."""
    delivered = []
    for batch in batches:
        pairs = batch.views[0].reshape(2, len(batch.index), -1).transpose(0, 1)
        delivered += [(int(sample), pair.numpy().tobytes()) for sample, pair in zip(batch.index, pairs, strict=True)]
    return delivered


def damage(folder):
    """Damage five files in five ways; sample -> a part of the expected reason."""
    whole = (folder / "03.jpg").read_bytes()
    (folder / "03.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    (folder / "04.jpg").write_bytes(b"")
    (folder / "17.jpg").write_text("this is not an image")
    whole = (folder / "25.jpg").read_bytes()
    (folder / "25.jpg").write_bytes(whole[:40])
    whole = (folder / "39.jpg").read_bytes()
    (folder / "39.jpg").write_bytes(whole[:-20])
    return {3: "cut short or damaged", 4: "empty", 17: "header", 25: "header", 39: "cut short or damaged"}


@pytest.mark.parametrize("augment", ["exact", "dali"])
def test_unreadable_images_are_replaced_and_named_once(folder, augment, caplog):
    healthy = rows(loader_of(opened(folder), BadSamples(), augment=augment).run(epoch()))
    reasons = damage(folder)
    bad = BadSamples(max_bad_pct=20)
    with caplog.at_level(logging.WARNING, logger="sslrun"):
        delivered = rows(loader_of(opened(folder), bad, augment=augment).run(epoch() + epoch()))
    assert bad.found.keys() == reasons.keys() and len(bad) == 5
    for sample, reason in reasons.items():
        assert reason in bad.found[sample] and f"{sample:02d}.jpg" in bad.found[sample]
        assert sum(f"{sample:02d}.jpg" in record.getMessage() for record in caplog.records) == 1
    assert delivered[:NUM_IMAGES] == delivered[NUM_IMAGES:]
    for position, (sample, pixels) in enumerate(delivered[:NUM_IMAGES]):
        assert sample not in reasons
        if position not in reasons:
            assert (sample, pixels) == healthy[position]


def test_substitutes_do_not_depend_on_what_was_known(folder):
    damage(folder)
    source = opened(folder)
    bad = BadSamples(max_bad_pct=20)
    expected = rows(loader_of(source, bad).run(epoch()))
    assert rows(loader_of(source, BadSamples(20), batch_size=20, num_threads=2).run(epoch(20))) == expected
    assert rows(loader_of(source, BadSamples(20)).run(epoch(8, start=16))) == expected[16:]
    remembered = BadSamples(20)
    remembered.load_state_dict(bad.state_dict())
    assert rows(loader_of(source, remembered).run(epoch())) == expected
    assert remembered.state_dict() == bad.state_dict()
    other_seed = rows(loader_of(source, BadSamples(20), seed=4).run(epoch()))
    replaced = [position for position in range(NUM_IMAGES) if expected[position][0] != position]
    assert replaced == [3, 4, 17, 25, 39]
    assert [other_seed[p][0] for p in replaced] != [expected[p][0] for p in replaced]


def test_substitutes_of_substitutes():
    positions = np.arange(500)
    ids = positions % 10
    few, many = BadSamples(100), BadSamples(100)
    few.load_state_dict({"3": "three"})
    many.load_state_dict({"3": "three", "5": "five", "6": "six"})
    first = few.replace(ids, 0, 0, positions, 10)
    second = many.replace(ids, 0, 0, positions, 10)
    assert not np.isin(first, [3]).any() and not np.isin(second, [3, 5, 6]).any()
    again = np.isin(first, [5, 6]) | (ids != first)
    assert np.array_equal(first[~again], second[~again])
    kept = (ids == 3) & ~np.isin(first, [5, 6])
    assert kept.sum() > 20 and np.array_equal(first[kept], second[kept])
    assert len(set(first[ids == 3].tolist())) == 9  # any of the others may stand in


@pytest.mark.parametrize("augment", ["exact", "dali"])
@pytest.mark.parametrize("change", ["removed", "emptied", "replaced by another size"])
def test_a_file_that_changes_under_the_run(folder, change, augment):
    source = opened(folder)
    assert source.sizes.min() > 0
    victim = folder / "21.jpg"

    def cursor():
        for n, item in enumerate(epoch()):
            if n == 1:
                if change == "removed":
                    victim.unlink()
                elif change == "emptied":
                    victim.write_bytes(b"")
                else:
                    Image.new("RGB", (9, 7)).save(victim)
            yield item

    bad = BadSamples(max_bad_pct=10)
    delivered = rows(loader_of(source, bad, augment=augment).run(cursor()))
    assert list(bad.found) == [21] and len(delivered) == NUM_IMAGES
    assert [sample for position, (sample, _) in enumerate(delivered) if position != 21] == [*range(21), *range(22, 40)]
    message = {"removed": "no such file", "emptied": "empty", "replaced by another size": "7x9, was 31x40"}
    assert message[change] in bad.found[21]


def test_too_many_end_the_run_after_the_good_batches(folder):
    for i in range(20, 26):
        (folder / f"{i}.jpg").write_text("no image")
    stream = loader_of(opened(folder), BadSamples(max_bad_pct=10)).run(epoch())
    assert next(stream).index.tolist() == list(range(8))
    next(stream)
    with pytest.raises(RunFailed, match=r"5 of 40 images cannot be decoded.*max_bad_pct = 10; the last one: .*24\.jpg"):
        next(stream)


@pytest.mark.parametrize(
    ("max_bad_pct", "num_samples", "allowed"), [(1.0, 500, 5), (1.0, 1_281_167, 12_811), (1.0, 20, 1), (0.0, 500, 0)]
)
def test_the_limit_is_a_share_of_the_source(max_bad_pct, num_samples, allowed):
    bad = BadSamples(max_bad_pct)
    bad.load_state_dict({str(i): "known" for i in range(allowed)})
    bad.add(0, "path", "known already", num_samples) if allowed else None
    with pytest.raises(RunFailed):
        bad.add(allowed, "path", "reason", num_samples)


def test_no_good_image_is_left(folder):
    for path in folder.iterdir():
        path.write_text("no image")
    with pytest.raises(RunFailed, match="no substitute"):
        next(loader_of(opened(folder), BadSamples(max_bad_pct=100)).run(epoch()))


def write_formats(root):
    random = np.random.default_rng(1)
    rgb, gray = smooth(random, 20, 30), smooth(random, 20, 30, 1)
    kinds = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "gray.jpg": gray,
        "gray.png": gray,
        "palette.png": rgb.quantize(16),
        "bilevel.png": gray.convert("1"),
        "alpha.png": Image.merge("RGBA", (*rgb.split(), gray)),
        "gray_alpha.png": Image.merge("LA", (gray, gray)),
        "lossy.webp": rgb,
        "plain.bmp": rgb,
        "plain.tiff": rgb,
    }
    for name, image in kinds.items():
        image.save(root / name)
    rgb.save(root / "progressive.jpg", progressive=True)
    rgb.save(root / "lossless.webp", lossless=True)
    rgb.save(root / "turned.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    rgb.save(root / "png_in_disguise.jpg", format="PNG")
    deep = (random.integers(0, 65536, (20, 30)) // 256 * 256).astype(np.uint16)
    Image.fromarray(deep).save(root / "sixteen_bit.png")
    return deep


def test_formats_are_read_as_pil_reads_them(tmp_path):
    root = tmp_path / "kinds"
    root.mkdir()
    deep = write_formats(root)
    source, bad = opened(root), BadSamples(max_bad_pct=0)
    assert (source.sizes == [20, 30]).all()
    whole = [ViewGroup(1, [Resize([20, 30])])]
    loader = Loader(source, whole, sampler=Sequential(len(source)), seed=0, batch_size=4, bad=bad)
    batches = loader.run([(0, np.arange(i, min(i + 4, len(source)))) for i in range(0, len(source), 4)])
    images = [image for batch in batches for image in batch.views[0].permute(0, 2, 3, 1).numpy()]
    assert len(images) == len(source) == 15
    for path, image in zip(source.names, images, strict=True):
        levels = np.rint(image * 255)
        if os.path.basename(path) == "sixteen_bit.png":  # PIL clips at 255; scaling is what an image of 16 bits means
            assert np.abs(levels - deep[..., None] / 257).max() <= 1
        else:
            assert np.array_equal(levels, np.asarray(Image.open(path).convert("RGB"))), path


def test_a_failure_that_no_image_explains_ends_the_run(folder, monkeypatch):
    damage(folder)
    monkeypatch.setattr(Trial, "trouble", lambda self, encoded, size: None)
    with pytest.raises(RunFailed, match="decode one by one"):
        list(loader_of(opened(folder), BadSamples()).run([(0, np.arange(8)), (0, np.arange(32, 40))]))
