# One surface for all that there is to do. `make help` lists it; `make demo` and `make test` set up what they need.
PYTHON ?= python3.11
BIN := .venv/bin
OUT ?= out/demo
MODEL ?= demo
DATA ?= ../shared/data/photos
RESULTS := benchmarks/results
# Long spin-waits starve other processes; none at all slows each step (torch, where it uses GNU OpenMP).
export GOMP_SPINCOUNT ?= 20000

.PHONY: help setup demo test lint bench study docs screenshots train chaos
.DEFAULT_GOAL := help

help:  ## List these commands.
	@sed -En 's/^([a-z]+):[^#]*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

setup: .venv/.installed  ## Create .venv with the pinned versions; the other commands do it when needed.

.venv/.installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	@# Python compiles what is imported when it is imported; all the rest would take two minutes.
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## Colorize photographs into out/photographs and rendered scenes into out/demo, in 7 minutes with the set-up.
	$(BIN)/python -m support.example_photographs out/gray out/truth
	$(BIN)/diffcolor run out/gray out/photographs
	$(BIN)/diffcolor run examples/archive $(OUT) --model demo
	$(BIN)/diffcolor status $(OUT)
	$(BIN)/diffcolor sheet out/photographs out/photographs.jpg --truth out/truth
	$(BIN)/diffcolor sheet $(OUT) out/scenes.jpg
	@echo "look at out/photographs/report/index.html and $(OUT)/report/index.html; ask: $(BIN)/diffcolor query $(OUT) 'select * from results'"

test: setup  ## Run all tests, with real local Ray and Prefect servers.
	@# One thread: networks this small gain nothing by two, which would wait for each other on a busy machine.
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: setup  ## Check format, style, types, import contracts and the Dockerfile.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/docker/Dockerfile

bench: setup  ## Measure costs and scale, then make the docs; 50 minutes on 2 idle cores.
	$(BIN)/python -m benchmarks.costs recolor --json $(RESULTS)/costs.json
	$(BIN)/python -m benchmarks.costs recolor --preset paper --scenes 1 --json $(RESULTS)/costs.json
	$(BIN)/python -m benchmarks.costs large --json $(RESULTS)/costs.json
	$(BIN)/python -m benchmarks.costs assembly --json $(RESULTS)/costs.json
	$(BIN)/python -m benchmarks.costs batch --json $(RESULTS)/costs.json
	$(BIN)/python -m benchmarks.scale plan --json $(RESULTS)/scale.json
	$(BIN)/python -m benchmarks.scale queries --json $(RESULTS)/scale.json
	$(BIN)/python -m benchmarks.pipeline --json $(RESULTS)/scale.json
	$(BIN)/python -m benchmarks.fleet --json $(RESULTS)/scale.json
	$(BIN)/python -m benchmarks.report_scale build --json $(RESULTS)/scale.json
	$(BIN)/python -m benchmarks.report

study: setup  ## Measure the method against its rivals and ablations, then make the docs; 1.5 hours, resumes.
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.report

docs: setup  ## Make docs/results.md, its plots and docs/options.md from what they show.
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m flows.cli.options_table

screenshots: setup  ## Make docs/report-*.jpg of the report in out/demo, with Chromium.
	$(BIN)/python -m benchmarks.screenshots $(OUT)/report docs

train: setup  ## Train a model into out/MODEL-model (MODEL=demo or photo, of DATA); hours, resumes.
	$(BIN)/python -m diffcolor_training.$(MODEL) --out out/$(MODEL)-model $(if $(filter photo,$(MODEL)),--data $(DATA))

chaos: setup  ## Inject faults into real runs, on a local disk and on S3; 2 hours.
	$(BIN)/python -m tests.faults.chaos --rounds 3 --json $(RESULTS)/chaos.json
