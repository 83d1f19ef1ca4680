#!/usr/bin/env bash
# Checks on a machine with an NVIDIA GPU what Telltale needs of it, and writes docs/benchmarks/gpu-check.{json,md}.
#
#   scripts/gpu_check.sh                 everything
#   scripts/gpu_check.sh --tier op       the tap operator alone: needs torch, no vLLM
#   scripts/gpu_check.sh --tier engine   a monitored engine against transformers and against plain vLLM
#   scripts/gpu_check.sh --device cpu    what can be checked without a GPU
#   PYTHON=python3 scripts/gpu_check.sh  another Python than .venv's
#
# Exit status: 0 all held, 1 a check failed (each is named), 2 it cannot be run here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
if ! command -v "$python" >/dev/null; then
    printf 'gpu-check: %s was not found. Run make install TELLTALE_DEVICE=cuda, or set PYTHON.\n' "$python" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m serving.gpu_check "$@"
