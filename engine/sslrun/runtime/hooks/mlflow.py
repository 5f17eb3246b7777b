"""The log hook for MLflow."""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslrun.runtime.durable import replace_file
from sslrun.runtime.early_signals import INTERRUPTED, PREEMPTED
from sslrun.runtime.hooks.base import Hook, earlier_rows, flat, library

logger = logging.getLogger(__name__)

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FILE = "mlflow.json"  # in the run folder: which MLflow run it is
# What every version of the server takes: characters of a key and of a value, parameters in one request.
MOST_OF_KEY, MOST_CHARACTERS, MOST_PARAMETERS = 250, 500, 100


@dataclass
class MLflow(Hook):
    """Sends the rows to MLflow, as one run over all resumes, with the recipe as its parameters.

    Args:
        tracking_uri: server or data base, such as "http://host:5000" or "sqlite:////home/me/mlflow.db"; by default what
            MLFLOW_TRACKING_URI says, or MLflow's own default, `mlflow.db` in the current folder.
        experiment: name of the experiment.
        run_name: name of the run; by default the recipe's.
        tags: tags with their values. Those of `log.tags` become tags without a value.
        description: a longer description.
    """

    tracking_uri: str | None = None
    experiment: str = "sslrun"
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    description: str | None = None

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports to its makers, also without a server
        mlflow = library("mlflow", "mlflow")
        self._entities = library("mlflow.entities", "mlflow")
        for loud in ("mlflow", "alembic"):  # each migration of a new data base would be a line
            logging.getLogger(loud).setLevel(logging.WARNING)
        before = _read(folder / FILE)
        with _hurried():
            self._start(mlflow, before, folder, name, values)
        self.missed = list(earlier_rows(folder)) if before else []

    def write(self, row: Mapping[str, float]) -> None:
        step, now = int(row["step"]), int(1000 * time.time())
        new = {name: value for name, value in row.items() if name != "step" and step > self._last_step(name)}
        metrics = [self._entities.Metric(name, value, now, step) for name, value in new.items()]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)
            self._last |= dict.fromkeys(new, step)

    def close(self) -> None:
        status = {0: "FINISHED", PREEMPTED: "KILLED", INTERRUPTED: "KILLED"}.get(self.exit_code, "FAILED")
        self._client.set_terminated(self._run_id, status)

    def _start(self, mlflow: Any, before: dict[str, str], folder: Path, name: str, values: dict[str, Any]) -> None:
        """Makes the run at MLflow, or goes on with the one that an earlier start recorded."""
        uri = self.tracking_uri or before.get("tracking_uri") or mlflow.get_tracking_uri()
        self._client = mlflow.MlflowClient(uri)
        self._last: dict[str, int] = {}
        if before.get("tracking_uri") == uri:
            self._run_id = before["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = self._begin(uri, folder, name, values)
        logger.info("MLflow: run %s of experiment %s, at %s", self._run_id, self.experiment, uri)

    def _begin(self, uri: str, folder: Path, name: str, values: dict[str, Any]) -> str:
        """Makes the run at MLflow; returns its id."""
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        tags = {**dict.fromkeys(values.get("log", {}).get("tags", []), ""), **self.tags}
        if self.description is not None:
            tags["mlflow.note.content"] = self.description
        run = self._client.create_run(experiment, run_name=self.run_name or name, tags=tags)
        named = {re.sub(r"[^\w. /-]", "_", key)[:MOST_OF_KEY]: str(value) for key, value in flat(values)}
        parameters = [
            self._entities.Param(key, text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}...")
            for key, text in named.items()
        ]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(run.info.run_id, params=parameters[first : first + MOST_PARAMETERS])
        record = {"tracking_uri": uri, "run_id": run.info.run_id}
        replace_file(folder / FILE, json.dumps(record).encode())
        return str(run.info.run_id)

    def _last_step(self, name: str) -> int:
        """Up to which step the server has a metric, so that no point is shown twice: not after a resume, nor those that
        several rows of a step have in common."""
        if name not in self._last:
            history = self._client.get_metric_history(self._run_id, name)
            self._last[name] = max((point.step for point in history), default=-1)
        return self._last[name]


@contextlib.contextmanager
def _hurried() -> Iterator[None]:
    """A server that does not answer is tried for seconds, not for the minutes that suit the middle of a run."""
    is_ours = RETRIES not in os.environ
    if is_ours:
        os.environ[RETRIES] = "2"
    try:
        yield
    finally:
        if is_ours:
            del os.environ[RETRIES]


def _read(file: Path) -> dict[str, str]:
    """What an earlier start recorded; nothing if it recorded nothing."""
    try:
        found = json.loads(file.read_bytes())
        return {"tracking_uri": str(found["tracking_uri"]), "run_id": str(found["run_id"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
