# Everything needs only Python 3.11 or newer and make. `make help` lists what there is.

SHELL := /bin/sh
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first one that really runs: a version manager's shims may be there and fail.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := pipeline publishers subscribers dashboards

# A stamp is named by a hash of what it stands for, so an edit or a moved checkout makes a new one due.
HASH := $(shell (cat requirements.txt requirements-dev.txt pyproject.toml; pwd) | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.run-$(HASH)
TEST_STAMP := $(VENV)/.test-$(HASH)

PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup run test check bench soak clean tools

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(RUN_STAMP) ## create .venv with the locked dependencies (the other targets do it by themselves)
	@:

run: $(RUN_STAMP) ## start everything: Redis, gateway, dashboard on http://127.0.0.1:8050, publishers, workers
	@exec $(BIN)/pipeline up

check: $(TEST_STAMP) ## format, lint, types, layering
	@$(BIN)/ruff format --check --quiet . || { echo "run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports >.venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

test: check tools ## check, then all tests; PYTEST_ARGS="-k name" chooses
	@$(PYTEST) -n $(PYTEST_WORKERS) --maxprocesses 4 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(TEST_STAMP) ## measure all of it, each in its own run
	@for name in events latency tensors growth serving training allreduce compression matmul dashboard; do $(BIN)/python -m benchmarks $$name || exit 1; done

soak: $(TEST_STAMP) tools ## long chaos
	@$(PYTEST) -m soak --timeout 0 -s $(PYTEST_ARGS)

clean: ## remove what was built or cached; the events in .pipeline stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that does not run, or was made for another place, is made anew.
$(RUN_STAMP):
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer runs here: install one, or name it with PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call install,python3-venv); }
	@grep -qsF '$(CURDIR)/$(VENV)' $(BIN)/activate && $(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing requirements.txt"
	@$(BIN)/python -m pip install -qq -r requirements.txt
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.run-* && touch $@

$(TEST_STAMP): $(RUN_STAMP)
	@echo "installing requirements-dev.txt"
	@$(BIN)/python -m pip install -qq -r requirements-dev.txt
	@rm -f $(VENV)/.test-* && touch $@

# What the tests need beside Python. Without it they fail and say why, so on a developer's machine this only warns.
tools:
	@$(call need,chromium chromium-browser google-chrome,chromium)
	@$(call need,redis-server,redis-server)

# $(call install,PACKAGE): with Debian's apt-get, when we may
define install
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "installing Debian's $(1)"; \
	{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(1); } >/dev/null 2>&1 || true; \
fi
endef

# $(call need,COMMANDS,PACKAGE): one of the commands, else the package, else say how
define need
found() { for command in $(1); do command -v $$command >/dev/null && return; done; return 1; }; \
found || { $(call install,$(2)); }; \
found || { echo "the tests need $(2), which is not on PATH; on Debian: apt-get install $(2)"; test "$$CI" != true; }
endef
