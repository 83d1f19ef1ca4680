#!/usr/bin/env bash
# Installs from Debian what `make test-services` talks to. Does nothing where it is there already.
set -euo pipefail

declare -A package=(
    [promtool]=prometheus
    [prometheus]=prometheus
    [prometheus-alertmanager]=prometheus-alertmanager
    [amtool]=prometheus-alertmanager
)

missing=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
# Debian keeps the server's programs out of the path.
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
((${#missing[@]})) || exit 0

mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
run=()
if ((EUID != 0)); then
    command -v sudo >/dev/null || {
        printf 'services: %s missing; install as root: apt-get install %s\n' "${missing[*]}" "${missing[*]}" >&2
        exit 1
    }
    run=(sudo)
fi
printf 'services: installing %s\n' "${missing[*]}"
# Debian starts what it installs, unless this file says no; the tests start their own.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    printf '#!/bin/sh\nexit 101\n' | "${run[@]}" tee /usr/sbin/policy-rc.d >/dev/null
    "${run[@]}" chmod 0755 /usr/sbin/policy-rc.d
    trap '"${run[@]}" rm -f /usr/sbin/policy-rc.d' EXIT
fi
"${run[@]}" apt-get update -qq
"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
