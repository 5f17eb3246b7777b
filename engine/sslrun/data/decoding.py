"""Files decoded outside of any graph that trains, by the same operators: which ones do not decode, and why.

Where a batch of a run has failed this happens in the run's own process. Who checks files of which nothing is known does
it in a process that may die (damaged JPEG 2000 files are seen to end DALI with a segmentation fault) and whose stderr
tells what the decoders complained of. That process runs this file, which therefore needs neither torch nor sslrun.

    python decoding.py BATCH_SIZE THREADS     a list of paths in, an answer out, one line of JSON each
"""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PROGRAM = __file__


def decoded(paths: Any, cuda: bool) -> Any:
    """DALI nodes that read and decode files into RGB, uint8, H W 3, as stored (EXIF rotation not applied)."""
    from nvidia.dali import fn

    # Plain reads: a mapped file that is cut short while it is mapped would kill the process, and reads are no slower.
    encoded = fn.io.file.read(paths, dont_use_mmap=True)  # type: ignore[attr-defined]
    return fn.decoders.image(encoded, device="mixed" if cuda else "cpu", adjust_orientation=False)


def as_inputs(paths: Sequence[str]) -> list[np.ndarray]:
    """Paths as a graph takes them."""
    return [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in paths]


class Trial:
    """A graph that reads and decodes, and nothing else.

    Args:
        batch_size: most files at once.
        cuda: whether JPEGs are decoded on the GPU.
        options: of the DALI pipeline.
    """

    def __init__(self, batch_size: int, cuda: bool, options: dict[str, Any]) -> None:
        self.batch_size, self.cuda, self.options = batch_size, cuda, options
        self._dali: Any = None

    def sizes(self, paths: Sequence[str]) -> np.ndarray:
        """(n, 2) heights and widths of files as they are decoded.

        Raises:
            RuntimeError: DALI's, where one of them does not decode.
        """
        if self._dali is None:
            self._dali = self._build()
        try:
            (images,) = self._dali.run(path=as_inputs(paths))
        except RuntimeError:
            self._dali = None  # what has failed is not relied upon
            raise
        return np.array(images.shape())[:, :2]

    def trouble(self, path: str, size: np.ndarray) -> str | None:
        """Why a file does not decode to a height and width, or None where it does: tried alone."""
        try:
            now = self.sizes([path])[0]
        except RuntimeError as error:
            return file_trouble(path) or decode_trouble(str(error))
        return None if (now == size).all() else other_size(now, size)

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def

        @pipeline_def
        def alone() -> Any:
            return decoded(fn.external_source(name="path", batch=True), self.cuda)

        dali = alone(batch_size=self.batch_size, prefetch_queue_depth=1, **self.options)
        dali.build()
        return dali


@dataclass(frozen=True)
class Answer:
    """What came of decoding some files.

    Attributes:
        sizes: (n, 2) heights and widths; None where one of the files did not decode.
        trouble: why, in plain words.
        said: what the decoders wrote to stderr meanwhile; they complain of some files that they decode, too.
    """

    sizes: np.ndarray | None
    trouble: str
    said: str


class TrialProcess:
    """A `Trial` on the CPU in a process of its own, which may die and is then started anew. Use as a context manager.

    Args:
        batch_size: most files at once.
        num_threads: DALI's.
    """

    def __init__(self, batch_size: int, num_threads: int) -> None:
        self._command = [sys.executable, "-P", PROGRAM, str(batch_size), str(num_threads)]
        self._stderr = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed at the end)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TrialProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._stderr.close()

    def sizes(self, paths: Sequence[str]) -> Answer:
        """Decode files, `batch_size` at most.

        Raises:
            RuntimeError: the process cannot do its work, whatever the files; the last line that it wrote.
        """
        if self._process is None:
            # Ctrl-C is the caller's: in a session of its own the process does not get it.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(list(paths)).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace")
        self._stderr.seek(0)  # where the process goes on writing: the position is common to both
        self._stderr.truncate()
        if not line.endswith(b"\n"):
            self._process.wait()
            code = self._end()
            if code >= 0:  # Python's own failure, at the start
                raise RuntimeError((said.strip().splitlines() or ["it says nothing"])[-1])
            return Answer(None, f"decoding it ends the process ({signal.Signals(-code).name})", said)
        answer = json.loads(line)
        if isinstance(answer, str):
            return Answer(None, answer, said)
        return Answer(np.array(answer, dtype=np.int64).reshape(-1, 2), "", said)

    def _end(self) -> int:
        """End the process; its exit code, or minus the signal that it died of."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.kill()  # nothing happens to one that is dead already
        process.communicate()
        return process.returncode


def other_size(now: np.ndarray, then: np.ndarray) -> str:
    """What is said of a file that is not the image whose header was read."""
    return f"changed since the sizes were read: {now[0]}x{now[1]}, was {then[0]}x{then[1]}"


def file_trouble(path: str) -> str | None:
    """What is wrong with a file before it comes to decoding it, or None."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return "a folder, not a file"
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return "not a file"
        with open(path, "rb"):
            return "the file is empty" if status.st_size == 0 else None
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except ValueError as error:  # a null byte in the name
        return str(error)


def decode_trouble(message: str) -> str:
    """DALI's failure in plain words."""
    if "'#3'" in message:
        return "not an image, or its header is broken"
    if "'#4'" in message:
        return "an image of a kind that is not supported"
    if "decode" in message:
        return "cut short or damaged"
    return brief(message)


def brief(message: str) -> str:
    """The line of a DALI error that says something."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Stacktrace", "[frame", "Error in", "Critical error"))]
    return (told or lines or ["unknown error"])[0][:200]


def main(batch_size: int, num_threads: int) -> None:
    """Answer until stdin ends: the sizes, or why there are none."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints is no answer
    trial = Trial(batch_size, False, {"num_threads": num_threads, "device_id": None, "exec_dynamic": True})
    for line in sys.stdin.buffer:
        paths = json.loads(line)
        try:
            answer = json.dumps(trial.sizes(paths).tolist())
        except RuntimeError as error:
            answer = json.dumps(decode_trouble(str(error)))
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
