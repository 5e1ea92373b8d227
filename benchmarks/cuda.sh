#!/usr/bin/env bash
# Everything that a CUDA device is asked, in one go: first whether what runs there is right, then how fast it is.
#   bash benchmarks/cuda.sh [PYTHON]      results in benchmarks/results/cuda-*.txt, or in the folder OUT
# NANOGPT: a folder with nanoGPT's model.py, to run beside. TOY=1: on a CPU, at sizes at which figures say nothing.
# The exit status is 1 where any of it failed; the rest is done all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${1:-.venv/bin/python}" out="${OUT:-benchmarks/results}" status=0
export PYTHONPATH="$PWD" # for a PYTHON that has the packages, but not this one
steps=(--device cuda) experts=(--device cuda --dtype bf16)
if [ -n "${TOY:-}" ]; then
    steps=(--device cpu --toy --rounds 1 --micro_batch 2) experts=(--device cpu --width 64 --tokens 256 --rounds 1)
fi
to() {
    "$python" "${@:2}" 2>&1 | tee "$out/$1" || status=1
}
to cuda-tests.txt -m pytest -m gpu -q
to cuda-steps.txt benchmarks/gpu.py "${steps[@]}" ${NANOGPT:+--nanogpt "$NANOGPT"}
to cuda-experts.txt benchmarks/experts.py "${experts[@]}"
exit $status
