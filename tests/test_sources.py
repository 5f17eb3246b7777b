"""Sources: samples, their order, labels and sizes, and the messages if there are none."""

import io
import logging
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sslrun.data import index as index_module
from sslrun.data.index import read_sizes
from sslrun.data.reading import read_all
from sslrun.data.sources import Source
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.sources.imagenet import ImageNet
from sslrun.data.sources.imagenet100 import ImageNet100
from sslrun.data.sources.paths import Paths
from sslrun.data.sources.places205 import Places205
from sslrun.data.sources.subset import Subset, split_holdout
from sslrun.errors import UsageError
from sslrun.randomness import HOLDOUT_VIEW, uniforms


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")  # not among the images
    monkeypatch.setenv("SSLRUN_CACHE", str(folder))
    return folder


def image(path, height=8, width=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8)).save(path)
    return path


def test_class_folders(tmp_path):
    for name in ["b/2.jpg", "b/10.JPEG", "a/x.png", "c/deep/er/y.webp", ".hidden/z.jpg", "b/.z.jpg"]:
        image(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    source = ImageFolder(str(tmp_path))
    source.open()
    assert [os.path.relpath(p, tmp_path) for p in source.names] == [
        "a/x.png",
        "b/10.JPEG",
        "b/2.jpg",
        "c/deep/er/y.webp",
    ]
    assert source.class_names == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 1, 1, 2] and source.labels.dtype == np.int64


def test_flat_folder_has_no_labels(tmp_path):
    for name in ["2.jpg", "1.jpg", "more/0.jpg"]:
        image(tmp_path / name)
    source = ImageFolder(str(tmp_path))
    source.open()
    assert [os.path.relpath(p, tmp_path) for p in source.names] == ["1.jpg", "2.jpg", "more/0.jpg"]
    assert source.labels is None and source.class_names is None


def test_links_are_followed_and_loops_end(tmp_path):
    image(tmp_path / "real" / "one.jpg")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "link.jpg").symlink_to(tmp_path / "real" / "one.jpg")
    (root / "b").symlink_to(tmp_path / "real")
    (root / "b" / "loop").symlink_to(root / "b")
    source = ImageFolder(str(root))
    source.open()
    assert [os.path.relpath(p, root) for p in source.names] == ["a/link.jpg", "b/one.jpg"]


def test_relative_folder_survives_a_change_of_directory(tmp_path, monkeypatch):
    image(tmp_path / "images" / "one.jpg")
    monkeypatch.chdir(tmp_path)
    source = ImageFolder("images")
    source.open()
    monkeypatch.chdir("/")
    assert os.path.exists(source.names[0])


def test_constructors_open_no_file():
    ImageFolder("/nowhere"), ImageList("/nowhere", "/nowhere.txt")
    assert ImageNet("/nowhere").nominal_size == 1281167


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("make", [ImageFolder, ImageNet, lambda prefix: ImageList(prefix, "list.txt")])
def test_missing_folder(make, tmp_path):
    with pytest.raises(UsageError) as error:
        make(str(tmp_path / "gone")).open()
    assert "does not exist" in one_line(error) and "data.source.data_prefix" in one_line(error)


@pytest.mark.parametrize("make", [ImageFolder, ImageNet])
def test_empty_folder(make, tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(UsageError) as error:
        make(str(tmp_path)).open("data.holdout")
    assert "has no images" in one_line(error) and "data.holdout.data_prefix" in one_line(error)


def test_a_file_is_not_a_folder(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        ImageFolder(str(image(tmp_path / "a.jpg"))).open()


def test_lists(tmp_path):
    ann_file = tmp_path / "list.txt"
    ann_file.write_text("b/1.jpg 3\n\na/with space.jpg 0\r\n/absolute/2.jpg 12\n")
    source = ImageList(str(tmp_path), str(ann_file))
    source.open()
    assert list(source.names) == [f"{tmp_path}/b/1.jpg", f"{tmp_path}/a/with space.jpg", "/absolute/2.jpg"]
    assert source.labels.tolist() == [3, 0, 12]
    ann_file.write_text("b/1.jpg\na/with space.jpg\n", encoding="utf-8-sig")
    source = ImageList(str(tmp_path), str(ann_file))
    source.open()
    assert source.labels is None and list(source.names) == [f"{tmp_path}/b/1.jpg", f"{tmp_path}/a/with space.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1\nb.jpg\n", "1 of 2 lines have no label"),
        ("a.jpg 0\nb.jpg 99999999999999999999\n", "the label 99999999999999999999 is too large"),
        ("", "lists no images"),
        (None, "No such"),
    ],
)
def test_wrong_lists_are_one_line(text, message, tmp_path):
    ann_file = tmp_path / "list.txt"
    if text is not None:
        ann_file.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        ImageList(str(tmp_path), str(ann_file)).open()
    one_line(error)


