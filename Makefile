# Everything a newcomer needs: `make demo` and `make test` set up what they use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PYTHONHASHSEED := 0

.PHONY: demo demo-train test test-long lint clean

demo: $(VENV)/.demo
	$(BIN)/minidiffusion demo

demo-train: $(VENV)/.demo
	$(BIN)/minidiffusion demo-train

test: $(VENV)/.test lint
	$(BIN)/pytest -m "not long"

test-long: $(VENV)/.test lint
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_tree.py --check

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: a range would pull the CUDA build and its gigabytes.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
