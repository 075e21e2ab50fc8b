# Every target works in .venv, made from pyproject.toml and constraints.txt. Needs make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -q -c constraints.txt
SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema
PAGES := README.md ARCHITECTURE.md CONTRIBUTING.md SECURITY.md demo/README.md docs/benchmarks.md docs/evaluation.md docs/glossary.md docs/index.md docs/tutorial.md docs/reference/problems.md docs/decisions docs/explanation docs/how-to
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

# The interpreter of .venv and the wanted one. Without PYTHON=..., an interpreter that works is kept.
identify = $(shell $(1) -c 'import sys; print("%s %d.%d" % ((sys.base_prefix,) + sys.version_info[:2]))' 2>/dev/null)
MADE_WITH := $(call identify,$(BIN)/python)
ifeq ($(origin PYTHON),file)
WANTED := $(or $(MADE_WITH),unknown)
else
WANTED := $(or $(call identify,$(PYTHON)),unknown)
endif

.PHONY: demo test test-all browser docs reference clients faults soak security properties conformance serve check lock sync-client install train help clean

demo: install  ## edit concepts over HTTP, pull the checkpoint, draw before and after into out/demo
	$(BIN)/python -m demo --out out/demo

test: install  ## the tests that a change usually breaks, against a real Postgres
	$(PYTEST) -n 2 --dist loadfile

test-all: install  ## the tests that `make test` leaves out: slow ones, faults, properties, real clients
	$(PYTEST) -n 2 --dist loadfile -m "(slow or fault or properties or clients) and not (browser or long or soak or gpu)"

browser: install  ## the web pages in the Chromium on the PATH; screenshots in out/browser
	$(PIP) -e ./client -e '.[browser]'
	$(PYTEST) -m browser tests/browser

docs: install  ## the documentation as a site in out/docs; a warning fails
	$(PIP) -e ./client -e '.[docs]'
	NO_COLOR=1 $(BIN)/zensical build --clean --strict
	$(BIN)/python -m tests.docs.pages

reference: install  ## write docs/reference/ from the code
	$(BIN)/python -m docs._generate.reference

clients: install  ## real Hub clients in environments of their own; writes docs/clients.md
	$(BIN)/pytest -m clients tests/clients --clients-table docs/clients.md

faults: install  ## every fault injected into real processes, and attacks; writes docs/faults.md
	$(BIN)/pytest -m "(fault or security) and not soak" tests/faults tests --faults-table docs/faults.md

soak: install  ## random kills under load for 15 minutes (SOAK=--soak-seconds=300); writes docs/faults.md
	$(BIN)/pytest -m soak tests/faults --faults-table docs/faults.md $(SOAK)

security: install  ## what an attacker would send
	$(BIN)/pytest -m security tests

properties: install  ## 100 examples of each operation and key, valid and invalid (an hour)
	$(BIN)/pytest -m properties tests/properties --property-examples 100 --timeout 3600

conformance: install  ## every family against diffusers' own pipeline; the last line is JSON
	$(PYTEST) -q tests/editing/test_conformance.py tests/editing/test_pipelines.py::TestPredict \
		tests/editing/generators/test_conformance_prediction.py --conformance

serve: install  ## the service with its own Postgres, until Ctrl-C; models are found in demo/weights
	EMENDER_MODEL_ROOTS=$${EMENDER_MODEL_ROOTS:-demo/weights} $(BIN)/emender serve --embedded

check: install  ## style, types, layers, spelling, project files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos
	$(BIN)/python -m docs._generate.prose
	$(BIN)/mdformat --check $(PAGES)
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(SCHEMA) vendor.compose-spec docker-compose.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml

lock: install  ## write uv.lock from pyproject.toml, and constraints.txt from it (UV_LOCK=--upgrade: newer versions)
	$(BIN)/uv lock $(UV_LOCK)
	echo '# Written by `make lock`: every version that make installs. A range for torch would fetch another build.' > constraints.txt
	$(BIN)/uv export -q --all-extras --all-groups --no-emit-local --no-emit-project --no-hashes --no-annotate --no-header >> constraints.txt

sync-client: install  ## write the sync client from the async client
	$(BIN)/python client/generate_sync.py

install: $(INSTALLED)  ## make .venv, or bring it up to date

train: install  ## train the emoji model again (90 minutes on two cores)
	$(PIP) -e ./client -e '.[train]'
	$(BIN)/python -m demo.train

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' Makefile | expand -t 18

clean:  ## remove .venv, out and var
	rm -rf $(VENV) out var

ifneq ($(MADE_WITH),$(WANTED))
.PHONY: $(INSTALLED)
endif
$(INSTALLED): pyproject.toml client/pyproject.toml demo/pyproject.toml constraints.txt
ifneq ($(MADE_WITH),$(WANTED))
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Emender needs Python 3.11 or newer. $(PYTHON) is %d.%d. Name a newer one: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv --clear $(VENV)
endif
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip  # uv makes it without pip
	$(PIP) -e ./client -e '.[dev]' -e ./demo
	touch $@
