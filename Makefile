# make demo, make test, make docs: each sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHELL := bash

.PHONY: demo test test-long test-fast test-eval test-lowest coverage lint format docs bench wheel lock sbom audit clean setup

# torch first and pinned: a bare `torch` may bring gigabytes of other builds.
$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $$(grep '^torch==' constraints.txt)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

setup: $(READY)

demo: $(READY)
	rm -rf runs/quickstart
	$(BIN)/regraft run quickstart --output runs/quickstart

# One process a core, one thread a process: the models of the tests are too small to share.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

# The tests that take about two and a half seconds of a processor or more each, two thirds of the time of all; CI runs them after the others.
test-long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m long

# What to run while working: without the tests of about a fifth of a second of a processor or more, and those that need servers or ../shared.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not long" tests/unit tests/conformance

# What needs lm-evaluation-harness, which CI does not install: about a minute of installing and 15,000 files.
test-eval: $(READY)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/pipelines/test_evaluate_tasks.py tests/pipelines/test_lm_eval.py

# The oldest versions of what pyproject.toml names, each with the newest of what it needs itself, in an environment of its own.
# LOWEST_TORCH=2.13.0+cpu takes another torch: the oldest brings gigabytes of CUDA on Linux.
LOWEST_TORCH ?=
test-lowest: $(READY)
	$(PIP) install --quiet --constraint constraints.txt uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip compile --quiet --no-header --resolution lowest-direct $(if $(LOWEST_TORCH),--override <(echo torch==$(LOWEST_TORCH))) pyproject.toml --output-file .venv-lowest/lowest.txt
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --requirement .venv-lowest/lowest.txt --no-deps
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python $$(grep -E '^(pytest|pytest-timeout|pytest-xdist|hypothesis)==' constraints.txt)
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not long" -W default tests/unit tests/conformance

# Which lines the fast tests run; the report is printed, and lies in htmlcov/ for reading.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not long" --cov=regraft --cov-report=term:skip-covered --cov-report=html tests/unit tests/conformance

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages made from the code, then the site, in which a warning is an error.
docs: $(READY)
	$(BIN)/python scripts/make_docs.py
	$(BIN)/python scripts/make_methods.py
	PYTHONPATH=src NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Every benchmark writes its tables into benchmarks/results/; takes hours on two cores.
bench: $(READY)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	for script in $$(grep -l __main__ benchmarks/*.py); do $(BIN)/python $$script || exit 1; done

wheel: $(READY)
	$(BIN)/python -m build --outdir dist

# Every package of every extra with the SHA-256 of its files, for all systems: pip install --require-hashes -r requirements.lock
lock: $(READY)
	$(PIP) install --quiet --constraint constraints.txt uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes --constraint constraints.txt --extra dev --extra bnb --extra eval pyproject.toml --output-file requirements.lock

# What the package is made of, in CycloneDX JSON.
sbom: $(READY)
	$(BIN)/python scripts/make_sbom.py dist/regraft.cdx.json

# Known weaknesses of what the lock names; a package that the service does not know, as without a network, fails too.
audit: $(READY)
	$(PIP) install --quiet --constraint constraints.txt pip-audit
	$(BIN)/python -m pip_audit --strict --disable-pip --require-hashes --progress-spinner off --requirement requirements.lock

clean:
	rm -rf $(VENV) .venv-lowest build dist runs .pytest_cache .ruff_cache .hypothesis .coverage htmlcov site src/*.egg-info
