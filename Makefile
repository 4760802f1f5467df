# The one interface to this repository: `make help` lists the targets, and CI calls nothing else.
# Needs Python >= 3.11, a Rust toolchain and the package registries; the rest is installed into $(VENV).
# GNU make 3.81 (macOS) and any POSIX shell will do.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

# Tools run as `python -m tool`: that works alike on every system and for a path of any length.
PY := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts/python.exe,bin/python)
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
PEERS := $(VENV)/.peers
RUST_SOURCES := $(shell find rust -type f)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_QUIET := 1
# maturin refuses to choose between a Conda environment and ours; cargo would look for the job server of make -j.
unexport CONDA_PREFIX MAKEFLAGS MFLAGS

.DEFAULT_GOAL := help
# The targets share one virtual environment and one cargo target folder.
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo build test test-loops fmt lint types bench bench-once peers ci wheel lock clean rust

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=python3.12 VENV=.venv-3.12 PYTEST_ARGS='-k join'"

demo: build ## Build, then run the ad exchange example
	$(PY) examples/ad_exchange.py

build: $(BUILT) ## Compile the Rust core into the virtual environment (Python sources are used in place)

test: build ## Run the tests of the core and the store (cargo) and of the package (pytest)
	cargo test --locked --features sqlite
	$(PY) -m pytest $(PYTEST_ARGS)

test-loops: build ## Run the Python tests in asyncio's debug mode, then under uvloop
	$(PY) -m pytest --loop=debug $(PYTEST_ARGS)
	$(PY) -m pytest --loop=uvloop $(PYTEST_ARGS)

fmt: $(READY) ## Format Rust and Python, sort imports
	cargo fmt
	$(PY) -m ruff check --quiet --select I --fix
	$(PY) -m ruff format

lint: $(READY) ## Check format and lints: rustfmt, clippy of the core alone and of everything, ruff
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	PYO3_PYTHON="$(abspath $(PY))" cargo clippy --locked --all-targets --features python -- -D warnings
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: build ## Check types: mypy, basedpyright, and the stub against the compiled module
	$(PY) -m mypy
	$(PY) -m basedpyright --pythonpath $(PY)
	$(PY) -m mypy.stubtest cano._core

bench: build peers ## Run the benchmarks and print the table of ratios
	mkdir -p .benchmarks
	$(PY) -m pytest --benchmark-only --benchmark-json=.benchmarks/last.json $(PYTEST_ARGS) benches
	$(PY) benches/report.py

bench-once: build peers ## Run each benchmark once, unmeasured, so that it cannot rot
	$(PY) -m pytest --benchmark-disable benches

peers: $(PEERS) ## Install the libraries that the benchmarks compare cano with

ci: lint types test test-loops bench-once ## Everything that must pass before a change lands

wheel: $(READY) ## Build the wheel for this Python into dist/
	$(PY) -m maturin build --release --locked --interpreter $(PY) --out dist

lock: $(PY) ## Resolve requirements-dev.txt and Cargo.lock anew
	$(PY) -m pip install uv
	$(PY) -m uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade --quiet \
		--custom-compile-command "make lock" --output-file requirements-dev.txt
	cargo update

clean: ## Remove everything that the targets above made
	rm -rf $(VENV) target dist .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f python/cano/_core*.so python/cano/_core*.pyd
	find python tests benches examples -name __pycache__ -prune -exec rm -rf {} +

rust:
	@command -v cargo >/dev/null 2>&1 || { \
		echo "cano needs a Rust toolchain: cargo 1.88 or newer, found none on PATH" >&2; exit 1; }

$(PY): | rust
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "cano needs Python 3.11 or newer, and $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo 'not to be found'); name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): requirements-dev.txt | rust $(PY)
	$(PY) -m pip install --requirement requirements-dev.txt
	@touch $@

$(PEERS): benches/compare/requirements.txt $(READY)
	$(PY) -m pip install --requirement benches/compare/requirements.txt
	@touch $@

# Stamped with the time at which the build began: a source saved meanwhile is built the next time.
$(BUILT): $(READY) Cargo.toml Cargo.lock pyproject.toml $(RUST_SOURCES)
	@touch $@.began
	VIRTUAL_ENV="$(abspath $(VENV))" $(PY) -m maturin develop --release --locked
	@mv $@.began $@
