# make demo: environment, built-in data, training on 2 processes, evaluation, table.
# make test: the same environment, all tests.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types clean

demo: .venv/.stamp
	$(BIN)/torchx run -s local_cwd dist.ddp -j 1x2 apps/train.py configs/demo.yaml

test: .venv/.stamp
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.stamp
	$(BIN)/pip install --quiet --no-deps -r requirements/dev.txt
	$(BIN)/pyright

.venv/.stamp: requirements/install.py requirements/cpu.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('error: Python 3.11 or later is needed; set PYTHON=...')"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python requirements/install.py
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv runs data/demo
