"""The `[data]` table of a recipe."""

from dataclasses import dataclass, field
from typing import Literal

from sslrun.data.sources import Source
from sslrun.data.sources.subset import holdout_size, split_holdout
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError


@dataclass
class DataConfig:
    """Samples, views and batches.

    Attributes:
        source: source of the training images.
        views: groups of views of each image; each group has its own size and transforms.
        samples_per_gpu: number of samples of one BatchNorm group (the published batch per GPU). How many samples are on
            a device at once is set by engine.micro_batch.
        workers_per_gpu: number of threads that decode in each process, and of threads that run the exact stage. One
            more reads files, and 8 or more where that takes long.
        drop_last: whether an epoch leaves out the samples that do not fill a global batch; otherwise the batch is
            filled up with the epoch's first samples, in other crops.
        holdout: images to measure on: another source, or the fraction of `source` to keep out of training.
        augment: how transforms are computed: "exact" follows PIL's arithmetic, "dali" does everything in DALI; "auto"
            is exact.
        hw_decoder_load: share of a batch, 0 to 1, decoded by the JPEG engine of GPUs that have one (A100, H100, ...),
            the rest by CUDA and the CPU. The engine's pixels differ slightly from CUDA's. At 0 and at 1 an image's
            pixels do not depend on its batch; in between, its place in the batch decides.
        prefetch: number of batches prepared ahead at each stage: being read, in DALI's queue, and finished.
        max_bad_pct: percentage of unreadable images above which the run stops.
    """

    source: Source
    views: list[ViewGroup] = field(default_factory=list)
    samples_per_gpu: int = 32
    workers_per_gpu: int = 4
    drop_last: bool = True
    holdout: Source | float | None = None
    augment: Literal["auto", "dali", "exact"] = "auto"
    hw_decoder_load: float = 0.0
    prefetch: int = 2
    max_bad_pct: float = 1.0

    def __post_init__(self) -> None:
        for name in ("samples_per_gpu", "workers_per_gpu", "prefetch"):
            if getattr(self, name) < 1:
                raise UsageError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise UsageError(f"data.hw_decoder_load must lie between 0 and 1, not {self.hw_decoder_load}")
        if not 0 <= self.max_bad_pct <= 100:
            raise UsageError(f"data.max_bad_pct must lie between 0 and 100, not {self.max_bad_pct}")
        if not self.views:
            raise UsageError("data.views is empty: a recipe needs at least one group of views ([[data.views]])")
        self.views = [group.for_channels(self.source.channels) for group in self.views]
        if isinstance(self.holdout, Source) and self.holdout.channels != self.source.channels:
            counts = f"{self.holdout.channels} channels, and those of data.source {self.source.channels}"
            raise UsageError(f"the images of data.holdout have {counts}")
        if isinstance(self.holdout, (int, float)) and not 0 < self.holdout < 1:
            raise UsageError(f"data.holdout must be a source or a fraction between 0 and 1, not {self.holdout}")

    @property
    def nominal_size(self) -> int | None:
        """Number of training samples, if it is known without the data."""
        size = self.source.nominal_size
        if size is None or self.holdout is None or isinstance(self.holdout, Source):
            return size
        return size - holdout_size(size, self.holdout)

    def make_nothing(self) -> None:
        """Keep `open` from making files, for a dry run."""
        self.source.make_nothing()
        if isinstance(self.holdout, Source):
            self.holdout.make_nothing()

    def open(self) -> tuple[Source, Source | None]:
        """Open the source or sources: training samples, and held-out ones or None.

        Raises:
            UsageError: something is missing; one line.
        """
        self.source.open("data.source")
        if self.holdout is None:
            return self.source, None
        if isinstance(self.holdout, Source):
            self.holdout.open("data.holdout")
            return self.source, self.holdout
        return split_holdout(self.source, self.holdout)
