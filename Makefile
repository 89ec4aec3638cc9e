# Every target below `setup` sets up first; that is a no-op when nothing it depends on has changed.

PYTHON ?= python3
# Extra options for pip, such as an index that has torch built for the CPU alone.
PIP_FLAGS ?=
# OSMesa draws without a display and without a GPU. macOS has its own OpenGL.
ifeq ($(shell uname -s),Linux)
export MUJOCO_GL ?= osmesa
endif

BIN := .venv/bin
# An editable install finds the modules that were there when it was made, so a new list of them needs a new one.
MODULES := $(shell find src/sqap -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
INSTALLED := .venv/.installed-$(MODULES)
OSMESA := $(filter osmesa,$(MUJOCO_GL))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:
	@echo "make setup  create .venv with sqap, the simulator and the development tools"
	@echo "make demo   compress the bundled policy and report what that did"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make clean  remove .venv and the tools' caches"

setup: $(INSTALLED)
	@PYTHON=$(BIN)/python scripts/system-packages $(OSMESA)

# Whatever the system lacks comes first, before anything is downloaded.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/sqap/kernels/cpu/csrc/*)
	@PYTHON='$(PYTHON)' scripts/system-packages python compiler $(OSMESA)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[sim,dev]"
	@rm -f .venv/.installed*
	@touch $@

demo: setup
	$(BIN)/sqap demo

# One process for each core, up to four, with a thread of its own. Tests of a module stay in one process, which then
# makes their fixtures once, until a process has none left and takes half of another's.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
