# vlafleet: every target does its own set-up and costs seconds when nothing changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

VENV := .venv
BIN := $(VENV)/bin
LOCK := uv pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
  --generate-hashes --no-emit-index-url --no-annotate --no-header --no-strip-extras

.PHONY: help setup demo data docs charts test lint images lock

help: ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Python 3.12 is looked for on PATH, then in pyenv, then in uv; Debian 12 itself ships 3.11.
$(VENV)/bin/python:
	@python=""
	for candidate in python3.12 "$$(pyenv prefix 3.12 2>/dev/null || true)/bin/python3.12" \
	  "$$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12 2>/dev/null | tail -n 1)" \
	  "$$(uv python find 3.12 2>/dev/null || true)"; do
	  if "$$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
	    python="$$candidate"; break
	  fi
	done
	if [ -z "$$python" ]; then
	  echo "Python 3.12 was not found on PATH, in pyenv or in uv. Install it (for example 'pyenv install 3.12' or 'uv python install 3.12') and run make again." >&2
	  exit 14
	fi
	"$$python" -m venv $(VENV)

# The stamp makes a second run cost nothing; it is written last, so an interrupted set-up runs again.
$(VENV)/.stamp: $(VENV)/bin/python requirements/tools.txt requirements/dev.txt pyproject.toml
	@echo "Installing the locked packages into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	# docopt has no wheel: what builds it is held to the same hashes.
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --build-constraints requirements/dev.txt \
	  requirements/tools.txt requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --offline -e .
	touch $@

setup: $(VENV)/.stamp ## install the locked packages into .venv

demo: setup ## a whole federation on this machine: simulated data, two sites, one run, a report
	@$(BIN)/vlafleet demo

data: setup ## the demo's simulated SO-101 datasets, in data/demo
	@$(BIN)/vlafleet data make data/demo --site site-a --site site-b

docs: setup ## docs/metrics.md, the Grafana dashboards and the charts' READMEs, from what declares them
	@$(BIN)/python -m docs.metrics_table
	$(BIN)/python -m docker.grafana.build
	$(BIN)/python -m k8s.readme

charts: setup ## the Helm charts, linted with every example of values and packaged into dist/
	@k8s/tools.sh .cache/kubernetes
	# Says of every link that its target is packaged.
	helm() { .cache/kubernetes/helm "$$@" 2> >(grep -v '^level=INFO' >&2); }
	for values in k8s/*/ci/*-values.yaml; do
	  helm lint --strict --quiet "$${values%/ci/*}" --values "$$values"
	done
	helm package k8s/superlink k8s/site --destination dist

# sysmon, Python 3.12's own hooks, costs a few per cent where the tracer takes twice the time.
test: setup ## every test; what needs Docker or OpenGL says so when it is missing
	@COVERAGE_CORE=sysmon $(BIN)/pytest --cov=app --cov-report=term:skip-covered --cov-fail-under=85

lint: setup ## ruff, mypy, hadolint
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

images: ## the three container images, after installing Docker where it is missing
	@docker/install-engine.sh
	docker/build-images.sh

lock: $(VENV)/bin/python ## resolve requirements/*.txt again from pyproject.toml, with hashes
	@command -v $(BIN)/uv >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	export PATH="$(CURDIR)/$(BIN):$$PATH"
	$(LOCK) --extra app --extra sim --extra simulation --extra dev pyproject.toml -o requirements/dev.txt
	$(LOCK) -c requirements/dev.txt requirements/tools.in -o requirements/tools.txt
	$(LOCK) --extra app -c requirements/dev.txt pyproject.toml -o requirements/app.txt
	$(LOCK) -c requirements/dev.txt pyproject.toml -o requirements/base.txt
