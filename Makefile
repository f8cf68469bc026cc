# Two commands: `make demo` shows the whole pipeline in the Dagster UI, `make test` runs the tests. `make help` lists all.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# pip, or uv if it is on the PATH, which takes seconds where pip takes minutes.
PIP := $(if $(shell command -v uv),uv pip install --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install \
  --disable-pip-version-check) --quiet --only-binary :all:
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help demo test check coverage install install-dev lint types benchmark scale slow sql-on-fhir cases search-steps random-operations kills hostile chaos soak newest-dagster dbt-story second-server hapi hapi-story rules lock sbom audit build passwords up down db-init bootstrap-s3 logs start clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

demo: $(VENV)/.installed ## The whole pipeline on synthetic patients, then the Dagster UI
	$(BIN)/fhir-assets demo

test: $(VENV)/.installed-dev ## All tests but the long stories
	$(PYTEST) --dist loadfile

check: lint types ## Lint, types and the fast tests: under five minutes
	$(PYTEST) --dist loadfile $(FAST)

# The tests of single components, without those that take the longest. The others start servers, daemons and whole loads.
SLOWER := test_commands test_psql warehouse/test_exports warehouse/test_dbt_claims warehouse/test_dbt_models \
  pipeline/test_consent_references pipeline/test_dead_consents pipeline/test_load_beside_replay \
  pipeline/test_operations_at_once pipeline/test_prune pipeline/test_reencrypt_online \
  pipeline/test_visit_files pipeline/test_workers privacy/test_unencrypted_data sandbox/test_population
FAST := $(addprefix fhir_assets_tests/,fhir privacy storage warehouse pipeline sandbox) \
  $(filter-out $(SLOWER:%=fhir_assets_tests/%.py),$(wildcard fhir_assets_tests/test_*.py)) \
  $(SLOWER:%=--ignore=fhir_assets_tests/%.py)

coverage: $(VENV)/.installed-dev ## `make test` with a coverage report in htmlcov/
	$(PYTEST) --dist loadfile --cov --cov-report=html --cov-report=term

install: $(VENV)/.installed ## Install what a deployment needs into .venv, from the lock files
install-dev: $(VENV)/.installed-dev ## Install what a contributor needs into .venv, from the lock files

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The locked versions first, each checked against its hash; then the package itself, without looking for any other.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml requirements/build.lock requirements/runtime.lock
	@echo "Installing fhir-assets into $(VENV) (a minute or two) …"
	$(PIP) --require-hashes -r requirements/build.lock -r requirements/runtime.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml requirements/dev.lock
	@echo "Installing fhir-assets with its tests into $(VENV) (a minute or two) …"
	$(PIP) --require-hashes -r requirements/dev.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@ $(VENV)/.installed

# The lock files: every version with its hashes, for all Pythons from 3.11 on; no address of a package index.
UV = $(or $(shell command -v uv),$(BIN)/uv)
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --only-binary :all: --generate-hashes --no-header \
  --no-annotate --no-emit-index-url --no-strip-extras pyproject.toml
lock: ## Resolve requirements/*.lock again, from pyproject.toml
	command -v uv >/dev/null || $(PIP) uv
	$(COMPILE) --extra embedded --extra parquet --extra xlsx --extra celery --extra k8s -o requirements/runtime.lock
	$(COMPILE) --extra dev -c requirements/runtime.lock -o requirements/dev.lock
	$(COMPILE) --extra dev --extra benchmark -c requirements/dev.lock -o requirements/benchmark.lock
	$(COMPILE) --extra test --extra dbt --extra dashboard -c requirements/runtime.lock -o requirements/dbt.lock
	echo 'hatchling editables' | tr ' ' '\n' | $(subst pyproject.toml,-,$(COMPILE)) -c requirements/dev.lock -o requirements/build.lock

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev ## mypy, strict
	$(BIN)/mypy

# The longer stories; STORIES picks some of them. Two at once: they wait a lot, for daemons and for the next minute.
STORIES ?= fhir_assets_tests
# With RETRY=1 what failed is run again, alone on the machine: a story that fails then has failed.
RETRY ?=
RETRY_FAILED = echo "Failed beside other stories, run again alone:" && \
  $(BIN)/python -m pytest -m slow --maxfail=1 --last-failed --last-failed-no-failures none -rA --show-capture=no
slow: $(VENV)/.installed-dev ## The long stories; STORIES picks some of them
	$(PYTEST) -m slow --dist loadfile $(STORIES)$(if $(RETRY), || { test $$? = 1 && $(RETRY_FAILED); })

# The two generated data files of the package: make rules DEFINITIONS=path/to/R4/definitions
DEFINITIONS ?= ../shared/fhir-r4
rules: $(VENV)/.installed-dev ## Build the validation rules and the type model of R4 from DEFINITIONS
	$(BIN)/python -m fhir_assets.fhir.validation.build_rules $(DEFINITIONS)
	$(BIN)/python -m fhir_assets.fhir.build_model $(DEFINITIONS)

