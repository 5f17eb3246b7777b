"""Damaged files of a finished run, and the verbs that read them: a defined code, and at most one line of error."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import starter
from campaign import STEPS, Campaign, Outcome

from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import CONFIG, ENVIRONMENT, MACHINE, METRICS, STATE

VERBS = ("report", "report --no-images", "eval spectrum", "eval knn", "export", "runs")
MOST_S = 60.0  # a reader that takes longer has waited for what does not come


def truncated(path: Path, campaign: Campaign) -> None:
    os.truncate(path, path.stat().st_size // 2)


def one_bit_flipped(path: Path, campaign: Campaign) -> None:
    data = bytearray(path.read_bytes())
    data[campaign.random.randrange(len(data))] ^= 1 << campaign.random.randrange(8)
    path.write_bytes(data)


def emptied(path: Path, campaign: Campaign) -> None:
    path.write_bytes(b"")


def removed(path: Path, campaign: Campaign) -> None:
    path.unlink()


def a_pipe(path: Path, campaign: Campaign) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path, campaign: Campaign) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path, campaign: Campaign) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_terabyte(path: Path, campaign: Campaign) -> None:
    os.truncate(path, 2**40)


def of_another_form(path: Path, campaign: Campaign) -> None:
    forms: list[bytes] = [
        b"[]",
        b"5",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b"{}",
        b'{"step": null}\n',
        b'{"a": {"b": []}}',
        b"a = 1\n",
    ]
    path.write_bytes(campaign.random.choice(forms))


DAMAGES = (truncated, one_bit_flipped, emptied, removed, a_pipe, a_folder, a_dangling_link, a_terabyte, of_another_form)


def files() -> list[str]:
    """Of the run folder, and of its newest checkpoint."""
    newest = f"checkpoints/step_{STEPS:08d}"
    return [
        CONFIG,
        METRICS,
        STATE,
        ENVIRONMENT,
        MACHINE,
        *(f"{newest}/{name}" for name in (*checkpoint.FILES, checkpoint.MANIFEST)),
    ]


def damaged_runs(campaign: Campaign) -> Iterator[Callable[[], Outcome]]:
    """Every file, damage and verb, in a random order."""
    cases = list(itertools.product(VERBS, files(), DAMAGES))
    campaign.random.shuffle(cases)
    for verb, file, damage in cases:
        yield lambda verb=verb, file=file, damage=damage: _read(campaign, verb, file, damage)


def _read(campaign: Campaign, verb: str, file: str, damage: Callable[[Path, Campaign], None]) -> Outcome:
    root = campaign.trial()
    run = Path(shutil.copytree(campaign.straight, root / "runs" / campaign.straight.name))
    damage(run / file, campaign)
    name, *options = verb.split()
    words = [name, *options, str(run.parent if name == "runs" else run)]
    if name == "report":
        words += ["-o", str(root / "page.html")]
    if name == "export":
        words += ["--to", "safetensors", "-o", str(root / "encoder.safetensors")]
    begin, output = time.monotonic(), root / "output"
    code = starter.run(words, output, timeout_s=2 * MOST_S)
    took_s, text = time.monotonic() - begin, output.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    lost = []
    if len(errors) != int(code != 0) or "Traceback" in text or took_s > MOST_S:
        lost.append(f"code {code} after {took_s:.1f} s: {text[-3000:]}")
    shutil.rmtree(root)
    return Outcome(f"{verb}, {file} {damage.__name__}", code, took_s, lost)
