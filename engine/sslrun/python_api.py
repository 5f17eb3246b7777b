"""The Python API: `sslrun.train`, `sslrun.load`, `sslrun.evaluate`, `sslrun.images`. docs/python.md shows it.

It does what the command line does, by the same code, as a guest in the caller's process (`runtime/guest.py`). Importing
it imports no torch.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.commands.evaluation import measure_encoder
from sslrun.config.load import load as load_config
from sslrun.config.paths import absolute
from sslrun.config.tables import Overrides, override_texts

if TYPE_CHECKING:
    import torch

    from sslrun.embedding.encoder import Encoder

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TrainedRun(os.PathLike[str]):
    """A training that is done. Whatever takes the path of a run takes this too.

    Attributes:
        folder: the run folder.
        rows: the rows of its metrics.jsonl in order: `step`, `epoch`, `wall_s`, and the metrics of that moment.
        last: the last value of each metric.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(repr=False)
    last: dict[str, Any] = field(repr=False)

    def __fspath__(self) -> str:
        return os.fspath(self.folder)


def train(
    recipe: PathLike | Mapping[str, Any],
    overrides: Overrides = None,
    *,
    name: str | None = None,
    work_dir: PathLike | None = None,
    resume: bool | PathLike = False,
    restart: bool = False,
) -> TrainedRun:
    """Trains an encoder as a recipe says, like `sslrun train`.

    Progress goes to stderr: a bar in a terminal and in a notebook, lines elsewhere. Ctrl-C saves and then raises
    KeyboardInterrupt, a second one does not save; `resume=True` continues. In another thread than the main one, signals
    are left to the program. Under a launcher (`torchrun script.py`) all ranks call it.

    Args:
        recipe: a TOML file; a recipe that ships, such as "mocov2" or "sslrun:mocov2"; or a dict of the same keys, whose
            `extends` starts from the current folder.
        overrides: a dict of values by dotted keys, such as {"data.views.0.num_views": 2}, or KEY=VALUE texts.
        name: name of the run; by default that of the recipe. A dict has the name of the one recipe that it extends,
            else "recipe".
        work_dir: the folder of run folders; by default the recipe's work_dir.
        resume: True continues from the run's newest intact checkpoint, if there is one; a path from that checkpoint.
        restart: sets the run folder's old run aside, and starts from the beginning.

    Returns:
        The run folder with its metrics.

    Raises:
        UsageError: something is wrong with the recipe or the data, or the run folder holds a run.
        RunFailed: the run cannot go on: too many bad images, a full disk.
        Diverged: loss or gradient became non-finite, or the features collapsed.
        KeyboardInterrupt: Ctrl-C was pressed.
        SystemExit: the process was asked to stop, by SIGTERM for example; what there was is saved.
    """
    texts = override_texts(overrides)
    if work_dir is not None:
        texts += override_texts({"work_dir": os.fspath(work_dir)})
    config = load_config(recipe if isinstance(recipe, Mapping) else os.fspath(recipe), texts, name=name)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    from sslrun.runtime.guest import guest, raise_stop
    from sslrun.runtime.run_files import METRICS, rows
    from sslrun.training import run

    checkpoint = {True: "", False: None}[resume] if isinstance(resume, bool) else os.fspath(resume)
    with guest():
        raise_stop(run(config, checkpoint, None, restart))
    folder = Path(absolute(config.values.get("work_dir", "work_dirs"))) / config.name
    measured_rows = [row for _, row in rows(folder / METRICS)]
    last = {key: value for row in measured_rows for key, value in row.items()}
    return TrainedRun(folder, measured_rows, last)


def load(
    run: PathLike,
    overrides: Overrides = None,
    *,
    recipe: PathLike | None = None,
    device: "str | torch.device | None" = None,
) -> "Encoder":
    """Opens a trained encoder.

    Classes of your own that the recipe names in `custom_imports` must be imported before.

    Args:
        run: a run folder, whose newest intact checkpoint is taken; a checkpoint in one; or a file of weights.
        overrides: as for `train`, over the run's recipe: {"eval.transforms": [...]}, for example, prepares images
            otherwise.
        recipe: the recipe of a file of weights, which has none of its own.
        device: where it computes; by default CUDA if there is a device, unless the recipe says "cpu".

    Raises:
        UsageError: it is no encoder, it is damaged, or weights and recipe do not belong together.
    """
    import torch

    from sslrun.embedding.encoder import Encoder
    from sslrun.plan import device_of
    from sslrun.runtime import distributed
    from sslrun.runtime.guest import guest
    from sslrun.saved import open_saved

    with guest():
        saved = open_saved(Path(run), (), override_texts(overrides), None if recipe is None else Path(recipe))
    if device is None:
        device = device_of(saved.recipe, distributed.local_rank())
    return Encoder(saved, torch.device(device))


def evaluate(
    kind: str,
    run: PathLike,
    overrides: Overrides = None,
    *,
    overlays: Sequence[PathLike] = (),
    recipe: PathLike | None = None,
    directory: PathLike | None = None,
) -> dict[str, Any]:
    """Measures what an encoder has learned, like `sslrun eval KIND RUN`, and keeps the result in eval/ of the run.

    Args:
        kind: "knn", "linear", "finetune", "spectrum", or a name in [eval.extra] of the recipe.
        run: a run folder, a checkpoint in one, or a file of weights.
        overrides: as for `train`, over the run's recipe.
        overlays: TOML files to merge over the run's recipe before the overrides.
        recipe: the recipe of a file of weights.
        directory: where the result goes instead.

    Returns:
        The results by name, such as "knn/top1_pct".

    Raises:
        UsageError: there is no such encoder or evaluation, or there are no images to measure on.
        RunFailed: the features are not finite, or the result could not be written.
        KeyboardInterrupt: Ctrl-C was pressed; the same call goes on.
    """
    from sslrun.runtime.guest import guest, raise_stop

    paths = [Path(overlay) for overlay in overlays]
    own, place = (None if path is None else Path(path) for path in (recipe, directory))
    command = f"sslrun.evaluate({kind!r}, {os.fspath(run)!r}, {overrides!r})"
    with guest():
        code, results, _ = measure_encoder(kind, Path(run), override_texts(overrides), paths, own, place, command)
        raise_stop(code)
    return results


def images(folder: PathLike) -> list[str]:
    """The images below a folder in the order of the rows of `Encoder.embed(folder)`: paths, sorted.

    Hidden folders are left out, and so is what is no image by its suffix.

    Raises:
        UsageError: there is no such folder, or it has no images.
    """
    from sslrun.embedding.images import in_folder

    return list(in_folder(os.fspath(folder)).paths)
