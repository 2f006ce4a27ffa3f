# The two commands of the README are `make demo` and `make test`; both build .venv first and can be repeated.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-all docs site lint types wheel check clean

demo: $(READY)
	$(BIN)/entropy-monitor demo

# The quick slice of the test matrix, and everything that is not in the matrix.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-unexpected-skips -m "not full"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-unexpected-skips

# Run the matrix and write docs/compatibility.md from its outcomes.
docs: $(READY)
	$(BIN)/python -m tests.matrix

# Make docs/_build/index.html of the pages in docs/; a warning is an error.
site: $(READY)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m nbstripout --verify notebooks/*.ipynb

types: $(READY)
	$(BIN)/mypy

# Build the wheel, install it outside the checkout, and try it there.
wheel: $(READY)
	PYTHON=$(CURDIR)/$(BIN)/python bash .ci/check-wheel

check: lint types test wheel

# torch comes first and alone: what asks for it later must find it, not fetch another build.
$(READY): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
