# make demo           train and sample, with a report, in a few minutes
# make gpu            benchmark a GPU
# make test           run the tests
# make test-cpus      run them with the kernels of other CPUs
# make test-settings  run every tool with invalid and extreme values of every setting
# make test-wheel     test the package as users install it
# make site           build the documentation in site/
# make figures        draw the figures of README and docs
# make notebook       run the notebook of the documentation
PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
# WORKERS=2: that many processes with one thread each (tests/conftest.py). 0: one process with two threads, about half as fast.
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

# Every setting of every tool, at invalid and extreme values.
test-settings: $(INSTALLED)
	$(PYTEST) -m exhaustive

test-wheel: $(INSTALLED)
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build .
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -I -m pip install --quiet --constraint constraints.txt build/*.whl
	LDM_SMD_WHEEL_PYTHON=$(CURDIR)/build/venv/bin/python $(BIN)/python -m pytest tests/test_wheel.py

# All tests as on other processors: kernels for other instruction sets, one thread, weights at other memory alignments.
VARIANTS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests/shifted

test-cpus: $(INSTALLED)
	@log=$$(mktemp); failed=0; for variant in $(VARIANTS); do \
		env $$variant $(PYTEST) >$$log 2>&1 || failed=1; \
		grep -E '^(FAILED|ERROR) ' $$log; echo "$$variant: $$(grep -E ' in [0-9.]+s' $$log | tail -n 1)"; \
	done; rm $$log; exit $$failed

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --strict makes warnings, such as a broken link, errors. --quiet would hide them from --strict.
# The variable switches off the theme's warning about its successor.
site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(INSTALLED)
	$(BIN)/python benchmarks/figures.py

notebook: $(INSTALLED)
	$(BIN)/python -m nbconvert --to notebook --execute --inplace docs/notebook/first-steps.ipynb

clean:
	rm -rf .venv .mypy_cache build outputs site
