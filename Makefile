# make demo: environment, built-in data, training on 2 processes, evaluation, table.
# make test: the same environment, all tests but the slow ones.
# make test-faults: faults injected and all that is slow, and the table of faults, faults.md.
# make test-soak: an hour of training, 500 fits.
# make env: the environment alone. make docs: the site, site/index.html. make wheel: dist/*.whl.
# make hooks: lint and types before every commit.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$name && break; done)
endif
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
# Packages of another environment must not come before the pinned ones.
unexport PYTHONPATH PYTHONHOME

.PHONY: demo env test test-faults test-soak lint types docs notebook wheel hooks clean

demo: .venv/.stamp
	$(BIN)/torchx run -s local_cwd dist.ddp -j 1x2 apps/train.py configs/demo.yaml

env: .venv/.stamp

test: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not soak"

test-faults: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "(fault or slow) and not soak" --fault-table=faults.md

test-soak: .venv/.dev
	$(BIN)/python -m pytest -q -m soak --fault-table=soak.md

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.docs
	$(BIN)/pyright

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Writes the outputs of now into docs/example.ipynb.
notebook: .venv/.docs
	$(BIN)/python docs/pages.py

wheel: .venv/.stamp
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

hooks: .venv/.docs
	$(BIN)/pre-commit install

.venv/.docs: .venv/.dev requirements/docs.txt
	$(BIN)/pip install -qq --no-deps -r requirements/docs.txt
	touch $@

.venv/.dev: .venv/.stamp requirements/dev.txt
	$(BIN)/pip install -qq --no-deps -r requirements/dev.txt
	touch $@

# compat: a plain path. By default Python, started beside a clone called hstu_rec, takes it for the package.
.venv/.stamp: .venv/.pinned requirements/serve.txt pyproject.toml
	$(BIN)/pip install -qq --no-deps -r requirements/serve.txt
	$(BIN)/pip install -qq --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	touch $@

.venv/.pinned: requirements/install.py requirements/cpu.txt
	@[ -n "$(PYTHON)" ] || { echo "error: Python 3.11 or later is needed; name it: make demo PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python requirements/install.py
	touch $@

clean:
	rm -rf .venv runs data/demo site dist build
