# `make demo` and `make test` do everything on a machine that has python3 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint results clean

demo: $(VENV)/.installed
	rm -rf build/demo
	$(BIN)/surgery demo --out build/demo

test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt surgery/kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# make results PAIR=pair DATA=data: docs/results.md's tables of `surgery auto`; it goes on from where it was stopped.
results: $(VENV)/.installed
	$(BIN)/python benchmarks/results.py --pre $(PAIR)/pre --ft $(PAIR)/ft --data $(DATA) --out build/results

clean:
	rm -rf $(VENV) build surgery/_kernels*.so *.egg-info
