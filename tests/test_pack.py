"""`sslrun data pack`: from the shards a run computes what it computes from the files, before and after a kill."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_run
from documents import follow
from photographs import jpeg, photographs
from ranks import run_ranks
from shards import members, opened
from small_run import call, write_recipe
from sslrun.cli import main
from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.pack import Options, Packing
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.transforms import ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from test_memory_sources import write_cifar10

SIZE = ("--shard-size", "30k")  # 80 images of the fixture make some shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def packed(capsys, images, tmp_path) -> Path:
    code, out, err = call(capsys, "data", "pack", images, tmp_path / "packed", *SIZE)
    assert code == 0 and out == f"{tmp_path}/packed: 80 images\n", err
    return tmp_path / "packed"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shard-*"))}


def folder_of(images: Path) -> ImageFolder:
    source = ImageFolder(str(images))
    source.open()
    return source


def batches(source, rank: int, ranks: int, epoch: int) -> list[tuple[list[int], torch.Tensor, list[int]]]:
    """What a rank sees of an epoch of global batches of 16: ids, views and labels."""
    views = [ViewGroup(2, [RandomResizedCrop(24), ColorJitter(0.4, 0.4, 0.4, 0.1), RandomHorizontalFlip()])]
    loader = Loader(source, views, sampler=Order(len(source), 3), seed=3, batch_size=16 // ranks)
    cursor = [(epoch, np.arange(first, first + 16)[rank::ranks]) for first in range(0, 80, 16)]
    return [(batch.index.tolist(), batch.views[0], batch.label.tolist()) for batch in loader.run(cursor)]


@pytest.mark.parametrize(("ranks", "epoch"), [(1, 0), (2, 5)])
def test_batches_are_those_of_the_folder_bit_by_bit(packed, images, ranks, epoch):
    files, shards = folder_of(images), opened(packed)
    assert shards.class_names == files.class_names and shards.labels.tolist() == files.labels.tolist()
    assert (shards.sizes == files.sizes).all() and len(digests(packed)) > 3
    for rank in range(ranks):
        for ours, wanted in zip(batches(shards, rank, ranks, epoch), batches(files, rank, ranks, epoch), strict=True):
            assert ours[0] == wanted[0] and ours[2] == wanted[2] and torch.equal(ours[1], wanted[1])
    assert not torch.equal(batches(shards, 0, ranks, epoch + 1)[0][1], wanted[1]), "another epoch is other batches"


def from_shards(recipe: Path, packed: Path) -> None:
    table = f'{{ type = "WebDataset", shards = "{packed}" }}'
    text = recipe.read_text()
    start = text.index("source = ") + len("source = ")
    recipe.write_text(text[:start] + table + text[text.index("\n", start) :])


def train(recipe: Path, ranks: int, *options: str) -> None:
    words = [str(recipe), *options]
    codes = [main(words)] if ranks == 1 else run_ranks(main, ranks, words, timeout_s=900)
    assert codes == [0] * ranks


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_run_from_shards_goes_on_exactly_as_one_from_files(images, packed, tmp_path, ranks):
    for name in ("files", "shards"):
        (tmp_path / name).mkdir()
    files, shards = (write_recipe(tmp_path / name, images) for name in ("files", "shards"))
    from_shards(shards, packed)
    for recipe in (files, shards):
        train(recipe, ranks)
    straight, ours = tmp_path / "files/runs/small", tmp_path / "shards/runs/small"
    small_run.as_of(ours, 4, tmp_path / "resumed")
    train(shards, ranks, "--resume", "--work-dir", str(tmp_path / "resumed"))
    for run in (ours, tmp_path / "resumed/small"):
        assert small_run.timeless(small_run.metrics(run)) == small_run.timeless(small_run.metrics(straight))
        differing = small_run.differences(small_run.saved(straight, 12), small_run.saved(run, 12))
        assert [name for name in differing if "/" in name] == [], "no tensor differs in a bit"
    other = small_run.differences(small_run.saved(straight, 8), small_run.saved(straight, 12))
    assert any("/" in name for name in other)


def test_the_same_command_writes_the_same_bytes(capsys, images, packed, tmp_path):
    assert call(capsys, "data", "pack", images, tmp_path / "again", *SIZE, "--workers", "1")[0] == 0
    assert digests(packed) == digests(tmp_path / "again")
    before = digests(packed)
    code, _, err = call(capsys, "data", "pack", images, packed, *SIZE)
    assert code == 0 and "80 of 80 images are there" in err and digests(packed) == before
    other, (code, _, err) = tmp_path / "other", call(capsys, "data", "pack", images, packed, "--shard-size", "50k")
    assert code == 2 and "has shards of other images or options" in err
    assert call(capsys, "data", "pack", packed.parent / "other.toml", other)[0] == 2 and not other.exists()


def test_what_other_tools_read(packed):
    import tarfile

    with tarfile.open(packed / "shard-000000.tar") as archive:
        first, second = archive.getmembers()[:2]
        assert (first.name, second.name) == ("class_0/00.jpg", "class_0/00.cls")
        assert archive.extractfile(second).read() == b"0" and first.mtime == first.uid == 0
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["class_names"] == [f"class_{i}" for i in range(4)] and manifest["samples"] == 80
    assert sum(shard["samples"] for shard in manifest["shards"]) == 80 and opened(packed).remarks == []
    some = opened(packed / "shard-000000.tar")
    assert some.class_names == manifest["class_names"] and "shards of manifest.json are not read" in some.remarks[0]
    assert all((packed / shard["file"]).stat().st_size == shard["bytes"] <= 30_000 for shard in manifest["shards"])


def test_a_killed_packing_goes_on(capsys, images, packed, tmp_path):
    """Killed within the third shard: two are kept, and the rest is written."""
    out = tmp_path / "killed"
    code = (
        "import os, signal, sys; from sslrun.cli import main; from sslrun.data.pack import Packing\n"
        "read = Packing._read\n"
        "def dying(self, sample):\n"
        "    if len(self._counts) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(self, sample)\n"
        "Packing._read = dying\n"
        "main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "data", "pack", str(images), str(out), *SIZE]
    assert subprocess.run(words, env=small_run.environment(), check=False).returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert sorted(kept) == ["shard-000000.tar", "shard-000001.tar"] and not (out / "manifest.json").exists()
    recipe = write_recipe(tmp_path, images)
    from_shards(recipe, out)
    code, _, err = call(capsys, "data", "check", recipe)
    assert code == 2 and f"{out} is not complete: give the command `sslrun data pack` again" in err
    code, _, err = call(capsys, "data", "pack", images, out, "--shard-size", "40k")
    assert code == 2 and "was begun with other images or options" in err
    assert call(capsys, "data", "pack", images, out, *SIZE)[0] == 0
    assert digests(out) == digests(packed)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".tar") == ["manifest.json"]


def test_a_full_disk_is_one_line_and_the_command_goes_on(capsys, images, packed, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".tar.tmp"):
            calls.append(path)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = call(capsys, "data", "pack", images, out, *SIZE)
    error = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 1 and len(error) == 1 and "No space left on device: the same command goes on" in error[0]
    assert len(list(out.glob("*.tar"))) == 2 and not list(out.glob("*.tmp"))
    assert call(capsys, "data", "pack", images, out, *SIZE)[0] == 0 and digests(out) == digests(packed)


@pytest.mark.parametrize("change", ["image", "label", "cut"])
def test_what_is_not_what_was_packed_is_found_at_the_end(capsys, images, tmp_path, monkeypatch, change):
    out, verify = tmp_path / "out", Packing.verify

    def after_a_change(self: Packing, progress):
        path = self._path(1)
        content = path.read_bytes()
        if change == "image":
            path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
        elif change == "cut":
            path.write_bytes(content[:-20_000])
        else:
            self.source.labels = self.source.labels[::-1].copy()
        return verify(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "verify", after_a_change)
        code, _, err = call(capsys, "data", "pack", images, out, *SIZE)
    shard = "shard-000000.tar" if change == "label" else "shard-000001.tar"
    line = err.splitlines()[-1]
    what = "is damaged or cut short" if change == "cut" else "is not what was packed: "
    assert (
        code == 1
        and line.startswith(f"error: {out}/{shard} {what}")
        and "; remove it" in line.replace(": remove", "; remove")
    )
    (out / "shard-000001.tar").unlink()
    after = (out / "shard-000002.tar").stat().st_mtime_ns
    assert call(capsys, "data", "pack", images, out, *SIZE)[0] == 0
    assert (out / "shard-000002.tar").stat().st_mtime_ns == after, "it is not made again"
    assert opened(out).labels.tolist() == folder_of(images).labels.tolist()


def test_an_image_that_cannot_be_read_stops_the_packing(capsys, images, tmp_path):
    files = Path(shutil.copytree(images, tmp_path / "files"))
    (files / "class_1/03.jpg").unlink()
    (files / "class_1/03.jpg").symlink_to("nowhere.jpg")
    listed = tmp_path / "list.txt"
    listed.write_text("class_0/00.jpg 0\nclass_1/03.jpg 1\n")
    recipe = write_recipe(tmp_path, files)
    recipe.write_text(recipe.read_text().replace("ImageFolder", "ImageList"))
    code, _, err = call(capsys, "data", "pack", recipe, tmp_path / "out", "--set", f'data.source.ann_file="{listed}"')
    assert code == 1 and err.splitlines()[-1].startswith(f"error: {files}/class_1/03.jpg cannot be read: No such file")


def test_names_that_would_be_one_sample(tmp_path):
    """WebDataset takes a name up to its first dot: each image stays a sample of its own, in the same order."""
    content = jpeg(np.full((40, 40, 3), 90, dtype=np.uint8))
    names = ["a.b.jpg", "a.c.jpg", "a_b.jpg", "b.jpg", "b.png", "c", "d.img", ".e.jpg"]
    for name in names:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names) + "/dev/null\n../outside.jpg\n")
    (tmp_path / "outside.jpg").write_bytes(content)
    source = ImageList(str(tmp_path / "files"), str(tmp_path / "list.txt"))
    source.open()
    with Packing(source, tmp_path / "out", Options(10**6), 2) as packing:
        source.names.lengths[:] = -1
        with pytest.raises(Exception, match="/dev/null cannot be read"):
            packing.write(lambda _: None)
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names) + "../outside.jpg\n")
    source = ImageList(str(tmp_path / "files"), str(tmp_path / "list.txt"))
    source.open()
    with Packing(source, tmp_path / "two", Options(10**6), 2) as packing:
        packing.write(lambda _: None)
        packing.finish(packing.verify(lambda _: None))
    packed = opened(tmp_path / "two")
    assert [name.partition("#")[2] for name in members(packed)] == [
        *("a_b.jpg", "a_c.jpg", "a_b.jpg", "b.jpg", "b-4.png", "c.jpg", "d.jpg", "e.jpg", "outside.jpg"),
    ]
    assert packed.encoded(np.arange(9)) == [content] * 9


def test_larger_images_are_made_smaller(capsys, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    photograph = Image.fromarray(photographs()[0])
    photograph.save(files / "0_large.jpg", quality=95)
    photograph.convert("RGBA").save(files / "1_alpha.png")
    photograph.convert("L").save(files / "2_gray.jpg")
    photograph.resize((100, 60)).save(files / "3_small.png")
    Image.fromarray(np.full((300, 300), 1000, dtype=np.uint16)).save(files / "4_deep.png")
    (files / "5_damaged.jpg").write_bytes((files / "0_large.jpg").read_bytes()[:3000])
    words = ("data", "pack", files, tmp_path / "out", "--max-side", "200", "--quality", "80")
    code, out, err = call(capsys, *words)
    assert code == 0 and "6 images, 3 of them made smaller" in out, err
    source = opened(tmp_path / "out")
    names = [name.partition("#")[2] for name in source.names]
    assert names == ["0_large.jpg", "1_alpha.jpg", "2_gray.jpg", "3_small.png", "4_deep.png", "5_damaged.jpg"]
    assert source.sizes.max(axis=1).tolist()[:5] == [200, 200, 200, 100, 300]
    for i in (3, 4, 5):
        assert source.open_encoded(i).read() == (files / names[i]).read_bytes(), "as it is"
    small = Image.open(io.BytesIO(source.open_encoded(0).read())).convert("RGB")
    wanted = photograph.resize(small.size, Image.Resampling.LANCZOS)
    error = np.asarray(small, float) - np.asarray(wanted, float)
    assert np.abs(error).mean() < 6, "a JPEG's"
    assert Image.open(io.BytesIO(source.open_encoded(2).read())).mode == "L"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["quality"] == 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{images}", "{images}"], "is not empty, and no packing was begun in it"),
        (["/nowhere.toml", "{tmp}/o"], "/nowhere.toml"),
        (["{tmp}", "{tmp}/o"], "has no images"),
        (["{images}", "{tmp}/o", "--shard-size", "5"], "a size is a number with k, M or G"),
        (["{images}", "{tmp}/o", "--max-side", "3"], "from 16 to 65500"),
        (["{images}", "{tmp}/o", "--set", "a=1"], "is a folder"),
        (["{images}", "/proc/o"], "could not be written"),
    ],
)
def test_what_cannot_be_packed_is_one_line(capsys, images, tmp_path, words, message):
    given = [word.format(images=images, tmp=tmp_path) for word in words]
    try:
        code, _, err = call(capsys, "data", "pack", *given)
    except SystemExit as left:
        code, err = left.code, capsys.readouterr().err
    assert code in (1, 2) and message in err.splitlines()[-1]


def test_decoded_images_are_refused(capsys, tmp_path):
    recipe = write_recipe(tmp_path, tmp_path)
    write_cifar10(tmp_path / "cifar", "binary", np.zeros((10, 32, 32, 3), dtype=np.uint8), [0] * 10)
    text = recipe.read_text().replace("ImageFolder", "CIFAR10").replace(f'"{tmp_path}" }}', f'"{tmp_path}/cifar" }}')
    recipe.write_text(text)
    code, _, err = call(capsys, "data", "pack", recipe, tmp_path / "out")
    assert code == 2 and "keeps its images decoded" in err


def test_one_process_at_a_time(images, tmp_path):
    source = folder_of(images)
    first = Packing(source, tmp_path / "out", Options(30_000), 1)
    with first, pytest.raises(UsageError, match="another process packs"):
        Packing(source, tmp_path / "out", Options(30_000), 1)


def test_embed_reads_shards(capsys, trained, images, packed, tmp_path):
    recipe = write_recipe(tmp_path, images)
    assert call(capsys, "embed", trained, recipe, "-o", tmp_path / "files.npz")[0] == 0
    from_shards(recipe, packed)
    assert call(capsys, "embed", trained, recipe, "-o", tmp_path / "shards.npz")[0] == 0
    with np.load(tmp_path / "files.npz") as files, np.load(tmp_path / "shards.npz") as shards:
        assert np.array_equal(files["vectors"], shards["vectors"]) and len(files["vectors"]) == 80
        assert shards["paths"][3] == f"{packed}/shard-000000.tar#class_0/03.jpg"


@pytest.mark.nightly
def test_the_document_works_in_an_empty_folder(tmp_path):
    """docs/archives.md, followed by a user."""
    follow(small_run.ROOT / "docs" / "archives.md", tmp_path)
    assert "knn/top1_pct" in small_run.metrics(next((tmp_path / "work_dirs").iterdir()))[-1]
