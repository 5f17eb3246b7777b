"""Every file of a run in every kind of damage, opened by every verb: one line and a defined code, and never a hang."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from small_run import NAME, call

FILES = (
    "config.toml",
    "state.json",
    "metrics.jsonl",
    "machine.json",
    "env.json",
    "log.txt",
    "checkpoints/step_00000006/manifest.json",
    "checkpoints/step_00000006/state.json",
    "checkpoints/step_00000006/model.safetensors",
    "checkpoints/step_00000006/optimizer.safetensors",
)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x80" * 50),
    "null": lambda path: path.write_bytes(b"null\n"),
    "a list": lambda path: path.write_bytes(b"[1, null]\n"),
    "an empty table": lambda path: path.write_bytes(b"{}\n"),
    "deep nesting": lambda path: path.write_bytes(b"[" * 200_000),
    "a folder": replaced(lambda path: path.mkdir()),
    "a pipe": replaced(os.mkfifo),
    "a dangling link": replaced(lambda path: path.symlink_to("nothing")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
}

VERBS: dict[str, tuple[str, ...]] = {
    "report": ("report", "{run}", "-o", "{out}/page.html"),
    "runs": ("runs", "{run}/.."),
    "runs --wait": ("runs", "--wait", "{run}"),
    "eval": ("eval", "spectrum", "{run}", "--set", "engine.device=cpu"),
    "export": ("export", "{run}", "--format", "safetensors", "-o", "{out}/exported"),
    "publish": ("publish", "{run}", "-o", "{out}"),
    "embed": ("embed", "{run}", "{images}", "-o", "{out}/rows.npy"),
    "config diff": ("config", "diff", "{run}", "{run}"),
    "resume": ("{recipe}", "--work-dir", "{run}/..", "--set", "max_iters=7", "--resume"),
    "train": ("{recipe}", "--work-dir", "{run}/.."),
}
LIMIT_S = 300  # of a verb; a pipe without a writer would be waited for without end


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise AssertionError(f"after {LIMIT_S} s it waits still")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES)
@pytest.mark.usefixtures("alarm")
def test_every_verb_on_every_damage(trained, images, tmp_path, capsys, file):
    fell = []
    for damage, apply in DAMAGES.items():
        for verb, words in VERBS.items():
            shutil.rmtree(tmp_path, ignore_errors=True)
            run = Path(shutil.copytree(trained, tmp_path / "runs" / NAME))
            recipe = shutil.copy(run / "config.toml", tmp_path / f"{NAME}.toml")
            out = tmp_path / "out"
            out.mkdir()
            apply(run / file)
            signal.alarm(LIMIT_S)
            try:
                found = call(capsys, *(word.format(run=run, recipe=recipe, out=out, images=images) for word in words))
                said = problem(*found)
            except (Exception, SystemExit) as error:
                said = f"{type(error).__name__}: {error}"
            signal.alarm(0)
            if said is not None:
                fell.append(f"{file}, {damage}, {verb}: {said}")
    assert not fell, "\n".join(fell)


def problem(code: int, _: str, errors: str) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    lines = [line for line in errors.splitlines() if re.match(r"(\S+ )?error: ", line)]
    if code not in (0, 1, 2) or "Traceback" in errors:
        return f"code {code}: {errors[-300:]}"
    if code and len(lines) != 1:
        return f"code {code} and {len(lines)} lines of error: {errors[-300:]}"
    if not code and lines:
        return f"code 0 and an error: {lines[0]}"
    return None
