#!/usr/bin/env bash
# Bad weather for a cluster of three real nodes with a real etcd, for longer than scripts/test.sh has time for:
# kills, pauses, cut and slow networks, slow disks and wrong clocks at random while clients work, with all that
# clients saw checked; and how long failovers, planned stops and rolling restarts are felt.
#
#   scripts/weather.sh                 110 faults, 20 kills and 10 stops that are measured: about a quarter of an hour
#   scripts/weather.sh --faults 1000   any option of tests/weather.py
#   FLUX_BIN=... scripts/weather.sh    another binary than the dev build
#
# Needs etcd; and, for all of it, root, iproute2, faketime and cgroups v1. What is missing is named and left out.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_PROFILE_DEV_OPT_LEVEL=1
target=${CARGO_TARGET_DIR:-$PWD/target}
python=${PYTHON:-$target/tests-venv/bin/python}
if [ -z "${FLUX_BIN-}" ]; then
    cargo build --workspace --bins
    export FLUX_BIN=$target/debug/flux
fi
if [ ! -x "$python" ]; then
    python3 -m venv "$target/tests-venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
fi
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
exec "$python" tests/weather.py "$@"
