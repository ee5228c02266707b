#!/usr/bin/env python3
"""Runs three etcd nodes and three Flux-KV nodes side by side on this machine and writes the table in
PERFORMANCE.md.

Both clusters of a comparison are up at once and take the load in turns, and every figure is the median
of the turns: a figure counts only as a ratio to the peer's of the same run. Nothing is held to a core:
three servers and the client share the machine, on both sides alike. Both sync every write to disk before
they acknowledge it. Nothing here listens beyond loopback, and it all ends by itself.

    bench/cluster.py --write                    everything, about half an hour; rewrites the table
    bench/cluster.py --only put-1,put-100       only these; prints the table
    bench/cluster.py --seconds 1 --repeat 1 --many-keys 100000     rough, to see that it works

Measures: put-1, put-100 (without pipeline and with 16), get-100 (the same), partitions (CPU a put with
1, 64 and 1,024), keys (CPU a put with 10k and 10M), idle (1,024 quiet partitions).
Needs etcd (Debian: etcd-server), a release build, about 8 GiB of memory and 12 GiB of disk.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import resp
import servers

BEGIN, END = "<!-- cluster:begin -->", "<!-- cluster:end -->"
ETCD, FLUX = "etcd", "flux"
SIDES = (ETCD, FLUX)
NODES = 3
VALUE_BYTES = 64
CLIENTS, ETCD_CONNECTIONS = 100, 10
PARTITIONS = (1, 64, 1024)
FEW_KEYS = 10_000
# Of all requests of a run.
MOST_REDIRECTED = 0.002
WARMUP_SECONDS, IDLE_SECONDS = 1, 20
LOAD_PACKAGE = ROOT / "bench" / "etcd-load"

# Run: (operation, clients, pipeline); etcd's client has no pipeline, so its runs have 1.
RUNS = {
    "put-1": ("put", 1, 1),
    "put-100": ("put", CLIENTS, 1),
    "put-100-16": ("put", CLIENTS, 16),
    "get-100": ("get", CLIENTS, 1),
    "get-100-16": ("get", CLIENTS, 16),
}
# Measure: the runs of each side.
AGAINST = {
    "put-1": {ETCD: ["put-1"], FLUX: ["put-1"]},
    "put-100": {ETCD: ["put-100"], FLUX: ["put-100", "put-100-16"]},
    "get-100": {ETCD: ["get-100"], FLUX: ["get-100", "get-100-16"]},
}
# Run of Flux-KV: (run of etcd, least ratio of operations a second).
LEAST = {
    "put-100": ("put-100", 5),
    "put-100-16": ("put-100", 20),
    "get-100": ("get-100", 3),
    "get-100-16": ("get-100", 15),
}
MEASURES = tuple(AGAINST) + ("partitions", "keys", "idle")


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_json(command, timeout=900):
    """Runs a load generator at the end of its run, and gives the JSON that it printed."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout)


