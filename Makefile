# Set-up, checks and the demonstration. `make help` lists the targets; works with GNU make 3.81 and newer.
#
#   PYTHON=...     interpreter that makes the environment  (default: the first of those in PYTHONS that is 3.11 or newer)
#   VENV=...       the environment                         (default: .venv; an existing one is used as it is)
#   VENV_ARGS=...  for `python -m venv`                    (--system-site-packages: use the PyTorch of the system)
#   PIP_ARGS=...   for `pip install`                       (an index with CPU-only wheels, -v to see each step)
#   PYTEST_ARGS=.. for pytest                              (-x, -k "prior", ...)
#
# constraints.txt names versions only, so which build of PyTorch comes (CPU, CUDA) is the choice of pip and of PIP_ARGS.
# A PyTorch that lies in the environment before the first `make` is kept, and its own version becomes the constraint.

VENV ?= .venv
PYTHON ?=
VENV_ARGS ?=
PIP_ARGS ?=
PYTEST_ARGS ?=

# One thread on purpose: the networks of the tests and the demonstration are small, and threads that wait for each other
# on a busy machine make them many times slower.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

PYTHONS := python3.13 python3.12 python3.11 python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.pyro-vae-installed
FOUND := $(VENV)/.pyro-vae-found-torch
PINS := $(VENV)/.pyro-vae-constraints.txt
TORCH := '^torch(vision)?=='

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make the environment and install the library with its development tools

demo: $(STAMP) ## train on the embedded digits, evaluate, draw three pictures and write a report into demo/
	@rm -rf demo/digits demo/samples.png demo/reconstructions.png demo/interpolations.png demo/report.html
	@mkdir -p demo
	$(BIN)/pyro-vae train digits --epochs 200 --out demo/digits
	$(BIN)/pyro-vae evaluate demo/digits --samples 1000
	$(BIN)/pyro-vae sample demo/digits --out demo/samples.png
	$(BIN)/pyro-vae reconstruct demo/digits --out demo/reconstructions.png
	$(BIN)/pyro-vae interpolate demo/digits --out demo/interpolations.png
	$(BIN)/pyro-vae report demo/digits --out demo/report.html
	@echo
	@echo "The run:         demo/digits"
	@echo "Samples:         demo/samples.png"
	@echo "Reconstructions: demo/reconstructions.png"
	@echo "Interpolations:  demo/interpolations.png"
	@echo "Report:          demo/report.html"

test: lint ## lint, then the fast tests
	$(BIN)/pytest -m "not slow and not cuda" $(PYTEST_ARGS)

test-all: lint ## lint, then every test, the slow ones and those for a GPU included
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(STAMP) ## linter, formatter, types and the direction of imports, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format, and mend what the linter can mend by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the demonstration, builds and caches; the environment and runs/ stay
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path './$(VENV)' -prune -o -path ./.venv -prune -o -path ./.git -prune \
	  -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Where the interpreter is missing, or its link is broken, whatever was installed beside it is installed again.
ifneq ($(shell test -x $(BIN)/python && echo there),there)
.PHONY: $(BIN)/python
endif

# ensurepip is asked for because some systems package venv apart and would leave an environment without pip.
$(BIN)/python:
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	  if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    rm -f $(BIN)/python $(BIN)/python3*; \
	    "$$python" -m venv $(VENV_ARGS) "$(VENV)" && exit 0; \
	    rm -f "$(BIN)/python"; exit 1; \
	  fi; \
	done; \
	echo "error: none of '$(or $(PYTHON),$(PYTHONS))' is a Python 3.11 or newer that has venv:" \
	  "install one (Debian and Ubuntu: also python3-venv), or name it with make PYTHON=/path/to/python" >&2; exit 1

$(STAMP): pyproject.toml constraints.txt $(BIN)/python
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@test -e $(FOUND) || $(PIP) list --format=freeze | grep -E $(TORCH) >$(FOUND) || true
	@if test -s $(FOUND); then \
	  { grep -Ev $(TORCH) constraints.txt; $(PIP) list --format=freeze | grep -E $(TORCH) || true; } >$(PINS); \
	  echo "Keeping the PyTorch found in $(VENV):" $$(grep -E $(TORCH) $(PINS)); \
	else cp constraints.txt $(PINS); fi
	@echo "Installing into $(VENV) (the first time fetches PyTorch, which is large: some minutes; PIP_ARGS=-v shows each step)"
	$(PIP) install --quiet --no-input -c $(PINS) $(PIP_ARGS) -e ".[dev]"
	@touch $(STAMP)
