# Everything a newcomer needs: `make demo` and `make test` set up what they use.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
export PYTHONHASHSEED := 0

# What rounds: tested once more as on a processor with AVX2 alone (no AVX512, no bf16 or int8 units),
# with one thread and, where sums are long enough to be shared, with two. Types and shapes have been
# checked by then.
NUMERIC := tests/layers tests/models tests/diffusion \
           $(addprefix tests/pipelines/test_,flow.py stable_diffusion.py)
SINGLE  := $(addprefix tests/pipelines/test_,latent.py pipeline.py plan.py)
AVX2    := JAXTYPING_DISABLE=1
ifeq ($(shell uname -m),x86_64)
AVX2    += ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
endif
# A file is one worker's: what its tests share is made once.
PYTEST  := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-train test test-long test-avx2 lint clean

demo: $(VENV)/.demo
	$(BIN)/minidiffusion demo

demo-train: $(VENV)/.demo
	$(BIN)/minidiffusion demo-train

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(PYTEST) -m "not long"
	$(MAKE) test-avx2

test-long: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(PYTEST)
	$(MAKE) test-avx2

test-avx2: $(VENV)/.test
	$(AVX2) OMP_NUM_THREADS=1 $(PYTEST) -m "not long" $(NUMERIC) $(SINGLE)
	$(AVX2) MINIDIFFUSION_TEST_THREADS=2 GOMP_SPINCOUNT=0 $(PYTEST) -m "not long" $(NUMERIC)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_tree.py --check

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: a range would pull the CUDA build and its gigabytes.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
