"""Measures how long two ranks of a ResNet-50 take to leave after SIGTERM, saved, at moments spread over their steps.

    python benchmarks/preemption.py [--times 5] [--folder DIR] [--step 2] [--size 64] [--monitors]

Each trial starts MoCo v2 with a ResNet-50 on two ranks of the CPU (gloo), waits until `--step` steps are done and a
random part of the next four, sends SIGTERM to all its processes as a cluster does, and waits for the end. Checkpoints
are written after every second step, so that some are under way; with `--monitors`, loss and k-NN are measured after
every third. The row has the seconds from the signal to the end, those of a step, exit codes, and the load of the
machine.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from rows import append_row, quantiles

from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import METRICS, RunFiles

RANKS = 2
SETTINGS = {
    "data.source": '{ _delete_ = true, type = "Shapes", num_images = 512 }',
    "global_batch": "8",
    "data.samples_per_gpu": "4",
    "data.workers_per_gpu": "1",
    "checkpoint.by": "iter",
    "checkpoint.interval": "2",
    "log.interval": "1",
    "engine.device": "cpu",
    "engine.threads": "1",
}
SILENT = {"monitor.knn_interval": "0"}
MONITORS = {
    "data.holdout": '{ type = "Shapes", num_images = 64, split = "test" }',
    "monitor.by": "iter",
    "monitor.loss_interval": "3",
    "monitor.knn_interval": "3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--step", type=int, default=2, help="steps before the signal")
    parser.add_argument("--size", type=int, default=64, help="side of the crops in pixels")
    parser.add_argument("--monitors", action="store_true", help="measure while the signal comes, too")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        settings = {**SETTINGS, **(MONITORS if args.monitors else SILENT)}
        settings["data.views.0.transforms.0.size"] = str(args.size)
        trials = [trial(Path(folder), args.step, settings) for _ in range(args.times)]
    row = {
        "case": "mocov2_resnet50",
        "ranks": RANKS,
        "size": args.size,
        "monitors": args.monitors,
        "device": "cpu",
        "global_batch": int(SETTINGS["global_batch"]),
        "codes": sorted({each["code"] for each in trials}),
        "left_s": quantiles([each["left_s"] for each in trials]),
        "step_s": quantiles([second for each in trials for second in each["step_s"]]),
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    print(row)
    append_row("preemption", row)


def trial(folder: Path, step: int, settings: dict[str, str]) -> dict[str, Any]:
    """Exit code of the run, seconds from the signal to its end, and those of its steps."""
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    words = [str(ROOT / "bin/sslrun"), str(ROOT / "configs/mocov2.toml"), "--work-dir", str(folder), *options]
    sources = ["data.source", *(["data.holdout"] if "data.holdout" in settings else [])]
    words += [word for source in sources for word in ("--set", f"{source}.root={folder.parent / 'shapes'}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen(
            [*launcher, *words], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        while not (seconds := times_of_steps(folder)) or len(seconds) < step:
            assert process.poll() is None, (folder / "output").read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 4 * seconds[-1]))
        os.killpg(process.pid, signal.SIGTERM)
        begin = time.monotonic()
        process.wait()
        left_s = time.monotonic() - begin
    (run,) = (path.parent for path in folder.glob(f"*/{METRICS}"))
    newest = checkpoint.newest_good(run / "checkpoints")
    assert newest is not None, (folder / "output").read_text()[-3000:]
    found = {"code": RunFiles(run).state()["exit_code"], "left_s": left_s, "step_s": seconds}
    print(newest.name, found, flush=True)
    shutil.rmtree(run)
    return found


def times_of_steps(folder: Path) -> list[float]:
    """Seconds between the rows of the steps, the first of which has none."""
    files = list(folder.glob(f"*/{METRICS}"))
    lines = files[0].read_text().splitlines() if files else []
    walls = [json.loads(line)["wall_s"] for line in lines]
    return [after - before for before, after in itertools.pairwise(walls)]


if __name__ == "__main__":
    main()
