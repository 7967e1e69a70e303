# `make sweep` installs and runs the main job; `make test` installs and runs the checks.
PYTHON ?= python3
BIN := .venv/bin
STUDY ?= search_spaces/dwt.yaml
PORT ?= 5000
STORAGE ?= ./runs
CLUSTER ?= cluster.yaml

.PHONY: install sweep test test-all long ui docs cluster clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "codistill needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

sweep: install  # the main job: trains, tunes, searches and confirms, then writes runs/<study>/report.html
	$(BIN)/python -m orchestrator.sweep $(STUDY) $(ARGS)

test: install  # lint, types, words, unit tests; needs no root and no services
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.support.words
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: install  # the tests that start Ray, kill processes or open a browser
	$(BIN)/python -m pytest -q -m "(slow or faults or hosts or browser) and not long"

long: install  # what takes minutes each: every family of models that transformers has, groups and machines that are lost
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long

ui: install  # MLflow on loopback over the storage that sweeps write, with every trial nested under its study
	$(BIN)/python -m orchestrator.command ui --storage $(STORAGE) --port $(PORT)

docs: install  # the documentation site, in site/html; fails at a broken link
	$(BIN)/python -m docs.pages
	$(BIN)/mkdocs build --strict --quiet -f docs/mkdocs.yml

cluster: install  # starts machines that cost money until `ray down`; starts nothing if the file has an error
	$(BIN)/python -m orchestrator.cluster.check_config $(CLUSTER)
	$(BIN)/ray up --no-config-cache $(CLUSTER)
