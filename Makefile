# `make demo` and `make test` work in a fresh clone: they create .venv, build, and run.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-all test-large test-tools test-errors test-fuzz test-asan test-tsan bench lint docs wheel clean

# glibc returns large blocks to the system on free; keeping them avoids page faults in CPU training.
demo: export MALLOC_MMAP_THRESHOLD_ = 33554432
demo: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo: export MALLOC_TOP_PAD_ = 67108864
demo: .venv/.built
	$(BIN)/fastkd demo --out runs/demo

# Triton versions of other torch versions, for tests/test_triton_versions.py.
TRITONS = $(addprefix .venv/triton-,3.6.0 3.7.1)
.venv/triton-%: .venv/.installed
	$(BIN)/python -m pip install -q --target $@ --no-deps triton==$*

# Three runs: the C++ kernels (on a GPU: Triton's and CUDA's); on the CPU, Triton's in its interpreter; on the CPU, CUDA's on
# the emulated GPU. tests/suites.py lists the files of the last two.
# Workers share the cores, so waiting OpenMP threads should sleep.
test test-all: export OMP_WAIT_POLICY = passive
test: PYTEST += -m "not slow"
test-all: PYTEST += -m "not large"
test-all: export FASTKD_TRITONS = $(subst $() ,:,$(addprefix $(CURDIR)/,$(TRITONS)))
test-all: $(TRITONS)
test test-all: .venv/.built .venv/.emulated
	$(PYTEST)
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(PYTEST) $$($(BIN)/python -m tests.suites interpreted)
	CUDA_VISIBLE_DEVICES= FASTKD_CUDA_EMULATION=$$(cat .venv/.emulated) $(PYTEST) $$($(BIN)/python -m tests.suites emulated)
	$(if $(filter test-all,$@),$(MAKE) test-large && $(MAKE) -j $(WORKERS) --output-sync test-tools)

# Each takes most of the memory, so they run alone.
test-large: .venv/.built
	$(BIN)/python -m pytest -q -m large

# The tools with a bounded run time. The others are in docs/promises.md: mutants, versions, valgrind.
test-tools: test-errors test-fuzz test-asan test-tsan
test-errors: .venv/.built
	$(BIN)/python -m tests.tools.errors
test-fuzz: .venv/.built
	$(BIN)/python -m tests.tools.fuzz --minutes 5
test-asan test-tsan: test-%: .venv/.built
	$(BIN)/python -m tests.tools.sanitize --tool $*

bench: .venv/.built
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.publish

# The docs as a site, in site/. Broken links are errors, but not with -q, which does not count warnings.
docs: .venv/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The source archive and, built from it, a pure wheel and one with the kernels. The latter excludes torch's libraries and works
# with every Python and torch that pyproject.toml allows; auditwheel determines the oldest supported glibc.
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

# No build isolation, so that it builds against the torch that it runs with.
.venv/.built: .venv/.installed $(SOURCES)
	FASTKD_BUILD=1 $(BIN)/pip install -q --no-build-isolation -c $(CONSTRAINTS) -e ".[train,export,bench,dev]"
	touch $@

# The library of the emulated GPU; the file contains its path.
.venv/.emulated: .venv/.installed tests/emulation.py $(SOURCES)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.emulation > $@.new
	mv $@.new $@

.venv/.installed: $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch torchvision triton numpy ninja "setuptools>=77"
	touch $@
