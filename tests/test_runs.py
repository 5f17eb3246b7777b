"""`sslrun runs`: it lists what run folders hold, tells dead runs from running ones, and skips nothing for damage."""

import contextlib
import csv
import io
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import small_run
from sslrun.cli import main
from sslrun.errors import UsageError
from sslrun.runs import RunSummary, as_json, summarize
from sslrun.runtime import folder_lock, run_files
from sslrun.runtime.run_files import RunFiles, newest_rows
from sslrun.runtime.run_folder import RunFolder

RECIPE = {"epochs": 10, "seed": 1}


def listed(capsys, root: Path) -> dict[str, dict]:
    """The output of --json, by folder."""
    capsys.readouterr()
    assert main(["runs", str(root), "--json"]) == 0
    return {os.path.relpath(one["path"], root): one for one in json.loads(capsys.readouterr().out)}


def table(capsys, root: Path) -> list[str]:
    capsys.readouterr()
    assert main(["runs", str(root)]) == 0
    return capsys.readouterr().out.splitlines()


def write_rows(path: Path, *rows: dict) -> None:
    with open(path / "metrics.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def training(step: int, loss: float | None) -> dict:
    return {"step": step, "epoch": step / 5, "wall_s": 1.5, "train/loss": loss, "speed/images_per_s": 100.0 + step}


def test_the_values_of_a_finished_run(capsys, trained):
    (name, run), *others = listed(capsys, trained.parent).items()
    rows = small_run.metrics(trained)
    assert name == trained.name and not others
    assert run["state"] == "done" and run["exit_code"] == 0 and run["error"] is None
    assert run["step"] == rows[-1]["step"] == 6 and run["epoch"] == rows[-1]["epoch"]
    assert run["epochs"] == pytest.approx(rows[-1]["epoch"]), "max_iters is the length"
    last = [row for row in rows if "train/loss" in row][-1]
    assert (run["loss"], run["images_per_s"]) == (last["train/loss"], last["speed/images_per_s"])
    assert run["best_knn_top1_pct"] == max(row["knn/top1_pct"] for row in rows if "knn/top1_pct" in row)
    assert run["tags"] == [] and run["best"] == {}
    assert (run["ranks"], run["nodes"]) == (1, 1) and [start["step"] for start in run["starts"]] == [0]
    alone = listed(capsys, trained)["."]
    assert {**alone, "age_s": run["age_s"]} == run and alone["age_s"] >= run["age_s"]


@pytest.mark.parametrize(
    ("state", "code", "shown"),
    [
        ("done", 0, "done"),
        ("pre-empted", 75, "pre-empted"),
        ("failed", 3, "failed (3)"),
        ("interrupted", 130, "interr"),
    ],
)
def test_recorded_states(capsys, tmp_path, state, code, shown):
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as folder:
        write_rows(folder.path, {"step": 0, "knn/top1_pct": 31.0}, training(5, 2.5), {"step": 5, "knn/top1_pct": 30.0})
        folder.record_state(state, code, error="because")
    found = listed(capsys, tmp_path)["run"]
    assert (found["state"], found["exit_code"], found["error"]) == (state, code, "because")
    assert (found["step"], found["epoch"], found["epochs"], found["loss"]) == (5, None, 10.0, 2.5)
    assert found["best_knn_top1_pct"] == 31.0 and 0 <= found["age_s"] < 3600
    assert shown in table(capsys, tmp_path)[1]


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds a run folder's lock until it is killed."""
    holder = small_run.python(HOLDER, path / ".lock", stdin=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_run_whose_lock_is_free_has_died(capsys, tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, resume=None):
        pass
    state = tmp_path / "run" / "state.json"
    record = json.loads(state.read_text())
    assert record["state"] == "running"
    with hold(tmp_path / "run") as holder:
        state.write_text(json.dumps({**record, "pid": holder.pid}))
        assert listed(capsys, tmp_path)["run"]["state"] == "running"
        state.write_text(json.dumps({**record, "pid": 1, "host": "another"}))
        assert listed(capsys, tmp_path)["run"]["state"] == "running"
        holder.kill()
    assert listed(capsys, tmp_path)["run"]["state"] == "died", "the lock is free, the host another one"
    state.write_text(json.dumps({**record, "pid": os.getppid()}))
    assert listed(capsys, tmp_path)["run"]["state"] == "died", "the process id now belongs to another process"
    state.write_text(json.dumps({**record, "state": "done", "pid": holder.pid}))
    assert listed(capsys, tmp_path)["run"]["state"] == "done"
    # Without a lock file the process id decides, if it is one of this host.
    (tmp_path / "run" / ".lock").unlink()
    for pid, host, expected in [
        (holder.pid, socket.gethostname(), "died"),
        (os.getppid(), socket.gethostname(), "running"),
        (holder.pid, "another", "running"),
        ("many", socket.gethostname(), "running"),
    ]:
        state.write_text(json.dumps({**record, "pid": pid, "host": host}))
        assert listed(capsys, tmp_path)["run"]["state"] == expected, (pid, host)


def test_listing_neither_takes_nor_releases_a_lock(capsys, tmp_path):
    def is_locked() -> bool:
        done = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], input="", capture_output=True)
        return done.returncode != 0

    with RunFolder(tmp_path, RECIPE, resume=None):
        assert listed(capsys, tmp_path)["."]["state"] == "running" and is_locked()
    assert not is_locked()