def test_imagenet_from_folders_and_from_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ["n02/b.JPEG", "n01/a.JPEG"]:
        image(tmp_path / "train" / name)
    folders = ImageNet("train", "data/imagenet/meta/train.txt")
    folders.open()
    assert list(folders.remarks) == ["there is no data/imagenet/meta/train.txt: the classes are the folders"]
    with pytest.raises(UsageError, match=r"lits.txt: No such file.*set data.source.ann_file"):
        ImageNet("train", "lits.txt").open()
    (tmp_path / "train.txt").write_text("n01/a.JPEG 0\nn02/b.JPEG 1\n")
    listed = ImageNet(str(tmp_path / "train"), str(tmp_path / "train.txt"))
    listed.open()
    assert list(folders.names) == list(listed.names)
    assert folders.labels.tolist() == listed.labels.tolist() == [0, 1]
    assert folders.class_names == ["n01", "n02"]


def test_paths_are_compact_and_keep_odd_names():
    names = [f"n{i % 1000:08d}/image_{i}.JPEG" for i in range(10_000)] + [os.fsdecode(b"\xff\xfe.jpg"), "ü/ß.jpg"]
    paths = Paths("/root", iter(names))
    assert (
        len(paths) == 10_002
        and paths[-2] == "/root/" + os.fsdecode(b"\xff\xfe.jpg")
        and paths[10_001] == "/root/ü/ß.jpg"
    )
    assert paths[3:5] == ["/root/n00000003/image_3.JPEG", "/root/n00000004/image_4.JPEG"]
    assert paths.blob.nbytes + paths.ends.nbytes < 40 * len(paths)
    with pytest.raises(IndexError):
        paths[10_002]


def test_sizes(tmp_path):
    good = image(tmp_path / "0.jpg", 20, 30)
    image(tmp_path / "1.png", 7, 5)
    (tmp_path / "2.jpg").write_bytes(good.read_bytes()[:-2])
    (tmp_path / "3.jpg").write_bytes(good.read_bytes() + b"trailer")
    (tmp_path / "4.jpg").write_text("not an image")
    (tmp_path / "5.jpg").write_bytes(b"")
    turned = Image.new("RGB", (40, 10))
    turned.save(tmp_path / "6.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    source = ImageFolder(str(tmp_path))
    source.open()
    assert source.sizes.tolist() == [[20, 30], [7, 5], [20, 30], [20, 30], [0, 0], [0, 0], [10, 40]]
    assert source.sizes.dtype == np.int32


def sizes_of(paths):
    """Sizes of some files, as a new run reads them."""
    source = ImageFolder("unused")
    source.names = Paths("", paths)
    return read_sizes(source)


def test_index_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    paths = [str(image(tmp_path / f"{i}.jpg", 10 + i, 20)) for i in range(3)]
    first = sizes_of(paths)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "size_of", lambda *_: pytest.fail("read again"))
        assert np.array_equal(sizes_of(paths), first)
    image(tmp_path / "1.jpg", 50, 60)
    assert sizes_of(paths).tolist() == [[10, 20], [50, 60], [12, 20]]
    assert sizes_of(paths[::-1]).tolist() == [[12, 20], [50, 60], [10, 20]]


