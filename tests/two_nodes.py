"""Two machines of their own network, in namespaces of this one: own host names and addresses, a cable between them.

Needs no privileges where user namespaces are allowed. The folders are shared, as by a cluster's file system.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOSTS = ("nodeA", "nodeB")
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")

# As Debian has it, a machine's own name is a loopback address, where no other machine can reach it.
NODE = """
set -e
printf '127.0.0.1 localhost\\n127.0.1.1 {host}\\n{other_address} {other_host}\\n' > {folder}/hosts.{host}
mount --bind {folder}/hosts.{host} /etc/hosts
hostname {host}
ip link set lo up
echo ready
exec cat
"""
CABLE = """
set -e
ip link add cable type veth peer name other
ip link set cable netns {0} name eth0
ip link set other netns {1} name eth0
for node in '{0} {2}' '{1} {3}'; do
  set -- $node
  nsenter --target $1 --net ip address add $2/24 dev eth0
  nsenter --target $1 --net ip link set eth0 up
done
"""


class Nodes:
    """Two nodes, 0 and 1, as long as `two_nodes` lasts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids

    def entering(self, node: int, folder: Path) -> list[str]:
        """The words before a command that start it on a node, in a folder."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder)]  # entering ends in the root folder
        return [*_enter(self._pids[node]), *inside]

    def start(
        self, node: int, words: Sequence[str], output: IO[str], cwd: Path, environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Starts a command on a node, in a session of its own."""
        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
        return subprocess.Popen([*self.entering(node, cwd), *words], env=dict(environment), **options)

    def cut(self, node: int) -> None:
        """Takes the node's network down: no packet comes or goes, and no connection is closed."""
        subprocess.run([*_enter(self._pids[node]), "ip", "link", "set", "eth0", "down"], check=True)

    def lose(self, node: int) -> None:
        """The node has no power: no packet comes or goes, and all that was started there is killed."""
        self.cut(node)
        for pid in self.processes(node):
            with contextlib.suppress(OSError):  # it has ended
                os.kill(pid, signal.SIGKILL)

    def processes(self, node: int) -> list[int]:
        """What was started on a node and runs."""
        holder, found = self._pids[node], []
        network = os.readlink(f"/proc/{holder}/ns/net")
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
            with contextlib.suppress(OSError):  # it has ended
                if pid != holder and os.readlink(f"/proc/{pid}/ns/net") == network:
                    found.append(pid)
        return found

    def ranks(self, node: int) -> dict[int, int]:
        """The process of each rank that runs on a node, by its number. Processes that a rank has started are none."""
        numbers = {pid: _rank(pid) for pid in self.processes(node)}
        return {
            number: pid for pid, number in numbers.items() if number is not None and numbers.get(_parent(pid)) is None
        }

    def mend(self, node: int) -> None:
        """Takes the node's network up again."""
        subprocess.run([*_enter(self._pids[node]), "ip", "link", "set", "eth0", "up"], check=True)


def is_running(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _rank(pid: int) -> int | None:
    """What a launcher has written in the environment of a process."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Makes the nodes; skips the test, with the reason, where that is not possible. What runs on them is killed."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"two network namespaces need {', '.join(missing)}, which is not installed")
    outer = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts"]
    fabric = _hold([*outer, "sh", "-c", "echo ready; exec cat"])
    holders = [fabric]
    try:
        for node in (0, 1):
            script = NODE.format(
                folder=folder, host=HOSTS[node], other_host=HOSTS[1 - node], other_address=ADDRESSES[1 - node]
            )
            holders.append(_hold([*_enter(fabric.pid), "unshare", "--net", "--mount", "--uts", "sh", "-c", script]))
        pids = [holder.pid for holder in holders[1:]]
        _run([*_enter(fabric.pid), "sh", "-c", CABLE.format(*pids, *ADDRESSES)])
        yield Nodes(pids)
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def _hold(command: Sequence[str]) -> "subprocess.Popen[str]":
    """A process that says "ready" and holds its namespaces."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        pytest.skip(f"network namespaces are not allowed here: {_last_line(process.communicate()[1])}")
    return process


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be connected here: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[-1]


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--preserve-credentials", "--net", "--mount", "--uts"]
