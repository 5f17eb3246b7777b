"""A script of benchmarks/peers/ in a process of its own, with the Python that has the peers (`make peers`)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))


class NoPeer(Exception):
    """Why a peer cannot be measured here."""


class Peer:
    """A process that answers lines of JSON with lines of JSON.

    Args:
        script: name of a file in benchmarks/peers/.
        job: its first line.

    Raises:
        NoPeer: it cannot be started, or answers its first line with an `error`.
    """

    def __init__(self, script: str, job: dict[str, Any]) -> None:
        if not PYTHON.exists():
            raise NoPeer("`make peers` was not run")
        command = [str(PYTHON), str(ROOT / "benchmarks/peers" / script)]
        environment = {**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            answer = self.ask(job)
        except NoPeer:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise NoPeer(answer["error"])

    def ask(self, question: dict[str, Any]) -> Any:
        """The answer to a line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise NoPeer(f"its process ended with exit code {self._process.wait()}") from None

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def versions() -> dict[str, str]:
    """Versions of the peers' packages that `requirements.txt` names; empty if they are not installed."""
    if not PYTHON.exists():
        return {}
    names = [line.split("=")[0].split(">")[0].strip() for line in (ROOT / "benchmarks/peers/requirements.txt").open()]
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in sys.argv[1:]:\n  try: found[name] = version(name)\n  except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    listed = [name for name in names if name and not name.startswith("#")]
    found: dict[str, str] = json.loads(subprocess.check_output([str(PYTHON), "-c", code, *listed], text=True))
    return found
