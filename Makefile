# make demo | test | test-full | bench | gpu | lint | format | clean
#
# Each target prepares what it needs: a virtual environment in .venv with the pinned requirements,
# and the package in it, editable, so that only what was edited is compiled again.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# For the GPU that is here; where none is, to see that it compiles. All architectures take twice as
# long.
ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
export KERNELPOSE_CUDA_ARCHS ?= $(or $(ARCH),90)

# A test file a process, a thread each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

CXX_FILES := $(shell find csrc tests/emulator -path '*/.build' -prune -o -name '*.h' -print \
  -o -name '*.cuh' -print -o -name '*.cpp' -print -o -name '*.cu' -print)
SOURCES := $(shell find csrc -type f) setup.py CMakeLists.txt pyproject.toml

.PHONY: help setup demo test test-full bench gpu lint format clean

help:
	@sed -n '1,4s/^# *//p' Makefile

$(BIN)/requirements.stamp: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@

$(BIN)/build.stamp: $(BIN)/requirements.stamp $(SOURCES)
	MAX_JOBS=$(JOBS) $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(BIN)/build.stamp

demo: setup
	$(BIN)/kernelpose demo --out demo $(if $(IMAGE),--image "$(IMAGE)")

test: setup lint
	$(PYTEST)

test-full: setup lint
	$(PYTEST) --full

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark

# On a machine with an NVIDIA GPU and a Python that has torch and the build tools already.
gpu:
	bash benchmarks/gpu.sh

lint: $(BIN)/requirements.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(BIN)/requirements.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist demo kernelpose/*.so kernelpose.egg-info tests/emulator/.build $(BIN)/build.stamp