class Encoded(Source, listed=False):
    """Encoded images that are not in files of their own; only the required methods."""

    def __init__(self, contents):
        self.contents = contents

    def list_samples(self, key):
        return [f"memory#{i}" for i in range(len(self.contents))]

    def encoded(self, ids):
        return [self.contents[i] for i in ids]


def png(height, width):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_a_source_may_have_an_argument_called_names():
    class Named(Encoded, listed=False):
        def __init__(self, names):
            self.names = names
            super().__init__([png(3, 4)] * 2)

    source = Named("names.txt")
    source.open()
    assert source.names == ["memory#0", "memory#1"]


def test_a_source_without_a_fingerprint_is_not_cached(cache):
    source = Encoded([png(3, 4), b"no image", np.frombuffer(png(5, 6), dtype=np.uint8)])
    source.open()
    assert source.sizes.tolist() == [[3, 4], [0, 0], [5, 6]]
    assert not any(cache.iterdir())
    subset = Subset(source, np.array([2]))
    assert subset.sizes.tolist() == [[5, 6]] and subset.open_encoded(0).read() == png(5, 6)
    assert subset.files_root is None and subset.names[0] == "memory#2"


def test_read_errors_belong_to_their_sample(tmp_path):
    image(tmp_path / "0.png")
    (tmp_path / "1.png").mkdir()
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "4.png").write_bytes(b"")
    source = ImageFolder("unused")
    source.names = Paths(str(tmp_path), [*(f"{i}.png" for i in range(5)), "nu\0ll.png"])
    first, *rest = read_all(source, np.arange(6))
    assert first.tobytes() == (tmp_path / "0.png").read_bytes()
    reasons = ["a folder, not a file", "not a file", "no such file or directory", "the file is empty"]
    assert [read.reason for read in rest] == [*reasons, "embedded null byte"]
    assert source.sizes.tolist() == [[8, 12]] + [[0, 0]] * 5, "and the index waits for no pipe"


def test_broken_or_unwritable_cache_is_no_error(tmp_path, cache, monkeypatch, caplog):
    paths = [str(image(tmp_path / "0.jpg", 10, 20))]
    sizes_of(paths)
    (cached,) = (cache / "index").iterdir()
    cached.write_bytes(cached.read_bytes()[:40])
    assert sizes_of(paths).tolist() == [[10, 20]]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, logger="sslrun"):
        assert sizes_of(paths).tolist() == [[10, 20]]
    assert "not kept" in caplog.text


def test_holdout_is_disjoint_and_lasting(tmp_path):
    for i in range(50):
        image(tmp_path / "ab"[i % 2] / f"{i:02d}.jpg", 10 + i, 10)
    source = ImageFolder(str(tmp_path))
    source.open()
    train, held_out = split_holdout(source, 0.2)
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted([*train.names, *held_out.names]) == list(source.names)
    assert held_out.names[:] == [source.names[i] for i in held_out.ids]
    assert np.array_equal(held_out.labels, source.labels[held_out.ids]) and held_out.class_names == ["a", "b"]
    assert np.array_equal(held_out.sizes, source.sizes[held_out.ids])
    assert np.array_equal(split_holdout(source, 0.2)[1].ids, held_out.ids)
    assert set(split_holdout(source, 0.1)[1].ids) < set(held_out.ids)
    assert [len(s) for s in split_holdout(Subset(source, np.arange(3)), 0.01)] == [2, 1]
    for fraction in (0.0, 1.0, 20):
        with pytest.raises(UsageError, match="holdout"):
            split_holdout(source, fraction)


@pytest.mark.parametrize(("count", "fraction"), [(7, 0.01), (1000, 0.01), (1000, 0.3), (1001, 0.99), (2, 0.5)])
def test_the_samples_with_the_smallest_hashes_are_held_out(count, fraction):
    source = Encoded([b""] * count)
    source.open()
    hashes = uniforms(0, 0, np.arange(count), HOLDOUT_VIEW, 2)
    ranked = sorted(range(count), key=lambda i: (*hashes[i], i))[: max(1, round(fraction * count))]
    train, held_out = split_holdout(source, fraction)
    assert held_out.ids.tolist() == sorted(ranked)
    assert train.ids.tolist() == sorted({*range(count)} - {*ranked}) and len(train) == count - len(ranked)
    assert train.identity() == Subset(source, train.ids).identity() != held_out.identity()


