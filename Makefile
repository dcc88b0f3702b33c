# `make demo` and `make test` set everything up themselves, in .venv; the second run starts in seconds.
# A CPU machine can be spared PyTorch's CUDA download where an index offers a CPU build: make TORCH="torch==2.13.0+cpu" PIP_FLAGS="--extra-index-url ..."
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: setup demo test test-fast sanitize bench quality quality-smoke gpu-check triton-table lint clean

setup: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_FLAGS) "$(TORCH)"
	@touch $@

# Rebuilt when a native source or the dependencies change; Python files are used in place.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet $(PIP_FLAGS) --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/pile-fast demo

test: setup lint
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer, built aside.
sanitize: setup
	$(BIN)/python tests/sanitize.py

# On a machine with a GPU: needs a Python with PyTorch and Triton, and no installation. GPU_PYTHON=... STAGES="correctness speed"
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py $(STAGES)

# Registers and shared memory of every Triton kernel on four chips, into docs/triton.md; needs no GPU.
triton-table: setup
	$(BIN)/python tests/triton_aot.py --write

bench: setup
	$(BIN)/python benchmarks/speed.py

# Needs MQ2008 (PILE_FAST_DATA or data/); goes on where it was stopped, then writes docs/quality.md's tables and plots.
quality: setup
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality.py --report

quality-smoke: setup
	$(BIN)/python benchmarks/quality.py --smoke

clean:
	rm -rf build *.egg-info pile_fast/*.so .pytest_cache .hypothesis .ruff_cache
