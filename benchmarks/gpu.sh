#!/usr/bin/env bash
# Everything that is to be known of surgery on a GPU, in eight minutes, on a bare machine: python3 with torch, transformers and numpy.
#
#     bash benchmarks/gpu.sh OUT            one table last, and all numbers as JSON in OUT
#     bash benchmarks/gpu.sh OUT --small    every part, small, on the processor: half a minute
#
# PYTHON names another python3.
set -eu
out=$(realpath -m "${1:?Say where to: bash benchmarks/gpu.sh OUT}")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/tests" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m benchmarks.gpu "$out" "$@"
