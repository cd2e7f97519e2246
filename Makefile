# `make demo` and `make test` do everything from a fresh clone: the environment in .venv, the build, the run.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-all test-large test-tools bench lint docs wheel clean

# glibc gives large blocks back to the system after every use; keeping them saves the page faults of a CPU training.
demo: export MALLOC_MMAP_THRESHOLD_ = 33554432
demo: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo: export MALLOC_TOP_PAD_ = 67108864
demo: .venv/.built
	$(BIN)/fastkd demo --out runs/demo

# The Tritons that other torch versions bring, for tests/test_triton_versions.py.
TRITONS = $(addprefix .venv/triton-,3.6.0 3.7.1)
.venv/triton-%: .venv/.installed
	$(BIN)/python -m pip install -q --target $@ --no-deps triton==$*

# Three runs, each on another backend: the C++ kernels (on a GPU: Triton's and CUDA's), then, on the CPU, Triton's in its
# interpreter and CUDA's on the emulated GPU. tests/suites.py says which files the last two have.
# Workers share the cores: where a test has threads of its own, one that waits is to sleep.
test test-all: export OMP_WAIT_POLICY = passive
test: PYTEST += -m "not slow"
test-all: PYTEST += -m "not large"
test-all: export FASTKD_TRITONS = $(subst $() ,:,$(addprefix $(CURDIR)/,$(TRITONS)))
test-all: $(TRITONS)
test test-all: .venv/.built .venv/.emulated
	$(PYTEST)
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(PYTEST) $$($(BIN)/python -m tests.suites interpreted)
	CUDA_VISIBLE_DEVICES= FASTKD_CUDA_EMULATION=$$(cat .venv/.emulated) $(PYTEST) $$($(BIN)/python -m tests.suites emulated)
	$(if $(filter test-all,$@),$(MAKE) test-large test-tools)

# Each takes most of the memory, so they run alone.
test-large: .venv/.built
	$(BIN)/python -m pytest -q -m large

# The tools that end by themselves; docs/promises.md has the others: mutants, versions, valgrind.
test-tools: .venv/.built
	$(BIN)/python -m tests.tools.errors
	$(BIN)/python -m tests.tools.fuzz --minutes 5
	$(BIN)/python -m tests.tools.sanitize --tool asan
	$(BIN)/python -m tests.tools.sanitize --tool tsan

bench: .venv/.built
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.publish

# The docs as a site, in site/. A broken link is an error (with -q it would not be: warnings are not counted).
docs: .venv/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The source archive and, built from it, a pure wheel and one with the kernels. The latter has torch's libraries left out and is
# one file for every Python and torch that pyproject.toml allows; auditwheel names the oldest glibc that it runs on.
DIST ?= dist
PLATFORM ?= auto
wheel: .venv/.built
	rm -rf $(DIST)/fastkd-* $(DIST)/unrepaired
	$(BIN)/python -m build --sdist --no-isolation --outdir $(DIST)
	FASTKD_BUILD=0 FASTKD_CUDA=0 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w $(DIST) $(DIST)/fastkd-*.tar.gz
	FASTKD_BUILD=1 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w $(DIST)/unrepaired $(DIST)/fastkd-*.tar.gz
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	    --plat $(PLATFORM) -w $(DIST) $(DIST)/unrepaired/*.whl
	rm -r $(DIST)/unrepaired

clean:
	rm -rf .venv build dist *.egg-info fastkd/*.so

# The build must see the torch it will run with, hence no build isolation.
.venv/.built: .venv/.installed $(SOURCES)
	FASTKD_BUILD=1 $(BIN)/pip install -q --no-build-isolation -c $(CONSTRAINTS) -e ".[train,export,bench,dev]"
	touch $@

# The library of the emulated GPU; the file holds its path.
.venv/.emulated: .venv/.installed tests/emulation.py $(SOURCES)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.emulation > $@.new
	mv $@.new $@

.venv/.installed: $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch torchvision triton numpy ninja "setuptools>=77"
	touch $@
