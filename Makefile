# Every target below `setup` sets up first; that is a no-op when nothing it depends on has changed.

PYTHON ?= python3
# Extra options for pip, such as an index that has torch built for the CPU alone.
PIP_FLAGS ?=
# OSMesa draws without a display and without a GPU. macOS has its own OpenGL.
ifeq ($(shell uname -s),Linux)
export MUJOCO_GL ?= osmesa
endif

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:
	@echo "make setup  create .venv with sqap, the simulator and the development tools"
	@echo "make demo   compress the bundled policy and report what that did"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make clean  remove .venv and the tools' caches"

setup: $(INSTALLED)
ifeq ($(MUJOCO_GL),osmesa)
	@$(BIN)/python -c 'import ctypes.util, sys; ctypes.util.find_library("OSMesa") or sys.exit( \
	"MuJoCo has nothing to draw with: apt-get install libosmesa6, or set MUJOCO_GL=egl if you have EGL.")'
endif

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/sqap/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit( \
	"sqap runs on Python 3.10 to 3.13, but $(PYTHON) is %d.%d; name another: make setup PYTHON=python3.12." % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[sim,dev]"
	@touch $@

demo: setup
	$(BIN)/sqap demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
