PYTHON ?= python3
RUN := .venv/bin/python
# The older Transformers that exports have to open in as well, in a folder of its own; its tests are skipped without it.
TRANSFORMERS_4 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2

.PHONY: train test test-gpu soak mutants check format clean

train: .venv/installed
	$(RUN) -m training.train --config configs/quickstart.yaml

test: .venv/installed
	$(RUN) -m pytest -n 2 --dist loadfile

test-gpu: .venv/installed
	$(RUN) -m pytest -m gpu

soak: .venv/installed
	$(RUN) -m pytest -m soak -s

mutants: .venv/installed
	$(RUN) tests/mutants.py

check: .venv/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pytest -n 2 --dist loadfile

format: .venv/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	-$(RUN) -m pip install --quiet --no-deps --upgrade --target .venv/transformers-4 $(TRANSFORMERS_4)
	@touch $@

clean:
	rm -rf .venv data_cache
