# Everything happens in .venv, made from pyproject.toml and constraints.txt. Needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test browser docs reference clients faults soak security properties serve check install train clean

demo: install  ## correct real concepts over HTTP, pull the result, draw before and after
	$(BIN)/emender demo --out out/demo

test: install  ## all tests, against a real Postgres; two files at a time, since most of a test runs on one core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

browser: install  ## the pages in the Chromium on the PATH; screenshots in out/browser
	$(BIN)/pip install -q -c constraints.txt -e ./client -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser tests/browser

docs: install  ## the documentation's site in out/docs; a warning fails
	$(BIN)/pip install -q -c constraints.txt -e ./client -e '.[docs]'
	NO_COLOR=1 $(BIN)/zensical build --clean --strict
	$(BIN)/python -m tests.docs.pages

reference: install  ## docs/reference/: the pages of the API and the settings, out of the code
	$(BIN)/python -m docs._generate.reference

clients: install  ## real clients in environments of their own; writes docs/clients.md
	$(BIN)/pytest -m clients tests/clients --clients-table docs/clients.md

faults: install  ## every fault injected into real processes, and what an attacker would send; writes docs/faults.md
	$(BIN)/pytest -m "(fault or security) and not soak" tests/faults tests --faults-table docs/faults.md

soak: install  ## random kills under load for 15 minutes (SOAK=--soak-seconds=300); writes docs/faults.md
	$(BIN)/pytest -m soak tests/faults --faults-table docs/faults.md $(SOAK)

security: install  ## what an attacker would send
	$(BIN)/pytest -m security tests

properties: install  ## 100 examples an operation and key, of right data and of wrong (about an hour)
	$(BIN)/pytest -m properties tests/properties --property-examples 100 --timeout 3600

serve: install  ## the embedded stack, until Ctrl-C; models are found in demo/weights
	EMENDER_MODEL_ROOTS=$${EMENDER_MODEL_ROOTS:-demo/weights} $(BIN)/emender serve --embedded

check: install  ## style, types, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

train: install  ## train the emoji model again (about 90 minutes on two cores)
	$(BIN)/pip install -q -c constraints.txt -e ./client -e '.[train]'
	$(BIN)/python -m demo.train

install: $(INSTALLED)

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ./client -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out var
