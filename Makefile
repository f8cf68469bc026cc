# Two commands: `make demo` shows the whole pipeline in the Dagster UI, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test install lint types benchmark scale slow sql-on-fhir second-server clean

demo: $(VENV)/.installed
	$(BIN)/fhir-assets demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing fhir-assets into $(VENV) (a minute or two) …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --editable '.[embedded,parquet]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --editable '.[test]'
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --editable '.[lint]'
	touch $@

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-lint
	$(BIN)/mypy

# The longer stories; STORIES picks some of them. Two at once: they wait a lot, for daemons and for the next minute.
STORIES ?= fhir_assets_tests
slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile $(STORIES)

# The public SQL-on-FHIR suite: make sql-on-fhir SUITE=path/to/checkout/tests
SUITE ?= ../shared/sql-on-fhir/tests
sql-on-fhir: $(VENV)/.installed-test
	$(BIN)/python -m fhir_assets_tests.support.sql_on_fhir_suite $(SUITE) --report test_report.json

# Upload and connector against a FHIR server that is not ours; needs node 20 and npm.
SECOND := fhir_assets_tests/e2e/second_server
second-server: $(VENV)/.installed-test
	npm install --prefix $(SECOND) --no-package-lock --no-audit --no-fund --silent
	$(BIN)/python -m pytest -m slow fhir_assets_tests/e2e/test_second_server.py

benchmark: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --editable '.[benchmark]'
	@# A peer that asks for an older fhirpathpy than ours, and works with it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps 'sqlonfhir>=0.0.2'
	$(BIN)/python -m benchmarks

# The tables of SCALE.md, measured again: make scale RESOURCES=1000000
RESOURCES ?= 100000
scale: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.scale $(RESOURCES)

clean:
	rm -rf $(VENV) .fhir_assets build dist