class EtcdNode(servers.Server):
    """One member of an etcd cluster, with the settings of its defaults."""

    name = "etcd"

    def __init__(self, directory, member):
        super().__init__(directory)
        self.member, self.peer_port = member, servers.free_port()
        self.members = [self]

    def command(self):
        url = f"http://127.0.0.1:{self.port}"
        peer_url = f"http://127.0.0.1:{self.peer_port}"
        everybody = ",".join(f"{m.member}=http://127.0.0.1:{m.peer_port}" for m in self.members)
        return [
            "etcd", "--name", self.member, "--data-dir", self.directory / "data",
            "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", everybody, "--initial-cluster-token", str(self.directory.parent),
        ]

    def environment(self):
        kept = super().environment()
        return {key: value for key, value in kept.items() if not key.startswith("ETCD_")}

    def ready(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return json.load(answer)["health"] == "true"
        except OSError:
            return False


class Cluster:
    """Servers that start together: none is ready before the others run."""

    def __init__(self, nodes):
        self.nodes = nodes

    def start(self, deadline_s=120.0):
        for node in self.nodes:
            node.spawn()
        for node in self.nodes:
            servers.wait_until(node._ready_or_ended, f"{node.name} ready", deadline_s, 0.05)
        return self

    def cpu_seconds(self):
        return [servers.cpu_seconds(node.pid) for node in self.nodes]

    def addresses(self):
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def kill(self):
        for node in self.nodes:
            node.kill()


class EtcdCluster(Cluster):
    """etcd, as its users have it; `target` is whom the load goes to, as is best for etcd."""

    def __init__(self, directory, load, count=NODES):
        super().__init__([EtcdNode(directory / f"e{number}", f"e{number}") for number in range(count)])
        self.load = load
        for node in self.nodes:
            node.members = self.nodes

    def run(self, operation, clients, pipeline, keys, seconds, target="all"):
        assert pipeline == 1, "etcd's clients have no pipeline"
        connections = min(clients, ETCD_CONNECTIONS)
        return run_json([
            self.load, "--endpoints", self.addresses(), "--target", target, "--operation", operation,
            "--clients", clients, "--connections", connections, "--keys", keys,
            "--value-size", VALUE_BYTES, "--warmup", WARMUP_SECONDS, "--duration", seconds,
        ])

    def fill(self, keys):
        self.run("fill", CLIENTS, 1, keys, 0)


class FluxCluster(Cluster):
    """Flux-KV with one worker a node, registered in an etcd of its own."""

    def __init__(self, directory, binary, registry, partitions):
        self.binary, self.partitions = binary, partitions
        super().__init__([
            servers.Flux(
                directory / f"n{number}", binary=binary, etcd_endpoints=registry.addresses(),
                cluster_name=directory.name, partitions=partitions, workers=1, fsync="always",
                resp_redirect="true",
            )
            for number in range(NODES)
        ])

    def start(self, deadline_s=120.0):
        super().start(deadline_s)
        self.settle()
        return self

    def leaders(self):
        """The partitions' leaders by each node, in turn, where all slots are served; else nothing."""
        seen = []
        for node in self.nodes:
            try:
                with node.connect() as connection:
                    ranges = connection.call("CLUSTER", "SLOTS")
            except (OSError, resp.Closed, resp.ReplyError):
                return None
            if sum(last - first + 1 for first, last, *_ in ranges) != 16384:
                return None
            seen.append(sorted((first, last, leader[1]) for first, last, leader, *_ in ranges))
        return seen[0] if all(other == seen[0] for other in seen) else None

    def settle(self, quiet_s=5.0, deadline_s=300.0):
        """Until the nodes agree on who leads what and have not changed it for a while."""
        known, since = None, time.monotonic()

        def settled():
            nonlocal known, since
            leaders = self.leaders()
            if leaders != known:
                known, since = leaders, time.monotonic()
            return known is not None and time.monotonic() - since >= quiet_s

        servers.wait_until(settled, "leaders stay who they are", deadline_s, 0.25)

    def run(self, operation, clients, pipeline, keys, seconds, warmup=WARMUP_SECONDS):
        mix = "set" if operation == "put" else operation
        figures = self.bench(
            "--clients", clients, "--pipeline", pipeline, "--keys", keys, "--mix", mix,
            "--warmup", warmup, "--duration", seconds,
        )["run"]
        latency = figures["operations"][mix]["latency_us"]
        return {
            "operations": figures["operations"][mix]["requests"],
            "elapsed_s": figures["elapsed_s"],
            "ops_s": figures["operations"][mix]["throughput_per_s"],
            "p50_us": latency["p50"],
            "p99_us": latency["p99"],
            "p99_9_us": latency["p99_9"],
        }

    def fill(self, keys):
        self.bench("--clients", CLIENTS, "--keys", keys, "--load", "--requests", 0)

    def bench(self, *flags):
        report = run_json([
            self.binary, "bench", "--cluster", "--addr", self.addresses(),
            "--value-size", VALUE_BYTES, "--json", "-", *flags,
        ])
        for figures in (report["load"], report["run"]):
            if figures and figures["errors"]["total"]:
                check_errors(figures["errors"], figures["requests"])
        return report


def check_errors(errors, requests):
    """A leader that another one follows redirects a few requests, which count as failed; anything else
    spoils the run."""
    say(f"of {requests + errors['total']:,} requests failed: {errors['by_kind']}")
    redirected = errors["by_kind"].get("MOVED", 0)
    if errors["total"] > redirected or redirected > MOST_REDIRECTED * requests:
        raise RuntimeError(f"a benchmark with errors says nothing: {errors}")


class Bench:
    """What the command line asked for, and the clusters that run."""

    def __init__(self, options):
        self.options = options
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-cluster-", dir=options.dir))
        self.running = []
        self.registry = None

    def flux(self, name, partitions):
        if self.registry is None:
            self.registry = self.started(EtcdCluster(self.folder / "registry", None, count=1))
        say(f"starting three Flux-KV nodes with {partitions} partitions")
        return self.started(
            FluxCluster(self.folder / name, self.options.flux_binary, self.registry, partitions)
        )

    def etcd(self):
        say("starting three etcd nodes")
        return self.started(EtcdCluster(self.folder / "etcd", self.options.etcd_load))

    def started(self, cluster):
        self.running.append(cluster)
        return cluster.start()

    def discard(self, cluster):
        cluster.kill()
        self.running.remove(cluster)
        for node in cluster.nodes:
            shutil.rmtree(node.directory)

    def close(self):
        """Ends what still runs, the registry last."""
        for cluster in reversed(self.running):
            cluster.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def turns(self, sides):
        """The sides again and again, each turn in the other order."""
        for turn in range(self.options.repeat):
            yield from sides if turn % 2 == 0 else reversed(sides)


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


# ---- against etcd ----------------------------------------------------------------------------------


def measure_against_etcd(bench, measures):
    """Puts and gets; gives the medians by side and run."""
    options = bench.options
    clusters = {ETCD: bench.etcd(), FLUX: bench.flux("against", 64)}
    for side, cluster in clusters.items():
        say(f"filling {options.keys} keys: {side}")
        cluster.fill(options.keys)
    results = {}
    for measure in measures:
        etcd_run = AGAINST[measure][ETCD][0]
        target = best_target(clusters[ETCD], RUNS[etcd_run], options)
        runs = {}
        for side in bench.turns(SIDES):
            for run in AGAINST[measure][side]:
                extra = {"target": target} if side == ETCD else {}
                before = sum(clusters[side].cpu_seconds())
                figures = clusters[side].run(*RUNS[run], options.keys, options.seconds, **extra)
                cpu = sum(clusters[side].cpu_seconds()) - before
                figures["servers_cores"] = cpu / (figures["elapsed_s"] + WARMUP_SECONDS)
                runs.setdefault((side, run), []).append(figures)
                say(f"{run} {side}: {figures['ops_s']:.0f}/s, p50 {figures['p50_us']:.0f} us, "
                    f"p99 {figures['p99_us']:.0f} us")
        for (side, run), figures in runs.items():
            results.setdefault(side, {})[run] = medians(figures) | {"runs": figures}
        results[ETCD][etcd_run]["target"] = target
    for cluster in clusters.values():
        bench.discard(cluster)
    return results


def best_target(cluster, run, options):
    """Whether etcd does better when only its leader is asked, or when all members are."""
    rates = {
        target: cluster.run(*run, options.keys, max(1.0, options.seconds / 2), target)["ops_s"]
        for target in ("all", "leader")
    }
    best = max(rates, key=rates.get)
    say(f"{run[0]} etcd: " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))
    return best