# The public SQL-on-FHIR suite: make sql-on-fhir SUITE=path/to/checkout/tests
SUITE ?= ../shared/sql-on-fhir/tests
sql-on-fhir: $(VENV)/.installed-dev ## The public SQL on FHIR suite: SUITE=path/to/checkout/tests
	$(BIN)/python -m fhir_assets_tests.support.sql_on_fhir_suite $(SUITE) --report test_report.json

# Public problems as runnable cases; each starts a deployment of its own, so that three run at once.
CASES_PATH ?= ../shared/cases
CASES ?= $(shell seq -w 1 27)
cases: $(VENV)/.installed-dev ## Problems that others have reported: CASES_PATH=path/to/cases, CASES="01 02" picks some
	echo $(CASES) | tr ' ' '\n' | xargs -n 3 -P $(WORKERS) $(BIN)/python $(CASES_PATH)/run.py

SEARCH_STEPS ?= 1000000
search-steps: $(VENV)/.installed-dev ## Searches of a server that misbehaves at random: SEARCH_STEPS answers
	SEARCH_STEPS=$(SEARCH_STEPS) $(BIN)/python -m pytest fhir_assets_tests/fhir/test_search_misbehaving.py --hypothesis-show-statistics

PLANS ?= 1000
random-operations: $(VENV)/.installed-dev ## Operations on the same resources at random, two at once: PLANS plans
	RANDOM_OPERATIONS=$(PLANS) $(BIN)/python -m pytest fhir_assets_tests/pipeline/test_random_operations.py

HOURS ?= 1
SEED ?= $(shell date +%s)
chaos: $(VENV)/.installed-dev ## A deployment under kills, cuts, failovers, a full disk, lies: HOURS, SEED repeats a plan
	$(BIN)/python -m fhir_assets_tests.support.soak --chaos --seed $(SEED) --minutes $$(awk 'BEGIN {print $(HOURS) * 60}')

KILLS ?= 1000
kills: $(VENV)/.installed-dev ## Commands killed at random moments, on 2,000 resources: KILLS, SEED repeats the moments
	KILLS=$(KILLS) KILLS_SEED=$(SEED) $(BIN)/python -m pytest -m slow fhir_assets_tests/e2e/test_many_kills.py

