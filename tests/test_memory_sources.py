"""Decoded sources: CIFAR and STL in their published layouts, pickles that are never executed, no decoder."""

import io
import os
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sslrun.data import pipeline as pipeline_module
from sslrun.data.loader import Loader
from sslrun.data.order import Order, Sequential
from sslrun.data.sources import Source
from sslrun.data.sources.cifar import CIFAR10, CIFAR100
from sslrun.data.sources.cifar_pickle import read
from sslrun.data.sources.stl10 import STL10
from sslrun.data.sources.subset import Subset, split_holdout
from sslrun.data.transforms import CenterCrop, ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


CPU = torch.device("cpu")


def drawn(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """(N, H, W, 3) random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def planes(pixels: np.ndarray) -> np.ndarray:
    """(N, 3072): 1024 reds row by row, then greens, then blues."""
    return np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in pixels])


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes as Python 2 did in protocol 2: strings of bytes, numpy's functions under their old name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin-1") if isinstance(text, str) else text
        short = len(content) < 256
        self.write(
            (b"U" + struct.pack("B", len(content)) if short else b"T" + struct.pack("<i", len(content))) + content
        )
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}  # type: ignore[attr-defined]


def pickled(table: dict) -> bytes:
    file = io.BytesIO()
    Python2(file).dump(table)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar10(folder: Path, version: str, pixels: np.ndarray, labels: list[int]) -> None:
    """Five files of training images and one of two test images."""
    folder.mkdir(parents=True)
    parts = np.array_split(np.arange(len(pixels)), 5)
    files = {f"data_batch_{i + 1}": part for i, part in enumerate(parts)} | {"test_batch": np.arange(2)}
    for name, rows in files.items():
        own = planes(pixels[rows])
        if version == "binary":
            content = b"".join(bytes([labels[row]]) + image.tobytes() for row, image in zip(rows, own, strict=True))
            (folder / f"{name}.bin").write_bytes(content)
        else:
            table = {
                "batch_label": "training batch 1 of 5",
                "labels": [labels[row] for row in rows],
                "data": own,
                "filenames": [f"{row:05d}.png" for row in rows],
            }
            (folder / name).write_bytes(pickled(table))
    if version == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(pickled({"num_cases_per_batch": 10000, "label_names": NAMES}))


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("place", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, version, place):
    pixels, labels = drawn(13), [int(x) for x in np.random.default_rng(1).integers(0, 10, 13)]
    write_cifar10(tmp_path / "data" / place, version, pixels, labels)
    source = CIFAR10(str(tmp_path / "data"))
    source.open()
    assert np.array_equal(source.pixels, pixels) and source.pixels.flags.c_contiguous
    assert source.labels.tolist() == labels and source.labels.dtype == np.int64 and source.class_names == NAMES
    assert len(source) == 13 and source.sizes.tolist() == [[32, 32]] * 13
    assert os.path.basename(source.names[4]).startswith("data_batch_2") and source.names[4].endswith("#1")
    test = CIFAR10(str(tmp_path / "data"), split="test")
    test.open("data.holdout")
    assert np.array_equal(test.pixels, pixels[:2]) and test.labels.tolist() == labels[:2]


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar100_takes_the_fine_labels(tmp_path, version):
    pixels, fine, coarse = drawn(3), [99, 0, 42], [19, 1, 7]
    own = planes(pixels)
    if version == "binary":
        rows = zip(coarse, fine, own, strict=True)
        (tmp_path / "train.bin").write_bytes(b"".join(bytes([c, f]) + image.tobytes() for c, f, image in rows))
        (tmp_path / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    else:
        table = {"filenames": ["a.png", "b.png", "c.png"], "batch_label": "training batch 1 of 1"}
        table |= {"fine_labels": fine, "coarse_labels": coarse, "data": np.asfortranarray(own)}
        (tmp_path / "train").write_bytes(pickled(table))
        (tmp_path / "meta").write_bytes(
            pickled({"fine_label_names": ["apple", "aquarium_fish"], "coarse_label_names": []})
        )
    source = CIFAR100(str(tmp_path))
    source.open()
    assert np.array_equal(source.pixels, pixels) and source.labels.tolist() == fine
    assert source.class_names == ["apple", "aquarium_fish"]


def test_stl10(tmp_path):
    """STL stores channel after channel, each column by column, and labels from 1."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    sets = {part: drawn(count, 96, seed) for seed, (part, count) in enumerate([("train", 3), ("unlabeled", 1002)])}
    for part, pixels in sets.items():
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")
    first = np.fromfile(folder / "train_X.bin", dtype=np.uint8, count=97)
    assert first[1] == sets["train"][0, 1, 0, 0] and first[96] == sets["train"][0, 0, 1, 0]
    (folder / "train_y.bin").write_bytes(bytes([10, 1, 3]))
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    labeled = STL10(str(tmp_path), split="train")
    labeled.open()
    assert np.array_equal(labeled.pixels, sets["train"]) and labeled.labels.tolist() == [9, 0, 2]
    assert labeled.class_names == ["airplane", "bird"] and labeled.nominal_size == 5000
    both = STL10(str(tmp_path))
    both.open()
    assert np.array_equal(both.pixels, np.concatenate([sets["train"], sets["unlabeled"]])) and both.labels is None
    assert len(both) == 1005 and both.nominal_size == 105_000
    assert both.names[3].endswith("unlabeled_X.bin#0") and both.names[1004].endswith("unlabeled_X.bin#1001")


def test_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"has no data_batch_1.bin or data_batch_1: set data.source.data_prefix"):
        CIFAR10(str(tmp_path)).open()
    write_cifar10(tmp_path / "ten", "binary", drawn(5), [0] * 5)
    (tmp_path / "ten" / "data_batch_3.bin").write_bytes(b"x" * 3072)
    with pytest.raises(UsageError, match=r"data_batch_3.bin cannot be read: its length is not a multiple of 3073"):
        CIFAR10(str(tmp_path / "ten")).open()
    (tmp_path / "train").write_bytes(pickled({"data": planes(drawn(2)), "fine_labels": [1]}))
    with pytest.raises(UsageError, match="train cannot be read: it does not hold images of 3072 bytes"):
        CIFAR100(str(tmp_path)).open()
    (tmp_path / "train").write_bytes(pickled({"data": planes(drawn(2)), "labels": [1, 2]}))
    with pytest.raises(UsageError, match="train cannot be read: it has no 'fine_labels'"):
        CIFAR100(str(tmp_path)).open()
    (tmp_path / "train_X.bin").write_bytes(b"x" * 27_649)
    with pytest.raises(UsageError, match=r"train_X.bin cannot be read: its length is not a multiple of 27648"):
        STL10(str(tmp_path), "train").open()
    (tmp_path / "train_X.bin").write_bytes(b"x" * 27_648)
    (tmp_path / "train_y.bin").write_bytes(b"\1\2")
    with pytest.raises(UsageError, match="holds 1 images, but there are 2 labels"):
        STL10(str(tmp_path), "train").open()


class Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["value", "top", "label"])
def test_nothing_in_a_pickle_is_called(tmp_path, place):
    target = tmp_path / "made"
    harm = Harmful(str(target))
    table = {"value": {"data": harm}, "top": harm, "label": {"labels": [harm], "data": planes(drawn(1))}}[place]
    content = pickled(table)
    pickle.loads(content, encoding="latin1")
    assert target.exists(), "the file does no harm anyway"
    target.rmdir()
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(content)
    with pytest.raises(UsageError, match="data_batch_1 cannot be read"):
        CIFAR10(str(tmp_path)).open()
    assert not target.exists()


BROKEN = [
    b"",
    b"hello",
    b"\x80",
    b"\x80\x02.",
    b"\x80\x02}",
    b"\x80\x02]a.",
    b"\x80\x02h\x07.",
    b"K\x01.",
]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_pickles_are_value_errors(content):
    with pytest.raises(ValueError):
        read(content)


def test_arrays_of_anything_but_bytes_are_refused():
    assert read(pickled({"data": np.arange(3, dtype=np.uint8)}))["data"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="does not hold bytes"):
        read(pickled({"data": np.arange(3)}))


@pytest.fixture
def source(tmp_path):
    write_cifar10(tmp_path / "cifar", "binary", drawn(26), [i % 10 for i in range(26)])
    source = CIFAR10(str(tmp_path / "cifar"))
    source.open()
    return source