# ---- the cost of a put -----------------------------------------------------------------------------


def measure_cost(bench, clusters, keys):
    """CPU of all three nodes for each put of 100 clients without pipeline, by what tells the clusters
    apart. `keys` gives the keys of each."""
    runs = {name: [] for name in clusters}
    for name in bench.turns(tuple(clusters)):
        cluster = clusters[name]
        cluster.run("put", CLIENTS, 1, keys[name], WARMUP_SECONDS, warmup=0)
        before = sum(cluster.cpu_seconds())
        # No warm-up: each put that costs is counted.
        figures = cluster.run("put", CLIENTS, 1, keys[name], bench.options.seconds, warmup=0)
        cpu = sum(cluster.cpu_seconds()) - before
        runs[name].append({"cpu_us": cpu / figures["operations"] * 1e6} | figures)
        say(f"{name:,}: {runs[name][-1]['cpu_us']:.1f} us CPU a put, {figures['ops_s']:.0f} puts/s")
    return {name: medians(figures) | {"runs": figures} for name, figures in runs.items()}


def measure_partitions(bench):
    clusters = {count: bench.flux(f"partitions{count}", count) for count in PARTITIONS}
    for cluster in clusters.values():
        cluster.settle()
        cluster.fill(bench.options.keys)
    results = measure_cost(bench, clusters, dict.fromkeys(PARTITIONS, bench.options.keys))
    for cluster in clusters.values():
        bench.discard(cluster)
    return results


