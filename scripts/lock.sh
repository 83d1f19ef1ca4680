#!/usr/bin/env bash
# Writes constraints.txt: one version for every package of the CPU environment with the extras train, dev and fuzz.
# It keeps the versions that are there unless they no longer fit; `make lock ARGS=--upgrade` takes the newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=".venv/bin/uv"
[[ -x "$uv" ]] || {
    echo "lock: .venv has no uv; run 'make install' first (constraints.txt may be empty for it)" >&2
    exit 1
}
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mapfile -t options < <(.venv/bin/python scripts/uv_options.py)
certificates="${options[0]#SSL_CERT_FILE=}"
[[ -n "$certificates" ]] && export SSL_CERT_FILE="$certificates"

# uv keeps the versions of an existing output file.
[[ -f constraints.txt ]] && cp constraints.txt "$scratch/resolved.txt"
echo "uv" >"$scratch/uv.in"
"$uv" pip compile --quiet --python-version 3.11 --extra cpu --extra train --extra dev --extra fuzz \
    --override scripts/overrides.txt --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
    "${options[@]:1}" "$@" --output-file "$scratch/resolved.txt" pyproject.toml "$scratch/uv.in"

if grep -Eq '^(nvidia-|cuda-|cupy)|(://|@ )' "$scratch/resolved.txt"; then
    echo "lock: the resolution holds CUDA packages or addresses, which constraints.txt must not:" >&2
    grep -E '^(nvidia-|cuda-|cupy)|(://|@ )' "$scratch/resolved.txt" >&2
    exit 1
fi
{
    echo "# The versions that Telltale is tested with, on a CPU, extras cpu, train, dev and fuzz. Written by 'make lock'; do not edit."
    echo "# 'make lock ARGS=--upgrade' takes the newest versions that pyproject.toml allows."
    grep -E '^[a-zA-Z0-9._-]+==' "$scratch/resolved.txt" | sort -f
} >"$scratch/constraints.txt"
cp "$scratch/constraints.txt" constraints.txt
echo "lock: constraints.txt pins $(grep -c == constraints.txt) packages"
