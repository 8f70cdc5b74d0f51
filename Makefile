# `make test` and `make demo` work from a clean clone: they make .venv, install into it, and run.
# The README shows the plain pip lines that they stand for.

PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
OUT    ?= benchmarks/results
BASE   ?= HEAD
JOBS   ?= auto

BIN    := $(VENV)/bin
NATIVE := setup.py pyproject.toml jepa_fast/ops/_build.py $(shell find csrc -type f)
# Files that hold tests of a tier, or of CPU kernels; collecting all others would cost more than
# running these. tests/backends.py marks what is parametrized by it.
tests_of = $(shell grep -lE "$(1)|^from backends import .*\bbackends\b" tests/test_*.py)
TIER1   = $(call tests_of,tier1)
TIER3   = $(call tests_of,tier3)
NATIVE_TESTS = $(shell grep -lE "^SAMPLES|mark\.native" tests/test_*.py)
# The workers of pytest-xdist fill the cores; threads on top of them only fight.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

.PHONY: help venv install test test-oldest sanitize lint demo compare tables gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         pretrain a small TC-JEPA on the CPU and report, a few minutes"
	@echo "make test         lint, then the tests of tiers 0 to 2"
	@echo "make test-oldest  the same, but for the tools, under the oldest supported torch and triton"
	@echo "make sanitize     tests of the CPU kernels under g++'s AddressSanitizer and UBSan, 1 to 2 min"
	@echo "make lint         ruff and mypy"
	@echo "make compare      times and peak memory against those of BASE, by default the last commit"
	@echo "make tables       the README's tables anew, from benchmarks/results"
	@echo "make gpu          build, test and benchmark on a machine with a GPU, in its own Python"
	@echo "make install      the development installation in $(VENV)"
	@echo "make clean        remove what builds and tools left behind"

venv: $(BIN)/python

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install -q torch torchvision

# $(VENV)/.train and $(VENV)/.test: installed with these extras, from the sources as they are.
$(VENV)/.%: $(BIN)/python $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --editable ".[$*]"
	touch $@

install: $(VENV)/.test

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) $(TIER1)

# The package goes into this environment as a user installs it; the tests run from the checkout,
# with the native library as `make test` built it against another torch.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip "setuptools>=77"
	$(OLDEST)/bin/python -m pip install -q torch==2.11.0 triton==3.6.0 torchvision==0.26.0
	$(OLDEST)/bin/python -m pip install -q --no-build-isolation ".[test]"
	$(OLDEST)/bin/jepa-fast info
	test -f jepa_fast/_native.abi3.so || $(OLDEST)/bin/python -m jepa_fast.cli build
	$(MAKE) --no-print-directory oldest-tiers VENV=$(OLDEST)

# But for the tests of the tools, which start processes by the dozen: what the tools do with torch,
# tests/test_bench.py and tests/test_audit.py see here. And for what no torch changes.
TOOLS = $(addprefix --ignore=tests/test_,compare.py examples.py tables.py heads_comparison.py \
  bench_step.py packaging.py growth.py tiers.py csrc.py)

.PHONY: oldest-tiers
oldest-tiers:
	$(PYTEST) $(TOOLS)
	TRITON_INTERPRET=1 $(PYTEST) $(TIER1)

# Checks of every access, and of all that C++ leaves undefined; what one finds ends the process.
SANITIZED  := build/sanitize
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
SANITIZERS += -fno-omit-frame-pointer -O1 -g -D_GLIBCXX_ASSERTIONS
# Python comes without the sanitizer's runtime, which has to be there first, and which looks for the
# exceptions of libstdc++ as it starts. What Python never frees is no leak.
SANITIZING  = JEPA_FAST_NATIVE=$(SANITIZED) CUDA_VISIBLE_DEVICES= \
  LD_PRELOAD="$(foreach lib,libasan.so libstdc++.so,$(shell g++ -print-file-name=$(lib)))" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

$(SANITIZED)/_native.abi3.so: $(VENV)/.test $(NATIVE) Makefile
	CXX=g++ JEPA_FAST_BUILD=cpu JEPA_FAST_NATIVE=$(SANITIZED) JEPA_FAST_CXXFLAGS="$(SANITIZERS)" \
	  $(BIN)/python -m jepa_fast.cli build

# pytest does not capture a sanitizer's report, which would be lost with the process. Tests of
# torch.compile are left out: the kernels do not know who calls them. So are those of accuracy beside
# PyTorch's: without the SIMD clones sums run in another order, and products are rounded first.
sanitize: $(SANITIZED)/_native.abi3.so
	$(SANITIZING) $(PYTEST) --capture=sys -m native -k "not compile and not as_accurate" $(NATIVE_TESTS)

demo: $(VENV)/.train
	$(BIN)/jepa-fast pretrain demo --report --overwrite

# COMPARE=... for more options.
compare: $(VENV)/.test
	$(BIN)/jepa-fast compare $(BASE) $(COMPARE)

# Needs no installation; a test fails where the README and the results differ.
tables:
	$(PYTHON) benchmarks/tables.py

# Installs nothing. COMMIT=... for the record, where the checkout comes without its .git.
gpu:
	@PYTHON="$(PYTHON)" OUT="$(OUT)" COMMIT="$(COMMIT)" sh benchmarks/gpu.sh $(TIER3)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f jepa_fast/_native.abi3.so jepa_fast/_native_build.json
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
