# make demo    set up, and run the main job on the sample data
# make test    set up, and run the tests
# make check   set up, and run linter, type checker, import contracts and tests
# make setup   only set up: .venv with slmops and all that its tests need
# make clean   remove .venv and what tools have cached; runs in .slmops stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests in parallel would share two cores with torch's own threads; one thread a worker, a worker a core.
WORKERS ?= 2

.PHONY: setup demo test check lint clean

setup: $(STAMP)

# torch comes first and by its exact version, so that its CPU build is taken where there is one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/slmops deploy foundry --install || echo "Foundry Local is not here: its tests are skipped."
	touch $@

demo: setup
	$(BIN)/slmops demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# Runs and benchmarks in .slmops cost hours and are not thrown away here.
clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
