#!/usr/bin/env bash
# Everything that a CUDA device is asked, in one go of at most 12 minutes: first whether what runs there is right, then how
# fast it is, then how fast the recipes learn. Each part has a time limit, and leaves what it has printed until then.
#   bash benchmarks/cuda.sh [PYTHON]      results in benchmarks/results/cuda-*.txt, or in the folder OUT
# TEXT: a text file for the recipes (default: Python's standard library, of which they read many epochs).
# NANOGPT: a folder with nanoGPT's model.py, to run beside. TOY=1: on a CPU, at sizes at which figures say nothing.
# The exit status is 1 where any of it failed; the rest is done all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${1:-.venv/bin/python}" out="${OUT:-benchmarks/results}" status=0
export PYTHONPATH="$PWD" # for a PYTHON that has the packages, but not this one
steps=(--device cuda) experts=(--device cuda --dtype bf16) scale=1
recipes=(--steps 120 --batch_tokens 131072)
if [ -n "${TOY:-}" ]; then
    steps=(--device cpu --toy --rounds 1 --micro_batch 2) experts=(--device cpu --width 64 --tokens 256 --rounds 1)
    recipes=(--steps 2 --batch_tokens 128 --model.n_embd 48 --model.n_positions 64 --precision fp32)
    recipes+=(--parallel.device cpu) scale=5
fi
to() {
    timeout "$(($2 * scale))" "$python" "${@:3}" 2>&1 | tee "$out/$1" || status=1
}
source="{type: stdlib}"
[ -z "${TEXT:-}" ] || source="{paths: ['$TEXT']}"
runs="$(mktemp -d)"
to cuda-tests.txt 150 -m pytest -m gpu -q
to cuda-steps.txt 300 benchmarks/gpu.py "${steps[@]}" ${NANOGPT:+--nanogpt "$NANOGPT"}
to cuda-recipes.txt 180 -m training.compare configs/gpt2_124m.yaml recipes/gpt2_124m.yaml recipes/gpt2_moe.yaml \
    --equal time --seeds 1 --out "$runs/compare" --out_dir "$runs" --data.cache_dir "$runs/cache" \
    --data.sources "[$source]" --data.val_fraction 0.05 --data.tokenizer "{type: bpe, vocab_size: 16384}" \
    --model.vocab_size null --schedule "{type: wsd, warmup: 0.05, decay: 0.6}" --eval "{every: 30, prompts: []}" \
    --checkpoint.every null "${recipes[@]}"
cp "$runs/compare/compare.html" "$out/cuda-recipes.html" || status=1
to cuda-experts.txt 90 benchmarks/experts.py "${experts[@]}"
rm -rf "$runs"
exit $status
