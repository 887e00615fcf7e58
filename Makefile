# make demo   the whole chain on the built-in model and generated pages; prints where its page lies
# make test   ruff, mypy and all tests
# ARGS passes overrides to the demo: make demo ARGS="train.num_train_epochs=2 run.name=longer"
# Both make .venv with the pinned packages first; PYTHON names another interpreter (3.10 to 3.13).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# A process a core; files stay whole, since the tests of one share what they trained.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick lint format docs lock clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/fintune demo $(ARGS)

test: lint
	$(BIN)/pytest $(PARALLEL)

quick: $(STAMP)
	$(BIN)/pytest $(PARALLEL) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/fintune config reference > docs/options.md

# The stamp is written last: an interrupted installation is begun again.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "fintune needs Python 3.10 to 3.13, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

# The first install gives torch its pinned build, so that nothing pulls another.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	.venv-lock/bin/pip install --quiet hatchling editables
	.venv-lock/bin/pip install --quiet --no-build-isolation --editable '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//'

clean:
	rm -rf .venv .venv-lock .pytest_cache .mypy_cache .ruff_cache
