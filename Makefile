# make quickstart   the whole life of a model on this machine
# make test         everything that must hold: format, types, tests, coverage floors
# make check        the quick part of it: format, lint, types
# make clean        removes what the others made, the environment included
#
# Of what takes long, `make test` runs a part that the state of the code draws, in some 40 minutes, and names what
# it left out for time; SOLOMONOV_FULL=1 make test runs all.
# Needs Python 3.11 or newer with its venv module. VENV=folder and PYTHON=interpreter choose others;
# TESTS="tests/launcher -k name" runs a part of the suite, without the coverage floors. RAY= leaves Ray out:
# the quickstart then builds rows inline.

VENV ?= .venv
PYTHON ?= python3
TESTS ?=
RAY ?= ray

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile
RUNTIME := $(VENV)/.installed-runtime
TESTING := $(VENV)/.installed-testing

.PHONY: quickstart test check clean
.DELETE_ON_ERROR:

quickstart: $(RUNTIME)
	@$(BIN)/solomonov quickstart

check: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(if $(TESTS),$(TESTS),--coverage-floors --sampled)

# torch goes first and alone: pinned, so that what comes after keeps it and does not fetch another build.
$(RUNTIME): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	@echo "installing into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable '.$(if $(RAY),[$(RAY)])'
	@touch $@

$(TESTING): $(RUNTIME)
	@$(PIP) --editable '.[cluster,science,test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
