#!/usr/bin/env bash
# Runs every test of the project: Rust tests and doc tests, simulated clusters, the end-to-end tests in
# tests/ against real nodes, and a short run of each fuzz target. Installs what the tests need, or says
# what is missing.
#
#   scripts/test.sh                   everything
#   scripts/test.sh rust e2e          only these parts (rust, sim, e2e, fuzz)
#   SIM_SEEDS=5000 scripts/test.sh sim
#   FUZZ_SECONDS=300 scripts/test.sh fuzz
#   scripts/test.sh e2e -- -k golden  arguments after -- go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
tools=$target/tools
venv=$target/tests-venv
fuzz_seconds=${FUZZ_SECONDS:-20}
sim_seeds=${SIM_SEEDS:-500}
export PATH="$tools/bin:$PATH"
# One profile for all: optimised enough for the end-to-end tests, with every check of a debug build.
export CARGO_PROFILE_DEV_OPT_LEVEL=1

parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        rust | sim | e2e | fuzz) parts+=("$1") ;;
        *)
            sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
            exit 2
            ;;
    esac
    shift
done
[ "${1-}" != -- ] || shift
pytest_arguments=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(rust sim e2e fuzz)

begun=$SECONDS
section=
section_begun=$SECONDS
section() {
    [ -z "$section" ] || echo "--- $section: $((SECONDS - section_begun)) s"
    section=$1
    section_begun=$SECONDS
    [ -z "$section" ] || printf '\n=== %s\n' "$section"
}

wanted() {
    local part
    for part in "${parts[@]}"; do
        [ "$part" != "$1" ] || return 0
    done
    return 1
}

# Runs a command as root where that is possible without asking anybody.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

# Installs Debian's packages that give these commands, where they are not there. Says so where it cannot:
# tests that need them then fail or are skipped, and say which.
install_packages() {
    local missing=() pair
    for pair in "$@"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%=*}" >/dev/null || missing+=("${pair##*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null || ! as_root true 2>/dev/null; then
        echo "Cannot install from here what some tests need; install: ${missing[*]}" >&2
        return
    fi
    # Debian starts a daemon on the default port when it installs a server. The tests start their own, so
    # a policy forbids that for as long as the installation takes, where there is no other policy.
    (
        policy=/usr/sbin/policy-rc.d
        if [ ! -e "$policy" ]; then
            trap 'as_root rm -f "$policy"' EXIT
            printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
            as_root chmod +x "$policy"
        fi
        as_root apt-get update -qq
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${missing[@]}"
    )
}

install_python_packages() {
    local wanted_packages=tests/requirements.txt installed=$venv/requirements.txt
    if cmp -s "$wanted_packages" "$installed"; then
        return
    fi
    if ! python3 -m venv --clear "$venv"; then
        echo "python3 with venv is needed: apt-get install python3-venv" >&2
        exit 1
    fi
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$wanted_packages"
    cp "$wanted_packages" "$installed"
}

run_rust_tests() {
    section "What the Rust tests need"
    install_packages etcd=etcd-server rabbitmq-server=rabbitmq-server
    section "Rust tests"
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --workspace --no-fail-fast
        section "Doc tests"
        cargo test --workspace --doc
    else
        echo "cargo-nextest is not installed: cargo test runs the same tests, only slower"
        cargo test --workspace --no-fail-fast
    fi
}

run_end_to_end_tests() {
    section "What the end-to-end tests need"
    install_packages redis-server=redis-server redis-benchmark=redis-tools etcd=etcd-server \
        faketime=faketime ip=iproute2 rabbitmq-server=rabbitmq-server
    install_python_packages
    section "The node"
    # With the features that the Rust tests were built with, so that nothing is built twice.
    cargo build --workspace --bins
    section "End-to-end tests"
    # Thousands of connections need as many file descriptors on both sides.
    ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
    FLUX_BIN=${FLUX_BIN:-$target/debug/flux} \
        "$venv/bin/python" -m pytest tests -p no:cacheprovider --durations=10 "${pytest_arguments[@]}"
}

run_simulation() {
    section "Simulation, $sim_seeds seeds"
    cargo run --quiet -p flux-sim -- --seeds "0..$sim_seeds"
}

run_fuzz_targets() {
    section "Fuzz targets, $fuzz_seconds s each"
    if [ ! -f fuzz/Cargo.toml ]; then
        echo "there is no fuzz/Cargo.toml" >&2
        return 1
    fi
    if ! cargo fuzz --version >/dev/null 2>&1; then
        mkdir -p "$tools"
        if ! CARGO_TARGET_DIR=$tools/build cargo install cargo-fuzz --locked --quiet --root "$tools"; then
            echo "skipped: cargo-fuzz is not installed and could not be installed"
            return
        fi
        rm -rf "$tools/build"
    fi
    local names name log
    # A sanitizer needs flags that only a nightly compiler takes, or one told to be like it.
    export RUSTC_BOOTSTRAP=1
    names=$(cargo fuzz list)
    for name in $names; do
        echo "- $name"
        log=$target/fuzz-$name.log
        if env -u CARGO_PROFILE_DEV_OPT_LEVEL CARGO_TARGET_DIR="$target/fuzz" cargo fuzz run "$name" -- \
            -max_total_time="$fuzz_seconds" -rss_limit_mb=2048 >"$log" 2>&1; then
            grep '^Done ' "$log"
        else
            tail -n 60 "$log"
            echo "the fuzz target $name failed; all of its output is in $log" >&2
            return 1
        fi
    done
    unset RUSTC_BOOTSTRAP
}

! wanted rust || run_rust_tests
! wanted sim || run_simulation
! wanted fuzz || run_fuzz_targets
! wanted e2e || run_end_to_end_tests
section ""
echo "=== all of ${parts[*]}: $((SECONDS - begun)) s"
