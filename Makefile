# Needs Python 3.11 (or newer) and make, nothing else: each target sets up what it needs in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.installed
READY_OLDEST := .venv-oldest/.installed

.PHONY: demo test check format test-oldest gpu-check clean

# The chain of recipes/tiny on the CPU: base -> SFT -> reward models -> two RL stages -> table, answer, report page.
demo: $(READY)
	$(BIN)/dsv2 run recipes/tiny/chain.yaml
	$(BIN)/dsv2 chat runs/tiny/rl_preference --prompt "What is 17 + 25?"
	$(BIN)/dsv2 report runs/tiny

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The model's floor on the oldest torch and transformers that pyproject.toml allows: the tests that import no other
# floor. The project itself is not installed here, since this floor must do without TRL; it is found from its root.
OTHER_FLOORS := (from|import) (conversations|recipes|sft|reward|rl|eval|trl|datasets|dsv2_start)\b|from \.(stage|resume)|import (stage|resume)_launch
MODEL_TESTS = $(shell grep -l deepseek_v2_modeling $$(grep -LE '$(OTHER_FLOORS)' tests/test_*.py))

test-oldest: $(READY_OLDEST)
	.venv-oldest/bin/python -m pytest $(MODEL_TESTS)

# On a machine with a GPU whose Python has torch, transformers and peft; nothing is installed.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py --device cuda --output benchmarks/results/gpu.json

# Built again when what is to be installed has changed, and when an installation was broken off.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 found; install Python 3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than Python 3.11; give another one: make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(READY_OLDEST): Makefile
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check \
	    'torch==2.11.*' 'transformers==5.17.*' 'peft==0.21.*' hypothesis pytest
	@touch $@

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