def test_a_start_is_not_refused_because_another_process_asks_for_the_lock(tmp_path, monkeypatch):
    """Asking takes a shared lock for an instant. Negative control: a start is refused if that lock stays."""
    monkeypatch.setattr(folder_lock, "RETRY_S", 1.0)
    asker = HOLDER.replace("LOCK_EX", "LOCK_SH").replace(
        "sys.stdin.read()", "import time; time.sleep(SECONDS); os.close(descriptor)"
    )
    (tmp_path / ".lock").touch()
    for seconds, is_refused in ((0.05, False), (10, True)):
        code = asker.replace("SECONDS", str(seconds))
        with small_run.python(code, tmp_path / ".lock") as process:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            with pytest.raises(UsageError, match="in use by") if is_refused else contextlib.nullcontext():
                RunFolder(tmp_path, RECIPE, resume=None).close()
            process.kill()


def test_which_folders_are_searched(capsys, tmp_path):
    for name in ("b", "a/nested", ".hidden/run", "elsewhere/run"):
        with RunFolder(tmp_path / name, RECIPE, resume=None) as folder:
            folder.record_state("done", 0)
    (tmp_path / "b" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "step_00000001" / "state.json").write_text("{}")
    (tmp_path / "only" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "only" / "checkpoints" / "step_00000001" / "state.json").write_text("{}")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "no run").mkdir()
    assert list(listed(capsys, tmp_path)) == ["a/linked", "a/nested", "b"]
    assert [line.split()[0] for line in table(capsys, tmp_path)] == ["run", "a/linked", "a/nested", "b"]


def test_the_best_evaluations_are_listed(capsys, tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as folder:
        folder.eval.mkdir()
        for name, value in (("a", 70.5), ("b", 71.25), ("c", None)):
            (folder.eval / f"linear_{name}.json").write_text(
                json.dumps({"results": {"linear/top1_pct": value, "k": 1}})
            )
        (folder.eval / "knn.json").write_text('{"results": []}')
        (folder.eval / "spectrum.json").write_text("{")
    assert listed(capsys, tmp_path)["run"]["evaluations"] == {"linear/top1_pct": 71.25}


@pytest.fixture
def three(tmp_path) -> Path:
    """A folder of three runs: a has the best k-NN early, b the best loss, c has neither yet."""
    rows = {
        "a": [(0, None, 50.0), (5, 2.0, 71.23456789), (10, 1.5, 60.0)],
        "b": [(5, 1.25, None), (10, None, 55.5)],
        "c": [],
    }
    for name, values in rows.items():
        recipe = {**RECIPE, "log": {"tags": ["paper", name]}}
        with RunFolder(tmp_path / name, recipe, resume=None) as folder:
            for step, loss, accuracy in values:
                row = {"step": step, "epoch": step / 5, "train/loss": loss, "knn/top1_pct": accuracy}
                write_rows(folder.path, {key: value for key, value in row.items() if value is not None})
            folder.record_state("done", 0)
    (tmp_path / "b/eval").mkdir()
    result = {"epoch": 2.0, "step": 10, "results": {"linear/top1_pct": 80.123456789, "grid": []}}
    (tmp_path / "b/eval/linear.json").write_text(json.dumps(result))
    return tmp_path


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        ("knn/top1_pct", "abc"),  # higher is better
        ("train/loss", "bac"),  # lower is better
        ("loss", "bac"),  # the last one
        ("linear/top1_pct", "bac"),  # of an evaluation
        ("run", "abc"),
        ("k-NN", "abc"),
    ],
)
def test_the_best_run_is_first_and_one_without_the_metric_last(capsys, three, metric, order):
    assert main(["runs", str(three), "--sort", metric, "--json"]) == 0
    assert [Path(one["path"]).name for one in json.loads(capsys.readouterr().out)] == list(order)


