PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build is a tenth of the CUDA one; set TORCH=torch to take the default build of the platform.
TORCH ?= torch==2.13.0

.PHONY: setup demo test style

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[tts,eval,train,dev]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
