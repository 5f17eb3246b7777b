"""`sslrun embed`: vectors in a stated order with their paths; the same bytes on any ranks and after an interruption."""

import errno
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
import sslrun
from ranks import run_ranks
from small_run import call
from sslrun.cli import main
from sslrun.embedding import outputs
from sslrun.embedding.embed import Settings, _identity
from sslrun.embedding.encoder import Encoder
from sslrun.embedding.images import images_of
from sslrun.embedding.pieces import Pieces, cut
from sslrun.errors import UsageError
from sslrun.saved import open_saved

BATCH = ("--batch-size", "16")


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> str:
    """80 images in class folders, one that is broken, and one beside the folders."""
    copy = shutil.copytree(images, tmp_path / "pictures")
    shutil.copy(copy / "class_0" / "03.jpg", copy / "zebra.jpg")
    (copy / "class_1" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return str(copy)


def embedded(path: Path) -> tuple[np.ndarray, list[str]]:
    return np.load(path), path.with_suffix(".paths.txt").read_text().splitlines()


def test_rows_are_the_vectors_of_the_sorted_paths(capsys, trained, folder, tmp_path):
    code, out, err = call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npy")
    assert (code, out) == (0, f"{tmp_path}/a.npy\n"), err
    vectors, paths = embedded(tmp_path / "a.npy")
    assert (
        paths == sorted(str(path) for path in Path(folder).rglob("*.jpg"))
        and len(paths) == 82
        and paths[-1].endswith("zebra.jpg")
    )
    assert vectors.dtype == np.float32
    encoder = Encoder(open_saved(trained), torch.device("cpu"))
    for path, vector in zip(paths, vectors, strict=True):
        if path.endswith("broken.jpg"):
            assert np.isnan(vector).all()
        else:
            with torch.no_grad():
                alone = encoder.module(encoder.transform(path)[None])[0]
            assert np.abs(alone.numpy() - vector).max() < 1e-5 * np.abs(vector).max()
    assert "1 of 82 images could not be decoded, their rows are NaN: " in err and "broken.jpg" in err
    assert not (tmp_path / "a.npy.part").exists()


def test_npz_holds_the_same(capsys, trained, folder, tmp_path):
    assert call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npy")[0] == 0
    assert call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npz", "--l2")[0] == 0
    vectors, paths = embedded(tmp_path / "a.npy")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["paths"].tolist() == paths
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.allclose(arrays["vectors"], unit, atol=1e-6, equal_nan=True)
        assert np.array_equal(outputs.read(tmp_path / "a.npz"), arrays["vectors"], equal_nan=True)


@pytest.mark.needs("pyarrow")
def test_parquet_holds_the_same(tmp_path):
    import pyarrow.parquet

    rows = [np.arange(6, dtype=np.float32).reshape(2, 3), np.full((1, 3), np.nan, dtype=np.float32)]
    outputs.check(tmp_path / "a.parquet", force=False)
    outputs.write(tmp_path / "a.parquet", rows, (3, 3), ["a", "b/ü", os.fsdecode(b"\xff.jpg")])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table["path"].to_pylist() == ["a", "b/ü", r"\udcff.jpg"]
    assert np.array_equal(np.stack(table["vector"].to_numpy()), np.concatenate(rows), equal_nan=True)
    assert np.array_equal(outputs.read(tmp_path / "a.parquet"), np.concatenate(rows), equal_nan=True)


def test_a_missing_pyarrow_is_one_line_before_any_work(capsys, trained, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = call(capsys, "embed", trained, folder, "-o", tmp_path / "a.parquet")
    assert code == 2 and err.startswith("error: .parquet needs pyarrow (pip install 'sslrun[parquet]')")
    assert len(err.splitlines()) == 1


def test_two_ranks_write_the_same_bytes(capsys, trained, folder, tmp_path):
    assert call(capsys, "embed", trained, folder, "-o", tmp_path / "one.npy", *BATCH)[0] == 0
    words = ["embed", str(trained), folder, "-o", str(tmp_path / "two.npy"), *BATCH]
    assert run_ranks(main, 2, words) == [0, 0]
    for name in ("{}.npy", "{}.paths.txt"):
        assert (tmp_path / name.format("one")).read_bytes() == (tmp_path / name.format("two")).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_embedding_goes_on(capsys, trained, folder, tmp_path, monkeypatch, number, code):
    words = ("embed", trained, folder, *BATCH, "-o")
    assert call(capsys, *words, tmp_path / "straight.npy")[0] == 0
    made, write = [], Pieces.write

    def and_then_a_signal(pieces: Pieces, piece: int, rows: np.ndarray) -> None:
        write(pieces, piece, rows)
        made.append(piece)
        if len(made) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(Pieces, "write", and_then_a_signal)
    before = signal.getsignal(number)
    stopped, _, err = call(capsys, *words, tmp_path / "a.npy")
    assert stopped == code and "the same command goes on" in err and made == [0, 1]
    assert signal.getsignal(number) == before and not (tmp_path / "a.npy").exists()
    stopped, _, err = call(capsys, *words, tmp_path / "a.npy")
    assert stopped == 0 and made == [0, 1, 2, 3, 4, 5] and "33 % of the images are embedded already" in err
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "straight.npy").read_bytes()


@pytest.mark.nightly
def test_a_killed_embedding_goes_on(trained, folder, tmp_path):
    words = [sys.executable, str(small_run.ROOT / "bin/sslrun"), "embed", str(trained), folder, "--batch-size", "1"]
    process = small_run.start([*words, "-o", str(tmp_path / "a.npy")])
    small_run.wait_until(lambda: len(list(tmp_path.glob("a.npy.part/*.npy"))) > 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run([*words, "-o", str(tmp_path / "a.npy")], env=small_run.environment(), capture_output=True)
    assert done.returncode == 0 and b"embedded already" in done.stderr
    straight = subprocess.run([*words, "-o", str(tmp_path / "b.npy")], env=small_run.environment())
    assert straight.returncode == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_pieces_of_other_settings_are_not_taken(capsys, trained, folder, tmp_path):
    assert call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npy", *BATCH)[0] == 0
    vectors, _ = embedded(tmp_path / "a.npy")
    pieces = Pieces(tmp_path / "a.npy", 6)
    assert pieces.open("of another embedding") == [0, 1, 2, 3, 4, 5]
    pieces.write(0, np.zeros((16, vectors.shape[1]), dtype=np.float32))
    pieces.close()
    code, _, err = call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npy", *BATCH, "--force")
    assert code == 0 and "is of other weights, images or settings: starting over" in err
    assert np.array_equal(embedded(tmp_path / "a.npy")[0], vectors, equal_nan=True)


def test_whatever_changes_vectors_changes_the_identity(trained, folder):
    saved, images = open_saved(trained), images_of(folder, open_saved(trained))
    base = _identity(saved, images, Settings())
    assert _identity(open_saved(trained), images_of(folder, saved), Settings()) == base
    others = [Settings(l2=True), Settings(batch_size=64)]
    found = [_identity(saved, images, settings) for settings in others]
    found.append(_identity(open_saved(trained / "checkpoints/step_00000004"), images, Settings()))
    sized = open_saved(trained, overrides=["eval.transforms=[{type='CenterCrop', size=24}]"])
    found.append(_identity(sized, images, Settings()))
    found.append(_identity(saved, images_of(images.paths[:-1], saved), Settings()))
    os.utime(images.paths[0], (1, 1))
    found.append(_identity(saved, images_of(folder, saved), Settings()))
    assert len({base, *found}) == 7


def test_two_processes_do_not_write_one_file(tmp_path):
    code = "import sys; from pathlib import Path; from sslrun.embedding.pieces import Pieces\n"
    code += "Pieces(Path(sys.argv[1]), 1).open('x'); print('held', flush=True); sys.stdin.read()"
    holder = small_run.python(code, tmp_path / "a.npy", stdin=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"a\.npy\.part is in use by process {holder.pid}"):
        Pieces(tmp_path / "a.npy", 1).open("x")
    holder.communicate()
    assert Pieces(tmp_path / "a.npy", 1).open("x") == [0]


def test_a_file_is_replaced_only_by_force(capsys, trained, folder, tmp_path):
    (tmp_path / "a.npy").write_text("mine")
    code, _, err = call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npy")
    assert (code, err) == (2, f"error: {tmp_path}/a.npy exists; --force replaces it\n")
    assert (tmp_path / "a.npy").read_text() == "mine"
    assert call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npy", "--force")[0] == 0
    assert len(embedded(tmp_path / "a.npy")[0]) == 82


def test_a_full_disk_is_one_line(capsys, trained, folder, tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs, "arriving", full)
    code, _, err = call(capsys, "embed", trained, folder, "-o", tmp_path / "a.npz")
    assert (
        code == 1 and err.splitlines()[-1] == f"error: {tmp_path}/a.npz could not be written: No space left on device"
    )
    assert "Traceback" not in err


def test_a_recipe_gives_the_images_of_its_source(capsys, trained, tmp_path):
    assert call(capsys, "embed", trained, trained / "config.toml", "-o", tmp_path / "a.npz")[0] == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["paths"]) == 80  # with the held-out ones
        assert arrays["paths"][0].endswith("class_0/00.jpg") and not np.isnan(arrays["vectors"]).any()


def test_images_are_read_as_those_of_the_run(trained, folder):
    saved = open_saved(trained, overrides=["data.source.range=[0, 1023]"])
    assert images_of(folder, saved).source.range == (0, 1023)


def test_images_without_any_vector_end_it(capsys, trained, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    code, _, err = call(capsys, "embed", trained, tmp_path, "-o", tmp_path / "a.npy")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: none of the 1 images can be decoded; the last one: ")


@pytest.mark.parametrize(
    ("subject", "words", "message"),
    [
        ("nowhere", ["-o", "a.npy"], "nowhere does not exist"),
        (".", ["-o", "a.npy"], "has no images"),
        ("mocov2.txt", ["-o", "a.npy"], "is neither a folder of images nor a recipe"),
        (".", ["-o", "a.txt"], "must end with .npy, .npz, .parquet"),
        (".", ["-o", "no/a.npy"], "there is no folder no"),
        (".", ["-o", "a.npy", "--batch-size", "0"], "the batch size must be at least 1, not 0"),
        (".", ["-o", "a.npy", "--set", "eval.kk=1"], "unknown key of EvalConfig"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(capsys, trained, tmp_path, monkeypatch, subject, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mocov2.txt").write_text("")
    code, _, err = call(capsys, "embed", trained, subject, *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["mocov2.txt"]


def test_names_with_line_breaks_stay_on_their_line(capsys, trained, tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "a\nb.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "c d.png")
    assert call(capsys, "embed", trained, tmp_path, "-o", tmp_path / "a.npy")[0] == 0
    assert embedded(tmp_path / "a.npy")[1] == [f"{tmp_path}/a\\nb.png", f"{tmp_path}/c d.png"]


def test_pieces_depend_on_images_and_batch_alone():
    for num_images, batch_size, pieces in ((5, 2, 3), (100_000, 128, 261), (1_281_167, 128, 626)):
        cuts = cut(num_images, batch_size)
        assert len(cuts) == pieces
        assert np.array_equal(np.concatenate([ids for piece in cuts for ids in piece]), np.arange(num_images))


def embedded_in_memory(run: Path, folder: str) -> np.ndarray:
    return sslrun.load(run).embed(folder, batch_size=16)


def test_all_ranks_get_all_rows_in_memory(trained, folder):
    alone = embedded_in_memory(trained, folder)
    for found in run_ranks(embedded_in_memory, 2, trained, folder):
        assert np.array_equal(found, alone, equal_nan=True)