def test_a_split_of_many_samples_takes_little_memory():
    count = 400_000
    source = Encoded([])
    source.names, source._is_open = range(count), True  # names that take no memory
    source.labels, source._sizes = np.arange(count) % 1000, np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    split_holdout(source, 0.01)  # with what numpy keeps
    tracemalloc.start()
    try:
        train, held_out = split_holdout(source, 0.01)
        ids = np.arange(0, len(train), 1000)
        assert train.labels_of(ids).tolist() == (train.ids[ids] % 1000).tolist()
        assert train.sizes_of(ids)[:, 0].tolist() == (2 * train.ids[ids]).tolist()
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < count / 2, "a copy of the ids would take 8 bytes for each sample"
    assert np.array_equal(train.labels, source.labels[train.ids]) and len(held_out.labels) == 4000


def test_a_size_that_is_entered_late_belongs_to_the_source(tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"")
    source = ImageFolder(str(tmp_path))
    source.open()
    subset = Subset(source, np.array([3, 2]))
    assert subset.sizes.tolist() == [[8, 12], [0, 0]] and subset.has_size(0) and not subset.has_size(1)
    assert subset.set_size(1, (30, 40))
    assert subset.sizes.tolist() == [[8, 12], [30, 40]] and source.sizes[2].tolist() == [30, 40]


def opened(source):
    source.open()
    return source


def labels_by_path(source, root):
    labels = [None] * len(source) if source.labels is None else source.labels.tolist()
    return {os.path.relpath(path, root): label for path, label in zip(source.names, labels, strict=True)}


