# asd-rt: `make demo` and `make test` need Python 3.11 or newer and nothing else.
#
#   make demo     build the engine, stream a video from it, measure it: see out/
#   make test     the tests              make lint     style and import rules
#   make test-long  those that take minutes each: killed runs, long sittings, memory of large networks
#   make types    mypy                   make format   let ruff tidy up
#   make engine   the engine inside the package (asd_rt/engine), from the shipped student
#   make clean    what was built         make distclean   that, and .venv
#
# PIP_ARGS goes to pip, so that a machine without a GPU need not fetch torch's CUDA build:
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
OUT    ?= out
PIP_ARGS ?=
PYTEST_ARGS ?=
PROMPT ?= a red three moving up and left

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
DEMO_READY := $(VENV)/.ready-demo
ALL_READY  := $(VENV)/.ready-all
ENGINE_READY := engines/.ready
ENGINE_SOURCES := $(wildcard export/*.py train/*.py train/*/*.py asd_rt/*.py train/tiny_student/*)

.DELETE_ON_ERROR:
.PHONY: help demo test test-long lint types format engine clean distclean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

$(VENV)/bin/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: needs Python 3.11 or newer, found '$(PYTHON)'; say which: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(DEMO_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,export,train]'
	@touch $@

$(ALL_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,export,train,rtx,text,serve,ray,dev]'
	@touch $@ $(DEMO_READY)

$(ENGINE_READY): $(ENGINE_SOURCES) | $(DEMO_READY)
	$(BIN)/python -m export.build --steps 1 --force
	@touch $@

demo: $(DEMO_READY) $(ENGINE_READY)
	@mkdir -p $(OUT)
	$(BIN)/asd-rt run --steps 1 --first-steps 4 --frames 48 --prompt "$(PROMPT)" --out $(OUT)/demo.mp4
	$(BIN)/python -m benchmarks.contact_sheet --out $(OUT)/contact_sheet.png
	$(BIN)/python -m benchmarks.latency --out $(OUT)
	@echo "done: $(OUT)/demo.mp4, $(OUT)/contact_sheet.png, $(OUT)/latency.{json,md,png}"

# One process a core, one thread each: most of the time goes into exports, which use one. Files are begun
# in the order of tests/conftest.py, long ones first, not by how many tests they have.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(ALL_READY)
	$(PYTEST) -m 'not long' $(PYTEST_ARGS)

test-long: $(ALL_READY)
	$(PYTEST) -m long $(PYTEST_ARGS)

lint: $(ALL_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(ALL_READY)
	$(BIN)/mypy

format: $(ALL_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

engine: $(DEMO_READY)
	@mkdir -p asd_rt/engine
	$(BIN)/python -m export.build --steps 1 --target onnx --precision fp32 --out asd_rt/engine --force

clean:
	rm -rf $(OUT) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find engines -mindepth 1 ! -name README.md -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
