# `make demo` and `make test` need nothing but Python >= 3.11: the first run creates $(VENV) and installs requirements-dev.txt in it.
# An environment that is already there is used as it stands:
#   make test PYTHON=/path/to/python        that interpreter
#   make test VENV=/path/to/venv            that virtual environment (created if it does not exist)

VENV ?= .venv
SPEC ?= gqa16-d128
ARGS ?=

ifdef PYTHON
ENV :=
else
PYTHON := $(VENV)/bin/python
ifeq ($(origin VENV),file)
ENV := $(VENV)/.ready
else
ENV := $(if $(wildcard $(VENV)/bin/python),,$(VENV)/.ready)
endif
endif

NSA_GEN := $(PYTHON) -m nsa_gen

.PHONY: demo test lint format bench tune goldens env clean
.DEFAULT_GOAL := demo

demo: $(ENV)
	$(NSA_GEN) demo $(ARGS)

test: $(ENV)
	$(PYTHON) -m pytest -q -n auto $(ARGS)

lint: $(ENV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(ENV)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(ENV)
	$(NSA_GEN) bench $(SPEC) $(ARGS)

tune: $(ENV)
	$(NSA_GEN) tune $(SPEC) $(ARGS)

goldens: $(ENV)
	$(PYTHON) -m pytest -q tests/test_templates.py --update-goldens

env: $(ENV)

# The stamp is written last: an interrupted install is done again. Python compiles modules when they are first imported (--no-compile):
# most of torch's never are.
$(VENV)/.ready: requirements-dev.txt pyproject.toml
	@set -e; \
	for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: no Python >= 3.11 found; say PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "creating $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv build dist out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
