# Two commands matter on a fresh clone: `make quickstart` runs the whole main job, `make test` the whole test suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch by itself and pinned: asked for through another package, pip may take a build with several GB of CUDA libraries.
TORCH ?= torch==2.13.0
REQUIREMENTS := $(VENV)/.requirements
STAMP := $(VENV)/.installed

.PHONY: help requirements install quickstart test test-full lint benchmark bench-data bench-peer bench-training clean

help:
	@echo "make quickstart   install, then corpus -> shards -> pretraining -> evaluation -> export -> text, 9 to 15 minutes on 2 cores"
	@echo "make test         install, lint, types, all tests but the long matrices"
	@echo "make test-full    all tests and the whole numerical matrix"
	@echo "make benchmark    tokens/s of two ranks against one plain process, paired"
	@echo "make bench-data   data pipeline and loader against Megatron's, with the cost of each stage"
	@echo "make bench-peer   PEER's row products, PEER against dense and dropless layers, latent attention against grouped queries"
	@echo "make bench-training   optimizers, compiled blocks, branches of one trunk, deterministic mode (data/quickstart must be built)"
	@echo "make clean        removes data/ and runs/ of the quickstart and debug recipes"

$(REQUIREMENTS): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $(REQUIREMENTS)

# The packages stay in the checkout, the environment only learns where they are and what the commands are called.
$(STAMP): $(REQUIREMENTS) pyproject.toml setup.py
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

requirements: $(REQUIREMENTS)

install: $(STAMP)

quickstart: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/quickstart.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "not full"

test-full: lint
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest

benchmark: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/two_ranks_against_plain.py

bench-data: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/preprocessing.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/loading.py

bench-peer: install
	$(BIN)/python benchmarks/peer_kernels.py
	$(BIN)/python benchmarks/peer_and_mla.py

bench-training: install
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/wsd_branches.py
	$(BIN)/python benchmarks/deterministic_mode.py

clean:
	rm -rf data/quickstart data/debug runs/quickstart runs/debug
