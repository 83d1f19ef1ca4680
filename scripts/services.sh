#!/usr/bin/env bash
# Installs the services that `make test-services` starts, where they are missing: PostgreSQL, from Debian.
set -euo pipefail

compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && exit 0
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "services: PostgreSQL is missing. Install its server (Debian: apt-get install postgresql) and run this again" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends postgresql
