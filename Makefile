# make demo: pictures in some minutes.  make test: the tests.  make test-wheel: the package as others install it.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-wheel lint clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py --config configs/demo.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-wheel: $(INSTALLED)
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build .
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install --quiet --constraint constraints.txt build/*.whl
	LDM_SMD_WHEEL_PYTHON=$(CURDIR)/build/venv/bin/python $(BIN)/python -m pytest tests/test_wheel.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build outputs
