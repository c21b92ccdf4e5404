# `make demo` and `make test` set up everything they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IMG2DATASET := tests/handover/.venv
TRANSFORMERS := tests/embed/.venv
PORT ?= 3000

.PHONY: help demo dev test test-faults fuzz test-ui screenshots test-peer test-k8s test-embed test-handover golden lint bench bench-quick bench-cold bench-embed bench-staging bench-sensor bench-runs bench-sparse bench-build bench-duplicates bench-combine bench-truesize bench-plan settings-docs docs docs-links lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), which takes one to three minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## Build the demo index, materialize all assets for one seed set, show the result
	@$(BIN)/laion-assets demo

dev: $(READY) ## Start the Dagster UI on http://127.0.0.1:3000, with the same data and history; PORT= for another port
	@$(BIN)/laion-assets dev --port $(PORT)

test: $(READY) ## Run the tests; three workers keep two cores busy, because some tests wait for processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder -m "not faults"

test-faults: $(READY) ## Kill processes, damage files, answer as hostile servers and senders do; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder -m faults

fuzz: $(READY) ## The random tries of test-faults, FUZZ= times as many (20), an hour; FUZZ_SEED= repeats a run
	FUZZ=$(or $(FUZZ),20) $(BIN)/python -m pytest -s --quiet --hypothesis-show-statistics -m fuzz

test-k8s: $(READY) ## Run the graph on a stand-in for a Kubernetes cluster; needs PostgreSQL
	$(BIN)/python -m pytest tests/k8s

test-ui: $(READY) ## Run the tests against a real `make dev`, with a real browser; needs chromium
	$(BIN)/python -m pytest tests/ui

screenshots: $(READY) ## Retake the README's screenshots of the UI; needs chromium
	SCREENSHOTS=$(CURDIR)/docs/ui $(BIN)/python -m pytest tests/ui/test_built_index.py tests/ui/test_ui.py

test-peer: $(READY) ## Compare with clip-retrieval, and with indices of autofaiss, in their own environment
	PYTHONPATH=benchmarks $(BIN)/python -m pytest tests/peer

test-handover: $(READY) $(IMG2DATASET)/.ready ## Pass our tables to img2dataset, in its own environment
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

golden: $(READY) ## Record clip-retrieval's answers, for a test that runs without it
	PYTHONPATH=benchmarks:tests $(BIN)/python tests/peer/golden.py

lint: $(READY) ## Lint, check formatting, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini
	$(BIN)/lint-imports

bench: $(READY) ## Measure against the peer, about an hour; writes benchmarks/results.md
	$(BIN)/python benchmarks/bench.py

bench-quick: $(READY) ## The same on less data, a few minutes; writes benchmarks/.cache/quick
	$(BIN)/python benchmarks/bench.py --quick --output benchmarks/.cache/quick

bench-cold: $(READY) ## Measure the bytes of cold reads of metadata and lists, five minutes
	$(BIN)/python benchmarks/cold.py

bench-embed: $(READY) ## Measure embedded images per second, against the model alone, a few minutes
	ORT_DISABLE_TELEMETRY=1 $(BIN)/python benchmarks/embed.py

bench-staging: $(READY) ## Measure how fast an index is copied from a bucket, a few minutes; writes benchmarks/staging.md
	$(BIN)/python benchmarks/staging.py

bench-sensor: $(READY) ## Measure a tick of the sensor over 100,000 seed files in a bucket, a few minutes
	$(BIN)/python benchmarks/sensor.py

bench-runs: $(READY) ## Measure a run of a small seed set in `make dev`, against the command line, five minutes; writes benchmarks/runs.md
	$(BIN)/python benchmarks/runs.py

bench-sparse: $(READY) ## Measure what sparse staging reads, a few minutes; writes benchmarks/sparse.md
	$(BIN)/python benchmarks/sparse.py

bench-truesize: $(READY) ## Requests on a stand-in of LAION-5B's true size, an hour, 25 GB of disk; writes benchmarks/truesize.md
	$(BIN)/python benchmarks/truesize.py

bench-build: $(READY) ## Build the same index as autofaiss, about an hour; ROWS= for another size
	$(BIN)/python benchmarks/build.py --rows $(or $(ROWS),1000000)

bench-duplicates: $(READY) ## CPU time and memory of finding near-duplicates, a few minutes; writes benchmarks/duplicates.md
	$(BIN)/python benchmarks/duplicates.py

bench-combine: $(READY) ## Time, memory and disk of combining millions of images, half an hour; ROWS="250000 500000" for other sizes
	$(BIN)/python benchmarks/combine.py $(if $(ROWS),--rows $(ROWS))

bench-plan: $(READY) ## Compare planned requests with measured ones, on the data of bench; two minutes if they are there
	$(BIN)/python benchmarks/plan.py

settings-docs: $(READY) ## Write the tables of settings in docs/settings.md, and .env.example
	$(BIN)/python -m laion_assets.defs.settings_docs

docs: $(READY) ## Build the documentation into docs/_build/html; fails on warnings and dead internal links
	$(BIN)/python -m sphinx -W -n --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-links: $(READY) ## Check the documentation's links to the web; needs a network
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

LOCK = $(BIN)/uv pip compile --quiet --extra cluster --generate-hashes --no-header --no-annotate --no-emit-index-url pyproject.toml

lock: $(READY) ## Pin current versions of everything in requirements.lock, and of the image in k8s/requirements.lock
	$(BIN)/python -m pip install --quiet uv
	$(LOCK) --upgrade --group dev --group docs --output-file requirements.lock
	$(LOCK) --upgrade --constraint requirements.lock --output-file k8s/requirements.lock

clean: ## Remove the environment and caches; data/ stays
	rm -rf $(VENV) $(IMG2DATASET) $(TRANSFORMERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info docs/_build docs/reference/api
