"""The hook for MLflow, with the real library and a store on the disk: one run over resumes, each point once."""

import json
import os
from pathlib import Path

import pytest

from sslrun.errors import RunFailed
from sslrun.runtime.hooks.mlflow import MLflow
from sslrun.runtime.log import RunLog

pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


def run_log(folder: Path, hook: MLflow, first_step: int = 0) -> RunLog:
    folder.mkdir(exist_ok=True)
    values = {"optimizer": {"lr": 0.5, "name?": "n" * 900}, "views": [{"size": 8}], "log": {"tags": ["cpu"]}}
    values["many"] = {f"value_{i}": i for i in range(250)}
    options = {"name": "recipe", "values": values, "total_steps": 9, "steps_per_epoch": 3}
    return RunLog(folder, first_step=first_step, hooks=[hook], **options)


def write(one: RunLog, *steps: int) -> None:
    for step in steps:
        one.write(step, {"train/loss": step / 2})
        one.write(step, {"knn/top1_pct": 10.0 * step})


@pytest.mark.parametrize("store", ["files", pytest.param("the default", marks=pytest.mark.nightly)])
def test_one_run_over_resumes_with_each_point_once(tmp_path, monkeypatch, store):
    import mlflow

    folder, uri = tmp_path / "run", f"file://{tmp_path}/mlruns"
    if store == "files":  # the data base takes 8 s for its tables
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    else:
        pytest.importorskip("sqlalchemy")
        uri = f"sqlite:///{tmp_path}/mlflow.db"
    one = run_log(folder, MLflow(experiment="birds", run_name="seed 1", tags={"team": "a"}, description="a note"))
    write(one, 1, 2, 3)
    one.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))  # the run was killed; its checkpoint is of step 2
    resumed = run_log(folder, MLflow(), first_step=2)
    write(resumed, 3, 4)
    resumed.close()

    record = json.loads((folder / "mlflow.json").read_text())
    assert record["tracking_uri"] == uri
    client = mlflow.MlflowClient(record["tracking_uri"])
    experiment = client.get_experiment_by_name("birds")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (record["run_id"], "seed 1", "FINISHED")
    assert run.data.tags.items() >= {"team": "a", "cpu": "", "mlflow.note.content": "a note"}.items()
    parameters = run.data.params
    assert parameters["optimizer.lr"] == "0.5" and parameters["views"] == '[{"size": 8}]'
    assert len(parameters["optimizer.name_"]) == 500 and parameters["many.value_249"] == "249"
    for name, factor in (("train/loss", 0.5), ("knn/top1_pct", 10.0), ("epoch", 1 / 3)):
        points = [(point.step, point.value) for point in client.get_metric_history(record["run_id"], name)]
        assert points == [(step, pytest.approx(step * factor)) for step in (1, 2, 3, 4)]


def test_it_shows_how_the_run_ended(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, shown = f"file://{tmp_path}/mlruns", []

    def status() -> str:
        record = json.loads((tmp_path / "run/mlflow.json").read_text())
        return mlflow.MlflowClient(uri).get_run(record["run_id"]).info.status

    for code in (75, 130, 3, 0):
        one = run_log(tmp_path / "run", MLflow(tracking_uri=uri))
        shown.append(status())
        one.close(code)
        shown.append(status())
    assert shown == ["RUNNING", "KILLED", "RUNNING", "KILLED", "RUNNING", "FAILED", "RUNNING", "FINISHED"]


def test_a_server_that_does_not_answer_ends_a_new_run_only(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    hook = MLflow(tracking_uri="http://127.0.0.1:9")
    with pytest.raises(RunFailed, match=r"log\.hooks: MLflow cannot be opened: .*127\.0\.0\.1.*"):
        run_log(tmp_path / "run", hook)
    resumed = run_log(tmp_path / "run", hook, first_step=2)
    write(resumed, 3)
    resumed.close()
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("sslrun.runtime.hooks")]
    assert line.startswith("log.hooks: MLflow cannot be opened and gets no rows: ")
