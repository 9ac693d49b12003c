# install: what everything else needs · demo: fresh clone to report · dev: Dagster UI · test: the default tier · test-all: every tier
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo dev test test-all lint types check bench clean

install: .venv/installed

# torch first and by itself, at its pinned version. On Linux pip's own index brings the CUDA build (gigabytes): on a machine without a
# GPU set TORCH_INDEX to an index of CPU builds.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,postgres]'
	touch $@

demo: install
	$(BIN)/finetune run --assistant dental

dev: install
	$(BIN)/finetune dev

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,postgres,ray]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu and not live"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

check: lint types
	$(BIN)/dg check defs

bench: install
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf data/store
