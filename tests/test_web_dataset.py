"""Tar shards as a source: which samples they hold, and one line for what is wrong with them."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from photographs import jpeg
from shards import members, opened, write_tar
from small_run import call, write_recipe
from sslrun.data import outage
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.reading import read_all
from sslrun.data.sources import shard_index
from sslrun.data.sources.fraction import Fraction
from sslrun.data.sources.subset import split_holdout
from sslrun.data.sources.web_dataset import WebDataset
from sslrun.data.transforms import Resize
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.runtime import durable

PICTURES = [jpeg(np.full((8 + number, 12, 3), 20 * number, dtype=np.uint8)) for number in range(8)]
SHARDS = "data.source.shards"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards of four images each, with labels."""
    for number in range(2):
        some = {
            name: content
            for i in range(4 * number, 4 * number + 4)
            for name, content in {f"n{i}.jpg": PICTURES[i], f"n{i}.cls": b"%d\n" % (i % 3)}.items()
        }
        write_tar(tmp_path / f"shards/train-{number:03d}.tar", some)
    return tmp_path / "shards"


def test_a_dry_run_keeps_no_index(folder, tmp_path):
    source = Fraction(WebDataset(str(folder)), share=0.5)
    source.make_nothing()
    source.open()
    assert len(source) == 5 and not (tmp_path / "cache").exists()  # half of each class, rounded up
    assert len(opened(folder)) == 8 and list((tmp_path / "cache/shards").glob("*/offsets.npy"))  # the control


def test_samples_of_a_pattern_a_folder_and_a_file(folder):
    pattern = f"{folder}/train-{{000..001}}.tar"
    for source in (opened(folder), opened(pattern)):
        assert members(source) == [f"train-{i // 4:03d}.tar#n{i}.jpg" for i in range(8)]
        assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and source.class_names is None
        assert source.encoded(np.array([6, 1, 6])) == [PICTURES[6], PICTURES[1], PICTURES[6]]
        assert source.sizes.tolist() == [[8 + i, 12] for i in range(8)]
        assert source.open_encoded(5).read() == PICTURES[5]
    backward = opened(f"{folder}/train-00{{1,0}}.tar")
    assert members(backward)[0] == "train-001.tar#n4.jpg" and backward.encoded(np.array([0])) == [PICTURES[4]]
    assert len(opened(folder / "train-001.tar")) == 4
    assert opened(folder).identity() == opened(pattern).identity() != backward.identity()
    assert opened(folder).fingerprint(np.arange(3)) != backward.fingerprint(np.arange(3))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_in_every_format(tmp_path, form):
    long = "/".join(["a_long_folder"] * (7 if form == tarfile.USTAR_FORMAT else 30)) + "/a.jpg"
    names = ["../../etc/passwd.jpg", "/absolute/b.jpg", long, "ü/ß x\n.jpg", os.fsdecode(b"n/\xff.jpg")]
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in zip(names, PICTURES, strict=False):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = opened(path, label="none")
    assert [name.partition("#")[2] for name in source.names] == names
    assert source.encoded(np.arange(5)) == PICTURES[:5] and source.sizes[:, 0].tolist() == [8, 9, 10, 11, 12]


def test_nothing_is_opened_by_the_name_of_a_member(tmp_path, monkeypatch):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    path = write_tar(tmp_path / "a/b.tar", {"../secret.jpg": PICTURES[0], str(secret): PICTURES[1]})
    seen, open_ = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: seen.append(str(path)) or open_(path, *rest))
    source = opened(path)
    assert source.encoded(np.arange(2)) == PICTURES[:2] and source.sizes[:, 0].tolist() == [8, 9]
    assert {one for one in seen if "/cache/" not in one} == {str(path)}


@pytest.mark.parametrize(
    ("label", "labels", "names"),
    [
        ("auto", [10, 2, 10], None),
        ("cls", [10, 2, 10], None),
        ("json.id", [7, 3, 7], None),
        ("json.deep.name", [1, 0, 1], ["cat", "dog"]),
        ("txt", [0, 1, 0], ["a dog", "cat"]),
        ("folder", [1, 0, 1], ["b", "d/e"]),
        ("none", None, None),
    ],
)
def test_labels(tmp_path, label, labels, names):
    def sample(stem: str, cls: int, number: int, name: str, text: str) -> dict[str, bytes]:
        about = json.dumps({"id": number, "deep": {"name": name}}).encode()
        parts = {".jpg": PICTURES[0], ".cls": b"%d" % cls, ".json": about, ".txt": text.encode()}
        return {f"train/{stem}{suffix}": content for suffix, content in parts.items()}

    rows = [("d/e/1", 10, 7, "dog", "a dog"), ("b/2", 2, 3, "cat", "cat\n"), ("d/e/3", 10, 7, "dog", "a dog")]
    path = write_tar(tmp_path / "a.tar", {k: v for row in rows for k, v in sample(*row).items()})
    for _ in range(2):  # the second time from the cache
        source = opened(path, label=label)
        assert (None if source.labels is None else source.labels.tolist()) == labels
        assert source.class_names == names