def test_the_best_value_is_shown_with_its_epoch(capsys, three):
    words = ["runs", str(three), "--best", "knn/top1_pct", "--sort", "train/loss"]
    assert main([*words, "--json"]) == 0
    b, a, c = json.loads(capsys.readouterr().out)
    assert a["best"]["knn/top1_pct"] == {"value": 71.23456789, "epoch": 1.0, "step": 5}
    assert b["best"]["train/loss"] == {"value": 1.25, "epoch": 1.0, "step": 5} and c["best"] == {}
    assert main(words) == 0
    header, first, second, _ = capsys.readouterr().out.splitlines()
    assert header.endswith(f"{'best knn/top1_pct':>19}  {'best train/loss':>18}")
    assert first.endswith("55.5 after 2 epochs  1.25 after 1 epoch")
    assert second.endswith(" 71.2 after 1 epoch  1.5 after 2 epochs")


def test_csv_has_every_digit(capsys, three):
    assert main(["runs", str(three), "--csv", "--best", "knn/top1_pct", "--best", "linear/top1_pct"]) == 0
    a, b, c = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (a["best knn/top1_pct"], a["best knn/top1_pct: epoch"]) == ("71.23456789", "1.0")
    assert (b["best linear/top1_pct"], b["best linear/top1_pct: epoch"]) == ("80.123456789", "2.0")
    assert (b["tags"], b["exit_code"], b["loss"]) == ("paper;b", "0", "1.25")
    assert c["loss"] == c["best knn/top1_pct"] == "" and c["path"] == str(three / "c")


