# make demo: the main job. make test: the tests. Each sets up its own environment; only Python >= 3.11 is needed.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all notebooks faults lint docs bench clean
demo: $(VENV)/installed
	$(BIN)/eqssl demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(VENV)/installed
	$(BIN)/pip install -q -e ".[test,torch,browser,parquet,kubernetes]"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest --nbmake notebooks
	$(MAKE) docs

# The notebooks with their outputs, as they are read where they are shown. On a quiet machine: minutes.
notebooks: $(VENV)/installed
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

# Every fault, in full counts: hours; the rows come in .cache/faults as they are found. docs/reliability.md has the last run.
faults: $(VENV)/installed
	EQSSL_FAULTS=full $(BIN)/python -m pytest tests/faults

# ruff and pyright. pyright is a program of Node.js: pip brings Node.js, and pyright fetches itself from npm, once.
lint: $(VENV)/installed
	$(BIN)/pip install -q -e ".[lint]"
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation site, in build/docs. Warnings are errors.
docs: $(VENV)/installed
	$(BIN)/pip install -q -e ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(VENV)/installed
	$(BIN)/pip install -q -e ".[torch]"
	$(BIN)/python benchmarks/step.py

$(VENV)/installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 was not found; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache
