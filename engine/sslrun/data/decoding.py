"""Images decoded outside of any graph that trains, by the same operators: which ones do not decode, and why.

After a batch of a run has failed, this happens in the run's own process. `data check` knows nothing of its images and
decodes them in a process that may die (damaged JPEG 2000 files are seen to end DALI with a segmentation fault) and
whose stderr has the decoders' complaints. That process runs this file, which therefore needs neither torch nor sslrun.

    python decoding.py BATCH_SIZE THREADS FILE    FILE: descriptor of an open file that holds some images;
                                                  in: a line of JSON with their lengths;
                                                  out: a line of JSON with their sizes, or with the reason for none
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PROGRAM = __file__

# DALI keeps host memory from this size on in a pool of its own, not only from 32 MiB on: a batch of decoded images that
# malloc gives back to the system costs 5 % of the decoding in page faults. DALI reads it at its first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "256k")


def decoder_arguments(cuda: bool, hw_decoder_load: float = 0.0, is_gray: bool = False) -> dict[str, Any]:
    """Arguments of `fn.decoders.image` for uint8, H W 3 (RGB) or H W 1, as stored (EXIF rotation not applied).

    Args:
        cuda: whether JPEGs are decoded on the GPU, with libjpeg's interpolation of chroma; nvJPEG repeats it otherwise.
        hw_decoder_load: share of a batch that the GPU's JPEG engine decodes.
        is_gray: whether images become gray; the default is RGB.
    """
    common: dict[str, Any] = {"adjust_orientation": False}
    if is_gray:
        from nvidia.dali import types

        common["output_type"] = types.GRAY  # type: ignore[attr-defined]
    if not cuda:
        return {"device": "cpu", **common}
    return {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": hw_decoder_load, **common}


class Trial:
    """A graph that decodes, and nothing else.

    Args:
        batch_size: maximum number of images at once.
        arguments: of `decoder_arguments`.
        options: options of the DALI pipeline.
    """

    def __init__(self, batch_size: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        self.batch_size, self.arguments, self.options = batch_size, arguments, options
        self._dali: Any = None

    def sizes(self, encoded: Sequence[np.ndarray]) -> np.ndarray:
        """(n, 2) heights and widths of images as they are decoded.

        Raises:
            RuntimeError: DALI's, if one of them does not decode.
        """
        if self._dali is None:
            self._dali = self._build()
        try:
            (images,) = self._dali.run(encoded=encoded)
        except RuntimeError:
            self._dali = None  # a graph that has failed is not used again
            raise
        return np.array(images.shape())[:, :2]

    def trouble(self, encoded: np.ndarray, size: np.ndarray) -> str | None:
        """Why an image does not decode to a height and width, or None if it does: tried alone."""
        try:
            now = self.sizes([encoded])[0]
        except RuntimeError as error:
            return decode_trouble(str(error))
        return None if (now == size).all() else other_size(now, size)

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def

        @pipeline_def
        def alone() -> Any:
            return fn.decoders.image(fn.external_source(name="encoded", batch=True), **self.arguments)

        dali = alone(batch_size=self.batch_size, prefetch_queue_depth=1, **self.options)
        dali.build()
        return dali


@dataclass(frozen=True)
class Answer:
    """The result of decoding some images.

    Attributes:
        sizes: (n, 2) heights and widths; None if one of the images did not decode.
        trouble: why it did not, in a few words.
        stderr: what the decoders wrote meanwhile; they also complain of some images that they decode.
    """

    sizes: np.ndarray | None
    trouble: str
    stderr: str


class TrialProcess:
    """A `Trial` on the CPU in a separate process. If the process dies, another one is started. A context manager.

    Args:
        batch_size: maximum number of images at once.
        num_threads: number of DALI's threads.
    """

    def __init__(self, batch_size: int, num_threads: int) -> None:
        # In memory. Through a pipe, the images would take a change of process for every 64 KB.
        self._images = open(os.memfd_create("sslrun-images"), "wb")  # noqa: SIM115 (closed at the end)
        self._command = [sys.executable, "-P", PROGRAM, *map(str, (batch_size, num_threads, self._images.fileno()))]
        self._stderr = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed at the end)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TrialProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._stderr.close()
        self._images.close()

    def sizes(self, encoded: Sequence[np.ndarray]) -> Answer:
        """Decode at most `batch_size` images, each a one-dimensional uint8 array.

        Raises:
            RuntimeError: the process cannot do its work, whatever the images; the last line that it wrote.
        """
        if self._process is None:
            # Ctrl-C is the caller's: in a session of its own the process does not get it.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,
                pass_fds=[self._images.fileno()],
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._images.seek(0)
        self._images.writelines(image.data for image in encoded)
        self._images.flush()
        try:
            self._process.stdin.write(json.dumps([len(image) for image in encoded]).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace")
        self._stderr.seek(0)  # where the process goes on writing: the position is common to both
        self._stderr.truncate()
        if not line.endswith(b"\n"):
            self._process.wait()
            code = self._end()
            if code >= 0:  # Python's own failure, at the start
                raise RuntimeError((stderr.strip().splitlines() or ["it wrote nothing"])[-1])
            return Answer(None, f"decoding it ends the process ({signal.Signals(-code).name})", stderr)
        answer = json.loads(line)
        if isinstance(answer, str):
            return Answer(None, answer, stderr)
        return Answer(np.array(answer, dtype=np.int64).reshape(-1, 2), "", stderr)

    def _end(self) -> int:
        """End the process; its exit code, or minus the signal that it died of."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.kill()  # has no effect on a process that has ended
        process.communicate()
        return process.returncode


def other_size(now: np.ndarray, then: np.ndarray) -> str:
    """The reason why an image of another size than the index has is bad."""
    return f"changed since the sizes were read: {now[0]}x{now[1]}, was {then[0]}x{then[1]}"


def decode_trouble(message: str) -> str:
    """A failure of DALI in a few words."""
    if "'#3'" in message:
        return "not an image, or its header is broken"
    if "'#4'" in message:
        return "an image of a kind that is not supported"
    if "decode" in message:
        return "cut short or damaged"
    return brief(message)


def brief(message: str) -> str:
    """The line of a DALI error that carries its message."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Stacktrace", "[frame", "Error in", "Critical error"))]
    return (telling or lines or ["unknown error"])[0][:200]


def main(batch_size: int, num_threads: int, images: int) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints goes to stderr
    options = {"num_threads": num_threads, "device_id": None, "exec_dynamic": True}
    trial = Trial(batch_size, decoder_arguments(cuda=False), options)
    while line := sys.stdin.buffer.readline():
        ends = np.cumsum(json.loads(line))
        content = np.frombuffer(mmap.mmap(images, ends[-1], prot=mmap.PROT_READ), dtype=np.uint8)
        try:
            answer = json.dumps(trial.sizes(np.split(content, ends[:-1])).tolist())
        except RuntimeError as error:
            answer = json.dumps(decode_trouble(str(error)))
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
