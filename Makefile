# make test: everything checked, from nothing but Python 3.11+ and make. make demo: the main job.
# make docs: the site, in build/site. make test-versions: the fast tests at the oldest and the newest
# versions of what this depends on. make test-slow: what make test leaves out; an hour or two.
#
# PYTHON names the interpreter for .venv.

PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are imported first: most never are, and all take a minute.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
# In half of pip's time; it keeps what is there already.
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python
# Warnings are errors; Material's notice of its end of life is none.
SITE := NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/mkdocs build

.PHONY: test types site tests test-slow test-tunix test-versions docs demo assets clean

# Many tests start processes, which find modules compiled, whatever the user wants elsewhere.
test test-slow: export PYTHONDONTWRITEBYTECODE :=
test test-slow: export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/pycache
# Packages and weights are fetched side by side.
test:
	$(MAKE) --no-print-directory --jobs=2 .venv/.test assets
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --no-print-directory --jobs=2 types site tests

# The parts of `make test`, which makes what they need. The tests begin beside mypy, when the site is
# there, so that no core waits.
types:
	$(BIN)/mypy

site:
	$(SITE)

tests:
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.test assets
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m slow

# Tunix has ceilings of its own on what it needs, so it gets an environment of its own.
test-tunix: .venvs/tunix/.test
	XLA_FLAGS=--xla_force_host_platform_device_count=8 .venvs/tunix/bin/python -m pytest -q tests/tunix

test-versions: .venvs/uv/.made
	.venvs/uv/bin/python scripts/test_versions.py

docs: .venv/.docs
	$(SITE)

demo: .venv/.demo
	$(BIN)/python scripts/demo.py

# The weights and the reviews that the demo trains on, and some of the tests use.
assets: | $(BIN)/python
	$(BIN)/python scripts/prepare_demo.py

# All that make itself has put here; runs/ stays.
clean:
	rm -rf .venv .venvs assets build dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find loft_jax benchmarks examples experiments scripts tests \
	  -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "loft_jax needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=/path/to/python3.11"; exit 2; } >&2
	$(PYTHON) -m venv .venv

# Torch goes first: only the tests need it, and a plain "torch" could bring another build.
.venv/.test: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) uv torch==2.13.0
	$(UV_INSTALL) --editable '.[test]'
	touch $@

.venvs/tunix/.test: pyproject.toml
	$(PYTHON) -m venv .venvs/tunix
	.venvs/tunix/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
	  --editable . 'google-tunix>=0.1.7' pytest
	touch $@

.venvs/uv/.made:
	$(PYTHON) -m venv .venvs/uv
	.venvs/uv/bin/python -m pip install -qq --disable-pip-version-check uv
	touch $@

.venv/.docs: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

.venv/.demo: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable '.[plot]'
	touch $@
