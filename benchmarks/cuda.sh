#!/usr/bin/env bash
# Everything that a CUDA device is asked, in one go: first whether what runs there is right, then how fast it is.
#   bash benchmarks/cuda.sh [PYTHON]      results in benchmarks/results/cuda-*.txt
# NANOGPT: a folder with nanoGPT's model.py, to run beside.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${1:-.venv/bin/python}"
out=benchmarks/results
export PYTHONPATH="$PWD"  # for a PYTHON that has the packages, but not this one
"$python" -m pytest -m gpu -q 2>&1 | tee "$out/cuda-tests.txt"
"$python" benchmarks/gpu.py ${NANOGPT:+--nanogpt "$NANOGPT"} 2>&1 | tee "$out/cuda-steps.txt"
"$python" benchmarks/experts.py --device cuda --dtype bf16 2>&1 | tee "$out/cuda-experts.txt"
