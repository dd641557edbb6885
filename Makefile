# One command for each thing a contributor does. `make install` is done once; the others install when they have to.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install quickstart test check format clean
.DEFAULT_GOAL := install

install: $(STAMP)

# The constraints file fixes every version; the CPU build of torch or the CUDA one is what the package index gives.
$(STAMP): setup.py pyproject.toml constraints.txt tools/prebuild_ops.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python tools/prebuild_ops.py
	touch $@

quickstart: $(STAMP)
	$(BIN)/minima run recipes/quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest tests

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m "not ranks and not network and not slow" \
	  -n auto --maxprocesses 8 --dist loadfile

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