def measure_keys(bench):
    counts = (FEW_KEYS, bench.options.many_keys)
    clusters = {count: bench.flux(f"keys{count}", 64) for count in counts}
    for count, cluster in clusters.items():
        say(f"filling {count:,} keys")
        cluster.fill(count)
        cluster.settle()
    results = measure_cost(bench, clusters, dict(zip(counts, counts)))
    for cluster in clusters.values():
        bench.discard(cluster)
    return results


def measure_idle(bench):
    """Percent of a core that each node takes while nobody asks anything."""
    cluster = bench.flux("idle", PARTITIONS[-1])
    time.sleep(IDLE_SECONDS / 2)
    before, since = cluster.cpu_seconds(), time.monotonic()
    time.sleep(IDLE_SECONDS)
    after, took = cluster.cpu_seconds(), time.monotonic() - since
    percents = [(b - a) / took * 100 for a, b in zip(before, after)]
    say("idle: " + ", ".join(f"{percent:.2f}%" for percent in percents))
    bench.discard(cluster)
    return {"percents": percents}


# ---- report ----------------------------------------------------------------------------------------


def summary_rows(results):
    """(measure, etcd, Flux-KV, ratio or None, requirement, met) for each that was measured."""
    etcd, flux = results.get(ETCD, {}), results.get(FLUX, {})
    if "put-1" in flux:
        ours, theirs = (side["put-1"]["p50_us"] for side in (flux, etcd))
        yield ("put, 1 client: p50", f"{theirs:,.0f} µs", f"{ours:,.0f} µs", ours / theirs, "≤ 1x",
               ours <= theirs)
    for run, (peer, least) in LEAST.items():
        if run in flux:
            ours, theirs = flux[run]["ops_s"], etcd[peer]["ops_s"]
            ratio = ours / theirs
            yield (f"{run_name(run)}: operations/s", f"{theirs:,.0f}", f"{ours:,.0f}", ratio,
                   f"≥ {least}x", ratio >= least)
    if "partitions" in results:
        costs = {count: figures["cpu_us"] for count, figures in results["partitions"].items()}
        for count, most in ((64, 1.3), (1024, 2.0)):
            yield cost_row("partitions", costs, 1, count, most)
    if "keys" in results:
        costs = {count: figures["cpu_us"] for count, figures in results["keys"].items()}
        few, many = sorted(costs)
        yield cost_row("keys", costs, few, many, 1.3)
    if "idle" in results:
        percents = results["idle"]["percents"]
        yield (f"{PARTITIONS[-1]:,} quiet partitions: CPU of each node, of a core", "",
               ", ".join(f"{percent:.2f}%" for percent in percents), None, "< 3%", max(percents) < 3)


def run_name(run):
    operation, clients, pipeline = RUNS[run]
    name = "linearizable get" if operation == "get" else operation
    clients = f"{clients} client" + ("s" if clients > 1 else "")
    return f"{name}, {clients}" + (f", pipeline {pipeline}" if pipeline > 1 else "")


def cost_row(what, costs, few, many, most):
    ratio = costs[many] / costs[few]
    return (f"CPU of all three nodes for a put, {few:,} → {many:,} {what}", "",
            f"{costs[few]:.1f} → {costs[many]:.1f} µs", ratio, f"≤ {most:.1f}x", ratio <= most)


