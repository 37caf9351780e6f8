# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
OUT ?= out/demo
# Threads that spin for long starve other processes of the machine (torch, where it uses GNU OpenMP).
export GOMP_SPINCOUNT ?= 20000

.PHONY: setup demo test lint demo-model study evaluate chaos bench

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## Colorize the sample archive through the real flow, then show where to look.
	$(BIN)/diffcolor run examples/archive $(OUT)
	$(BIN)/diffcolor status $(OUT)
	$(BIN)/python benchmarks/contact_sheet.py $(OUT) $(OUT)/contact-sheet.png
	@echo "look at $(OUT)/contact-sheet.png and $(OUT)/images; ask: $(BIN)/diffcolor query $(OUT) 'select * from results'"

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/docker/Dockerfile

demo-model: setup  ## Train the demo model anew into out/demo-model; stopped, it goes on from its checkpoint.
	$(BIN)/python -m diffcolor_training.demo --out out/demo-model

study: setup  ## The method against baselines and ablations; hours on a CPU, resumes.
	$(BIN)/python -m benchmarks.quality

evaluate: setup  ## Does the demo model obey its words?
	$(BIN)/python -m diffcolor_training.evaluate --num 40 --seed 7

chaos: setup  ## Faults injected into real runs, on a local disk and on S3; about two hours on 2 cores.
	$(BIN)/python -m tests.faults.chaos --rounds 3 --json benchmarks/results/chaos.json

bench: setup  ## What the pipeline costs at scale, what a fit costs; about 40 minutes on 2 idle CPU cores.
	$(BIN)/python -m benchmarks.planning --json benchmarks/results/scale.json
	$(BIN)/python -m benchmarks.queries --json benchmarks/results/scale.json
	$(BIN)/python -m benchmarks.pipeline --json benchmarks/results/scale.json
	$(BIN)/python -m benchmarks.fleet --json benchmarks/results/scale.json
	$(BIN)/python -m benchmarks.plot_scale
	$(BIN)/python -m benchmarks.costs --json benchmarks/results/costs.json
