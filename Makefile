# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IMG2DATASET := tests/handover/.venv
TRANSFORMERS := tests/embed/.venv
PORT ?= 3000

.PHONY: help demo dev test test-ui screenshots test-peer test-k8s test-embed test-handover golden lint bench bench-quick bench-cold bench-embed bench-staging bench-sensor bench-sparse bench-build settings-docs docs docs-links lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## Build the demo index, materialize all assets for one seed set, show the result
	@$(BIN)/laion-assets demo

dev: $(READY) ## Start the Dagster UI on http://127.0.0.1:3000, on the same data and history; PORT= for another
	@$(BIN)/laion-assets dev --port $(PORT)

test: $(READY) ## Run the tests; three workers fill two cores, for some wait for processes
	$(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder

test-k8s: $(READY) ## Run the graph on a stand-in for a Kubernetes cluster; needs PostgreSQL
	$(BIN)/python -m pytest tests/k8s

test-ui: $(READY) ## Run the tests against a real `make dev`, with a real browser; needs chromium
	$(BIN)/python -m pytest tests/ui

screenshots: $(READY) ## Take the README's pictures of the UI anew; needs chromium
	SCREENSHOTS=$(CURDIR)/docs/ui $(BIN)/python -m pytest tests/ui/test_ui.py

test-peer: $(READY) ## Compare with clip-retrieval, and with indices of autofaiss, in their own environment
	PYTHONPATH=benchmarks $(BIN)/python -m pytest tests/peer

test-handover: $(READY) $(IMG2DATASET)/.ready ## Hand our tables over to img2dataset, in its own environment
	$(BIN)/python -m pytest tests/handover

$(IMG2DATASET)/.ready: tests/handover/requirements.txt
	$(PYTHON) -m venv --clear $(IMG2DATASET)
	$(IMG2DATASET)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r $<
	@touch $@

test-embed: $(READY) $(TRANSFORMERS)/.ready ## Compare our vectors with those of transformers and clip-retrieval, in their own environment
	$(BIN)/python -m pytest tests/embed

$(TRANSFORMERS)/.ready: tests/embed/requirements.txt
	$(PYTHON) -m venv --clear $(TRANSFORMERS)
	$(TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps open-clip-torch==3.3.0 clip-retrieval==2.45.0
	@touch $@

golden: $(READY) ## Write down what clip-retrieval answers, for a test that runs without it
	PYTHONPATH=benchmarks:tests $(BIN)/python tests/peer/golden.py

lint: $(READY) ## Lint, check formatting, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Measure against the peer, about an hour; writes benchmarks/results.md
	$(BIN)/python benchmarks/bench.py

bench-quick: $(READY) ## The same on less data, a few minutes; writes benchmarks/.cache/quick
	$(BIN)/python benchmarks/bench.py --quick --output benchmarks/.cache/quick

bench-cold: $(READY) ## Bytes that cold reads of the metadata take, a minute
	$(BIN)/python benchmarks/cold.py

bench-embed: $(READY) ## Images a second that are embedded, against the model alone, a few minutes
	$(BIN)/python benchmarks/embed.py

bench-staging: $(READY) ## How fast an index comes from a bucket, a few minutes; writes benchmarks/staging.md
	$(BIN)/python benchmarks/staging.py

bench-sensor: $(READY) ## Measure a tick of the sensor over 100,000 seed files in a bucket, a few minutes
	$(BIN)/python benchmarks/sensor.py

bench-sparse: $(READY) ## What sparse staging reads, a few minutes; writes benchmarks/sparse.md
	$(BIN)/python benchmarks/sparse.py

bench-build: $(READY) ## Build the same index as autofaiss, about an hour; ROWS= for another size
	$(BIN)/python benchmarks/build.py --rows $(or $(ROWS),1000000)

settings-docs: $(READY) ## Write the tables of settings in docs/settings.md, and .env.example
	$(BIN)/python -m laion_assets.defs.settings_docs

docs: $(READY) ## Build the documentation into docs/_build/html; fails on warnings and dead internal links
	$(BIN)/python -m sphinx -W -n --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-links: $(READY) ## Follow the documentation's links to the web; needs a network
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

lock: $(READY) ## Pin today's versions of everything into requirements.lock
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --extra cluster --group dev --group docs --no-header --no-annotate --no-emit-index-url \
		pyproject.toml --output-file requirements.lock

clean: ## Remove the environment and caches; data/ stays
	rm -rf $(VENV) $(IMG2DATASET) $(TRANSFORMERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info docs/_build docs/reference/api
