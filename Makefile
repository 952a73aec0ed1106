# Short names for the commands people use. Needs python3 >= 3.11, make and a network that reaches PyPI; uv is fetched when missing.
#   make train-iceaggr ARGS="--seed 1"      NPROC=2 make train-iceaggr
.DEFAULT_GOAL := help
.PHONY: help setup lock lint types imports test isolated check slow gpu bench walk golden wheels report reproduce costs faults fuzz audit
SHELL := /bin/bash
# Where it is set, every process would compile torch anew: seconds for each of them.
unexport PYTHONDONTWRITEBYTECODE
ARGS ?=
NPROC ?= 1
PACKAGES := iceaggr attn_clustering gauge_attn rh_memory
ifeq ($(wildcard uv.lock),)
$(error no uv.lock in $(CURDIR): run make in the checkout, or make -C CHECKOUT)
endif
# Names without the path of the checkout, which may have spaces in it.
UV := $(if $(shell command -v uv 2>/dev/null),uv,.uv/bin/uv)
FETCHED_UV := $(filter .uv/bin/uv,$(UV))
RUN := $(UV) run --locked
# A process per core, each with one thread as most tests are too small for more; files stay whole for their fixtures.
PYTEST := pytest -q -n auto --dist loadfile
test test-% isolated slow: export OMP_NUM_THREADS := 1

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 22
	@echo; echo 'Variables: ARGS="flags for the command"  NPROC=processes (>1 runs through torchrun)'

# A local folder, so that nothing outside the checkout changes; --target where the venv module is missing (Debian splits it off).
.uv/bin/uv:
	@echo "uv not found: installing it into .uv/" >&2
	@python3 -m venv .uv 2>/dev/null && .uv/bin/python -m pip install --quiet uv \
	  || { rm -rf .uv && python3 -m pip install --quiet --target .uv uv; }
	@test -x $@ || { echo "could not install uv: install it yourself (pip install uv) and run make again" >&2; exit 1; }

setup: | $(FETCHED_UV)  ## create .venv from uv.lock (all packages)
	@$(UV) sync --locked --quiet

lock: | $(FETCHED_UV)  ## fail when uv.lock does not match the pyproject files
	$(UV) lock --check

lint: setup  ## ruff: style and formatting
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: setup  ## mypy on every package
	$(RUN) mypy shared/src tools examples/mirror/src $(foreach p,$(PACKAGES),packages/$(p)/src)

imports: setup  ## import contracts: packages -> lab_shared, never sideways
	$(RUN) lint-imports

test: setup  ## the fast test suite of everything
	$(RUN) $(PYTEST) $(ARGS)

test-%: setup  ## one package's fast tests: test-iceaggr, test-shared, ...
	$(RUN) $(PYTEST) $(if $(filter shared tools,$*),$*/tests,packages/$(subst -,_,$*)/tests) $(ARGS)

isolated: | $(FETCHED_UV)  ## each package's tests in an environment with only its declared dependencies
	@set -e; for p in shared $(addprefix packages/,$(PACKAGES)); do \
	  name=$$(sed -n 's/^name = "\(.*\)"/\1/p' $$p/pyproject.toml | head -1); echo "== $$name alone"; \
	  $(UV) run --locked --isolated --package $$name $(PYTEST) $$p/tests; done

slow: setup  ## the slow tests
	$(RUN) $(PYTEST) -m slow $(ARGS)

gpu: setup  ## the tests that need a CUDA device
	$(RUN) pytest -q -m gpu $(ARGS)

check: lock lint imports types test  ## everything a change must pass

train-%: setup  ## train an experiment: train-iceaggr (no data needed: it simulates)
	@[[ "$(NPROC)" =~ ^[1-9][0-9]*$$ ]] || { echo 'NPROC="$(NPROC)": it must be a number of processes, 1 or more' >&2; exit 2; }; \
	if [ "$(NPROC)" -gt 1 ]; then \
	  $(RUN) torchrun --standalone --nproc-per-node=$(NPROC) -m $(subst -,_,$*) train $(ARGS); \
	else $(RUN) $* train $(ARGS); fi

report: setup  ## every table, figure and claim of the READMEs from the records (ARGS=--check: only say what is stale)
	$(RUN) python tools/report.py $(ARGS)

reproduce: setup  ## which command makes which record; makes the missing ones (ARGS="--out DIR --gpus 1 --minutes 20")
	$(RUN) python tools/reproduce.py $(ARGS)

costs: setup  ## COSTS.md from the committed speeds
	$(RUN) python tools/costs.py --write

report-%: setup  ## rebuild a run's report: make report-iceaggr ARGS=runs/iceaggr/...
	$(RUN) $* report $(ARGS)

bench: setup  ## speed suite on this machine's device; JSON under each package's results/
	$(RUN) python tools/bench.py $(ARGS)

walk: setup  ## every command of the READMEs is checked (ARGS=--run: the short ones are run as well)
	$(RUN) python tools/walk.py $(ARGS)

golden: setup  ## rewrite the golden losses and show what would change
	LAB_UPDATE_GOLDEN=1 $(RUN) pytest -q -k golden $(ARGS)
	@git status --short -- '*golden*'; git --no-pager diff -- '*golden*'

faults: setup  ## kill -9 and full disks in everything that trains, caches or generates (ARGS="--only train-iceaggr")
	$(RUN) python tools/faults.py $(ARGS)

fuzz: setup  ## damaged and forged files for every reader (ARGS="--cases 500 --only checkpoint")
	$(RUN) python tools/fuzz.py $(ARGS)

audit: | $(FETCHED_UV)  ## known vulnerabilities of what uv.lock pins; asks a public service
	$(UV) audit --locked

wheels: | $(FETCHED_UV)  ## build every package's wheel into dist/
	$(UV) build --quiet --all-packages --wheel --out-dir dist
