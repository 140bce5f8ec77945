# Every target makes its own virtual environment and installs what it needs. A CPU is enough.

VENV ?= .venv
PYTHON ?= python3
# The version that CI tests on. Installed first, so that you can choose another build of torch, for example
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

BIN = $(VENV)/bin

.PHONY: demo test lint docs dist-check

demo: $(VENV)/installed-demo
	$(BIN)/diffusers-draft demo --output out

test: lint docs $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --cov

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html

dist-check: $(VENV)/installed-dev
	.ci/dist $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable ".[$*]"
	touch $@