def markdown(results, facts):
    lines = [
        f"Measured {facts['date']} by `{facts['command']}` on {facts['machine']}; {facts['etcd']}; "
        f"three nodes each, nothing held to a core; medians of {facts['repeat']} runs of "
        f"{facts['seconds']:g} s; {facts['keys']:,} keys of 16 bytes, values of {VALUE_BYTES}.",
        "",
        "| measure | etcd | Flux-KV | ratio | required | met |",
        "|---|---|---|---|---|---|",
    ]
    for name, etcd, flux, ratio, required, met in summary_rows(results):
        shown = f"{ratio:.2f}x" if ratio is not None else ""
        lines.append(f"| {name} | {etcd} | {flux} | {shown} | {required} | {'yes' if met else '**no**'} |")
    if FLUX in results:
        lines += [
            "",
            "| | operations/s | p50 ms | p99 ms | p99.9 ms | cores taken by the three nodes |",
            "|---|---|---|---|---|---|",
        ]
    for side, name in ((ETCD, "etcd"), (FLUX, "Flux-KV")):
        for run, figures in results.get(side, {}).items():
            asked = f", {figures['target']} asked" if "target" in figures else ""
            p50, p99, p99_9 = (figures[key] / 1000 for key in ("p50_us", "p99_us", "p99_9_us"))
            lines.append(
                f"| {name}: {run_name(run)}{asked} | {figures['ops_s']:,.0f} | {p50:.2f} | {p99:.2f} "
                f"| {p99_9:.2f} | {figures['servers_cores']:.2f} |"
            )
    return "\n".join(lines)


def write_into(path, table):
    text = path.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{path} has no lines {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


def facts_of(options):
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    version = subprocess.run(["etcd", "--version"], capture_output=True, text=True).stdout
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["bench/cluster.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), Linux {platform.release()}",
        "etcd": "etcd " + re.search(r"Version: (\S+)", version)[1],
        "repeat": options.repeat,
        "seconds": options.seconds,
        "keys": options.keys,
        "many_keys": options.many_keys,
    }


def build_etcd_load(target):
    """The load generator for etcd, built by cargo if it is not up to date."""
    folder = target / "etcd-load"
    subprocess.run(
        ["cargo", "build", "--release", "--locked", "--quiet", "--target-dir", folder],
        cwd=LOAD_PACKAGE, check=True,
    )
    return folder / "release" / "etcd-load"


def arguments():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="comma-separated measures; all if not given")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a run (10)")
    parser.add_argument("--repeat", type=int, default=3, help="turns for each side (3)")
    parser.add_argument("--keys", type=int, default=100_000, help="keys where nothing else is said (100000)")
    parser.add_argument("--many-keys", type=int, default=10_000_000, help="the many keys of `keys` (10000000)")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all figures")
    parser.add_argument("--write", action="store_true", help="write the table into PERFORMANCE.md")
    parser.add_argument("--dir", help="where the servers keep their files (a real disk; default: the target folder)",
                        default=str(target))
    parser.add_argument("--flux-binary", type=pathlib.Path, help="default: $FLUX_BIN, else the release build",
                        default=os.environ.get("FLUX_BIN", target / "release" / "flux"))
    parser.add_argument("--etcd-load", type=pathlib.Path,
                        help="the load generator for etcd (default: built from bench/etcd-load)")
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else list(MEASURES)
    unknown = set(options.only) - set(MEASURES)
    if unknown:
        parser.error(f"unknown measures {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    if options.many_keys <= FEW_KEYS:
        parser.error(f"--many-keys must be over {FEW_KEYS}")
    if shutil.which("etcd") is None:
        parser.error("etcd is not installed")
    options.flux_binary = pathlib.Path(options.flux_binary).resolve()
    if not options.flux_binary.exists():
        parser.error(f"{options.flux_binary} does not exist: run `cargo build --release`")
    if options.etcd_load is None and set(options.only) & set(AGAINST):
        options.etcd_load = build_etcd_load(target)
    return options


def main():
    options = arguments()
    pathlib.Path(options.dir).mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    results = {}
    try:
        against = [measure for measure in AGAINST if measure in options.only]
        if against:
            results |= measure_against_etcd(bench, against)
        for name, measure in (("partitions", measure_partitions), ("keys", measure_keys), ("idle", measure_idle)):
            if name in options.only:
                results[name] = measure(bench)
    finally:
        bench.close()
    facts = facts_of(options)
    table = markdown(results, facts)
    print(table)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "results": results}, indent=1))
    if options.write:
        write_into(ROOT / "PERFORMANCE.md", table)
    return 0 if all(row[-1] for row in summary_rows(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
