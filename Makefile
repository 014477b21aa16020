# `make demo` and `make test` install what they need first, so either is enough on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# SAEDashboard needs an older TransformerLens, so it has an environment of its own.
DASHBOARD := .venv-dashboard
DASHBOARD_STAMP := $(DASHBOARD)/installed
DASHBOARD_PIP := $(DASHBOARD)/bin/python -m pip install --quiet --disable-pip-version-check
DASHBOARD_PIP += -c constraints/dashboard.txt

.PHONY: install demo reproduce test test-dashboard mutants check docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints/tested.txt torch
	$(PIP) -c constraints/tested.txt -e '.[interpret,dev,docs]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/sae-lens-route demo --output demo-output

# the paper's experiments on the demo model; rewrites the tables of docs/reproduction.md
reproduce: $(STAMP)
	$(BIN)/sae-lens-route reproduce --output reproduction --page docs/reproduction.md
	cp reproduction/*.svg docs/images/
	cp reproduction/reproduction.json reproduction/penalties.json docs/

test: $(STAMP)
	$(BIN)/python -m pytest

test-dashboard: $(DASHBOARD_STAMP)
	$(DASHBOARD)/bin/python -m pytest tests/dashboards tests/models tests/splice tests/saes

$(DASHBOARD_STAMP): pyproject.toml constraints/dashboard.txt
	test -x $(DASHBOARD)/bin/python || $(PYTHON) -m venv $(DASHBOARD)
	$(DASHBOARD_PIP) torch
	$(DASHBOARD_PIP) -e . frozendict tabulate eindex-callum dataclasses-json hf-transfer \
	  pytest pytest-timeout hypothesis
	$(DASHBOARD_PIP) --no-deps sae-dashboard==0.8.0
	touch $(DASHBOARD_STAMP)

# plants bugs and sees whether the tests notice; rewrites benchmarks/results/reliability/mutants.json
mutants: $(STAMP)
	$(BIN)/python benchmarks/reliability/mutants.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DASHBOARD) site demo-output
