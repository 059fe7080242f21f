# `make` lists the targets. The first use of any other installs into $(VENV); afterwards nothing needs the network.

PYTHON   ?= python3
VENV     ?= .venv
EXTRAS   ?= lab,test,dev
PIP_ARGS ?=
PORT     ?=
ARGS     ?=
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)

comma := ,
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PYTEST := $(PY) -m pytest
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout 180 --nbval-sanitize-with notebooks/sanitize.cfg

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install lab test test-fast test-unit test-notebooks lint notebooks soak

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  Variables: PYTHON=python3.12  PORT=8899  ARGS=--no-browser  EXTRAS=lab,test,dev,peers"
	@echo "  PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' spares a machine without a GPU the CUDA libraries"

install: $(STAMP) ## the virtual environment, with exactly the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moe_lab needs Python 3.11 or newer; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo 'Installing into $(VENV): once, a few minutes.'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lab: $(STAMP) ## open the notebooks in JupyterLab (PORT=, ARGS=--no-browser)
	@$(PY) -m moe_lab lab $(if $(PORT),--port $(PORT)) $(ARGS)

test: lint test-unit test-notebooks ## everything: lint, types, unit and browser tests with coverage, notebooks

test-unit: $(STAMP)
	$(PYTEST) tests -m "not soak" --cov --cov-report=term $(ARGS)

test-fast: $(STAMP) ## unit tests without the slow ones and the browser
	$(PYTEST) tests -m "not slow and not browser and not soak" $(ARGS)

test-notebooks: $(STAMP) ## run each notebook, compare every stored number, with and without vector instructions
	$(PYTEST) $(NBVAL) notebooks
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(NBVAL) notebooks

lint: $(STAMP) ## ruff (notebooks too) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

notebooks: $(STAMP) ## run notebooks in a fresh kernel and store them (NOTEBOOKS=notebooks/01_routing.ipynb)
	$(PY) notebooks/store.py $(NOTEBOOKS)

soak: $(STAMP) ## long runs: soak tests, many more examples for every property
	$(PYTEST) tests -m "not browser" --hypothesis-profile soak --timeout 7200 $(ARGS)
