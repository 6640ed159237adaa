# Two commands matter on a fresh clone: `make quickstart` runs the whole main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch is pinned and installed first: as a dependency of another package, pip may choose a build with several GB of
# CUDA libraries.
TORCH ?= torch==2.13.0
# Processes that share the tests: one a core, and no more than 8, because each holds up to 2 GB and starts ranks.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
REQUIREMENTS := $(VENV)/.requirements
STAMP := $(VENV)/.installed

.PHONY: help requirements install quickstart lint test-unit test test-full test-gpu
.PHONY: long-context bench bench-quick bench-growth benchmark bench-data bench-peer bench-training soak clean

help:
	@echo "make quickstart      corpus, shards, pretraining, evaluation, export, text; 9 to 15 minutes on 2 cores"
	@echo "make long-context    a model of 256 tokens extended to 2,048, and asked for needles"
	@echo "make lint            ruff and mypy"
	@echo "make test-unit       tests of one process, minutes on 2 cores"
	@echo "make test            lint, then the tests of one process and of real runs, about half an hour on 2 cores"
	@echo "make test-full       lint, then all tests with the long matrices, hours"
	@echo "make test-gpu        the tests that need a CUDA device, and those of fused kernels, in one process"
	@echo "make bench           steps, layers, texts and the start against DeepSpeed's, transformers' and plain PyTorch, hours"
	@echo "make bench-quick     one round of a few of them against the stored ratios; it reports and never fails"
	@echo "make bench-growth    a step's time and memory against experts, tokens, ... and ranks, 10 minutes on 2 cores"
	@echo "make benchmark       tokens/s of two ranks against one plain process, paired"
	@echo "make bench-data      data pipeline and loader against Megatron's, with the cost of each stage"
	@echo "make bench-peer      PEER's table products; PEER against dense and dropless layers; MLA against GQA"
	@echo "make bench-training  optimizers, compiled blocks, branches of a run, deterministic mode; after the quickstart"
	@echo "make soak            a run that is killed 100 times against one that is not, about an hour on 2 cores"
	@echo "make clean           remove data/ and runs/ of the quickstart and debug recipes"
	@echo "Every target but help and clean first installs into $(VENV). WORKERS=N sets the processes of the tests."

$(REQUIREMENTS): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $(REQUIREMENTS)

# An editable install: the packages stay in the checkout, the environment gets a link and the commands.
$(STAMP): $(REQUIREMENTS) pyproject.toml setup.py
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

requirements: $(REQUIREMENTS)

install: $(STAMP)

quickstart: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/quickstart.py

long-context: install
	$(BIN)/python tools/make_needle_corpus.py --output data/long_context_texts
	$(BIN)/python tools/preprocess_data.py --recipe long_context
	$(BIN)/python launchers/pretrain.py --recipe long_context
	$(BIN)/python tools/evaluate.py --checkpoint runs/long_context/checkpoints/latest \
		--needle 256 512 1024 2048 --needle-form pairs \
		--lengths 256 512 1024 2048 --max-windows 20 --plot runs/long_context/needles.png

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests start commands of the environment (deepspeed, mpirun) by name.
PYTEST = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS)

test-unit: install
	$(PYTEST) --dist worksteal -m "not full" tests/unit

# By file, so that the tests of one file share the runs that their fixtures start; in the order of
# tests/conftest.py, the longest first.
BY_FILE = --dist loadfile --no-loadscope-reorder
test: lint
	$(PYTEST) $(BY_FILE) -m "not full" tests/unit tests/integration

test-full: lint
	$(PYTEST) $(BY_FILE)

# On CPUs Triton interprets what these compile for a GPU, so all machines run them.
COMPILED = tests/unit/model/kernels/test_dense_kernels.py tests/unit/model/kernels/test_fused_moe.py
test-gpu: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m gpu tests
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(COMPILED)

bench: install
	$(BIN)/python benchmarks/against_peers.py --store

# What others of a shared machine do moves these ratios: they are for a reader, no reason to fail.
bench-quick: install
	-$(BIN)/python benchmarks/against_peers.py --quick --only "head, 32,768 tokens" "text, batch 8"

bench-growth: install
	$(BIN)/python benchmarks/cost_growth.py --json benchmarks/results/cost_growth.json \
		--plot benchmarks/results/cost_growth.png

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

soak: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/soak.py --kills 100 --overwrite \
		--output benchmarks/results/soak.json

clean:
	rm -rf data/quickstart data/quickstart_sentencepiece data/debug runs/quickstart runs/debug
