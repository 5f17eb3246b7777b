"""`sslrun doctor`: what it says about this machine, and about one on which things are broken."""

import json
import os
import subprocess
import sys

import pytest

import small_run
from bare_image import BARE, environment_without
from sslrun import doctor
from sslrun.doctor import CHECKS, Check, Finding, as_text, ask, can_train, examine
from sslrun.doctor.checks import ALL

LIBRARIES = CHECKS[0]
BREAKS = "import os, signal\n{}\n"


def said(folder):
    """(exit code, answer as JSON) of `sslrun doctor --json`."""
    command = [sys.executable, str(small_run.ROOT / "bin/sslrun"), "doctor", "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    return done.returncode, json.loads(done.stdout)


def test_every_check_has_a_function():
    assert [check.name for check in CHECKS] == [function.__name__ for function in ALL]


@pytest.mark.nightly
def test_without_dali_and_deepspeed_a_training_works_and_the_rest_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment_without(tmp_path / "bare", BARE)["PYTHONPATH"])
    monkeypatch.chdir(tmp_path)
    quick = [check for check in CHECKS if check.name != "torch_compile"]
    findings = list(examine(quick))
    checks = {check.name: finding for check, finding in findings}
    assert can_train(findings), checks
    assert checks["training"].says.endswith("from decoded images; files need DALI")
    assert checks["decoding"].state == checks["deepspeed"].state == "missing"
    assert checks["decoding"].advice.startswith("pip install nvidia-dali-cuda")
    assert all(checks[name].state == "works" for name in ("libraries", "memory", "disk", "collectives"))
    assert os.listdir(tmp_path) == ["bare"], "nothing is left behind"


@pytest.mark.nightly
def test_everything_works_that_can_work_here(tmp_path):
    code, found = said(tmp_path)
    assert code == 0
    assert not [name for name, each in found["checks"].items() if each["state"] == "fails"], found
    assert found["checks"]["deepspeed"]["state"] == "works" == found["checks"]["decoding"]["state"]
    assert found["checks"]["training"]["says"].endswith("from JPEGs")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ends its process (SIGSEGV)"),
        ("raise ImportError('libtorch_cuda.so: cannot open')", "ImportError: libtorch_cuda.so: cannot open"),
        ("import time; time.sleep(60)", "gives no answer within 5 s"),
    ],
)
def test_a_library_that_breaks_its_process_is_found(fault, says, tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text(BREAKS.format(fault))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    limited = Check(LIBRARIES.name, LIBRARIES.title, 5 if "sleep" in fault else 60, LIBRARIES.advice)
    assert ask(limited) == Finding("fails", says, LIBRARIES.advice)


@pytest.mark.nightly
def test_a_launchers_variables_do_not_reach_the_checks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (training,) = (check for check in CHECKS if check.name == "training")
    assert ask(training).state == "works"


def test_only_the_training_decides():
    findings = [(check, Finding("works" if check.name == "training" else "fails", "")) for check in CHECKS]
    assert can_train(findings)
    findings = [(check, Finding("fails" if check.name == "training" else "works", "")) for check in CHECKS]
    assert not can_train(findings)


def test_a_failed_training_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: iter([(CHECKS[-1], Finding("fails", "no disk", "buy one"))]))
    assert small_run.call(capsys, "doctor") == (1, "fails    training       no disk; buy one\n", "")


def test_lines_fit_80_columns():
    finding = Finding("fails", "a very long answer " * 8, "and what to do about it " * 4)
    lines = as_text(LIBRARIES, finding, 80).splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 80
    assert all(line.startswith(" " * 24) for line in lines[1:])


def test_help_imports_no_torch():
    code = "import sys, sslrun.cli, sslrun.doctor; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'"
    assert small_run.finish(small_run.python(code))[0] == 0
