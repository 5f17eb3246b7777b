# make quickstart   install, train a small encoder on drawn images, write its report (3 minutes on two cores)
# make test         install, check format, lint and types, run the CPU tests
# make gpu-check    install, then tell in ten minutes what this machine's GPU makes of it (docs/gpu.md)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-nightly lint schema kernel-table rehearsal-table scaling-table fault-tables equality-table \
  learn peers bench bench-short clean

install: $(VENV)/.installed

# The stamp is newer than the files that list the dependencies while the environment is current; then nothing is done.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (PYTHON=...)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/python bin/sslrun configs/quickstart.toml --resume  # a second call continues, or says that the run is done
	$(BIN)/python bin/sslrun report work_dirs/quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install lint
	$(BIN)/pytest -n 2 --dist worksteal

test-nightly: install
	$(BIN)/pytest -n 2 --dist worksteal -m nightly

schema: install
	PYTHONPATH=engine:kernels $(BIN)/python -m sslrun.config.schema
	PYTHONPATH=engine:kernels $(BIN)/python -m sslrun.glossary

kernel-table: install
	PYTHONPATH=kernels:tests/kernels $(BIN)/python -m test_ahead_of_time

rehearsal-table: install
	$(BIN)/python benchmarks/rehearsal.py

scaling-table: install
	$(BIN)/python benchmarks/plan.py published scaling

# Every fault, signal and mistake of docs/reliability.md and docs/cluster.md; half an hour. TIMES=10 for ten times the faults.
fault-tables: install
	TABLES=write $(BIN)/pytest -n 2 --dist worksteal -m nightly tests/faults/test_campaign.py tests/faults/test_launchers.py
	TABLES=write $(BIN)/pytest -m "nightly or not nightly" tests/faults/test_mistakes.py
	TABLES=write $(BIN)/pytest tests/faults/test_campaign.py tests/faults/test_launchers.py

# The tables of docs/equality.md: every ZeRO stage in float32, and every method in float64, against one process.
equality-table: install
	TABLES=write $(BIN)/pytest -n 2 --dist worksteal -m nightly tests/test_equality_table.py tests/test_float64.py
	TABLES=write $(BIN)/pytest tests/test_equality_table.py tests/test_float64.py

learn: install
	$(BIN)/python benchmarks/learn.py

# What the benchmarks compare with: lightly, kornia and others, in an environment of its own.
peers: .venv-peers/.installed

.venv-peers/.installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --requirement benchmarks/peers/requirements.txt
	@touch $@

# A part of `bench`, a quarter of an hour on two idle cores by estimate: what changes with the step, the start and scale.
bench-short: install peers
	$(BIN)/python benchmarks/loader.py configs/mae.toml --quick
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --operators
	$(BIN)/python benchmarks/scale.py --quick
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/performance_page.py

# docs/performance.md is made of these rows. About an hour on two idle cores, by estimate; QUICK=--quick for less.
bench: install peers
	$(BIN)/python benchmarks/loader.py $(QUICK)
	$(BIN)/python benchmarks/step.py $(QUICK)
	$(BIN)/python benchmarks/step.py --operators
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/scale.py $(QUICK)
	$(BIN)/python benchmarks/startup.py $(QUICK)
	$(BIN)/python benchmarks/config.py
	$(BIN)/python benchmarks/data_check.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/zero_host.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/kernels.py --table
	$(BIN)/python benchmarks/performance_page.py

.PHONY: gpu-check
gpu-check: install
	$(BIN)/python benchmarks/first_light.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers work_dirs build *.egg-info
