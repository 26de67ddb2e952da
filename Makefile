# make demo: pictures in some minutes.  make test: the tests.  make test-cpus: as other CPUs run them.
# make gpu: what a GPU does with it, in eight minutes.
# make test-settings: all settings at hostile values.  make test-wheel: the package as others install it.
# make site: the documentation as a site, in site/.  make figures, make notebook: its figures, its notebook.
PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
# Several processes, each with one thread (tests/conftest.py): for tiny networks far faster than several threads.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup
INSTALLED := .venv/.installed

.PHONY: demo gpu test test-cpus test-settings test-wheel lint site figures notebook clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py --config configs/demo.yaml

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py

test: $(INSTALLED)
	$(PYTEST)

# Every setting of every tool, set to what no user means.
test-settings: $(INSTALLED)
	$(PYTEST) -m exhaustive

test-wheel: $(INSTALLED)
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build .
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -I -m pip install --quiet --constraint constraints.txt build/*.whl
	LDM_SMD_WHEEL_PYTHON=$(CURDIR)/build/venv/bin/python $(BIN)/python -m pytest tests/test_wheel.py

# All tests as other processors would run them: kernels for other instructions, two threads, weights elsewhere in memory.
DISGUISES := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2 PYTHONPATH=$(CURDIR)/tests/shifted

test-cpus: $(INSTALLED)
	@log=$$(mktemp); failed=0; for disguise in $(DISGUISES); do \
		env $$disguise $(PYTEST) >$$log 2>&1 || failed=1; \
		grep -E '^(FAILED|ERROR) ' $$log; echo "$$disguise: $$(grep -E ' in [0-9.]+s' $$log | tail -n 1)"; \
	done; rm $$log; exit $$failed

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning, as of a link that leads nowhere, is an error; not with --quiet, which hides warnings from --strict too.
# The theme's own warning, of its successor, is switched off.
site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(INSTALLED)
	$(BIN)/python benchmarks/figures.py

notebook: $(INSTALLED)
	$(BIN)/python -m nbconvert --to notebook --execute --inplace docs/notebook/first-steps.ipynb

clean:
	rm -rf .venv .mypy_cache build outputs site
