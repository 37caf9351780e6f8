# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
OUT ?= out/demo

.PHONY: setup demo test lint bench study docs clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## Colorize the sample archive through the real flow, then show where to look.
	$(BIN)/diffcolor run examples/archive $(OUT)
	$(BIN)/diffcolor status $(OUT)
	$(BIN)/python -m benchmarks.contact_sheet $(OUT) $(OUT)/contact-sheet.png
	@echo "look at $(OUT)/contact-sheet.png and $(OUT)/images; ask: $(BIN)/diffcolor query $(OUT) 'select * from results'"

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/docker/Dockerfile
