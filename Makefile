VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test check install clean

quickstart: install
	$(BIN)/qc run quickstart

test: install
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

check: install
	$(BIN)/python tools/check.py

install: $(INSTALLED)

# constraints.txt is the tested set; the stamp makes the next call quick.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing qc into $(VENV), which takes a few minutes once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[dev,plots]" -c constraints.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
