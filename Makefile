# Each target is all that a fresh machine needs (git, Python 3.11, a C compiler, make): it installs into .venv first.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
WORDS ?=
UPGRADE ?=
# One thread per process: every tool and test spreads its work over processes.
export OMP_NUM_THREADS ?= 1

.PHONY: help install quickstart test lint check format constraints bench-cpu docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv with everything at its tested version (2 to 5 minutes)

quickstart: $(VENV)/.installed ## The whole way from web dump to trained GPT, small, under 5 minutes; all it makes is in runs/quickstart
	$(BIN)/python tools/quickstart.py $(WORDS)

test: $(VENV)/.installed ## Every test (tests that need a GPU, the real dumps or SLURM skip, with the reason, where these are absent)
	$(BIN)/pytest -n $(JOBS) --dist loadgroup -r sfE

lint: $(VENV)/.installed ## Format, lint, types, shell scripts: nothing is run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	if command -v shellcheck > /dev/null; then shellcheck .ci/run docker/*.sh slurm/*.sh; fi

check: lint ## What a change must pass before review: lint and the fast tests
	$(BIN)/pytest -n $(JOBS) -m "not slow and not gpu and not slurm"

format: $(VENV)/.installed ## Rewrite the sources in the project's format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# uv keeps the pins of the file that it writes to, unless pyproject.toml rules them out. It reads the metadata of an index's own
# (CUDA) build of torch; the packages that this build brings are left out: torch names their versions, and other builds have others.
constraints: $(VENV)/.installed ## Write constraints.txt anew from pyproject.toml; pins stay (UPGRADE="--upgrade-package numpy" moves one)
	cp constraints.txt $(VENV)/constraints.txt
	$(BIN)/uv pip compile pyproject.toml --quiet --extra dev --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-annotate --no-header $(UPGRADE) --output-file $(VENV)/constraints.txt
	{ head -n 1 constraints.txt; grep -Pv '^(cuda-|nvidia-(?!ml-py)|triton=)' $(VENV)/constraints.txt; } > $(VENV)/constraints.new
	cmp -s $(VENV)/constraints.new constraints.txt || mv $(VENV)/constraints.new constraints.txt

bench-cpu: $(VENV)/.installed ## Measure training, generation, scale against peers (environments are made first), under 30 minutes; docs/benchmarks.md
	$(BIN)/python -m bench.training.compare cells=one_fp32,one_bf16,two_replicated,two_sharded repetitions=1
	$(BIN)/python -m bench.training.life repetitions=1
	$(BIN)/python -m bench.generation.compare repetitions=1
	$(BIN)/python -m bench.serving.throughput repetitions=1
	$(BIN)/python -m bench.scale parts=loader,ranks,checkpoint most=200000000
	$(BIN)/python -m bench.data.packing
	$(BIN)/python -m bench.document

docs: $(VENV)/.installed ## Build the site into build/site; a broken link is an error
	$(BIN)/mkdocs build --quiet

clean: ## Remove what tests and tools leave in the working tree (not .venv, not runs)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml setup.py megagpt/__init__.py constraints.txt docker/install.sh
	docker/install.sh python dev $(VENV)
	touch $@
