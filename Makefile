SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
RUN := .venv/bin/python
BENCHMARKS := step around scaling tokens growth experts generate tasks average inspection compare finetune save speedrun \
	plan_memory moe_vs_dense rounding log bound ladder
# The older Transformers that exports have to open in as well, in a folder of its own; its tests are skipped without it.
TRANSFORMERS_4 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
# lm-eval, against which task scores are tested: as well.
LM_EVAL := --requirement tests/lm-eval.txt

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

# Every benchmark on a CPU for docs/speed.md, docs/moe.md, docs/planning.md and docs/distributed.md: about two hours with
# nothing else running, from a clean tree, so that each result names its commit. `make bench-step` makes one of them,
# into build/bench.
# NANOGPT, NANOMOE: folders with their model.py; TOKENIZER: one with GPT-2's vocab.json and merges.txt. What is not
# given is left out.
bench: $(addprefix bench-,$(BENCHMARKS))
	cp build/bench/* benchmarks/results/

step_flags = $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(NANOMOE),--nanomoe $(NANOMOE))
tokens_flags = $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) --plot build/bench/tokens_memory.png
experts_flags = --plot build/bench/experts_memory.png
speedrun_flags = --plot build/bench/speedrun.png
growth_flags = --plot build/bench/growth.png
moe_vs_dense_flags = --plot build/bench/moe_vs_dense.png
ladder_flags = --plot build/bench/ladder.png

bench-%: .venv/installed
	@test -z "$$(git status --porcelain)" || { echo "commit your changes first: a result names its commit" >&2; exit 2; }
	mkdir -p build/bench
	$(RUN) benchmarks/$*.py $($*_flags) | tee build/bench/$*.txt

format: .venv/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	-$(RUN) -m pip install --quiet --no-deps --upgrade --target .venv/transformers-4 $(TRANSFORMERS_4)
	-$(RUN) -m pip install --quiet --no-deps --upgrade --target .venv/lm-eval $(LM_EVAL)
	@touch $@

clean:
	rm -rf .venv data_cache
