PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := tts,eval,train,dev
EXTRAS := [$(CORE),quantization,serve,app,export,cluster]

# The CPU build of PyTorch is a tenth of the size of the CUDA one. `make test TORCH=torch` takes the default build of the
# platform instead: without the extra index, whose "+cpu" versions count as the newer ones.
ifeq ($(origin TORCH),undefined)
TORCH := torch==2.13.0
TORCH_INDEX := --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
endif

# What `pytest` runs in test-lowest and test-latest; everything by default.
TESTS ?=

.PHONY: setup demo test style lock test-lowest test-latest gpu

setup: $(VENV)/.installed

# The versions of constraints.txt, so that a clone behaves the same in a year. `make lock` renews them.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_INDEX) --constraint constraints.txt "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".$(EXTRAS)"
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

# PyTorch and its CUDA packages are left out: which build fits is the platform's choice.
lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --no-annotate --no-header \
		--output-file constraints.txt pyproject.toml
	sed -i.old -E '/^(torch==|triton|nvidia-|cuda-)/d' constraints.txt && rm constraints.txt.old

# The lowest versions that pyproject.toml allows, and the newest (pre-releases of transformers too), in environments of
# their own, without servers, export and clusters.
test-lowest: RESOLUTION := --resolution lowest-direct
test-latest: RESOLUTION := --upgrade "transformers>=0rc0"
test-lowest test-latest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip install --quiet uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python $(RESOLUTION) --editable ".[$(CORE)]"
	.venv-$*/bin/python -m pytest $(TESTS)

# Tests and benchmarks on a CUDA device, in the Python that has it, in nine minutes and without a network:
# `make gpu PYTHON=python`. The results are in gpu/report.md.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --output gpu
