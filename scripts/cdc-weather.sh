#!/usr/bin/env bash
# Bad weather for change capture: three real nodes, a real RabbitMQ and `flux consume`, with writes of every kind
# under way. The leader of most partitions, the broker and the consumer are killed with SIGKILL, in random order;
# at the end the consumer's file must have every change of every partition once and in order, and be the store.
#
#   scripts/cdc-weather.sh                  20 kills of each: about a quarter of an hour
#   scripts/cdc-weather.sh --kills 5        any option of tests/cdc_weather.py
#   FLUX_BIN=... scripts/cdc-weather.sh     another binary than the dev build
#
# Needs etcd and RabbitMQ: apt-get install etcd-server rabbitmq-server.
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
exec "$python" tests/cdc_weather.py "$@"
