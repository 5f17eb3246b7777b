"""The kinds of faults that the nightly campaign injects: the rows of the table in docs/reliability.md."""

import collections
import contextlib
import errno
import io
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import starter
from campaign import INTERVAL, STEPS, Campaign, Outcome
from readers import damaged_runs

import small_run
from small_run import saved
from sslrun.cli import main
from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import RunFiles

DAMAGES = ("truncated", "one bit flipped", "emptied", "removed", "a pipe in its place")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: words of the table.
        trials: yields functions that each inject once into a run.
        nightly: number of injections of a nightly run.
        codes: exit codes that the process with the fault may have.
    """

    name: str
    trials: Callable[[Campaign], Iterator[Callable[[], Outcome]]]
    nightly: int
    codes: tuple[int, ...]


def killed_at_calls(campaign: Campaign, kind: str) -> Iterator[Callable[[], Outcome]]:
    for at in campaign.points():
        if kind == "kill" or campaign.calls[at - 1].startswith("write"):
            settings = {"FAULT_KIND": kind, "FAULT_AT": str(at)}
            yield lambda at=at, settings=settings: campaign.faulty(f"call {at}, {campaign.calls[at - 1]}", settings)


def disk_full(campaign: Campaign) -> Iterator[Callable[[], Outcome]]:
    for at in campaign.points():
        settings = {"FAULT_KIND": "full", "FAULT_AT": str(at)}
        yield lambda at=at, settings=settings: campaign.faulty(f"from call {at}", settings)


def signaled(campaign: Campaign, name: str) -> Iterator[Callable[[], Outcome]]:
    while True:
        yield lambda: campaign.faulty(f"SIG{name}", {}, signal.Signals[f"SIG{name}"])


def read_errors(campaign: Campaign) -> Iterator[Callable[[], Outcome]]:
    """Errors that pass after two attempts, and one that does not."""
    files = ("checkpoints", *(f"step_00000006/{name}" for name in (*checkpoint.FILES, "manifest.json")))
    yield lambda: _read_error(campaign, files[1], errno.EIO, times=10**6)
    for code in (errno.ESTALE, errno.EIO):
        for file in files:
            yield lambda file=file, code=code: _read_error(campaign, file, code, times=2)


def _read_error(campaign: Campaign, file: str, code: int, times: int) -> Outcome:
    root = campaign.trial()
    campaign.half(root)
    settings = {"FAULT_KIND": "read", "FAULT_MATCH": file, "FAULT_ERRNO": str(code), "FAULT_TIMES": str(times)}
    words = [*campaign.words(root), "--resume"]
    ended = starter.run(words, campaign.folder / "output", campaign.settings(root) | settings)
    outcome = campaign.outcome(root, f"{errno.errorcode[code]}, {file}, {times} times", ended)
    if ended != (0 if times < 10 else 1):
        outcome.lost.append(f"the resume ended with {ended}: {campaign.output()}")
    outcome.lost.extend(campaign.continued(root))
    shutil.rmtree(root)
    return outcome


def damaged_checkpoints(campaign: Campaign) -> Iterator[Callable[[], Outcome]]:
    for damage in DAMAGES:
        for file in (*checkpoint.FILES, checkpoint.MANIFEST):
            yield lambda file=file, damage=damage: _damaged(campaign, file, damage)


def _damaged(campaign: Campaign, file: str, damage: str) -> Outcome:
    root = campaign.trial()
    run = campaign.half(root)
    path = saved(run, STEPS - INTERVAL) / file
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "one bit flipped":
        data = bytearray(path.read_bytes())
        data[campaign.random.randrange(len(data))] ^= 1 << campaign.random.randrange(8)
        path.write_bytes(data)
    else:
        path.unlink()
        if damage == "emptied":
            path.touch()
        elif damage.startswith("a pipe"):
            os.mkfifo(path)
    (root / "mark").touch()
    code = starter.run([*campaign.words(root), "--resume"], campaign.folder / "output")
    outcome = campaign.outcome(root, f"{file} {damage}", code)
    outcome.lost.extend(campaign.different(run) if code == 0 else [campaign.output()])
    shutil.rmtree(root)
    return outcome


def mutated_recipes(campaign: Campaign) -> Iterator[Callable[[], Outcome]]:
    while True:
        yield lambda: _mutated(campaign)


PIECES = (
    "=",
    "[",
    "]",
    '"',
    "{",
    "}",
    "#",
    ".",
    ",",
    "\n",
    " ",
    "-",
    "x",
    "\0",
    "true",
    "nan",
    "[]",
    "${a}",
    "${vars.b}",
)


def _mutated(campaign: Campaign) -> Outcome:
    """A recipe with one to three slips of the pen, in this process: a plan, or one line that says what is wrong."""
    random, text = campaign.random, campaign.recipe.read_text()
    for _ in range(random.randint(1, 3)):
        at, lines = random.randrange(len(text)), text.splitlines(keepends=True)
        line = random.randrange(len(lines))
        text = random.choice(
            [
                text[:at] + text[at + 1 :],
                text[:at] + random.choice(PIECES) + text[at:],
                "".join(lines[:line] + lines[line + 1 :]),
                "".join([*lines[:line], random.choice(lines), *lines[line:]]),
                text[:at] + text[at : at + 2][::-1] + text[at + 2 :],
            ]
        )
    recipe = campaign.folder / "mutated.toml"
    recipe.write_text(text)
    begin, errors, code = time.monotonic(), io.StringIO(), -1
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = main([str(recipe), "--dry-run"])
    except Exception as error:
        errors.write(repr(error))
    told = [line for line in errors.getvalue().splitlines() if not line.startswith(("note: ", "warning: "))]
    lost = [] if (code, len(told)) in ((0, 0), (2, 1)) else [f"{code}: {errors.getvalue()}\n{text}"]
    return Outcome("a slip of the pen", code, time.monotonic() - begin, lost)


def killed_launchers(campaign: Campaign) -> Iterator[Callable[[], Outcome]]:
    straight = campaign.trial()
    assert (
        subprocess.run(_torchrun(campaign, straight), env=small_run.environment(), capture_output=True).returncode == 0
    )
    while True:
        yield lambda: _killed_launcher(campaign, campaign.run(straight))


def _torchrun(campaign: Campaign, root: Path, *options: str) -> list[str]:
    _, *words = campaign.words(root)
    return small_run.command(campaign.recipe, *words, *options, ranks=2)


def _killed_launcher(campaign: Campaign, straight: Path) -> Outcome:
    """SIGKILL to torchrun while its two ranks are set up, train or save."""
    root = campaign.trial()
    run = campaign.run(root)
    launcher = small_run.start(_torchrun(campaign, root))
    small_run.wait_until(lambda: RunFiles(run).status() == "running", launcher)
    step = campaign.random.randrange(-1, STEPS - 1)  # -1 while the run is set up
    small_run.wait_until(lambda: small_run.last_step(run) >= step, launcher)
    time.sleep(campaign.random.uniform(0.0, campaign.run_s / 10))
    launcher.kill()
    begin = time.monotonic()
    launcher.communicate()  # both ranks have closed their output
    exit_s, files = time.monotonic() - begin, RunFiles(run)
    code = files.state().get("exit_code")
    lost = campaign.damaged(root)
    resumed = subprocess.run(_torchrun(campaign, root, "--resume"), env=small_run.environment(), capture_output=True)
    if resumed.returncode != 0:
        lost.append(f"the resume ended with {resumed.returncode}: {resumed.stderr.decode()[-2000:]}")
    else:
        lost += campaign.different(run, straight)
    shutil.rmtree(root)
    return Outcome(f"torchrun killed at step {step}", -1 if code is None else code, exit_s, lost)


def _kinds() -> Iterator[Kind]:
    calls = "call that changes a file"
    yield Kind(f"SIGKILL before the n-th {calls}", lambda c: killed_at_calls(c, "kill"), 24, (-signal.SIGKILL,))
    yield Kind("SIGKILL in the middle of the n-th write", lambda c: killed_at_calls(c, "torn"), 10, (-signal.SIGKILL,))
    for name, code in (("KILL", -9), ("TERM", 75), ("USR1", 75), ("HUP", 75), ("INT", 130)):
        codes = (0, code, -signal.Signals[f"SIG{name}"])
        yield Kind(f"SIG{name} at a random moment", lambda c, name=name: signaled(c, name), 6, codes)
    yield Kind("disk full from the n-th call on", disk_full, 12, (0, 1, 2))
    yield Kind("EIO and ESTALE on reading checkpoints", read_errors, 6, (0, 1))
    yield Kind("one damaged file of the newest checkpoint", damaged_checkpoints, 20, (0,))
    yield Kind("one damaged file of a run, on report, eval, export and runs", damaged_runs, 40, (0, 1, 2))
    yield Kind("torchrun killed, two ranks", killed_launchers, 3, (0, 1, 75))
    yield Kind("recipe with slips of the pen", mutated_recipes, 1000, (0, 2))


KINDS = {kind.name: kind for kind in _kinds()}


def inject(kind: Kind, campaign: Campaign, times: int) -> tuple[dict[str, Any], list[Outcome]]:
    """The row of a kind, and what was lost."""
    outcomes = [trial() for trial in itertools.islice(kind.trials(campaign), times)]
    for outcome in outcomes:
        if outcome.code not in kind.codes:
            outcome.lost.append(f"exit code {outcome.code}")
    codes = collections.Counter(outcome.code for outcome in outcomes)
    row = {
        "kind": kind.name,
        "times": len(outcomes),
        "lost": sum(bool(outcome.lost) for outcome in outcomes),
        "codes": {str(code): count for code, count in sorted(codes.items())},
        "worst_exit_s": round(max(outcome.exit_s for outcome in outcomes), 2),
    }
    return row, [outcome for outcome in outcomes if outcome.lost]
