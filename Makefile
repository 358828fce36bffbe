# Every target sets up what it needs: `make demo` or `make test` alone is enough on a fresh machine.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV        := .venv
BIN         := $(VENV)/bin
STAMP       := $(VENV)/.complete
UNFINISHED  := .venv.unfinished
PEERS       := .venv-bench
CAUSAL_PRODUCT := pytorch-fast-transformers==0.4.0
PYTHON      ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$python; break; }; done)
PIP         := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles a module when it is first imported: pip would compile all of them, which takes two minutes.
PIP_INSTALL := $(PIP) install --no-compile $(if $(CI),-qq --progress-bar off) -c constraints.txt
WORKERS     ?= 2
PYTEST      := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests start some hundred processes, which would each compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo docs vscode test test-all attack lint fmt bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Create .venv with the pinned dependencies and this project, editable

# The marker outlives a Ctrl-C, so that the next run starts from an empty environment and not from half of one.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer with its venv module is needed (set PYTHON=...)" >&2; exit 1; }
	@if test -e $(UNFINISHED) || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@touch $(UNFINISHED)
	@echo "Setting up $(VENV) (only when pyproject.toml or constraints.txt changed)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) hatchling editables
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev,docs]'
	@rm -f $(UNFINISHED) && touch $@

demo: setup ## Train examples/gpt.tfg and softmax attention on a novel for as long; loss, time and recall
	$(BIN)/python examples/demo.py

docs: setup ## Build the documentation as a static site in build/docs
	$(BIN)/python -W ignore -m website.build

vscode: ## Test and build the extension for VS Code with npm: editors/vscode/fastgrad.vsix
	cd editors/vscode && npm ci && npm test && npm run package

test: setup ## Run the tests (PYTEST_ARGS="..." for more options, WORKERS=0 for one process)
	$(PYTEST) $(PYTEST_ARGS)

test-all: setup ## Run all tests: those marked medium, which take seconds each, and the wide grids marked slow, too
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

attack: setup ## Attack every claim with random programs, for an hour of processor time (MINUTES=30 SEED=7 CHECKS=abcde)
	$(BIN)/python -m attack.run --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED)) $(if $(CHECKS),--checks $(CHECKS))

lint: setup ## Check style, formatting (of the .tfg files too), types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/fastgrad fmt --check examples/*.tfg grammar/fastgrad_grammar/std/*.tfg

fmt: setup ## Format the sources and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/fastgrad fmt examples/*.tfg grammar/fastgrad_grammar/std/*.tfg

bench: $(PEERS)/.complete ## Measure attention, its peers, training and the compiler, half an hour; make the pages from it
	$(PEERS)/bin/python -W ignore -m benchmarks.run $(BENCH_ARGS)
	$(PEERS)/bin/python -m benchmarks.document

# The peers stand on the product's environment without being part of it. The last of them is built from source with a C++
# compiler, against this PyTorch; nvcc is kept out of its sight, since it would be asked for CUDA kernels. It may be missing.
$(PEERS)/.complete: $(STAMP) benchmarks/requirements.txt
	@rm -rf $(PEERS)
	@$(BIN)/python -m venv $(PEERS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	> $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/product.pth
	@$(PEERS)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r benchmarks/requirements.txt
	@echo "Building pytorch-fast-transformers for $(PEERS) (some minutes, once)"
	@PATH=/usr/bin:/bin CFLAGS="-O3 -march=native" $(PEERS)/bin/python -m pip --disable-pip-version-check \
	install -q --no-deps --no-build-isolation $(CAUSAL_PRODUCT) \
	|| echo "It could not be built: what needs it will be named as not available"
	@touch $@

clean: ## Remove the environment, generated files and caches
	rm -rf $(VENV) $(UNFINISHED) $(PEERS) build dist runs editors/vscode/node_modules editors/vscode/dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
