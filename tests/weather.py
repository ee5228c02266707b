"""Long runs of bad weather, for scripts/weather.sh: faults at random, and how long each kind of stop is felt.

    python weather.py --faults 110 --kills 20 --stops 10 --rollings 2 --seed 1
"""

import argparse
import collections
import itertools
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback

import cluster
import faults
import history
import network
import servers
from test_cluster import failover_gap, rolling_restart, stop_gap

# A cluster is made anew after so many faults, so that histories and logs stay small.
FAULTS_PER_CLUSTER = 30
# Clients that write without pause while some of the planned stops are measured.
WRITERS = 50


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=110)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--rollings", type=int, default=2)
    parser.add_argument("--etcd-minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep all files, also when all is well")
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-weather-"))
    print(f"binary {servers.flux_binary()}, seed {arguments.seed}, files in {folder}", flush=True)
    failures = [
        *measure(folder / "measured", arguments),
        *storm(folder, arguments),
    ]
    if failures or arguments.keep:
        print(f"all files are in {folder}")
    else:
        shutil.rmtree(folder)
    print("failed: " + "; ".join(failures) if failures else "all is well")
    return 1 if failures else 0


def measure(folder, arguments):
    """Failover, planned stops, rolling restarts, and etcd away; each with what was promised of it."""
    failures = []
    with cluster.Cluster(folder) as made:

        def gaps(measured, count):
            found = []
            for number in range(count):
                victim = made.nodes[number % 3]
                servers.wait_until(lambda: len(victim.led()) >= 10, "it leads some", 60, 0.2)
                rest = [node for node in made.nodes if node is not victim]
                found.append(measured(made, victim, rest))
            return found

        if arguments.kills:
            found = gaps(failover_gap, arguments.kills)
            report("failover after kill -9", found)
            if statistics.median(found) > 1.0 or max(found) > 2.0:
                failures.append("failover: more than 1 s in the median or 2 s at worst")
        if arguments.stops:
            for name, measured in ("", stop_gap), (f" under {WRITERS} writers", crowded_stop_gap):
                found = gaps(measured, arguments.stops)
                report(f"gap of a planned stop{name}", found)
                if max(found) > 0.1:
                    failures.append(f"planned stop{name}: more than 100 ms")
        for _ in range(arguments.rollings):
            latencies, failed = rolling_restart(made)
            p999 = latencies[len(latencies) * 999 // 1000]
            print(
                f"rolling restart: {len(latencies)} requests, {len(failed)} failed {failed[:3]}, "
                f"median {latencies[len(latencies) // 2] * 1000:.1f} ms, p99.9 {p999:.3f} s, "
                f"worst {latencies[-1]:.3f} s",
                flush=True,
            )
            if failed or p999 > 2.0:
                failures.append("rolling restart: requests failed, or p99.9 is more than 2 s")
        if arguments.etcd_minutes:
            failures += without_etcd(made, arguments.etcd_minutes * 60)
    return failures


def crowded_stop_gap(made, victim, others):
    """The gap of a planned stop while clients of the other nodes write without pause."""
    ended = threading.Event()
    stayed = []

    def write(number):
        with others[number % len(others)].connect() as connection:
            for count in itertools.count():
                if ended.is_set():
                    break
                connection.call("SET", f"crowd:{number}:{count % 5000}", "x" * 100)
        stayed.append(number)

    crowd = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for writer in crowd:
        writer.start()
    try:
        gap = stop_gap(made, victim, others)
    finally:
        ended.set()
        for writer in crowd:
            writer.join()
    assert len(stayed) == WRITERS, "writers of the crowd got errors"
    return gap


def report(name, found):
    print(
        f"{name}: median {statistics.median(found):.3f} s, worst {max(found):.3f} s of {len(found)}: "
        + " ".join(f"{gap:.3f}" for gap in found),
        flush=True,
    )


def without_etcd(made, seconds):
    """etcd is silent, then gone, each for half of the time."""
    with history.Load(made.nodes) as load:
        made.etcd.signal(signal.SIGSTOP)
        time.sleep(seconds / 2)
        made.etcd.kill()
        time.sleep(seconds / 2)
        made.etcd.start()
        made.wait_until_well()
    result = load.check(made.nodes)
    print(f"etcd away for {seconds:.0f} s: {result}", flush=True)
    return ["etcd away: errors in the data plane"] if result["errors"] or result["unknown"] else []


def storm(folder, arguments):
    """Faults at random, half of them of a network; stops at the first failure, whose files are kept."""
    kinds = [faults.PROCESS_FAULTS]
    for needed, some in [
        (faults.ThrottledDisk.available(), faults.DISK_FAULTS),
        (faults.FakeClock.available(), faults.CLOCK_FAULTS),
    ]:
        if needed:
            print(f"without {', '.join(fault.__name__ for fault in some)}: {needed}")
        else:
            kinds.append(some)
    local = [fault for some in kinds for fault in some]
    reason = network.available()
    if reason:
        print(f"without faults of the network: {reason}")
    counts, totals = collections.Counter(), collections.Counter()
    number = 0
    while number < arguments.faults:
        count = min(FAULTS_PER_CLUSTER, arguments.faults - number)
        wired = reason is None and (number // FAULTS_PER_CLUSTER) % 2 == 1
        where = folder / f"storm{number}"
        seed = f"{arguments.seed}/{number}"
        try:
            if wired:
                with network.Network(3) as made_network:
                    pool = faults.NETWORK_FAULTS + faults.PROCESS_FAULTS
                    round_of(where, seed, count, pool, made_network, counts, totals)
            else:
                round_of(where, seed, count, local, None, counts, totals)
        except Exception:
            traceback.print_exc()
            print(f"after {sum(counts.values())} faults; files in {where}")
            return ["a fault was not survived"]
        number += count
    print(f"{sum(counts.values())} faults: {dict(counts)}")
    print(f"0 acknowledged writes lost, all histories linearizable: {dict(totals)}", flush=True)
    return []


def round_of(where, seed, count, pool, made_network, counts, totals):
    """One cluster through so many faults; every kind comes before any comes again."""
    with cluster.Cluster(where, network=made_network) as made:
        weather = faults.Weather(made, seed)
        order = []
        for _ in range(count):
            if not order:
                order = weather.chance.sample(pool, len(pool))
            fault = order.pop()
            print(f"{sum(counts.values()) + 1:4} {fault.__name__}", end=" ", flush=True)
            result = weather.strike(fault)
            counts[fault.__name__] += 1
            totals.update({key: result[key] for key in ("operations", "unknown", "acknowledged")})
            print(
                f"acknowledged {result['acknowledged']}, unknown {result['unknown']}, "
                f"well after {result['recovered_s']} s, slowest {result['slowest_s']} s"
                + "".join(f"\n     slow: {line}" for line in result["slow"]),
                flush=True,
            )
        count = weather.check_all_again()
        print(f"     all {count} acknowledged writes of this cluster are there", flush=True)


if __name__ == "__main__":
    sys.exit(main())
