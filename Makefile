# EdgeWarden. `make help` lists the targets; each does the set-up that it needs.
SHELL := /bin/bash
VENV := .cache/venv/bin
export PATH := $(CURDIR)/.cache/bin:$(PATH)
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := attest signature public log evidence
PYTEST_COVERAGE := $(if $(COVERAGE),--cov --cov-report=)

.DEFAULT_GOAL := help
.PHONY: help setup opa oms keylime demo run test coverage fuzz bench lint format lock clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## Install what everything else needs (asks before it installs Debian packages)
	@tools/setup

opa: setup ## Find or build the OPA binary
	@tools/setup opa

oms: setup
	@tools/setup oms

keylime: setup
	@tools/setup keylime

demo: setup ## A narrated tour of a whole node; ends by itself
	@$(VENV)/python -m tools.demo $(if $(TPM),--tpm '$(TPM)')

run: setup ## Start the same node in the foreground (TPM=tcti for a real TPM)
	@$(VENV)/python -m tools.demo --serve $(if $(TPM),--tpm '$(TPM)')

bench: setup keylime ## Compare with an unguarded server, in one run
	$(VENV)/python -m bench.run

test: setup opa oms keylime ## Run all tests
	$(VENV)/pytest -n 2 --dist loadgroup $(PYTEST_COVERAGE) $(PYTEST_ARGS)
	@if type -P opa >/dev/null; then opa test -b rego policies; else echo 'opa test: skipped, there is no OPA'; test -z "$$CI"; fi
	$(if $(COVERAGE),$(VENV)/python -m tools.coverage_gate)

coverage: ## Run all tests, print coverage by room and fail below a bar
	@$(MAKE) --no-print-directory test COVERAGE=1

fuzz: setup ## Fuzz each parser of the appraiser for FUZZ_SECONDS (60)
	@mkdir -p $(addprefix .cache/fuzz/,$(FUZZ_TARGETS))
	@set -e; for target in $(FUZZ_TARGETS); do echo "fuzz: $$target"; \
	  $(VENV)/python -m tests.fuzz.run $$target -max_total_time=$(FUZZ_SECONDS) -timeout=10 -verbosity=0 -print_final_stats=1 \
	    -artifact_prefix=.cache/fuzz/$$target- .cache/fuzz/$$target tests/fuzz/corpus/$$target; done

lint: setup ## Check format, style, types and the import rule
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(VENV)/lint-imports

format: setup ## Rewrite the code in the project's format
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .

lock: ## Write the lock files again (needs uv)
	uv pip compile -q pyproject.toml controller/pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-emit-package edgewarden -o requirements/dev.lock
	uv pip compile -q requirements/assets.in --no-deps --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url -o requirements/assets.lock
	uv pip compile -q requirements/oms.in --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url -o requirements/oms.lock
	uv pip compile -q requirements/keylime.in --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url -o requirements/keylime.lock

clean: ## Remove everything that the targets made
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
