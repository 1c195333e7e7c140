# Needs only Python 3.11 (or newer) and make: each target sets up what it needs in .venv.

# The first of these that runs: a version manager may provide names of Pythons that are not active.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
    $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
# The newest supported Python, if it is installed.
NEWEST := 3.13
NEWEST_PYTHON = $(shell for p in python$(NEWEST) $$HOME/.pyenv/versions/$(NEWEST)*/bin/python; do \
    $$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
BIN := .venv/bin
READY := .venv/.installed
# On all cores; the tests of one file run in one process, since they share fixtures. tests/conftest.py orders the files.
ALL_CORES := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY_OLDEST := .venv-oldest/.installed
READY_NEWEST := .venv-newest/.installed

.PHONY: demo test check format api docs test-oldest test-newest clients gpu-check clean

# The chain of recipes/tiny on the CPU: base -> SFT -> reward models -> two RL stages -> table, answer, report page.
demo: $(READY)
	$(BIN)/dsv2 run recipes/tiny/chain.yaml
	$(BIN)/dsv2 chat runs/tiny/rl_preference --prompt "What is 17 + 25?"
	$(BIN)/dsv2 report runs/tiny

test: $(READY)
	$(BIN)/python -m pytest $(ALL_CORES)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generates docs/api.md from signatures and docstrings, docs/keys.md from the schema of recipes and docs/commands.md
# from the command line; a test checks that they are up to date.
api: $(READY)
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_reference.py

# The pages of docs/ as a site in build/docs, which needs no network. A dead link, or a page that no list names, fails.
docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

# The model package on the oldest torch and transformers that pyproject.toml allows. The project itself is not installed,
# since the model package must work without TRL; it is imported from the project's root.
test-oldest: $(READY_OLDEST)
	.venv-oldest/bin/python -m pytest $(ALL_CORES) tests/model

# All tests except those marked slow: a few that take many seconds each, in separate processes.
test-newest: $(if $(NEWEST_PYTHON),$(READY_NEWEST))
	$(if $(NEWEST_PYTHON),.venv-newest/bin/python -m pytest $(ALL_CORES) -m "not slow and not clients",\
	    @echo "NOT TESTED on Python $(NEWEST): python$(NEWEST) is not installed")

# Other programs open what we write, in environments of their own under ~/.cache (or $DSV2_CLIENTS): downloads gigabytes
# and compiles llama.cpp.
clients: $(READY)
	$(BIN)/python -m pytest -s -m clients tests/clients

# For a machine with a GPU whose Python has torch, transformers and peft; installs nothing.
gpu-check:
	$(PYTHON) -m benchmarks.gpu.check --device cuda --output benchmarks/results/gpu.json

# Rebuilt if the requirements have changed, or if an installation was interrupted.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install Python 3.11" >&2; exit 2; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || \
	    { echo "error: $(PYTHON) is older than Python 3.11; choose another one: make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,serve,docs]'
	@touch $@

$(READY_OLDEST): Makefile
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check \
	    'torch==2.11.*' 'transformers==5.17.*' 'peft==0.21.*' 'bitsandbytes==0.50.2' hypothesis pytest pytest-xdist
	@touch $@

$(READY_NEWEST): pyproject.toml constraints.txt
	test -x .venv-newest/bin/python || $(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,serve]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
