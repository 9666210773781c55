# The two commands: `make demo` sets everything up and shows the main job; `make test` sets up and tests.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-tests demo run stop test check format lock bench docs site deb clean

PYTHON := .venv/bin/python

help: ## What there is to do
	@echo "jef_daemon: jobs on RabbitMQ. Begin with:  make demo"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## Prepare: .venv, packages, RabbitMQ
	@deploy/local/setup.sh

setup-tests:
	@deploy/local/setup.sh --tests

demo: ## Set up and watch the main job on a real broker, a minute
	@deploy/local/setup.sh --demo
	@$(PYTHON) deploy/local/demo.py

run: setup ## Set up and leave a daemon running on a private broker, to play with
	@$(PYTHON) deploy/local/playground.py start

stop: ## Stop what `make run` left running
	@[ ! -x $(PYTHON) ] || $(PYTHON) deploy/local/playground.py stop

test: setup-tests ## Set up and pass all tests
	@$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25 --cov --cov-report=term

check: setup-tests ## Format, lint, types, import rules
	@$(PYTHON) -m ruff format --check . && $(PYTHON) -m ruff check . && $(PYTHON) -m mypy && .venv/bin/lint-imports

format: setup ## Format the code
	@$(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --fix .

lock: setup ## Renew the lock files
	@$(PYTHON) -m pip install -q uv
	@compile() { .venv/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header --no-strip-extras "$$@"; } && \
	compile pyproject.toml -o requirements.lock && \
	compile --group dev pyproject.toml -o requirements-dev.lock && \
	compile --group build -o deploy/docker/build.lock && \
	compile --group peers -o benchmarks/peers/requirements.lock

docs: setup ## Write the generated parts of the documentation anew
	@$(PYTHON) docs/generate.py
	@$(PYTHON) deploy/grafana/export.py

site: setup ## Build the documentation as a site, into dist/site
	@command -v npm >/dev/null || { echo "make site: the site's scripts come from npm: install npm" >&2; exit 1; }
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict && echo "open dist/site/index.html"

bench: setup ## Measure against a plain handler, then beside Celery and others, in turns
	@$(PYTHON) benchmarks/throughput.py
	@$(PYTHON) benchmarks/peers/compare.py

deb: setup-tests ## Build the Debian package, into dist
	@deploy/debian/build.sh

clean: stop ## Remove what was made here
	@[ ! -d .jef/broker ] || $(PYTHON) deploy/local/broker.py remove
	@rm -rf .venv .jef .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* htmlcov dist
