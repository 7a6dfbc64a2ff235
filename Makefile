# `make demo` and `make test` set up all they need: a virtual environment, the packages of
# constraints.txt, the native CPU library. Nothing is done twice; `make help` lists the targets.

# The newest Python that runs (a pyenv shim may be there and not run); PYTHON=... overrules.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
# Runs of neighbours to each worker: modules share fixtures and compiled programs.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=worksteal

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
NATIVE := kernels/q4jax_kernels/_native.so
HEADERS := build/headers
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(INSTALLED) $(NATIVE) ## watch the embedded int4 Llama write text
	$(BIN)/q4jax demo

.PHONY: demo-qat
demo-qat: $(INSTALLED) $(NATIVE) ## train the embedded model under 3-bit rounding: a few minutes
	mkdir -p runs
	$(BIN)/q4jax qat experiments/tiny/tiny.f16.gguf runs/demo-qat.gguf --force --qat=lsq --bits=3 \
	  --rule=minimum --init=gptq --text=q4jax/data/calibration.txt --ctx=128 --batch=8 --steps=100 \
	  --held_out=q4jax/data/held_out.txt --chunks=10

.PHONY: test
test: $(INSTALLED) $(NATIVE) ## run all tests but the slow ones
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# The compilers of devices that are not here: 500 MB, so apart from the rest. jax[tpu] pins libtpu.
AOT_BIN := .venv-aot/bin
AOT_INSTALLED := .venv-aot/installed
DEPENDENCIES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")

.PHONY: aot
aot: $(AOT_INSTALLED) ## compile for TPUs and GPUs, without one, and print what they would need
	$(AOT_BIN)/python -m pytest -m aot --numprocesses=auto --maxprocesses=4 tests/aot

$(AOT_INSTALLED): pyproject.toml constraints.txt
	test -x $(AOT_BIN)/python || $(PYTHON) -m venv .venv-aot
	$(AOT_BIN)/pip install --quiet --no-compile --constraint=constraints.txt 'jax[tpu]' \
	  hypothesis pytest pytest-xdist --requirement=<($(AOT_BIN)/python -c '$(DEPENDENCIES)')
	v=$$($(AOT_BIN)/python -c 'import jax; print(jax.__version__)'); \
	  $(AOT_BIN)/pip install --quiet --no-compile --no-deps jax-cuda13-plugin==$$v jax-cuda13-pjrt==$$v
	touch $@

.PHONY: oracles
oracles: $(INSTALLED) $(NATIVE) ## compare with llama.cpp and transformers (slow: builds llama.cpp)
	$(BIN)/pip install --quiet --constraint=constraints.txt --editable '.[dev,oracle]'
	$(BIN)/python -m pytest -m 'oracle or slow'

.PHONY: test-matrix
test-matrix: ## run `make test` on every supported Python that pyenv or the PATH has
	@for v in 3.11 3.12 3.13; do \
	  python=$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python 2>/dev/null | sort -V | tail -n 1 || true); \
	  python=$${python:-$$(command -v python$$v)} || { echo "make: no python$$v here, skipped"; continue; }; \
	  echo "make: python$$v"; $(MAKE) test PYTHON="$$python" VENV=.venv-$$v || exit; \
	done

.PHONY: lint
lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: format
format: $(INSTALLED) ## rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: native
native: $(INSTALLED) $(NATIVE) ## build the C++ CPU library where its sources changed

.PHONY: notebooks
notebooks: $(INSTALLED) $(NATIVE) ## write colab/*.ipynb from their .py, and run them on the CPU
	$(BIN)/pip install --quiet --constraint=constraints.txt --editable '.[dev,notebooks]'
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/python -m colab.pairing --execute

# --strict: a link that leads nowhere is an error.
.PHONY: docs
docs: $(INSTALLED) ## build the documentation site into build/site
	$(BIN)/pip install --quiet --constraint=constraints.txt --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Generated code wants a runtime as new as its generator, so that is the oldest which will do.
PROTO_BIN := .venv-proto/bin
PROTOS := q4jax/formats/qbin.proto q4jax/text/sentencepiece.proto

.PHONY: proto
proto: $(PROTO_BIN)/installed ## generate the *_pb2.py anew from the .proto files
	$(PROTO_BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(PROTOS)

$(PROTO_BIN)/installed:
	$(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/pip install --quiet --no-compile 'grpcio-tools==1.76.*'
	touch $@

.PHONY: check-wheel
check-wheel: $(INSTALLED) ## build a wheel, install it into a fresh environment and run it there
	rm -rf build/wheel build/lib*
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir=build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --no-compile --constraint=constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/python -c 'import ctypes, pathlib, q4jax_kernels; \
	  ctypes.CDLL(str(pathlib.Path(q4jax_kernels.__file__).with_name("_native.so")))'
	cd build/wheel && venv/bin/q4jax --help > /dev/null
	cd build/wheel && venv/bin/q4jax generate tiny --prompt='The built-in function' --max_tokens=16

.PHONY: constraints
constraints: $(INSTALLED) ## pin the newest versions of everything anew, for all Pythons
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version=3.11 --no-annotate \
	  --custom-compile-command='make constraints' --extra=dev --extra=docs --extra=notebooks \
	  --extra=serve --extra=viz \
	  --output-file=constraints.txt pyproject.toml

.PHONY: clean
clean: ## remove what make made
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(NATIVE)
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'make: q4jax needs Python 3.11 or newer; none found. Install one (Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'make: $(PYTHON) cannot make virtual environments. Debian packs that apart: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip builds the native library too, in isolation, against the jaxlib that pyproject.toml pins.
$(INSTALLED): $(BIN)/python pyproject.toml setup.py constraints.txt
	rm -rf $(NATIVE) $(HEADERS)
	$(BIN)/pip install --quiet --no-compile --constraint=constraints.txt --editable '.[dev]'
	touch $@

# For a changed source, and where pip had no compiler: pip keeps the warning to itself.
$(NATIVE): $(wildcard kernels/csrc/*) | $(INSTALLED)
	@rm -f $@
	@test -d $(HEADERS) || $(BIN)/pip install --quiet --no-deps --target=$(HEADERS) \
	  --requirement=<(sed -n 's/.*"\(jaxlib==.*\)".*/\1/p' pyproject.toml)
	PYTHONPATH=$(HEADERS) $(BIN)/python setup.py --quiet build_ext --inplace
	@test -e $@ || ! command -v $${CXX:-g++} > /dev/null
