#!/usr/bin/env python3
"""Stands in for srun in a batch script, which finds it under that name: starts the ranks with Slurm's variables.

It passes SIGUSR1 on to them, as Slurm does before a job's time is up, and ends with their highest exit code. NODES is a
JSON table: each host, and the words that come before a command to start it there.
"""

import json
import os
import signal
import subprocess
import sys
from itertools import dropwhile

RANKS = 2  # of each node


def main() -> int:
    nodes = json.loads(os.environ["NODES"])
    command = list(dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    ranks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGUSR1, lambda number, _: [rank.send_signal(number) for rank in ranks])
    for number in range(RANKS * len(nodes)):
        node = number // RANKS
        step = {"PROCID": number, "LOCALID": number % RANKS, "NODEID": node, "STEP_NUM_TASKS": RANKS * len(nodes)}
        step |= {"STEP_TASKS_PER_NODE": f"{RANKS}(x{len(nodes)})", "STEP_NODELIST": ",".join(nodes), "STEP_ID": 0}
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in step.items()}
        words = [*list(nodes.values())[node], *command]
        ranks.append(subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL))
    return max(rank.wait() % 256 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
