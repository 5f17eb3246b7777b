"""`sslrun eval finetune`: trains an encoder and a classifier together, and classifies the test images.

The training is a separate run in eval/ of the encoder's run folder; the same command continues it where it stopped.
"""

import os
import time
from pathlib import Path

from sslrun.config.load import composed
from sslrun.data.classes import matched
from sslrun.errors import UsageError
from sslrun.evaluation.finetune_recipe import Finetune, recipe
from sslrun.evaluation.frozen_encoder import labeled, labels
from sslrun.measure import Results, described, keep, name_of, sources
from sslrun.runtime import checkpoint, distributed
from sslrun.runtime.log import start_logging
from sslrun.runtime.run_files import CHECKPOINTS, LOSS, METRICS, RATE, is_number, rows
from sslrun.saved import Saved
from sslrun.training import run

MOST_CLASSES = 100_000  # above, labels must use a tenth of the numbers
CURVE = ("step", "epoch", "wall_s", LOSS, RATE, "test/top1_pct", "test/top5_pct")


def finetune(kind: str, config: Finetune, saved: Saved, command: str, directory: Path) -> tuple[int, Results, Path]:
    """Trains, tests, and writes the result.

    Args:
        kind: name of the evaluation.
        config: how to fine-tune.
        saved: the encoder.
        command: the user's command line.
        directory: folder of the run folder and of the result.

    Returns:
        The exit code; the results, empty unless the code is 0; and the file with the results, or the run folder.
    """
    start_logging(distributed.rank(), level=saved.recipe.log.level)
    train, test = labeled(*sources(saved.recipe))
    test = matched(train, test, says=False)  # the run says it
    num_classes, distinct = int(labels(train).max()) + 1, len(labels(train).unique())
    if num_classes > max(MOST_CLASSES, 10 * distinct):  # the classifier has an output for each number
        raise UsageError(f"{train!r} has labels up to {num_classes - 1} for {distinct} classes: number them from 0")
    name = name_of(kind, saved)
    tables = saved.config.values.get("eval", {})
    values = recipe(
        saved.config.values,
        config,
        tables.get(kind) or tables.get("extra", {}).get(kind, {}),
        size=saved.recipe.data.views[0].size,
        num_classes=num_classes,
        weights=os.path.abspath(saved.weights),
        work_dir=str(directory),
    )
    folder, begin = directory / name, time.perf_counter()
    # A fine-tuning that was killed before its first save starts again.
    restart = folder.exists() and checkpoint.newest_good(folder / CHECKPOINTS) is None
    code = run(composed(values, name, f"fine-tuning of {saved.weights}"), "", None, restart)
    if code:
        return code, {}, folder
    results: Results = {}
    path = directory / f"{name}.json"
    if distributed.rank() == 0:
        curve = [{key: row[key] for key in CURVE if key in row} for _, row in rows(folder / METRICS)]
        last = [row for row in curve if is_number(row.get("test/top1_pct"))][-1]
        results = {f"finetune/{key[5:]}": last[key] for key in CURVE if key.startswith("test/") and key in last}
        results |= {"curve": curve}
        wall_s = round(time.perf_counter() - begin, 2)
        keep(
            path,
            kind,
            saved,
            command,
            {"recipe": values, "data": described(train, test), "wall_s": wall_s},
            results,
        )
    return code, results, path