HOSTILE_EXAMPLES ?= 5000
hostile: $(VENV)/.installed-dev ## Servers, buckets and folders that lie at random: HOSTILE_EXAMPLES on each road to them
	HOSTILE_EXAMPLES=$(HOSTILE_EXAMPLES) $(BIN)/python -m pytest $(shell ls fhir_assets_tests/*/test_hostile_*.py)

MINUTES ?= 60
soak: $(VENV)/.installed-dev ## A deployment under traffic, kills and outages for MINUTES, then: is anything lost?
	$(BIN)/python -m fhir_assets_tests.support.soak --minutes $(MINUTES)

# The event log writes the same rows as Dagster's own, and range runs their events: on the newest release that installs.
newest-dagster: ## The tests of the event log on the newest Dagster release, in build/newest
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r requirements/dev.lock
	build/newest/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --upgrade \
	  dagster dagster-postgres dagster-webserver dagster-graphql
	build/newest/bin/python -m pip list | grep -i '^dagster'
	PYTHONPATH=$(CURDIR) build/newest/bin/python -m pytest fhir_assets_tests/orchestration/instance \
	  fhir_assets_tests/e2e/test_range_events.py

# dbt needs an older pathspec than the build backend of requirements/dev.lock, and therefore has an environment of its own.
dbt-story: build/dbt/.installed ## The dbt package, run by dbt on Postgres and on the lake; the dashboard, pandas
	PYTHONPATH=$(CURDIR) build/dbt/bin/python -m pytest -m slow --durations=3 fhir_assets_tests/e2e/test_dbt.py \
	  fhir_assets_tests/e2e/test_dashboard.py fhir_assets_tests/e2e/test_data_frames.py

build/dbt/.installed: requirements/dbt.lock
	$(PYTHON) -m venv build/dbt
	$(subst $(BIN),build/dbt/bin,$(PIP)) --require-hashes -r requirements/dbt.lock
	touch $@

# Upload and connector against a FHIR server that is not ours; needs node 20 and npm.
SECOND := fhir_assets_tests/e2e/second_server
second-server: $(VENV)/.installed-dev ## The stories against a FHIR server that is not ours (needs Node 20)
	npm install --prefix $(SECOND) --no-package-lock --no-audit --no-fund --silent
	$(BIN)/python -m pytest -m slow fhir_assets_tests/e2e/test_second_server.py

# A real HAPI FHIR server, for a person and for its story; needs Maven, a JDK 17 and the folder HAPI.
HAPI ?= ../shared/hapi
HAPI_PORT ?= 8123
HAPI_OPTIONS ?=
hapi: build/hapi/.built ## A real HAPI FHIR server at http://127.0.0.1:8123/fhir (needs Maven and a JDK 17)
	@echo "HAPI starts at http://127.0.0.1:$(HAPI_PORT)/fhir, ready in a minute at most; Ctrl-C ends it, its data too."
	cd build/hapi && HEAP=$${HEAP:-1g} ./start.sh -Dport=$(HAPI_PORT) -Dfast.jobs=true $(HAPI_OPTIONS)

build/hapi/.built:
	@test -f $(HAPI)/pom.xml || { echo "There is no HAPI in $(HAPI): give its folder, make hapi HAPI=path/to/hapi"; exit 1; }
	@command -v mvn >/dev/null || { echo "HAPI is built with Maven: install it (apt install maven)"; exit 1; }
	@command -v javac >/dev/null || { echo "HAPI needs a JDK 17: install it (apt install openjdk-17-jdk-headless)"; exit 1; }
	@echo "Building HAPI in build/hapi (under a minute) …"
	mkdir -p build/hapi
	cp -r $(HAPI)/. build/hapi/
	chmod -R u+w build/hapi
	cd build/hapi && mvn -q -B compile dependency:copy-dependencies -DoutputDirectory=lib
	touch $@

hapi-story: $(VENV)/.installed-dev build/hapi/.built ## The stories against a real HAPI: all roads, writes during loads, deliveries, kills
	$(BIN)/python -m pytest -m slow --durations=5 fhir_assets_tests/e2e/test_hapi.py fhir_assets_tests/e2e/test_hapi_delivery.py

benchmark: $(VENV)/.installed-dev ## All figures of docs/performance.md, with those of comparable tools
	$(PIP) --require-hashes -r requirements/benchmark.lock
	@# A peer that asks for an older fhirpathpy than ours, and works with it.
	$(PIP) --no-deps 'sqlonfhir>=0.0.2'
	$(BIN)/python -m benchmarks

# The tables of docs/scale.md, measured again: make scale RESOURCES=1000000
RESOURCES ?= 100000
scale: $(VENV)/.installed-dev ## The costs of RESOURCES resources, as in docs/scale.md
	$(BIN)/python -m benchmarks.scale $(RESOURCES)

# What is installed by a deployment: its parts in CycloneDX's form, and what is known against them.
sbom: build/supply/.installed ## The software bill of materials of a deployment, in build/sbom.json
	build/supply/bin/cyclonedx-py requirements requirements/runtime.lock --pyproject pyproject.toml \
	  --mc-type application --output-reproducible --output-file build/sbom.json

audit: build/supply/.installed ## Known vulnerabilities of what a deployment installs (asks PyPI)
	build/supply/bin/pip-audit --requirement requirements/runtime.lock --require-hashes --disable-pip

build/supply/.installed:
	$(PYTHON) -m venv build/supply
	$(subst $(BIN),build/supply/bin,$(PIP)) cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

# What is deployed with Docker; the file .env has its settings.
build: ## Build the image of docker-compose.yml
	docker compose build

# Random ones, for what neither .env nor the environment sets. They are kept: Postgres has them from then on.
PASSWORDS := POSTGRES_PASSWORD $(patsubst %,POSTGRES_%_PASSWORD,LOADER DAGSTER API CONNECTOR OPERATOR) GRAFANA_PASSWORD
passwords: ## Write the passwords of docker-compose.yml that .env lacks into .env
	@umask 077; touch .env; chmod go= .env; [ -z "$$(tail -c 1 .env)" ] || echo >> .env; \
	for name in $(PASSWORDS); do \
	  if ! printenv $$name | grep -q . && ! grep -qE "^(export )?$$name=['\"]?[^'\"]" .env; then \
	    echo "$$name=$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >> .env; echo "New in .env: $$name"; \
	  fi; \
	done

up: passwords ## Start the services of docker-compose.yml, PROFILES="api monitoring" too
	docker compose $(foreach profile,$(PROFILES),--profile $(profile)) up --detach

down: ## Stop the services of docker-compose.yml; their data stays
	docker compose $(foreach profile,$(PROFILES),--profile $(profile)) down

db-init: passwords ## Create or upgrade the tables in the database of docker-compose.yml
	docker compose run --rm migrate

bootstrap-s3: $(VENV)/.installed ## Create the buckets (or folders) of FHIR_LANDING_URL and FHIR_STORE_URL
	$(BIN)/fhir-assets landing init

logs: ## Follow the logs of the services
	docker compose logs --follow --tail 100

start: up ## Start the services and print their addresses
	@echo "Dagster UI   http://127.0.0.1:3000"
	@echo "HTTP API     http://127.0.0.1:8080/docs   (PROFILES=api)"
	@echo "Grafana      http://127.0.0.1:3001        (PROFILES=monitoring)"
	@echo "S3 (MinIO)   http://127.0.0.1:9000        (PROFILES=s3)"

clean: ## Remove .venv and what was built; asks before it removes the data of the embedded parts (FORCE=1 does not ask)
	rm -rf $(VENV) build dist
	@if [ -d .fhir_assets ]; then \
	  if [ "$(FORCE)" != 1 ]; then \
	    printf 'Delete .fhir_assets, the database and the store with all loaded data? Type yes: '; read answer || true; \
	    [ "$$answer" = yes ] || { echo "Kept: .fhir_assets"; exit 0; }; \
	  fi; \
	  rm -rf .fhir_assets; \
	fi
