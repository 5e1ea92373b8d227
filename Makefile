SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
RUN := .venv/bin/python
RESULTS := benchmarks/results
# The older Transformers that exports have to open in as well, in a folder of its own; its tests are skipped without it.
TRANSFORMERS_4 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2

.PHONY: train test test-gpu soak mutants bench check format clean

train: .venv/installed
	$(RUN) -m training.train --config configs/quickstart.yaml

test: .venv/installed
	$(RUN) -m pytest -n 2 --dist worksteal

test-gpu: .venv/installed
	$(RUN) -m pytest -m gpu

soak: .venv/installed
	$(RUN) -m pytest -m soak -s

mutants: .venv/installed
	$(RUN) tests/mutants.py

check: .venv/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pytest -n 2 --dist worksteal

# Speed beside others', as ratios; about an hour, with nothing else running. NANOGPT, NANOMOE: folders with their
# model.py; TOKENIZER: one with GPT-2's vocab.json and merges.txt. What is not given is left out.
bench: .venv/installed
	$(RUN) benchmarks/step.py $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(NANOMOE),--nanomoe $(NANOMOE)) | tee $(RESULTS)/step.txt
	$(RUN) benchmarks/speedrun.py --plot $(RESULTS)/speedrun.png | tee $(RESULTS)/speedrun.txt
	$(RUN) benchmarks/around.py | tee $(RESULTS)/around.txt
	$(RUN) benchmarks/scaling.py | tee $(RESULTS)/scaling.txt
	$(RUN) benchmarks/tokens.py $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) --plot $(RESULTS)/tokens_memory.png | tee $(RESULTS)/tokens.txt
	$(RUN) benchmarks/growth.py --plot $(RESULTS)/growth.png | tee $(RESULTS)/growth.txt
	$(RUN) benchmarks/experts.py --plot $(RESULTS)/experts_memory.png | tee $(RESULTS)/experts.txt
	$(RUN) benchmarks/generate.py | tee $(RESULTS)/generate.txt
	$(RUN) benchmarks/save.py | tee $(RESULTS)/save.txt

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