def test_the_ranks_of_all_starts(capsys, tmp_path):
    for name, starts in {
        "alone": [(0, 1, 1, "cpu"), (5, 1, 1, "cuda")],
        "resumed": [(0, 16, 2, "cuda"), (5, 16, 2, "cuda"), (10, 8, 1, "cuda")],
        "often": [(step, 8 - step, 1, "cpu") for step in range(5)],
    }.items():
        for place, start in enumerate(starts):
            with RunFolder(tmp_path / name, RECIPE, resume=None if place == 0 else "a checkpoint") as folder:
                write_rows(folder.path, training(1, 2.0))
                folder.record_ranks(*start)
                folder.record_state("done", 0)
    for name, starts in {"damaged": [None, {"step": "x", "ranks": 2.5}], "old": [{"step": 0, "ranks": 4}]}.items():
        shutil.copytree(tmp_path / "alone", tmp_path / name)
        (tmp_path / name / "machine.json").write_text(json.dumps({"starts": starts}))
    found = listed(capsys, tmp_path)
    assert found["resumed"]["starts"] == [
        {"step": 0, "ranks": 16, "nodes": 2, "device": "cuda"},
        {"step": 10, "ranks": 8, "nodes": 1, "device": "cuda"},
    ]
    assert (found["resumed"]["ranks"], found["resumed"]["nodes"]) == (8, 1)
    assert (found["old"]["ranks"], found["old"]["nodes"]) == (4, None)
    assert found["damaged"]["starts"] == [{"step": None, "ranks": None, "nodes": None, "device": None}]
    assert main(["runs", str(tmp_path), "--csv"]) == 0
    cells = {Path(row["path"]).name: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert (cells["resumed"]["ranks"], cells["resumed"]["starts"]) == ("8", "0:16;10:8")
    assert (cells["damaged"]["ranks"], cells["damaged"]["starts"]) == ("", ":")
    assert main(["runs", str(tmp_path), "--sort", "ranks"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    end = header.index("ranks") + len("ranks")
    shown = {line.split()[0]: line[:end].split("  ")[-1].strip() for line in lines}
    texts = {"resumed": "16 (2 nodes) -> 8", "often": "… -> 6 -> 5 -> 4", "old": "4", "alone": "1", "damaged": "?"}
    assert shown == texts and next(iter(shown)) == "resumed"
    for name in ("resumed", "often", "old"):
        shutil.rmtree(tmp_path / name)
    assert main(["runs", str(tmp_path)]) == 0
    assert "ranks" not in capsys.readouterr().out


def test_tags_select_runs(capsys, three):
    for words, names in ([["paper"], "abc"], [["b"], "b"], [["paper", "c"], "c"], [["a", "b"], ""]):
        assert main(["runs", str(three), "--json", *(part for word in words for part in ("--tag", word))]) == 0
        assert [Path(one["path"]).name for one in json.loads(capsys.readouterr().out)] == list(names)
    assert main(["runs", str(three), "--tag", "papers"]) == 0
    assert "no runs below" in (error := capsys.readouterr().err) and "with papers in log.tags" in error


def test_a_metric_that_no_run_has_gets_the_nearest_name(capsys, three):
    for option in ("--sort", "--best"):
        assert main(["runs", str(three), option, "knn/top1"]) == 2
        assert capsys.readouterr().err == "error: no run has a metric knn/top1: did you mean knn/top1_pct?\n"


GARBAGE = [
    b"",
    b"\0" * 1000,
    b"{",
    b"[]",
    b"null\n",
    b"\xff\xfe not text",
    b"[" * 100_000,
    b"a = " + b"[" * 100_000,
    b'{"state": ["running"], "pid": {}, "exit_code": "x", "error": 3}\n',
    b'{"state": "running", "pid": 1e400, "host": 5}\n',
    b'{"step": "many", "epoch": {}, "train/loss": [], "knn/top1_pct": "high"}\n',
    b'{"step": true, "epoch": NaN, "train/loss": 1' + b"0" * 400 + b', "knn/top1_pct": 1e999}\n',
    b'{"results": {"linear/top1_pct": 1' + b"0" * 400 + b"}}",
    b"epochs = nan\nmax_iters = inf\n",
    b'epochs = "ten"\n',
]


def test_damaged_folders_are_listed(capsys, tmp_path):
    names = ("state.json", "metrics.jsonl", "config.toml", "eval/x.json", ".lock")
    for number, content in enumerate(GARBAGE):
        path = tmp_path / f"run{number:02d}"
        (path / "eval").mkdir(parents=True)
        for name in names:
            (path / name).write_bytes(content)
    for number, kind in enumerate(("folder", "pipe", "loop")):
        path = tmp_path / f"odd{number}"
        path.mkdir()
        (path / "checkpoints").mkdir()
        (path / "config.toml").write_text("epochs = 3")
        for name in ("state.json", "metrics.jsonl", "eval", ".lock"):
            place = path / name
            place.mkdir() if kind == "folder" else os.mkfifo(place) if kind == "pipe" else place.symlink_to(place)
    found = listed(capsys, tmp_path)
    assert len(found) == len(GARBAGE) + 3
    assert {one["state"] for one in found.values()} <= {None, "running", "died"}
    assert all(one["loss"] is None and one["best_knn_top1_pct"] is None for one in found.values())
    assert len(table(capsys, tmp_path)) == len(GARBAGE) + 4


def test_a_truncated_last_row_and_a_nonfinite_loss(capsys, tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as folder:
        write_rows(folder.path, training(5, 2.5), training(10, None), {"step": 12, "epoch": 2.4, "val/loss": 1.0})
        with open(folder.metrics, "a") as file:
            file.write('{"step": 15, "epoch": 3.0, "train/lo')
    found = listed(capsys, tmp_path)["run"]
    assert (found["step"], found["epoch"], found["loss"], found["images_per_s"]) == (12, 2.4, None, 110.0)
    assert table(capsys, tmp_path)[1].split()[2:6] == ["2.4", "/", "10", "nan"]


def test_rows_are_found_at_any_block_boundary(tmp_path, monkeypatch):
    generator = random.Random(0)
    files = RunFiles(tmp_path)
    for trial in range(60):
        rows = []
        for step in range(generator.randrange(12)):
            row: dict = training(step, step / 7) if generator.random() < 0.3 else {"step": step, "text": "x" * step * 5}
            if generator.random() < 0.4:
                row["knn/top1_pct"] = generator.choice([round(generator.uniform(0, 100), 10), 5e-05, None])
            rows.append(row)
        files.metrics.write_text(
            "".join(json.dumps(row) + "\n" for row in rows) + generator.choice(["", '{"step": 99, "knn/top1_pct": 1'])
        )
        monkeypatch.setattr(run_files, "BLOCK_BYTES", generator.choice([1, 7, 64, 2**16]))
        blocks = list(files.metrics_blocks())
        assert b"".join(blocks) == files.metrics.read_bytes()
        for key in (None, "train/loss", "knn/top1_pct"):
            found = [row for block in reversed(blocks) for row in newest_rows(block, key)]
            assert found == [row for row in reversed(rows) if key is None or key in row], (trial, key)
        summary = summarize(files)
        accuracies = [row["knn/top1_pct"] for row in rows if row.get("knn/top1_pct") is not None]
        assert summary.best_knn_top1_pct == max(accuracies, default=None), trial
        assert summary.step == (rows[-1]["step"] if rows else None), trial
        assert summary.loss == next((row["train/loss"] for row in reversed(rows) if "train/loss" in row), None), trial


def test_a_key_in_a_text_is_not_the_key(tmp_path):
    files = RunFiles(tmp_path)
    files.metrics.write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 2, "note": "\\"train/loss\\""}\n["train/loss"]\n'
    )
    assert (summarize(files).loss, summarize(files).step) == (2.0, 2)


def test_a_large_file_is_neither_parsed_nor_kept_in_memory(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as folder:
        lines = [json.dumps(training(step, 1.0)) + "\n" for step in range(20_000)]
        lines[123] = json.dumps({"step": 123, "knn/top1_pct": 77.0}) + "\n"
        folder.metrics.write_text("".join(lines))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(run_files.json, "loads", lambda text: parsed.append(1) or loads(text))
    files = RunFiles(tmp_path / "run")
    found = summarize(files)
    blocks = files.metrics.stat().st_size // run_files.BLOCK_BYTES + 1
    assert found.best_knn_top1_pct == 77.0 and found.step == 19_999 and len(parsed) < 2 * blocks + 5 < 100
    assert max(map(len, files.metrics_blocks())) < run_files.BLOCK_BYTES + 200


def test_the_table_fits_the_width(capsys, tmp_path, monkeypatch):
    name = "mocov2_resnet50_8xb32-coslr-200e_in1k"
    for folder in (name, name.replace("200e", "800e"), "short"):
        with RunFolder(tmp_path / folder, RECIPE, resume=None) as run:
            write_rows(run.path, training(25, 1.25), {"step": 25, "epoch": 5.0, "knn/top1_pct": 66.66})
            run.record_state("failed", 1)
        os.utime(run.metrics, (time.time() - 7300,) * 2)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    header, first, *_ = whole = table(capsys, tmp_path)
    assert header.split() == ["run", "state", "epoch", "loss", "k-NN", "%", "images/s", "last", "row"]
    assert first.split() == f"{name} failed (1) 5 / 10 1.25 66.7 125 2 h".split()
    for columns in (200, 100, 80, 60, 40, 20, 5):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = table(capsys, tmp_path)
        assert len(lines) == 4 and max(map(len, lines)) <= columns, lines
        if columns == 80:
            assert lines[1] != lines[2] and "…" in lines[1] and lines[3].startswith("short ")
            assert lines[1].split()[1:] == first.split()[1:], "names are shortened before columns are left out"
        if columns == 40:
            assert "failed" in lines[1] and "images/s" not in lines[0]
    monkeypatch.delenv("COLUMNS")
    assert table(capsys, tmp_path) == whole


def test_no_runs_and_no_folder(capsys, tmp_path, monkeypatch):
    assert main(["runs", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith("no runs below ")
    assert listed(capsys, tmp_path) == {}
    monkeypatch.chdir(tmp_path)
    for words, message in [([], "work_dirs does not exist"), ([__file__], "is not a folder"), (["x" * 5000], "exist")]:
        assert main(["runs", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1


def test_no_torch_is_imported(trained):
    code = "import sys; from sslrun.cli import main; main(sys.argv[1:]); "
    code += "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'"
    process = small_run.python(code, "runs", trained, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0 and "done" in out, err


def test_a_loss_of_nan_is_null_in_json():
    summary = RunSummary(Path("x"), loss=math.nan)
    assert json.loads(as_json([summary]))[0]["loss"] is None


@pytest.mark.parametrize(
    ("state", "code", "details"), [("done", 0, {}), ("pre-empted", 75, {}), ("failed", 3, {"error": "no good"})]
)
def test_wait_ends_with_the_runs_own_code(tmp_path, capsys, monkeypatch, state, code, details):
    def end_it(_):
        folder.record_state(state, code, **details)
        folder.close()

    folder = RunFolder(tmp_path, RECIPE, resume=None)
    monkeypatch.setattr(time, "sleep", end_it)
    assert main(["runs", "--wait", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{tmp_path}: {state}\n" + ("error: no good\n" if details else ""))


def test_wait_for_a_run_that_died_or_never_began(tmp_path, capsys):
    RunFolder(tmp_path / "died", RECIPE, resume=None).close()
    state = json.loads((tmp_path / "died/state.json").read_text())
    (tmp_path / "died/state.json").write_text(json.dumps({**state, "pid": 1}))
    assert main(["runs", "--wait", str(tmp_path / "died")]) == 1
    line = "the process ended without recording how, as when it is killed; --resume continues"
    assert capsys.readouterr().err == f"error: {tmp_path / 'died'}: {line}\n"
    assert main(["runs", "--wait", str(tmp_path)]) == 2
    assert "is not the folder of a run that has started" in capsys.readouterr().err
