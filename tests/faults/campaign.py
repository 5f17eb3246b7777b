"""Small runs that meet a fault: each is resumed to its end, and compared with the same run without the fault.

Lost is: a checkpoint that was saved and that is damaged or gone; a run that cannot be continued; a final checkpoint or
a row of metrics.jsonl that differs from those of the same run without the fault. Steps after the newest checkpoint are
computed again, and count as nothing.
"""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import starter

import small_run
from small_run import differences, metrics, saved, timeless
from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import RunFiles

STEPS, INTERVAL, KEEP = 8, 2, 3


@dataclass(frozen=True)
class Outcome:
    """What became of one injection.

    Attributes:
        fault: the fault, in words.
        code: exit code of the process that had the fault.
        exit_s: seconds from the injection to the end of that process.
        lost: what was lost; empty if nothing was.
    """

    fault: str
    code: int
    exit_s: float
    lost: list[str]


class Campaign:
    """A small run without faults, and the folder in which copies of it meet theirs."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self.random = random.Random(time.strftime("%Y-%m-%d"))  # other moments every night
        self.recipe = small_run.write_recipe(folder, images, steps=STEPS)
        text = self.recipe.read_text().replace("interval = 4\n", f"interval = {INTERVAL}\n")
        self.recipe.write_text(text.replace("max_keep_ckpts = 3", f"max_keep_ckpts = {KEEP}"))
        self.count = 0
        assert starter.run(["--version"], folder / "output") == 0, self.output()  # what starts the runs is ready
        root = self.trial()
        begin = time.monotonic()
        assert starter.run(self.words(root), folder / "output", self.settings(root)) == 0, self.output()
        self.run_s = time.monotonic() - begin
        self.straight = self.run(root)
        calls = (root / "calls").read_text().splitlines()
        self.calls = [f"{line.split()[0]} {line.rpartition('/')[2]}" for line in calls]

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-2000:]

    def points(self) -> list[int]:
        """The calls that change a file, from 1, in a random order; of equal calls in a row, the first and the last."""
        calls = ["", *self.calls, ""]
        found = [at for at in range(1, len(calls) - 1) if calls[at] != calls[at - 1] or calls[at] != calls[at + 1]]
        self.random.shuffle(found)
        return found

    def faulty(self, fault: str, settings: dict[str, str], stop: signal.Signals | None = None) -> Outcome:
        """One run with a fault, then without it to the end, compared with the run that had none."""
        root = self.trial()
        pid = starter.start(self.words(root), self.folder / "output", {**self.settings(root), **settings})
        if stop is not None:
            self.wait_for_a_moment(root)
            (root / "mark").touch()
            os.kill(pid, stop)  # it is there as long as nobody has waited for it
        code = starter.wait(pid)
        outcome = self.outcome(root, fault, code)
        outcome.lost.extend(self.damaged(root) + self.continued(root))
        shutil.rmtree(root)
        return outcome

    def trial(self) -> Path:
        """A new folder, in which a run meets its fault."""
        self.count += 1
        root = self.folder / f"trial{self.count}"
        root.mkdir()
        return root

    def settings(self, root: Path) -> dict[str, str]:
        return {"FAULT_ROOT": str(root / "runs"), "FAULT_MARK": str(root / "mark"), "FAULT_LOG": str(root / "calls")}

    def wait_for_a_moment(self, root: Path) -> None:
        """Waits until the run has done some part of its calls, and then for a moment."""
        done, calls = self.random.randrange(len(self.calls)), root / "calls"
        deadline = time.monotonic() + 60
        while done and time.monotonic() < deadline:
            if calls.exists() and calls.read_bytes().count(b"\n") >= done:
                break
            time.sleep(0.002)
        time.sleep(self.random.uniform(0.0, self.run_s / (50 if done else 4)))

    def outcome(self, root: Path, fault: str, code: int) -> Outcome:
        """The outcome of a process that has just ended; the seconds are counted from the injection."""
        mark = root / "mark"
        if not mark.exists():
            return Outcome(fault, code, 0.0, [f"the fault was never met: {self.output()}"])
        return Outcome(fault, code, time.time() - mark.stat().st_mtime, [])

    def damaged(self, root: Path) -> list[str]:
        """Checkpoints that look whole and are not."""
        run = self.run(root)
        found = checkpoint.steps(run / "checkpoints")
        return [f"{path.name}: {reason}" for path in found.values() if (reason := checkpoint.damage(path))]

    def continued(self, root: Path) -> list[str]:
        """What differs, after a resume, from the run without faults."""
        run = self.run(root)
        before = checkpoint.newest_good(run / "checkpoints")
        started_at = 0 if before is None else int(before.name[-8:])
        code = starter.run([*self.words(root), "--resume"], self.folder / "output")
        if code == 2 and before is None and "--restart" in self.output():  # rows, but no checkpoint yet
            code = starter.run([*self.words(root), "--restart"], self.folder / "output")
        if code != 0:
            return [f"the resume ended with {code}: {self.output()}"]
        if before is not None and f"step_{started_at:08d}" not in self.output():
            return [f"the resume did not continue from step {started_at}"]
        return self.different(run)

    def different(self, run: Path, straight: Path | None = None) -> list[str]:
        straight = straight or self.straight
        lost = differences(saved(run, STEPS), saved(straight, STEPS))
        lost = [name for name in lost if name != "is_measured"]  # says that a stop came before; the rows tell the rest
        if timeless(metrics(run)) != timeless(metrics(straight)):
            lost.append(f"rows: {timeless(metrics(run))}")
        if RunFiles(run).status() != "done":
            lost.append(f"state {RunFiles(run).status()}")
        return lost

    def half(self, root: Path) -> Path:
        """The run as it was when its second-last checkpoint, that of step 6, was its newest."""
        run = small_run.as_of(self.straight, STEPS - INTERVAL, root / "runs")
        rows = [json.dumps(row) for row in metrics(run) if row["step"] <= STEPS - INTERVAL]
        (run / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
        return run

    def run(self, root: Path) -> Path:
        """The run folder of a trial."""
        return root / "runs" / self.recipe.stem

    def words(self, root: Path) -> list[str]:
        """The command line of a trial."""
        return [str(self.recipe), "--work-dir", str(root / "runs")]