def batches(source, mode, steps=4, transforms=None):
    views = [ViewGroup(2, transforms or [RandomResizedCrop(16), ColorJitter(0.4, p=0.5), RandomHorizontalFlip()])]
    loader = Loader(source, views, sampler=Order(len(source), 0), seed=0, batch_size=8, augment=mode)
    return list(loader.run((step // 3, np.arange(8) + step % 3 * 8) for step in range(steps)))


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_pixels_arrive_as_they_are(source, mode):
    views = [ViewGroup(1, [CenterCrop(32)])]
    loader = Loader(source, views, sampler=Sequential(26), seed=0, batch_size=5, augment=mode)
    (batch,) = loader.run([(0, np.array([3, 25, 0, 7, 3]))])
    levels = batch.views[0].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(levels, source.pixels[[3, 25, 0, 7, 3]])
    assert batch.index.tolist() == [3, 25, 0, 7, 3] and batch.label.tolist() == [3, 5, 0, 7, 3]


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_a_subset_is_looked_up_in_its_source(source, mode):
    kept, held_out = split_holdout(source, 0.4)
    assert kept.is_decoded and not hasattr(kept, "pixels")
    for subset in (kept, Subset(held_out, np.arange(len(held_out))[::-1])):
        ids = np.array([4, 1, 6])
        views = [ViewGroup(1, [CenterCrop(32)])]
        (batch,) = Loader(subset, views, sampler=Sequential(len(subset)), seed=0, batch_size=3, augment=mode).run(
            [(0, ids)]
        )
        levels = batch.views[0].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(levels, subset.decoded(ids, CPU)) and batch.label.tolist() == subset.labels[ids].tolist()
    assert np.array_equal(kept.decoded(np.array([2]), CPU), source.pixels[kept.ids[[2]]])


def test_views_are_those_of_the_same_images_in_files(source, tmp_path):
    """Lossless files of the same pixels give the same views as decoded images."""
    from PIL import Image

    from sslrun.data.sources.image_folder import ImageFolder

    for i, pixels in enumerate(source.pixels):
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    files = ImageFolder(str(tmp_path))
    files.open()
    for mode in ("exact", "dali"):
        for one, other in zip(batches(source, mode), batches(files, mode), strict=True):
            assert torch.equal(one.views[0], other.views[0]) and torch.equal(one.index, other.index)
    assert not torch.equal(batches(source, "exact")[0].views[0], batches(source, "exact")[1].views[0])


def test_the_exact_mode_needs_no_graph(source, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a graph was built")

    monkeypatch.setattr(pipeline_module.Pipeline, "_build", refuse)
    assert len(batches(source, "exact")) == 4
    with pytest.raises(AssertionError, match="a graph was built"):
        batches(source, "dali")


class Unequal(Source, listed=False):
    """Decoded images of several sizes, as a list; only the required methods."""

    is_decoded = True

    def list_samples(self, key):
        self.images = [drawn(1, 20 + 3 * i, i)[0][:, : 30 - i].copy() for i in range(6)]
        return [f"drawn#{i}" for i in range(6)]

    def decoded(self, ids, device):
        return [self.images[i].copy() for i in ids]


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_decoded_images_may_differ_in_size(mode):
    source = Unequal()
    source.open()
    assert source.sizes.tolist() == [[20 + 3 * i, min(20 + 3 * i, 30 - i)] for i in range(6)]
    views = [ViewGroup(1, [CenterCrop(16)])]
    part = Subset(source, np.array([5, 0, 3]))
    (batch,) = Loader(part, views, sampler=Sequential(3), seed=0, batch_size=3, augment=mode).run([(0, np.arange(3))])
    levels = batch.views[0].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for image, id in zip(levels, (5, 0, 3), strict=True):
        height, width = source.sizes[id]
        top, left = round((height - 16) / 2), round((width - 16) / 2)
        assert np.array_equal(image, source.images[id][top : top + 16, left : left + 16])


class Lent(Unequal, listed=False):
    """The same images in memory that is not to be written to, or that runs backwards."""

    def decoded(self, ids, device):
        images = [self.images[i] if i % 2 else np.flip(np.flip(self.images[i], 1).copy(), 1) for i in ids]
        for image in images:
            image.flags.writeable = False
        return images


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_decoded_images_may_be_read_only(mode):
    given = []
    for source in (Unequal(), Lent()):
        source.open()
        loader = Loader(
            source, [ViewGroup(1, [CenterCrop(16)])], sampler=Sequential(6), seed=0, batch_size=6, augment=mode
        )
        (batch,) = loader.run([(0, np.arange(6))])
        ((_, originals),) = loader.decoded([(0, np.arange(6))])
        assert all(np.array_equal(one, other) for one, other in zip(originals, source.images, strict=True))
        given.append(batch.views[0])
    assert torch.equal(*given)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", pytest.param("dali", marks=pytest.mark.needs("nvidia.dali"))])
def test_on_a_gpu_pixels_of_a_source_that_knows_no_device_are_copied(mode):
    source, device = Unequal(), torch.device("cuda", 0)
    source.open()
    views = [ViewGroup(1, [CenterCrop(16)])]
    for part in (source, Subset(source, np.array([5, 0, 3]))):
        options = {"sampler": Sequential(len(part)), "seed": 0, "batch_size": 3, "augment": mode}
        (there,) = Loader(part, views, device=device, **options).run([(0, np.arange(3))])
        (here,) = Loader(part, views, device="cpu", **options).run([(0, np.arange(3))])
        assert torch.equal(there.views[0].cpu().float().mul(255).round(), here.views[0].mul(255).round())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", pytest.param("dali", marks=pytest.mark.needs("nvidia.dali"))])
def test_on_a_gpu_the_images_are_there(source, mode):
    device = torch.device("cuda", 0)
    ids = np.array([3, 25, 0, 7, 3])
    rows = source.decoded(ids, device)
    assert rows.device == device and np.array_equal(rows.cpu().numpy(), source.pixels[ids])
    pixels, sizes = source.pixels, source.sizes
    assert len(sizes) == len(pixels)
    source.pixels = None  # nothing is taken from the host any more
    views = [ViewGroup(2, [CenterCrop(32)])]
    loader = Loader(
        source, views, sampler=Sequential(len(pixels)), seed=0, batch_size=5, augment=mode, device=device, num_threads=1
    )
    for batch in loader.run([(0, ids), (0, ids[::-1])]):
        levels = batch.views[0].float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        wanted = pixels[batch.index.cpu().numpy()]
        assert np.array_equal(levels, np.concatenate([wanted, wanted])) and batch.views[0].device == device


def test_memory_stays_flat(source):
    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    batches(source, "exact", steps=20)
    before = peak_mib()
    views = [ViewGroup(2, [RandomResizedCrop(16)])]
    loader = Loader(source, views, sampler=Order(26, 0), seed=0, batch_size=26, augment="exact")
    for _ in loader.run((epoch, np.arange(26)) for epoch in range(400)):
        pass
    assert peak_mib() - before < 16  # 400 batches of views are 64 MB, of images 32 MB
