PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell grep -m1 '^torch==' requirements.lock 2>/dev/null)

.PHONY: install demo test lint messages

# Torch first: an unpinned torch may pull gigabytes of CUDA packages.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

install: .venv/installed

demo: install
	$(BIN)/swarm run experiments/quickstart.yaml --chaos 15

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

messages: install
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. averaging/averaging.proto swarm/swarm.proto
