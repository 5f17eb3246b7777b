"""Files that have no end, or no writer: a reader neither waits for them nor fills the memory."""

import os
import shutil
from pathlib import Path

import pytest

from small_run import NAME, call, saved
from sslrun.runtime import checkpoint, run_files
from sslrun.runtime.run_files import RunFiles, rows


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_recipe_that_is_no_file(tmp_path, capsys, monkeypatch, kind):
    import socket

    monkeypatch.chdir(tmp_path)
    if kind == "pipe":
        os.mkfifo("x.toml")
    elif kind == "device":
        os.symlink("/dev/zero", "x.toml")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x.toml")
    code, _, errors = call(capsys, "config", "print", "x.toml")
    path = "/dev/zero" if kind == "device" else "x.toml"
    assert (code, errors) == (2, f"error: {path}: is not a regular file\n")


def test_a_recipe_of_a_terabyte(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").touch()
    os.truncate("x.toml", 2**40)
    code, _, errors = call(capsys, "config", "print", "x.toml")
    assert (code, errors) == (2, "error: x.toml: 1,099,511,627,776 bytes; a recipe has at most 1,048,576\n")


def test_tables_of_a_terabyte_are_problems(tmp_path):
    files = RunFiles(tmp_path)
    for name in ("config.toml", "state.json", "env.json", "machine.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
    assert [files.config(), files.state(), files.environment(), files.machine()] == [{}] * 4
    assert set(files.problems.values()) == {"it has more than 67,108,864 bytes"}


def test_rows_of_a_terabyte_are_refused_in_one_line(trained, tmp_path, capsys):
    """Such as holes: reading them takes hours."""
    run = Path(shutil.copytree(trained, tmp_path / NAME))
    os.truncate(run / "metrics.jsonl", 2**40)
    line = f"{run}/metrics.jsonl: it has 1,099,511,627,776 bytes, and rows at most 4,294,967,296"
    with pytest.raises(OSError, match="1,099,511,627,776 bytes"):
        list(rows(run / "metrics.jsonl"))
    assert RunFiles(run).rows() == [] and list(RunFiles(run).metrics_blocks()) == []
    assert call(capsys, "report", run, "--no-images")[0] == 0
    shutil.copy(run / "config.toml", tmp_path / f"{NAME}.toml")
    code, _, errors = call(capsys, tmp_path / f"{NAME}.toml", "--work-dir", tmp_path, "--resume")
    assert (code, errors.splitlines()[-1]) == (1, f"error: {line}")


@pytest.mark.parametrize("kind", ["pipe", "terabyte"])
def test_a_report_leaves_a_recipe_out_that_is_no_text(trained, tmp_path, capsys, kind):
    run = Path(shutil.copytree(trained, tmp_path / NAME))
    (run / "config.toml").unlink()
    if kind == "pipe":
        os.mkfifo(run / "config.toml")
    else:
        (run / "config.toml").touch()
        os.truncate(run / "config.toml", 2**40)
    assert call(capsys, "report", run, "--no-images")[0] == 0
    reason = "it is not a file" if kind == "pipe" else "it has more than 67,108,864 bytes"
    assert f"Left out: config.toml: {reason}." in (run / "report.html").read_text()


def test_a_manifest_of_a_terabyte_is_damage(trained, tmp_path):
    path = Path(shutil.copytree(saved(trained, 6), tmp_path / "step_00000006"))
    os.truncate(path / "manifest.json", 2**40)
    assert checkpoint.damage(path) == "manifest.json is unreadable"


def test_a_line_that_does_not_end_is_read_in_parts(tmp_path, monkeypatch):
    """As after a power cut: zeros in place of what was not on the disk."""
    monkeypatch.setattr(run_files, "LINE_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(1_000_000) + b'\n{"step": 2}\n')
    blocks = list(RunFiles(tmp_path).metrics_blocks())
    assert max(map(len, blocks)) <= run_files.BLOCK_BYTES + 1000 and sum(map(len, blocks)) == path.stat().st_size
    assert [row["step"] for _, row in rows(path)] == [1, 2]
