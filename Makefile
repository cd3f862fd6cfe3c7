# `make demo` paints a picture, `make test` runs the tests; each sets up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := diffusers,plot,train,test,bench,lint
STAMP := .venv/.installed

.PHONY: setup demo test bench bench-gpu hub lint triton-3.6

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
	$(BIN)/instantas generate "sea at dusk" --size 640x256 --seed 2 --region "lighthouse by the sea at dusk@0.6,0,1,1" -o out/demo.png --force

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q

# Speeds on this machine, about 12 minutes on two cores; bench/results/report.md holds the tables and plots.
bench: $(STAMP)
	$(BIN)/python -m bench.operations
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m bench.end_to_end --counts
	$(BIN)/python -m bench.end_to_end
	$(BIN)/python -m bench.report

# On a machine with a GPU, which needs torch, triton and, unless the CUDA library is built, nvcc; nothing is fetched.
# What is missing for the rest is said, and the rest left out. Fails if a result is wrong.
ANY := $(firstword $(wildcard $(BIN)/python) $(PYTHON))
needs = $(ANY) -c 'import $(1)' 2>/dev/null || { echo 'bench.$(2): left out: there is no $(1)'; exit 0; }
bench-gpu:
	status=0; $(ANY) -m bench.gpu || status=1; \
	($(call needs,diffusers,modes); $(ANY) -m bench.modes) || status=1; \
	($(call needs,matplotlib,report); $(ANY) -m bench.report) || status=1; \
	exit $$status

# A copy of the operations that Hugging Face's `kernels` loads: kernels.get_local_kernel(Path("build")).
hub: $(STAMP)
	$(BIN)/python setup.py -q hub

# Beside what is installed, for tests/ops/test_triton_aot.py: the Triton of torch 2.11, which compiles less.
triton-3.6: build/triton-3.6
build/triton-3.6: $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@ triton==3.6.0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
