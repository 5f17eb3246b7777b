"""`Shapes`: images drawn on first use, so that everything can be tried without a download."""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np

from sslrun.config.annotations import DefaultOf
from sslrun.config.paths import FilePath, stated
from sslrun.data.sources import shapes_drawing as drawing
from sslrun.data.sources.files import FileSource
from sslrun.data.sources.paths import Paths
from sslrun.errors import UsageError

NUM_IMAGES = {"train": 5000, "test": 1000}  # by split

logger = logging.getLogger("sslrun")


class Shapes(FileSource):
    """Ten kinds of ornamented silhouettes strewn over woven backgrounds: arrow, bolt, cross, drop, flower, heart,
    moon, ring, star, triangle.

    The kind is the label. Number, place, size, turn, colors, background and light are random, and all kinds have the
    same area, so that neither raw pixels nor an untrained network tell the kinds apart; see `shapes_drawing.py`.
    Single ones are easier: an untrained network gets about 40 % of them right.

    Args:
        root: folder for the images, one subfolder for each set of arguments; drawn there at first use (about 5 s).
        num_images: number of images, the ten kinds in turn; by default 5000 for "train" and 1000 for "test".
        size: height and width of the images in pixels.
        split: part of the data set, "train" or "test"; they have no image in common.
        seed: seed of the drawing.
        rotation: smallest and largest rotation of each silhouette in degrees; [0, 0] is upright.
        lighting: smallest and largest brightness of the light; 1 leaves colors as they are.
        layout: arrangement of an image, many silhouettes "strewn" over it or a "single" one near its center.
    """

    lists_storage = False  # it draws, and removes what it has begun when Ctrl-C comes

    def __init__(
        self,
        root: FilePath = "data/shapes",
        num_images: Annotated[int | None, DefaultOf("split", NUM_IMAGES)] = None,
        size: int = 80,
        split: Literal["train", "test"] = "train",
        seed: int = 0,
        rotation: Sequence[float] = (-20.0, 20.0),
        lighting: Sequence[float] = (0.75, 1.15),
        layout: Literal["strewn", "single"] = "strewn",
    ) -> None:
        for name, value, least in (("rotation", rotation, -360.0), ("lighting", lighting, 0.0)):
            if len(value) != 2 or not least <= value[0] <= value[1]:
                raise UsageError(f"{name} must be [smallest, largest], {least:g} or more, not {list(value)}")
        if num_images is None:
            num_images = NUM_IMAGES[split]
        if num_images < 1 or not 16 <= size <= 1024:
            raise UsageError(f"num_images must be at least 1 and size 16 to 1024, not {num_images} and {size}")
        self.root = root
        self.split = split
        self.nominal_size = num_images
        stream = {"train": 0, "test": 1}[split]
        turn, light = ((float(low), float(high)) for low, high in (rotation, lighting))
        self.spec = drawing.Spec(num_images, size, stream, seed, turn, light, layout)

    def __repr__(self) -> str:
        return f"Shapes({self.split!r}, {self.spec.num_images} images of {self.spec.size} px)"

    def list_samples(self, key: str) -> Paths:
        spec = self.spec
        text = f"{drawing.VERSION} {drawing.as_json(spec)}"
        fingerprint = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        folder = os.path.join(os.path.abspath(self.root), f"{self.split}-{spec.num_images}-{spec.size}px-{fingerprint}")
        if self._makes_files:
            try:
                _draw_once(folder, spec)
            except OSError as error:
                advice = f"set {key}.root to a folder where the images can be drawn"
                raise UsageError(f"{stated(folder, f': {error.strerror or error}')}: {advice}") from None
        self.class_names = list(drawing.CLASS_NAMES)
        self.labels = np.arange(spec.num_images) % len(drawing.CLASS_NAMES)
        return Paths(folder, map(drawing.relative_path, range(spec.num_images)))

    @property
    def sizes(self) -> np.ndarray:
        return np.broadcast_to(np.int32(self.spec.size), (self.spec.num_images, 2))


def _draw_once(folder: str, spec: drawing.Spec) -> None:
    """Draw into a temporary folder and rename it, so that the folder is complete or absent if a process dies."""
    if os.path.isdir(folder):
        return
    root = os.path.dirname(folder)
    os.makedirs(root, exist_ok=True)
    with _locked(root):
        if os.path.isdir(folder):
            return
        start = time.monotonic()
        logger.info("drawing %d images into %s", spec.num_images, folder)
        unfinished = tempfile.mkdtemp(dir=root, prefix=".drawing-")
        try:
            os.chmod(unfinished, 0o755)
            _draw(unfinished, spec)
            with contextlib.suppress(FileExistsError, OSError):  # drawn by another machine meanwhile
                os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        logger.info("drawn in %.1f s", time.monotonic() - start)


def _draw(folder: str, spec: drawing.Spec) -> None:
    """One process per core, at most eight. They are started as programs: forking a process with threads is not safe."""
    for name in drawing.CLASS_NAMES:
        os.mkdir(os.path.join(folder, name))
    spec_file = os.path.join(folder, "spec.json")
    with open(spec_file, "w", encoding="utf-8") as file:
        file.write(drawing.as_json(spec))
    count = min(len(os.sched_getaffinity(0)), 8, 1 + spec.num_images // 200)
    if count == 1:
        drawing.main(folder, spec_file, 0, 1)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", drawing.__file__, folder, spec_file, str(first), str(count)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in range(count)
    ]
    try:
        for process in processes:
            stderr = process.communicate()[1]
            if process.returncode != 0:
                raise OSError(0, f"drawing failed: {(stderr.strip().splitlines() or ['killed'])[-1]}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _locked(root: str) -> Iterator[None]:
    """One process draws at a time. If the file system has no locks, two draw the same and the first rename wins."""
    with open(os.path.join(root, ".lock"), "a", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
