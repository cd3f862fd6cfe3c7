# `make demo` paints a picture, `make test` runs the tests; each sets up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := diffusers,plot,train,test,bench,lint
STAMP := .venv/.installed

.PHONY: setup demo test bench bench-gpu lint

setup: $(STAMP)

# torch first, by its exact version: a looser requirement would fetch gigabytes of CUDA packages on a machine without a GPU.
# No build isolation: what builds is what is there, and nothing is fetched for it.
$(STAMP): pyproject.toml setup.py constraints.txt instantas/ops/schemas.py instantas/ops/stamp.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch 'setuptools>=77'
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	mkdir -p out
	$(BIN)/instantas generate "lava" --size 1024x256 --seed 1 -o out/demo.png --force

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q

# Speeds on this machine, about 12 minutes on two cores; bench/results/report.md holds the tables and plots.
bench: $(STAMP)
	$(BIN)/python -m bench.operations
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m bench.end_to_end --counts
	$(BIN)/python -m bench.end_to_end
	$(BIN)/python -m bench.report

bench-gpu: $(STAMP)
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m bench.modes
	$(BIN)/python -m bench.report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
