# make demo   train, merge, export and score the built-in model on generated pages
# make test   ruff, mypy and all tests
# make docs   docs/options.md from the typed options, and the documentation as a site in site/
# The first of them installs the pinned packages in .venv. PYTHON names another interpreter (3.10 to 3.13).
# ARGS passes overrides to the demo: make demo ARGS="train.num_train_epochs=2 run.name=longer"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process a core. Files stay whole, since the tests of one file share what they trained.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick pythons lint format docs lock clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/fintune demo $(ARGS)

test: lint
	$(BIN)/pytest $(PARALLEL)

quick: $(STAMP)
	$(BIN)/pytest $(PARALLEL) -m "not slow"

# The quick tests on every Python that pyproject.toml admits; each gets an environment of its own.
pythons:
	@for python in python3.10 python3.11 python3.12 python3.13; do \
		if command -v $$python; then $(MAKE) quick PYTHON=$$python VENV=.venv-$$python || exit 1; \
		else echo "$$python is not installed here, so its tests did not run"; fi; \
	done

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/fintune config reference > docs/options.md
	$(BIN)/mkdocs build --quiet

# The stamp is written last, so an interrupted installation starts over.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "fintune needs Python 3.10 to 3.13, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages in $(VENV): 1 GB, and 3 GB more if pip takes torch with its CUDA libraries (Linux)."
	@echo "For a CPU alone, install PyTorch's CPU build in $(VENV) first, then run make again."
	$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

# torch is installed first in its pinned build, so that nothing pulls another.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	.venv-lock/bin/pip install --quiet hatchling editables
	.venv-lock/bin/pip install --quiet --no-build-isolation --editable '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//'

clean:
	rm -rf .venv .venv-* site .pytest_cache .mypy_cache .ruff_cache