LINES = ["b/1.jpg 3", "a/with space.jpg 0", "ü.jpg 12"]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES).encode("utf-8-sig"),
        "\r\n".join(LINES).encode("utf-16"),
        b"\xfe\xff" + "\r\n".join(LINES).encode("utf-16-be"),
        "\r".join(LINES).encode(),
        " \t\n".join(LINES).encode() + b"\n\t \n",
        "\n".join(line.replace(" ", "\t") for line in LINES).encode().replace(b"with\t", b"with "),
        "\n".join("   ".join(line.rsplit(" ", 1)) for line in LINES).encode(),
    ],
    ids=["utf-8 with a mark", "PowerShell", "big endian", "old Mac", "blanks at the end", "tabs", "three blanks"],
)
def test_lists_of_editors_and_tools(content, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    listed = opened(ImageList(str(tmp_path), str(tmp_path / "list.txt")))
    assert labels_by_path(listed, tmp_path) == {"b/1.jpg": 3, "a/with space.jpg": 0, "ü.jpg": 12}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.jpg 1\n".encode("utf-16-le"), "no text file, or UTF-16 without a byte-order mark"),
        ("a.jpg 1\n".encode("utf-16")[:-1], "not the text that its byte-order mark says"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "no text file"),
        (b"a.jpg " + b"9" * 5000, "is too large"),
        (b"a.jpg 9223372036854775808", "is too large"),
    ],
)
def test_what_is_no_list_is_one_line(content, message, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        opened(ImageList(str(tmp_path), str(tmp_path / "list.txt")))
    assert "list.txt" in one_line(error) and len(one_line(error)) < 300


def test_kinds_of_jpegs_are_read_and_others_are_counted(tmp_path, caplog):
    for name in ["a/1.jpg", "a/2.png", "b/3.jpg"]:
        image(tmp_path / name)
    for old, new in {"a/1.jpg": "a/1.jfif", "b/3.jpg": "b/3.JPE"}.items():
        (tmp_path / old).rename(tmp_path / new)
    for name in ["a/x.gif", "a/y.GIF", "b/z.heic", "b/download", "README.md", "a/notes.txt", ".DS_Store"]:
        (tmp_path / name).write_text("")
    with caplog.at_level(logging.INFO, logger="sslrun"):
        source = opened(ImageFolder(str(tmp_path)))
    assert labels_by_path(source, tmp_path) == {"a/1.jfif": 0, "a/2.png": 0, "b/3.JPE": 1}
    expected = "files of kinds that are not read are passed over: 2 .gif, 1 .heic, 1 without a suffix"
    assert list(source.remarks) == [expected] and caplog.messages == [f"{source!r}: {expected}"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.avif").write_text("")
    with pytest.raises(UsageError, match=r"has no images \(.jpg, .jpeg, ...\), only 1 .avif: set data.source"):
        opened(ImageFolder(str(tmp_path / "only")))


def test_images_beside_class_folders_are_named(tmp_path):
    for name in ["a/1.jpg", "b/2.jpg", "stray.jpg", "too.jpg"]:
        image(tmp_path / name)
    source = opened(ImageFolder(str(tmp_path)))
    assert source.labels is None and len(source) == 4
    assert list(source.remarks) == ["2 folders are no classes because of images beside them: stray.jpg and 1 more"]


@pytest.mark.parametrize("kind", [ImageFolder, ImageNet, Places205])
def test_a_linked_folder_is_listed_once_and_where_it_is(kind, tmp_path):
    """Links up, to a sibling, to a class under another name, out of the root, around it, and into a hidden store."""
    root = tmp_path / "data" / "root"
    for name in ["a/1.jpg", "b/2.jpg", "b/deep/3.jpg", ".store/4.jpg"]:
        image(root / name)
    image(tmp_path / "elsewhere" / "5.jpg")
    image(tmp_path / "data" / "other" / "6.jpg")
    for link, target in {
        "a/up": root,
        "a/sibling": root / "b",
        "a0": root / "b" / "deep",
        "c": root / ".store",
        "d": tmp_path / "elsewhere",
        "e": tmp_path / "elsewhere",
        "f": tmp_path / "data",
    }.items():
        (root / link).symlink_to(target)
    source = opened(kind(str(root)))
    classes = {path: source.class_names[label] for path, label in labels_by_path(source, root).items()}
    leaf = {"b/deep/3.jpg": "b/deep", "f/other/6.jpg": "f/other"} if kind is Places205 else {}
    assert classes == {
        "a/1.jpg": "a", "b/2.jpg": "b", "b/deep/3.jpg": "b", "c/4.jpg": "c", "d/5.jpg": "d", "f/other/6.jpg": "f",
    } | leaf  # fmt: skip
    (remark,) = source.remarks
    assert remark.startswith("5 linked folders are listed elsewhere, and not again: a/sibling, a/up, a0, ...")


def test_a_link_to_a_class_that_is_not_chosen_is_followed(tmp_path):
    image(tmp_path / "n01" / "1.jpg")
    (tmp_path / "n02").symlink_to(tmp_path / "n01")
    (tmp_path / "classes.txt").write_text("n02\n", encoding="utf-16")
    source = opened(ImageNet100(str(tmp_path), str(tmp_path / "classes.txt")))
    assert labels_by_path(source, tmp_path) == {"n02/1.jpg": 0}


def test_identity_is_that_of_the_images_wherever_they_lie(tmp_path):
    for name in ["a/1.png", "b/2.png"]:
        image(tmp_path / "one" / name)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "a" / "1.png", (0, 0))

    def identity():
        return opened(ImageFolder(str(tmp_path / "two"))).identity()

    source = opened(ImageFolder(str(tmp_path / "one")))
    first = identity()
    assert source.identity() == first
    parts = [Subset(source, np.array(ids)).identity() for ids in ([0, 1], [1, 0], [1])]
    assert len({first, *parts}) == 4
    (tmp_path / "two" / "a" / "1.png").rename(tmp_path / "two" / "a" / "3.png")
    assert identity() != first
    (tmp_path / "two" / "a" / "3.png").rename(tmp_path / "two" / "a" / "1.png")
    assert identity() == first
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)).save(tmp_path / "two/b/2.png")
    assert identity() != first
    encoded = [opened(Encoded([png(*size)])).identity() for size in ((3, 4), (3, 4), (3, 5))]
    assert encoded[0] == encoded[1] != encoded[2]
