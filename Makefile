PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: train test check format clean

train: .venv/installed
	$(RUN) -m training.train --config configs/quickstart.yaml

test: .venv/installed
	$(RUN) -m pytest

check: .venv/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pytest

format: .venv/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv data_cache