def test_folders_are_classes_without_cls(tmp_path):
    names = ["./train/n01/a.jpg", "./train/n02/b.jpg"]
    source = opened(write_tar(tmp_path / "a.tar", dict(zip(names, PICTURES, strict=False))))
    assert source.class_names == ["n01", "n02"] and source.labels.tolist() == [0, 1]
    flat = opened(write_tar(tmp_path / "b.tar", {"train/a.jpg": PICTURES[0], "train/b.jpg": PICTURES[1]}))
    assert flat.labels is None and flat.class_names is None


def test_the_image_of_a_sample_is_chosen(tmp_path):
    some = {"a.txt": b"x", "a.left.JPG": PICTURES[0], "a.right.jpg": PICTURES[1], "b.json": b"{}"}
    path = write_tar(tmp_path / "a.tar", some)
    with pytest.raises(UsageError, match=r'are two images of one sample.*set data.source.image.*"left.jpg"'):
        opened(path)
    source = opened(path, image="png;right.jpg;left.jpg")
    assert members(source) == ["a.tar#a.right.jpg"] and source.encoded(np.array([0])) == [PICTURES[1]]
    assert source.remarks == ["1 samples without an image are passed over: 1 with .json"]


def damaged(content: bytes, how: str) -> bytes:
    second = 512 + (len(PICTURES[0]) + 511) // 512 * 512  # the header of the second member
    changed = bytearray(content)
    if how == "header":
        changed[second : second + 40] = bytes(range(40))
    elif how == "zeros":
        changed[second : second + 512] = bytes(512)
    return {
        "cut within an image": content[: second - 100],
        "cut within a header": content[: second + 100],
        "cut between members": content[:second],
        "joined": content + content,
        "gzip": b"\x1f\x8b\x08" + content,
        "zstd": b"\x28\xb5\x2f\xfd" + content,
        "empty": b"",
        "text": b"<html>" * 200,
    }.get(how, bytes(changed))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut within an image", "is damaged or cut short"),
        ("cut within a header", "is damaged or cut short"),
        ("cut between members", "has no end mark"),
        ("header", "is no header of a member"),
        ("zeros", "has more after its end mark"),
        ("joined", "has more after its end mark"),
        ("gzip", "is compressed (gzip), so its images cannot be read one by one: unpack it (gunzip)"),
        ("zstd", "is compressed (zstd)"),
        ("empty", "is damaged or cut short"),
        ("text", "is damaged or cut short"),
    ],
)
def test_a_damaged_shard_is_one_line(tmp_path, how, message):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": PICTURES[i] for i in range(3)})
    assert len(opened(path)) == 3
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(UsageError) as error:
        opened(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shards", "options", "message"),
    [
        ("none.tar", {}, f"none.tar does not exist.*set {SHARDS} to"),
        ("shards/train-{000..007}.tar", {}, r"train-002.tar does not exist.*\(8 shards are named\)"),
        (".", {}, f"has no .tar files.*set {SHARDS} to"),
        ("shards", {"image": "png"}, "have no image .png, only 8 .cls, .jpg: set data.source.shards or .image"),
        ("shards", {"label": "json.label"}, "no sample has a label .json.label: set data.source.label"),
        ("shards", {"label": "folder"}, "no folders that tell classes: set data.source.label"),
        (
            "s3://bucket/{00..10}.tar",
            {},
            r"s3://bucket/\{00..10\}.tar: images are read .* from disks alone: copy the files",
        ),
        ("https://host/a.tar", {}, "https://host/a.tar: .*copy the files to a disk"),
        ("pipe:aws s3 cp s3://a/b.tar -", {}, "pipe:aws s3 cp .*copy the files to a disk"),
        ("shards", {"num_samples": 9}, "has 8 samples, and data.source.num_samples is 9"),
        ("shards", {"label": "json"}, 'expected "json.KEY"'),
        ("{0..99999999}.tar", {}, "names more than 1,000,000 shards"),
    ],
)
def test_what_is_wrong_is_one_line(folder, monkeypatch, shards, options, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UsageError, match=message) as error:
        opened(shards, **options)
    assert "\n" not in str(error.value)


def test_some_samples_without_a_label_are_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": PICTURES[0], "a.cls": b"3", "b.jpg": PICTURES[1]})
    with pytest.raises(UsageError, match=r'1 of 2 samples have no label .cls, such as b.jpg: set .*"none"'):
        opened(path)
    assert opened(path, label="none").labels is None


def test_a_dry_run_needs_no_shards(capsys, tmp_path):
    recipe = write_recipe(tmp_path, tmp_path)
    table = '{ _delete_ = true, type = "WebDataset", shards = "%s", num_samples = 100 }'
    for shards, expected in (("/nowhere/{00..99}.tar", 0), ("s3://bucket/{00..99}.tar", 2)):
        code, out, err = call(capsys, recipe, "--dry-run", "--set", f"data.source={table % shards}")
        assert code == expected and ("80 (as published" in out) == (code == 0), err
    assert "copy the files to a disk" in err and len([line for line in err.splitlines() if "error" in line]) == 1


