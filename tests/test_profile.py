"""`sslrun CONFIG --profile N`: parts of a step that add up, operators, a trace; in the run folder and in the report."""

import gzip
import json

import pytest
import torch

import small_run
from sslrun.report.page import render
from sslrun.report.reported_run import read_run
from sslrun.runtime import heartbeat
from sslrun.runtime.profile import NAME, SKIPPED, Parts, profiled

CPU = torch.device("cpu")
PARTS = {"before the step", "reading images", "targets", "forward", "backward", "update", "momentum", "logging"}


@pytest.fixture(scope="module")
def profiled_run(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("profile")
    recipe = small_run.write_recipe(folder, images, steps=10)
    small_run.train(recipe, "--profile", "2", "--set", "monitor.knn_interval=0", "--set", "checkpoint.interval=100")
    return folder / "runs/small"


def test_a_profile_has_every_part_of_a_step_and_they_add_up(profiled_run):
    found = json.loads((profiled_run / "profile/profile.json").read_text())
    assert found["steps"] == found["recorded_steps"] == 2 and found["global_batch"] == 16
    assert found["parts"].keys() >= PARTS and min(found["parts"].values()) > 0
    assert found["step_ms"] == pytest.approx(sum(found["parts"].values()))
    calls = {each["name"]: each["calls"] for each in found["operators"]}
    assert calls["aten::convolution_backward"] == 20  # of one ResNet-18, in each of the two steps
    assert not PARTS & calls.keys()
    text = (profiled_run / "profile/table.txt").read_text()
    assert len(text.splitlines()) < 60 and all(name[: NAME - 2] in text for name in [*PARTS, *calls])


def test_the_trace_shows_the_parts(profiled_run):
    with gzip.open(profiled_run / "profile/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    counts = {name: sum(e.get("name") == name and e.get("cat") == "user_annotation" for e in events) for name in PARTS}
    assert counts == dict.fromkeys(PARTS, 2)


def test_the_run_is_the_same_and_complete(profiled_run, tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=10)
    small_run.train(recipe, "--set", "monitor.knn_interval=0", "--set", "checkpoint.interval=100")
    losses = [
        [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (profiled_run, tmp_path / "runs/small")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_report_shows_it_once_it_is_there(profiled_run, tmp_path):
    page = render([read_run(profiled_run, None)], has_images=False)
    assert "Where the time goes" in page and "aten::convolution_backward" in page
    stored = profiled_run / "profile/profile.json"
    text = stored.read_text()
    try:
        stored.write_text(text.replace('"step_ms"', '"step"'))
        assert "profile/profile.json is damaged" in render([read_run(profiled_run, None)], has_images=False)
        stored.unlink()
        assert "Where the time goes" not in render([read_run(profiled_run, None)], has_images=False)
    finally:
        stored.write_text(text)


def test_a_number_of_steps_is_asked_for(capsys):
    for words in (["--profile", "0"], ["--profile", "few"]):
        with pytest.raises(SystemExit) as stopped:
            small_run.call(capsys, "quickstart", *words)
        assert stopped.value.code == 2
        assert f"expected a number of steps from 1, not {words[1]!r}" in capsys.readouterr().err


@pytest.mark.parametrize("steps_done", [SKIPPED, SKIPPED + 2, SKIPPED + 3])
def test_a_run_that_ends_early_leaves_what_there_is(tmp_path, caplog, steps_done):
    with profiled(2, tmp_path, CPU, 8):
        for step in range(steps_done):
            heartbeat.at("before the step", step + 1)
            torch.ones(2) + 1
            heartbeat.at("forward")
    if steps_done < SKIPPED + 3:
        assert not (tmp_path / "profile").exists() and "no profile" in caplog.text
    else:
        found = json.loads((tmp_path / "profile/profile.json").read_text())
        assert found["recorded_steps"] == 1 and found["parts"].keys() == {"before the step", "forward"}
    heartbeat.at("forward")  # nobody listens any longer


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    with profiled(1, tmp_path, CPU, 8):
        for step in range(SKIPPED + 3):
            heartbeat.at("before the step", step + 1)
    assert "the profile could not be written: " in caplog.text


def test_every_moment_belongs_to_one_part():
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    parts = Parts(lambda: next(now))
    parts.enter("unseen")  # before the start
    parts.start("a")
    parts.enter("b")
    parts.enter("a")
    parts.enter("a")
    parts.stop()
    parts.enter("unseen")
    assert parts.seconds == {"a": 1.0 + 4.0 + 8.0, "b": 2.0}
