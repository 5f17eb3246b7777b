"""`sslrun data check`: a run takes what it calls good and replaces what it calls unreadable; no image stops it."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import small_run
from sslrun.cli import main
from sslrun.data import check as check_module
from sslrun.data import decoding
from sslrun.data.bad_samples import BadSamples
from sslrun.data.check import Survey, Verdict
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.outage import Unreadable
from sslrun.data.reading import read_all
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.transforms import Resize
from sslrun.data.views import ViewGroup
from test_bad_samples import smooth, write_formats
from test_memory_sources import drawn, write_cifar10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


def check(capsys, *words: object) -> tuple[int, list[dict], str]:
    """(exit code, the entries of the sources in --json, stderr)."""
    capsys.readouterr()
    code = main(["data", "check", *map(str, words), "--json", "--workers", "1"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out)["sources"] if captured.out else [], captured.err


def names(entry: dict, kind: str) -> dict[str, str]:
    return {os.path.basename(one["path"]): one["reason"] for one in entry[kind]}


def write_unreadable(root: Path) -> dict[str, str]:
    """Write unreadable files; file name -> a part of the expected reason."""
    generator = np.random.default_rng(2)
    smooth(generator, 60, 70).save(root / "whole.jpg", quality=95)
    whole = (root / "whole.jpg").read_bytes()
    contents = {
        "half.jpg": (whole[: len(whole) // 2], "cut short or damaged"),
        "two_bytes_less.jpg": (whole[:-2], "cut short or damaged"),
        "head_only.jpg": (whole[:40], "header is broken"),
        "empty.jpg": (b"", "the file is empty"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "not an image"),
    }
    for name, (content, _) in contents.items():
        (root / name).write_bytes(content)
    frames = [smooth(generator, 40, 40) for _ in range(2)]
    frames[0].save(root / "gif_in_disguise.png", "GIF", save_all=True, append_images=frames[1:])
    smooth(generator, 40, 40).save(root / "avif_in_disguise.jpg", "AVIF")
    smooth(generator, 40, 40).save(root / "whole.png")
    whole = (root / "whole.png").read_bytes()
    (root / "half.png").write_bytes(whole[: len(whole) // 2])
    other = "of a kind that is not supported"
    reason_parts = {name: reason for name, (_, reason) in contents.items()}
    return reason_parts | {
        "gif_in_disguise.png": other,
        "avif_in_disguise.jpg": other,
        "half.png": "cut short or damaged",
    }


@pytest.mark.parametrize("small", [check_module._SMALL, 0])
def test_what_is_good_is_what_a_run_takes(capsys, tmp_path, monkeypatch, small):
    """Also of images that are read again, as they are too large to be kept."""
    monkeypatch.setattr(check_module, "_SMALL", small)
    root = tmp_path / "images"
    root.mkdir()
    write_formats(root)
    frames = [smooth(np.random.default_rng(7), 20, 30), smooth(np.random.default_rng(8), 20, 30)]
    frames[0].save(root / "moving.webp", save_all=True, append_images=frames[1:])
    frames[1].save(root / "moving.png", save_all=True, append_images=frames[:1])
    reason_parts = write_unreadable(root)
    good = tmp_path / "good.txt"
    code, (entry,), err = check(capsys, root, "--min-side", 20, "-o", good)
    assert code == 1 and entry["images"] == 15 + 2 + 2 + len(reason_parts) and "data_prefix" in err
    reasons = names(entry, "unreadable")
    assert reasons.keys() == reason_parts.keys()
    assert all(reason_parts[name] in reason for name, reason in reasons.items()), reasons
    assert not entry["tiny"] and not entry["huge"] and not entry["damaged"]

    source, bad = ImageFolder(str(root)), BadSamples(max_bad_pct=100)
    source.open()
    run_over(source, bad)
    assert {os.path.basename(source.names[i]) for i in bad.found} == reason_parts.keys()
    listed, strict = ImageList(str(root), str(good)), BadSamples(max_bad_pct=0)
    listed.open()
    assert len(listed) == entry["good"] == entry["images"] - len(reason_parts) - len(entry["duplicates"])
    run_over(listed, strict)
    assert not strict.found


def run_over(source, bad: BadSamples) -> None:
    """Read an epoch as a run does."""
    loader = Loader(
        source, [ViewGroup(1, [Resize([8, 8])])], sampler=Sequential(len(source)), seed=0, batch_size=8, bad=bad
    )
    for _ in loader.run([(0, np.arange(i, min(i + 8, len(source)))) for i in range(0, len(source), 8)]):
        pass


def test_a_good_folder_has_no_findings(capsys, images):
    code, (entry,), err = check(capsys, images)
    assert code == 0 and entry["good"] == entry["images"] == 80 and "80 images in" in err
    assert entry["sizes"]["width"] == {"min": 40, "p5": 40, "median": 40, "p95": 40, "max": 40}
    assert entry["sizes"]["shorter side"]["median"] == 36


def test_the_list_is_read_back_with_labels_and_odd_names(capsys, tmp_path):
    root = tmp_path / "set of images"
    odd = [
        "a b/with space.jpg",
        "a b/7 8.jpg",
        " lead/ing.jpg",
        "caf\u00e9/\udce9\udcff.jpg",
        "a b/line\nbreak.jpg",
        "z/\u2028.jpg",
    ]
    generator = np.random.default_rng(0)
    for name in odd:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        smooth(generator, 40, 50).save(path)
    good = tmp_path / "good list.txt"
    code, (entry,), err = check(capsys, root, "-o", good)
    assert code == 0 and entry["good"] == len(odd)
    assert "1 good images are not in" in err and "line\\nbreak.jpg" in err and f"{len(odd) - 1} images" in err
    folder, listed = ImageFolder(str(root)), ImageList(str(root), str(good))
    folder.open(), listed.open()
    expected = {path: int(label) for path, label in zip(folder.names, folder.labels, strict=True) if "\n" not in path}
    assert dict(zip(listed.names, listed.labels.tolist(), strict=True)) == expected
    assert [os.path.exists(path) for path in listed.names] == [True] * (len(odd) - 1)

    smooth(generator, 40, 50).save(root / "in front.jpg")  # now it is a flat set without labels
    code, (entry,), err = check(capsys, root, "-o", good, "--force")
    listed = ImageList(str(root), str(good))
    listed.open()
    assert code == 0 and listed.labels is None and len(listed) == len(odd)
    assert set(listed.names) == {*expected, str(root / "in front.jpg")}


def write_lists(root: Path, **lists: list[str]) -> dict[str, str]:
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return {name: f'{{ type = "ImageList", data_prefix = "{root}", ann_file = "{root}/{name}.txt" }}' for name in lists}


@pytest.mark.parametrize("small", [check_module._SMALL, 0])
def test_copies_in_a_source_and_between_those_for_training_and_for_measuring(capsys, tmp_path, monkeypatch, small):
    monkeypatch.setattr(check_module, "_SMALL", small)
    generator = np.random.default_rng(0)
    for name in "abcdef":
        smooth(generator, 40, 50).save(tmp_path / f"{name}.png")
    for original, copy in (("a", "a2"), ("a", "a3"), ("b", "b2"), ("d", "d2"), ("e", "e2")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{original}.png").read_bytes())
    tables = write_lists(
        tmp_path,
        train=["a.png 0", "b.png 1", "c.png 1", "a2.png 0", "b2.png 2", "a3.png 0", "d.png 0", "d.png 0"],
        held_out=["d2.png 0", "e.png 0"],
        test=["e2.png 0", "f.png 0"],
    )
    recipe = small_run.write_recipe(tmp_path, tmp_path)
    sets = [f"data.source={tables['train']}", f"data.holdout={tables['held_out']}"]
    sets += [f"eval.train={tables['train']}", f"eval.test={tables['test']}"]
    options = [word for text in sets for word in ("--set", text)]
    # The small recipe's source is a table that has to go first.
    text = recipe.read_text().replace(
        f'source = {{ type = "ImageFolder", data_prefix = "{tmp_path}" }}\nholdout = 0.2\n', ""
    )
    recipe.write_text(text)
    good = tmp_path / "good.txt"
    code, (train, held_out, test), _ = check(capsys, recipe, *options, "-o", good)
    assert code == 1
    assert [entry["keys"] for entry in (train, held_out, test)] == [
        ["data.source", "eval.train"],
        ["data.holdout"],
        ["eval.test"],
    ]
    here = f"{tmp_path}/"
    assert train["duplicates"] == [
        [f"{here}{n}.png" for n in ("a", "a2", "a3")],
        [f"{here}{n}.png" for n in ("b", "b2")],
    ]
    assert train["shared"] == [{"path": f"{here}d.png", "with": ["data.holdout"], "original": f"{here}d2.png"}] * 2
    assert held_out["good"] == test["good"] == 2, "the same image in two sets to measure on is none's fault"
    assert good.read_text() == "a.png 0\nb.png 1\nc.png 1\n"
    capsys.readouterr()
    assert main(["data", "check", str(recipe), *options]) == 1
    text = capsys.readouterr().out
    assert f"{here}b.png = {here}b2.png with labels 1, 2\n" in text and "2 are also in data.holdout\n" in text
    assert f"{here}a.png = {here}a2.png = {here}a3.png\n" in text and "3 duplicates, copies of 2 others\n" in text


def png_header(height: int, width: int) -> bytes:
    """The start of a PNG whose header has this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def test_sizes_have_limits_and_huge_images_are_not_decoded(capsys, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    generator = np.random.default_rng(0)
    for name, size in {"narrow": (31, 400), "edge": (32, 40), "large": (200, 300)}.items():
        smooth(generator, *size).save(root / f"{name}.png")
    (root / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (root / "long.png").write_bytes(png_header(30, 5_000_000))
    code, (entry,), _ = check(capsys, root)
    assert code == 1 and names(entry, "tiny") == {"narrow.png": "31x400"} and entry["good"] == 2
    assert names(entry, "huge") == {"bomb.png": "more than 178,956,970 pixels", "long.png": "30x5000000"}
    code, (entry,), _ = check(capsys, root, "--min-side", 33, "--max-pixels", "5e4")
    assert names(entry, "tiny") == {"narrow.png": "31x400", "edge.png": "32x40"}
    assert names(entry, "huge").keys() == {"bomb.png", "long.png", "large.png"} and entry["good"] == 0


def test_a_jpeg_that_decodes_with_damage(capsys, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(5):
        smooth(generator, 120, 160).save(root / f"{i}.jpg", quality=95)
    content = bytearray((root / "2.jpg").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = bytes(300)
    (root / "2.jpg").write_bytes(content)
    content = (root / "3.jpg").read_bytes()
    (root / "3.jpg").write_bytes(content[:-2] + bytes(20) + content[-2:])  # between the pixels and the end: harmless
    (root / "4.jpg").write_bytes((root / "4.jpg").read_bytes() + b"something else")
    smooth(generator, 40, 40).convert("CMYK").save(root / "cmyk.tiff")  # one decoder complains, another takes it
    code, (entry,), _ = check(capsys, root)
    assert code == 1 and names(entry, "damaged").keys() == {"2.jpg"} and entry["good"] == 5
    assert "data" in names(entry, "damaged")["2.jpg"]


def test_paths_that_are_not_files(capsys, tmp_path):
    smooth(np.random.default_rng(0), 40, 40).save(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    table = write_lists(tmp_path, list=["good.png", "folder.png", "pipe.png", "gone.png"])["list"]
    recipe = small_run.write_recipe(tmp_path, tmp_path)
    text = recipe.read_text().replace(f'{{ type = "ImageFolder", data_prefix = "{tmp_path}" }}', table)
    recipe.write_text(text)
    code, (entry,), _ = check(capsys, recipe)
    assert code == 1 and entry["good"] == 1
    assert names(entry, "unreadable") == {
        "folder.png": "a folder, not a file",
        "pipe.png": "not a file",
        "gone.png": "no such file or directory",
    }


def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    source = ImageFolder(str(tmp_path))
    source.open()
    mine = os.geteuid()
    try:
        if mine == 0:
            os.seteuid(65534)
        assert read_all(source, np.array([0])) == [Unreadable("permission denied", is_outage=True)]
    finally:
        os.seteuid(mine)
    path.chmod(0o600)
    assert [read.tobytes() for read in read_all(source, np.array([0]))] == [b"x"]


@pytest.fixture
def many(tmp_path):
    """140 files of 70 images, each twice."""
    root = tmp_path / "many"
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(70):
        smooth(generator, 32, 32).save(root / f"{i:03d}.png")
        os.link(root / f"{i:03d}.png", root / f"{i + 70:03d}.png")
    return root


def test_ctrl_c_ends_it_with_the_results_so_far(capsys, many, tmp_path, monkeypatch):
    (many / "003.png").write_bytes(b"no image")  # and its other name
    decode = check_module._decode

    def interrupted(entry, ids, contents, trial):
        if ids[0] >= 64:
            os.kill(os.getpid(), signal.SIGINT)
        decode(entry, ids, contents, trial)

    monkeypatch.setattr(check_module, "_decode", interrupted)
    good = tmp_path / "good.txt"
    code, (entry,), err = check(capsys, many, "-o", good)
    assert code == 130 and err.startswith("error: interrupted") and "good.txt is not written" in err
    assert not good.exists() and not Path(f"{good}.tmp").exists()
    assert names(entry, "unreadable").keys() >= {"003.png"} and entry["good"] == 63 and entry["unseen"] >= 12
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    alive = [pid for pid in children if b"decoding.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert not alive


DYING = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import decoding
sizes = decoding.Trial.sizes
def deadly(self, encoded):
    if any(image.tobytes() == open({image!r}, "rb").read() for image in encoded):
        os.kill(os.getpid(), signal.SIGSEGV)
    return sizes(self, encoded)
decoding.Trial.sizes = deadly
decoding.main(*map(int, sys.argv[1:]))
"""


def test_an_image_that_kills_its_decoder_is_named(capsys, many, tmp_path, monkeypatch):
    program = tmp_path / "dying.py"
    program.write_text(DYING.format(folder=str(Path(decoding.__file__).parent), image=str(many / "005.png")))
    monkeypatch.setattr(decoding, "PROGRAM", str(program))
    code, (entry,), _ = check(capsys, many)
    reason = "decoding it ends the process (SIGSEGV)"
    assert code == 1 and names(entry, "unreadable") == {"005.png": reason, "075.png": reason}, "both names of one image"
    assert entry["good"] == 69 and len(entry["duplicates"]) == 69


def test_a_decoder_that_cannot_start_is_not_blamed_on_images(capsys, many, tmp_path, monkeypatch):
    program = tmp_path / "broken.py"
    program.write_text("raise ImportError('libdali.so is not there')")
    monkeypatch.setattr(decoding, "PROGRAM", str(program))
    code, entry, err = check(capsys, many)
    assert code == 1 and not entry and err.splitlines()[-1].endswith("ImportError: libdali.so is not there")
    assert err.startswith("error: ") and "Traceback" not in err


def test_images_in_memory(capsys, tmp_path):
    pixels = drawn(12)
    pixels[9] = pixels[4]
    write_cifar10(tmp_path / "data", "binary", pixels, [0] * 12)
    recipe = small_run.write_recipe(tmp_path, tmp_path)
    table = f'{{ type = "CIFAR10", data_prefix = "{tmp_path}/data" }}'
    recipe.write_text(recipe.read_text().replace(f'{{ type = "ImageFolder", data_prefix = "{tmp_path}" }}', table))
    code, (entry,), _ = check(capsys, recipe)
    assert code == 1 and entry["images"] == 12 and entry["good"] == 11
    (pair,) = entry["duplicates"]
    assert [os.path.basename(path) for path in pair] == ["data_batch_2.bin#1", "data_batch_4.bin#1"]
    code, entry, err = check(capsys, recipe, "-o", tmp_path / "good.txt")
    assert code == 2 and not entry and "are not files of their own" in err and len(err.splitlines()) == 1


def test_mistakes_are_one_line(capsys, tmp_path, images):
    (tmp_path / "empty").mkdir()
    existing = tmp_path / "existing.txt"
    existing.write_text("mine")
    for words, message in [
        ([tmp_path / "empty"], "has no images"),
        ([tmp_path / "gone.toml"], "gone.toml"),
        ([images, "--set", "epochs=1"], "is a folder"),
        ([images, "-o", existing], "existing.txt exists; --force replaces it"),
        ([images, "-o", tmp_path], "is a folder, not a file"),
        ([images, "-o", tmp_path / "no" / "such.txt"], "there is no folder"),
    ]:
        code, entry, err = check(capsys, *words)
        assert code == 2 and not entry and len(err.splitlines()) == 1, err
        assert message in err and "data_prefix" not in err
    assert existing.read_text() == "mine"
    for words in (["--min-side", "x"], ["--max-pixels", "inf"], ["--max-pixels", "0"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as end:
            main(["data", "check", str(images), *words])
        assert end.value.code == 2


def test_memory_per_image_does_not_grow_with_findings(tmp_path):
    class Many:
        def __len__(self):
            return 10_000

    entry = Survey(Many(), ["data.source"])  # type: ignore[arg-type]
    arrays = [value for value in vars(entry).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 40 * 10_000
    for i in range(10_000):
        entry.judge(i, Verdict.UNREADABLE, random.choice(["one reason", "another"]))
    assert sorted(entry._texts) == ["another", "one reason"] and entry.reason(17) in entry._texts


def test_the_decoders_program_needs_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import decoding; "
    code += "assert not {'torch', 'sslrun'} & set(sys.modules)"
    folder = str(Path(decoding.__file__).parent)
    subprocess.run([sys.executable, "-P", "-c", code, folder], check=True)
