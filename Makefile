# `make demo` and `make test` install what they need first, so either is enough on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install demo test check docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints/tested.txt torch
	$(PIP) -c constraints/tested.txt -e '.[interpret,dev,docs]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/sae-lens-route demo --output demo-output

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site demo-output
