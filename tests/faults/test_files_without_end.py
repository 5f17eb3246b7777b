"""Files that have no end, or no writer: a reader neither waits for them nor fills the memory."""

import os

import pytest

from small_run import call
from sslrun.runtime import run_files
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


def test_a_line_that_does_not_end_is_read_in_parts(tmp_path, monkeypatch):
    """As after a power cut: zeros in place of what was not on the disk."""
    monkeypatch.setattr(run_files, "LINE_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(1_000_000) + b'\n{"step": 2}\n')
    blocks = list(RunFiles(tmp_path).metrics_blocks())
    assert max(map(len, blocks)) <= run_files.BLOCK_BYTES + 1000 and sum(map(len, blocks)) == path.stat().st_size
    assert [row["step"] for _, row in rows(path)] == [1, 2]
