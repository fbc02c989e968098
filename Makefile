# perch: `make run` and `make test` are all a new user needs. Both make and use .venv here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=

.PHONY: run test check format bench protos lock clean test-compose

run: $(VENV)/.run
	@exec $(BIN)/perch up $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The system in containers, started for real. Needs root and Debian's packages, which it installs where it may.
test-compose: $(VENV)/.dev
	@mkdir -p build && compose/tests/engine.sh > build/test-compose.engine
	PERCH_TEST_ENGINE=build/test-compose.engine $(BIN)/python -m pytest --numprocesses 0 compose/tests $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

protos: $(VENV)/.dev
	$(BIN)/python -m extproc.wire.generate

# Refreshes constraints.txt, the exact set of versions every install gets, for all Pythons and platforms at once.
lock: $(VENV)/.dev
	$(PIP) install uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --upgrade -o constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "perch needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing perch into $(VENV) (once)"
	@$(PIP) install --constraint constraints.txt --editable '.[run]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing perch and its development tools into $(VENV) (once)"
	@$(PIP) install --constraint constraints.txt --editable '.[run,train,onnx,dev]'
	@touch $@ $(VENV)/.run
