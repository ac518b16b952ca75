# Everything runs in a virtual environment that the targets make themselves: a machine
# with Python and make is enough. `make PYTHON=python3.12 test` chooses the interpreter,
# `make WORKERS=8 test` how many processes share the tests.

PYTHON ?= python3
VENV ?= .venv
CANARY := .venv-canary
CANARY_TESTS ?= test
WORKERS ?= 2
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^__version__ *= *"\(.*\)"/\1/p' torchrl_wm/__init__.py)

# One stamp per set of extras and version: what is installed is not installed again.
stamp = $(VENV)/.installed-$(VERSION)-$(1)
DEV_EXTRAS := test docs cli lint
pip_install = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

SOURCES := torchrl_wm test conftest.py $(wildcard docs/*.py) $(wildcard examples benchmarks)
PROSE := docs $(wildcard *.md)

.DEFAULT_GOAL := help
.PHONY: help venv demo test canary lint format docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(call stamp,dev) ## Make the development environment: all that the other targets need

demo: $(call stamp,cli) ## Run the demo: learn a world model of the pendulum and plan through it
	$(BIN)/torchrl-wm demo

# A document's snippets share one namespace: files stay whole. A thread for each worker, as
# threads that share a core wait for each other.
test: $(call stamp,test) ## Run the tests, the doctests and the snippets of README and docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

# An environment of its own, made anew: there is no other way to the newest of everything. The
# packages are installed one by one, without what each asks of the others, so that pip cannot
# stay at the versions that pyproject.toml allows. What is found is reported and fails nothing.
canary: ## Try the newest tensordict, torchrl and gymnasium that pip finds; report, never fail
	rm -rf $(CANARY)
	$(PYTHON) -m venv $(CANARY)
	$(CANARY)/bin/python -m pip --disable-pip-version-check install --quiet -e ".[test]"
	for name in tensordict torchrl gymnasium; do \
		$(CANARY)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade \
			--no-deps $$name || echo "canary: the newest $$name could not be installed"; \
	done
	@$(CANARY)/bin/python -m pip --disable-pip-version-check check || true
	@$(CANARY)/bin/python -m pip --disable-pip-version-check list | \
		grep -E "^(torch|tensordict|torchrl|gymnasium) " || true
	OMP_NUM_THREADS=1 $(CANARY)/bin/python -m pytest -m "not slow and not gpu" -n $(WORKERS) \
		--dist loadfile --continue-on-collection-errors $(CANARY_TESTS) \
		&& echo "canary: all tests pass" || echo "canary: some tests fail; see above"

# pyupgrade can only rewrite, so it is given a copy, and fails if it would have.
lint: $(call stamp,lint) ## Check formatting, style and spelling; change nothing
	$(BIN)/ufmt check $(SOURCES)
	$(BIN)/flake8 $(SOURCES)
	$(BIN)/pydocstyle torchrl_wm
	$(BIN)/codespell $(SOURCES) $(PROSE)
	@echo "$(BIN)/pyupgrade --py310-plus (on a copy)"; \
	bin=$$(cd $(BIN) && pwd) && copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	cp -R $(SOURCES) "$$copy" && cd "$$copy" && \
	find . -name '*.py' -exec "$$bin/pyupgrade" --py310-plus {} +

format: $(call stamp,lint) ## Format the code in place
	find $(SOURCES) -name '*.py' -exec $(BIN)/pyupgrade --py310-plus --exit-zero-even-if-changed {} +
	$(BIN)/ufmt format $(SOURCES)

docs: $(call stamp,docs) ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

bench: $(call stamp,bench) ## Measure what imagination, plans, ensembles, diffusion and the export cost; prints tables of ratios
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/ensemble.py
	$(BIN)/python benchmarks/diffusion.py
	$(BIN)/python benchmarks/export.py

clean: ## Remove the environment and everything built
	rm -rf $(VENV) $(CANARY) build dist docs/_build *.egg-info .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(call stamp,dev): pyproject.toml constraints.txt | $(BIN)/python
	$(pip_install) -e ".[test,docs,cli,lint]"
	@touch $(foreach extra,$(DEV_EXTRAS),$(call stamp,$(extra))) $@

$(call stamp,%): pyproject.toml constraints.txt | $(BIN)/python
	$(pip_install) -e ".[$*]"
	@touch $@