def test_the_index_is_kept_until_a_shard_changes(folder, monkeypatch):
    assert isinstance(opened(folder)._index.offsets, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "list_shard", lambda *_: pytest.fail("listed again"))
        source = opened(folder)
        assert members(source)[5] == "train-001.tar#n5.jpg" and source.labels.tolist()[:3] == [0, 1, 2]
        for array in (source._index.offsets, source._index.names, source.labels):
            assert isinstance(array, np.memmap), "the ranks of a machine share the memory"
    write_tar(folder / "train-001.tar", {"x.jpg": PICTURES[7], "x.cls": b"9"})
    source = opened(folder)
    assert members(source)[4:] == ["train-001.tar#x.jpg"] and source.labels.tolist() == [0, 1, 2, 0, 9]
    next((folder.parent / "cache/shards").glob("*/offsets.npy")).write_bytes(b"damaged")
    assert len(opened(folder)) == 5


def test_a_shard_that_changes_during_a_run_is_no_outage(folder):
    source = opened(folder)
    assert source.encoded(np.array([0])) == [PICTURES[0]]
    with open(folder / "train-000.tar", "r+b") as file:
        file.truncate(600)
    write_tar(folder / "train-001.tar", {"x.jpg": PICTURES[7]})
    reads = read_all(source, np.array([3, 4]))
    assert reads == [outage.Unreadable("the shard has changed since it was listed")] * 2
    (folder / "train-001.tar").unlink()
    assert read_all(source, np.array([4])) == [outage.Unreadable("no such file or directory")]


def test_a_storage_error_is_waited_for_and_the_shard_opened_again(folder, monkeypatch):
    monkeypatch.setattr(durable, "FIRST_PAUSE_S", 0.01)
    source, fails, pread, opens, open_ = opened(folder), [errno.EIO, errno.ESTALE], os.pread, [], os.open
    _ = source.sizes

    def failing(*args):
        if fails:
            raise OSError(fails.pop(), "storage")
        return pread(*args)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(os, "open", lambda path, *rest: opens.append(str(path)) or open_(path, *rest))
    bad = BadSamples()
    loader = Loader(source, [ViewGroup(1, [Resize([8, 8])])], sampler=Sequential(8), seed=0, batch_size=8, bad=bad)
    (batch,) = loader.run([(0, np.arange(8))])
    assert batch.index.tolist() == list(range(8)) and not bad.found and not bad.absent and not fails
    assert str(folder / "train-000.tar") in opens, "a stale handle is not used again"


def test_many_shards_are_read_with_few_open_files(tmp_path, monkeypatch):
    for number in range(20):
        write_tar(tmp_path / f"s/{number:02d}.tar", {"a.jpg": PICTURES[number % 8]})
    source = opened(tmp_path / "s")
    source._files._most = 3
    assert source.encoded(np.arange(20)) == [PICTURES[number % 8] for number in range(20)]
    assert len(source._files._open) == 3
    held = [os.path.realpath(f"/proc/self/fd/{link}") for link in os.listdir("/proc/self/fd")]
    assert len([path for path in held if path.startswith(str(tmp_path / "s"))]) == 3


def test_parts_of_the_samples(folder, tmp_path):
    source = opened(folder)
    train, held_out = split_holdout(source, 0.25)
    assert sorted([*train.ids, *held_out.ids]) == list(range(8))
    assert (
        train.encoded(np.array([0])) == source.encoded(train.ids[:1]) and train.labels[0] == source.labels[train.ids[0]]
    )
    (tmp_path / "few.txt").write_text("n6.jpg\nn2.jpg\n")
    few = Fraction(source, names=str(tmp_path / "few.txt"))
    few.open()
    assert few.ids.tolist() == [2, 6] and few.names[1] == f"{folder}/train-001.tar#n6.jpg"


def test_data_check_names_the_member(capsys, folder):
    path = folder / "train-001.tar"
    content = path.read_bytes()
    place = content.index(PICTURES[5])
    path.write_bytes(content[: place + 2] + bytes(len(PICTURES[5]) - 2) + content[place + len(PICTURES[5]) :])
    recipe = write_recipe(folder.parent, folder)
    table = f'{{ _delete_ = true, type = "WebDataset", shards = "{folder}" }}'
    words = ("data", "check", recipe, "--set", f"data.source={table}", "--json", "--workers", "1", "--min-side", "4")
    code, out, err = call(capsys, *words)
    (entry,) = json.loads(out)["sources"]
    assert code == 1 and [one["path"] for one in entry["unreadable"]] == [f"{path}#n5.jpg"] and entry["good"] == 7, err


def test_16_bit_images_are_read_as_from_files(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9), 1000, dtype=np.uint16)).save(buffer, "PNG")
    source = opened(write_tar(tmp_path / "a.tar", {"a.png": buffer.getvalue()}))
    assert source.encoded(np.array([0]))[0].startswith(b"P6")
    assert source.open_encoded(0).read() == buffer.getvalue()
