# `make demo` and `make test` do everything from a fresh clone: the environment in .venv, the build, the run.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-all bench lint clean

# glibc gives large blocks back to the system after every use; keeping them saves the page faults of a CPU training.
demo: export MALLOC_MMAP_THRESHOLD_ = 33554432
demo: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo: export MALLOC_TOP_PAD_ = 67108864
demo: .venv/.built
	$(BIN)/fastkd demo --out runs/demo

test: .venv/.built
	$(BIN)/python -m pytest -q -m "not slow"

# The Tritons that other torch versions bring, for tests/test_aot.py.
TRITONS = $(addprefix .venv/triton-,3.6.0 3.7.1)
.venv/triton-%: .venv/.installed
	$(BIN)/python -m pip install -q --target $@ --no-deps triton==$*

test-all: .venv/.built $(TRITONS)
	FASTKD_TRITONS="$$(ls -d $(CURDIR)/.venv/triton-* | paste -sd:)" $(BIN)/python -m pytest -q

bench: .venv/.built
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.publish

lint: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info fastkd/*.so

# The build must see the torch it will run with, hence no build isolation.
.venv/.built: .venv/.installed $(SOURCES)
	FASTKD_BUILD=1 $(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[train,export,bench,dev]"
	touch $@

.venv/.installed: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c constraints.txt torch torchvision triton numpy ninja "setuptools>=77"
	touch $@
