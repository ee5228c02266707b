#!/usr/bin/env python3
"""Runs Redis and Flux-KV side by side on this machine and writes the table in PERFORMANCE.md.

The server is held to core 0 and the load to core 1. Both servers of a comparison run in the same
minutes, in turns, and every figure is the median of the turns: a figure counts only as a ratio to the
peer's of the same run. Nothing here listens beyond loopback, and it all ends by itself.

    bench/compare.py                            every row, about half an hour; rewrites the table
    bench/compare.py --rows set-64,get-64       only these; prints the table
    bench/compare.py --quick --rows restart     small and rough, to see that it works

Rows: set-1 set-16 set-64 get-1 get-16 get-64 (AOF everysec), always-set-1 always-set-16 (AOF always),
memory, restart, snapshot, expiry, overload (Flux-KV alone). Needs redis-server, redis-benchmark, taskset, and a release build.
"""

import argparse
import csv
import io
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
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import load
import resp
import servers

SERVER_CORE, LOAD_CORE = 0, 1
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
REDIS, FLUX = "redis", "flux"
SIDES = (REDIS, FLUX)
# Never reached: the log of a run is smaller.
NEVER = "1tb"

# Row: (test, pipeline, fsync, what is compared, least ratio of Flux to Redis).
THROUGHPUT = {
    "set-1": ("set", 1, "everysec", "per_cpu_s", 1.0),
    "set-16": ("set", 16, "everysec", "per_cpu_s", 1.8),
    "set-64": ("set", 64, "everysec", "per_cpu_s", 2.5),
    "get-1": ("get", 1, "everysec", "per_cpu_s", 1.0),
    "get-16": ("get", 16, "everysec", "per_cpu_s", 1.3),
    "get-64": ("get", 64, "everysec", "per_cpu_s", 1.5),
    "always-set-1": ("set", 1, "always", "ops_s", 1.0),
    "always-set-16": ("set", 16, "always", "ops_s", 1.5),
}
OTHER = ("memory", "restart", "snapshot", "expiry", "overload")
ROWS = tuple(THROUGHPUT) + OTHER


class Bench:
    """What the command line asked for, and how to start each side with it."""

    def __init__(self, options):
        self.options = options
        quick = options.quick
        self.seconds = options.seconds or (1.0 if quick else 5.0)
        self.repeat = options.repeat or (1 if quick else 3)
        self.keys = 20_000 if quick else 1_000_000
        self.many_keys = 100_000 if quick else 3_000_000
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-compare-", dir=options.dir))
        self.snapshot_keys = self.keys // 2
        self.started = 0
        self.running = []

    def start(self, side, fsync="everysec", rewrite=False, **flux_settings):
        """A fresh server. Without `rewrite`, Redis's automatic AOF rewrite is off: it would take turns
        on the server's core at times that nobody chose."""
        directory = self.folder / f"{side}{self.started}"
        self.started += 1
        if side == REDIS or self.options.redis_as_flux:
            extra = [] if rewrite else ["--auto-aof-rewrite-percentage", "0"]
            server = servers.Redis(directory, fsync, SERVER_CORE, extra)
        else:
            server = servers.Flux(
                directory,
                pin_to_core=SERVER_CORE,
                binary=self.options.flux_binary,
                fsync=fsync,
                **flux_settings,
            )
        self.running.append(server)
        return server.start()

    def discard(self, server):
        server.stop(deadline_s=120)
        self.running.remove(server)
        shutil.rmtree(server.directory)

    def close(self):
        """Ends what a failed run has left running."""
        for server in self.running:
            server.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def on_load_core(*command):
    return ["taskset", "-c", str(LOAD_CORE)] + [str(part) for part in command]


def redis_benchmark(port, test, pipeline, requests, keys, *flags):
    done = subprocess.run(
        on_load_core(
            "redis-benchmark", "-p", port, "-t", test, "-P", pipeline, "-n", requests, "-r", keys,
            "-d", 64, "-c", 50, *flags,
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode or "Error" in done.stdout + done.stderr:
        raise RuntimeError(f"redis-benchmark: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def benchmark_csv(port, test, pipeline, requests, keys):
    rows = list(csv.DictReader(io.StringIO(
        redis_benchmark(port, test, pipeline, requests, keys, "--csv")
    )))
    return {"ops_s": float(rows[0]["rps"]), "p99_ms": float(rows[0]["p99_latency_ms"])}


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def wait_for_rewrite(server):
    """Until Redis has no AOF rewrite under way or planned."""
    if isinstance(server, servers.Redis):
        with server.connect() as connection:
            servers.wait_until(
                lambda: all(
                    f"{name}:0" in connection.call("INFO", "persistence").decode()
                    for name in ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
                ),
                "the AOF rewrite ends", 120, 0.1,
            )


# ---- throughput and CPU ----------------------------------------------------------------------------


def measure_throughput(bench, row):
    test, pipeline, fsync, _, _ = THROUGHPUT[row]
    running = {side: bench.start(side, fsync) for side in SIDES}
    requests, runs = {}, {side: [] for side in SIDES}
    for side, server in running.items():
        load.fill(server.port, bench.keys)
        warm = benchmark_csv(server.port, test, pipeline, 10_000 * min(pipeline, 20), bench.keys)
        requests[side] = max(10_000, int(warm["ops_s"] * bench.seconds))
    for turn in range(bench.repeat):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            server = running[side]
            cpu = servers.cpu_seconds(server.pid)
            run = benchmark_csv(server.port, test, pipeline, requests[side], bench.keys)
            cpu = servers.cpu_seconds(server.pid) - cpu
            run["cpu_us"] = cpu / requests[side] * 1e6
            run["per_cpu_s"] = requests[side] / cpu if cpu else float("nan")
            runs[side].append(run)
            say(f"{row} {side}: {run['ops_s']:.0f}/s, {run['cpu_us']:.2f} us CPU, p99 {run['p99_ms']} ms")
    for server in running.values():
        bench.discard(server)
    return {side: medians(runs[side]) for side in SIDES} | {"runs": runs}


# ---- memory and restart ----------------------------------------------------------------------------


def measure_memory_and_restart(bench):
    runs = {side: [] for side in SIDES}
    for turn in range(bench.repeat):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            server = bench.start(side, rewrite=True)
            load.fill(server.port, bench.many_keys)
            wait_for_rewrite(server)
            run = {"bytes_per_key": server.rss_bytes() / bench.many_keys}
            server.stop(deadline_s=120)
            started = time.monotonic()
            server.spawn()
            wait_for_keys(server, bench.many_keys)
            run["restart_s"] = time.monotonic() - started
            run["bytes_per_key_after_restart"] = server.rss_bytes() / bench.many_keys
            runs[side].append(run)
            say(f"memory {side}: {run['bytes_per_key']:.1f} bytes a key, restart {run['restart_s']:.2f} s")
            bench.discard(server)
    return {side: medians(runs[side]) for side in SIDES} | {"runs": runs}


def wait_for_keys(server, count):
    """Until the server answers PING and has all its keys."""

    def there():
        if not server.running():
            raise RuntimeError(f"the server ended:\n{server.log()[-2000:]}")
        try:
            with server.connect() as connection:
                return connection.raw("PING") == b"+PONG\r\n" and connection.call("DBSIZE") == count
        except (OSError, resp.Closed, resp.ReplyError):
            return False

    servers.wait_until(there, f"{count} keys are there", 180, 0.005)


# ---- snapshot --------------------------------------------------------------------------------------


def p999_ms(text):
    """From redis-benchmark's percentile distribution: the first at or above 99.9%."""
    for percent, value in re.findall(r"([\d.]+)% <= ([\d.]+) milliseconds", text):
        if float(percent) >= 99.9:
            return float(value)
    raise RuntimeError(f"no percentiles in:\n{text[-2000:]}")


class Watch(threading.Thread):
    """Samples the memory of a server and its children, and keeps Redis rewriting its AOF if asked."""

    def __init__(self, server, rewrite):
        super().__init__(daemon=True)
        self.server, self.rewrite = server, rewrite
        self.peak = self.before = self.resident()
        self.done = threading.Event()
        self.start()

    def resident(self):
        total = servers.memory_bytes(self.server.pid, "VmRSS")
        children = pathlib.Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text()
        for child in children.split():
            try:
                rollup = pathlib.Path(f"/proc/{child}/smaps_rollup").read_text()
            except OSError:
                continue
            # What the fork has copied; the rest it shares with its parent.
            total += int(re.search(r"Private_Dirty:\s+(\d+)", rollup)[1]) * 1024
        return total

    def run(self):
        with self.server.connect() as connection:
            while not self.done.wait(0.25):
                if self.rewrite:
                    connection.raw("BGREWRITEAOF")
                self.peak = max(self.peak, self.resident())

    def finish(self):
        self.done.set()
        self.join()
        return self.peak / self.before


def snapshots_taken(server):
    """Snapshots or rewrites that have ended so far."""
    if isinstance(server, servers.Redis):
        return server.log().count("Background AOF rewrite finished successfully")
    counters = re.findall(r"^flux_snapshots_total (\d+)", server.metrics(), re.MULTILINE)
    return sum(int(value) for value in counters)


def measure_snapshot(bench):
    """SET from 50 connections with and without snapshots. Flux-KV takes one whenever its log has become
    as long as its data, so a run overwrites every key four times over to have a few of them."""
    runs = {side: {} for side in SIDES}
    settings = {"without": {"snapshot_log_bytes": NEVER},
                "with": {"snapshot_log_bytes": "1mb", "segment_bytes": "1mb"}}
    for side in SIDES:
        for mode in ("without", "with"):
            server = bench.start(side, **settings[mode])
            load.fill(server.port, bench.snapshot_keys)
            rewrite = mode == "with" and isinstance(server, servers.Redis)
            for _ in range(bench.repeat):
                run = snapshot_run(server, bench.snapshot_keys, rewrite)
                for name, value in run.items():
                    runs[side].setdefault(f"{name}_{mode}", []).append(value)
                say(f"snapshot {side} {mode}: p99.9 {run['p999_ms']} ms, memory x{run['memory']:.2f}, "
                    f"{run['snapshots']} snapshots")
            bench.discard(server)
    median = lambda values: {key: statistics.median(value) for key, value in values.items()}
    return {side: median(runs[side]) for side in SIDES} | {"runs": runs}


def snapshot_run(server, keys, rewrite):
    taken = snapshots_taken(server)
    watch = Watch(server, rewrite)
    text = redis_benchmark(server.port, "set", 1, 4 * keys, keys, "--precision", 3)
    memory = watch.finish()
    wait_for_rewrite(server)
    return {"p999_ms": p999_ms(text), "memory": memory, "snapshots": snapshots_taken(server) - taken}


# ---- expiry ----------------------------------------------------------------------------------------


def measure_expiry(bench):
    """1M keys that expire evenly over one second, under SETs as fast as they are answered."""
    runs = {side: [] for side in SIDES}
    for turn in range(bench.repeat):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            server = bench.start(side)
            runs[side].append(expire_once(server, bench.keys))
            run = runs[side][-1]
            say(f"expiry {side}: p99 lag {run['lag_p99_ms']:.0f} ms, last {run['lag_last_ms']:.0f} ms, "
                f"SET keeps {run['kept']:.2f} of {run['sets_before']:.0f}/s")
            bench.discard(server)
    return {side: medians(runs[side]) for side in SIDES} | {"runs": runs}


def expire_once(server, count, lead_s=4.0):
    load.fill(server.port, 1000)
    begun = time.time()
    load.fill(server.port, count // 20, b"try:")
    fill_s = (time.time() - begun) * 20 * 1.5 + 2.0
    with server.connect() as connection:
        stays = connection.call("DBSIZE")
        due = int((time.time() + fill_s + lead_s) * 1000)
        load.fill(server.port, count, b"exp:", lambda number: due + number * 1000 // count)
        if time.time() * 1000 > due - 1000 * lead_s:
            raise RuntimeError("filling took too long: nothing was measured before the keys expired")
        time.sleep(due / 1000 - lead_s - time.time())
        seconds = lead_s + 8
        loader = subprocess.Popen(
            on_load_core(sys.executable, load.__file__, "series", server.port, seconds),
            stdout=subprocess.PIPE,
        )
        time.sleep(max(0.0, due / 1000 - 0.05 - time.time()))
        samples = []
        while not samples or samples[-1][1] > stays:
            left = connection.call("DBSIZE")
            samples.append((time.time() * 1000, left))
            if samples[-1][0] > due + 60_000:
                raise RuntimeError(f"{left - stays} keys have not gone in a minute")
            time.sleep(0.004)
        output, _ = loader.communicate(timeout=60)
    lags = expiry_lags(samples, due, count, stays)
    rates = json.loads(output)
    before = rate(rates, due - 3000, due - 100)
    during = rate(rates, due, max(due + 1000, samples[-1][0]))
    return {
        "lag_p99_ms": lags[int(len(lags) * 0.99)],
        "lag_last_ms": lags[-1],
        "sets_before": before,
        "kept": during / before,
    }


def expiry_lags(samples, due, count, stays):
    """Per thousandth of the keys, how long after its time it was seen gone, sorted. Keys are taken to
    go in the order in which they are due, which can only make a lag look shorter than it is."""
    lags, at = [], 0
    for thousandth in range(1, 1001):
        number = thousandth * count // 1000
        while count + stays - samples[at][1] < number:
            at += 1
        lags.append(max(0.0, samples[at][0] - (due + (number - 1) * 1000 / count)))
    return sorted(lags)


def rate(series, start_ms, end_ms):
    """Replies per second in a stretch of a series of 10 ms slots."""
    return sum(c for at, c in series if start_ms <= at < end_ms) / (end_ms - start_ms) * 1000


# ---- overload --------------------------------------------------------------------------------------


def measure_overload(bench):
    """SETs with AOF always: as fast as they are answered, then twice as many, sent on a schedule that
    waits for nothing."""
    runs = []
    for _ in range(bench.repeat):
        server = bench.start(FLUX, fsync="always")
        peak = flux_bench(bench, server, "--clients", 50, "--pipeline", 64)["run"]
        rate = round(2 * peak["throughput_per_s"])
        offered = flux_bench(bench, server, "--clients", 50, "--pipeline", 1024, "--rate", rate)["run"]
        refused = offered["errors"]["overloaded"] / offered["elapsed_s"]
        # The throughput counts every reply, a refusal too.
        runs.append({
            "peak": peak["throughput_per_s"],
            "goodput": offered["throughput_per_s"] - offered["errors"]["total"] / offered["elapsed_s"],
            "refused": refused,
        })
        say(f"overload: peak {runs[-1]['peak']:.0f}/s, offered {rate}/s, "
            f"goodput {runs[-1]['goodput']:.0f}/s, refused {refused:.0f}/s")
        bench.discard(server)
    return medians(runs) | {"runs": runs}


def flux_bench(bench, server, *flags):
    done = subprocess.run(
        on_load_core(
            bench.options.flux_binary, "bench", "--addr", f"127.0.0.1:{server.port}", "--mix", "set=1",
            "--warmup", 1, "--duration", bench.seconds, "--json", "-", *flags,
        ),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout)


# ---- report ----------------------------------------------------------------------------------------


def summary_rows(results):
    """(measure, Redis, Flux, ratio or None, requirement, met) for each row that was measured."""
    for row, (test, pipeline, fsync, metric, least) in THROUGHPUT.items():
        if row in results:
            redis, flux = (results[row][side][metric] for side in SIDES)
            per = "operations/s" if metric == "ops_s" else "operations per server-CPU-second"
            how = "no pipeline" if pipeline == 1 else f"pipeline {pipeline}"
            name = f"{test.upper()}, {how}, `{fsync}`: {per}"
            ratio = flux / redis
            yield name, f"{redis:,.0f}", f"{flux:,.0f}", ratio, f"≥ {least:.1f}x", ratio >= least
    if "memory" in results:
        redis, flux = (results["memory"][side]["bytes_per_key"] for side in SIDES)
        most = 125 / 175
        yield ("resident bytes per key", f"{redis:.0f}", f"{flux:.0f}", flux / redis,
               f"≤ {most:.2f}x (125 to 175)", flux / redis <= most)
    if "restart" in results:
        redis, flux = (results["restart"][side]["restart_s"] for side in SIDES)
        yield ("restart, seconds until all keys are served", f"{redis:.2f}", f"{flux:.2f}",
               flux / redis, "≤ 0.50x", flux / redis <= 0.5)
    if "snapshot" in results:
        sides = [results["snapshot"][side] for side in SIDES]
        grown = [side["p999_ms_with"] / side["p999_ms_without"] for side in sides]
        cells = [f"{s['p999_ms_without']:.2f} → {s['p999_ms_with']:.2f} ms ({g:.1f}x)"
                 for s, g in zip(sides, grown)]
        seen = sides[1]["snapshots_with"] > 0
        yield ("p99.9 of SET, without → with a snapshot", *cells, None,
               "≤ 2x its own" if seen else "≤ 2x its own; no snapshot was seen", grown[1] <= 2 and seen)
        memory = [side["memory_with"] for side in sides]
        yield ("memory during a snapshot", *[f"{m:.2f}x" for m in memory], None, "≤ 1.15x its own",
               memory[1] <= 1.15 and seen)
    if "expiry" in results:
        sides = [results["expiry"][side] for side in SIDES]
        yield ("keys expiring within one second: p99 lag until gone",
               *[f"{s['lag_p99_ms']:.0f} ms" for s in sides], None, "< 200 ms",
               sides[1]["lag_p99_ms"] < 200)
        yield ("SET throughput kept meanwhile", *[f"{s['kept'] * 100:.0f}%" for s in sides], None,
               "≥ 80%", sides[1]["kept"] >= 0.8)
    if "overload" in results:
        overload = results["overload"]
        ratio = overload["goodput"] / overload["peak"]
        yield ("SETs answered at twice the load that can be taken, of the peak", "",
               f"{overload['goodput']:,.0f} of {overload['peak']:,.0f}", ratio, "≥ 0.90x", ratio >= 0.9)


def markdown(results, facts):
    lines = [
        f"Measured {facts['date']} by `{facts['command']}` on {facts['machine']}; {facts['redis']}; "
        f"server on core {SERVER_CORE}, load on core {LOAD_CORE}; medians of {facts['repeat']}; "
        f"{facts['keys']:,} keys; {facts['many_keys']:,} for memory and restart, "
        f"{facts['snapshot_keys']:,} for snapshots.",
        "",
        "| measure | Redis | Flux-KV | ratio | required | met |",
        "|---|---|---|---|---|---|",
    ]
    for name, redis, flux, ratio, required, met in summary_rows(results):
        shown = f"{ratio:.2f}x" if ratio is not None else ""
        lines.append(f"| {name} | {redis} | {flux} | {shown} | {required} | {'yes' if met else '**no**'} |")
    measured = [row for row in THROUGHPUT if row in results]
    if measured:
        lines += [
            "",
            "| 50 connections, 64-byte values | Redis ops/s | Flux-KV ops/s | ratio "
            "| Redis CPU µs/op | Flux-KV CPU µs/op | Redis p99 ms | Flux-KV p99 ms |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for row in measured:
        test, pipeline, fsync, _, _ = THROUGHPUT[row]
        redis, flux = (results[row][side] for side in SIDES)
        lines.append(
            f"| {test.upper()}, `{fsync}`, pipeline {pipeline} | {redis['ops_s']:,.0f} | {flux['ops_s']:,.0f} "
            f"| {flux['ops_s'] / redis['ops_s']:.2f}x | {redis['cpu_us']:.2f} | {flux['cpu_us']:.2f} "
            f"| {redis['p99_ms']:.2f} | {flux['p99_ms']:.2f} |"
        )
    return "\n".join(lines)


def write_into(path, table):
    text = path.read_text() if path.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        sys.exit(f"{path} has no lines {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


def facts_of(bench):
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    version = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["bench/compare.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), Linux {platform.release()}",
        "redis": "Redis " + re.search(r"v=(\S+)", version)[1],
        "repeat": bench.repeat,
        "keys": bench.keys,
        "many_keys": bench.many_keys,
        "snapshot_keys": bench.snapshot_keys,
        "seconds": bench.seconds,
        "redis_as_flux": bench.options.redis_as_flux,
    }


def arguments():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="comma-separated; all if not given")
    parser.add_argument("--quick", action="store_true", help="small and rough")
    parser.add_argument("--seconds", type=float, help="length of a run (5; quick: 1)")
    parser.add_argument("--repeat", type=int, help="turns for each side (3; quick: 1)")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all figures")
    parser.add_argument("--write", action="store_true", help="write PERFORMANCE.md also after --rows or --quick")
    parser.add_argument("--dir", help="where the servers keep their files (a real disk; default: the target folder)",
                        default=str(target))
    parser.add_argument("--flux-binary", type=pathlib.Path, default=target / "release" / "flux")
    parser.add_argument("--redis-as-flux", action="store_true",
                        help="Redis on both sides: shows how far apart equal servers are measured")
    options = parser.parse_args()
    options.rows = options.rows.split(",") if options.rows else list(ROWS)
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for tool in ("redis-server", "redis-benchmark", "taskset"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed")
    if os.cpu_count() < 2:
        parser.error("two cores are needed")
    if not options.redis_as_flux and not options.flux_binary.exists():
        parser.error(f"{options.flux_binary} does not exist: run `cargo build --release`")
    options.flux_binary = options.flux_binary.resolve()
    return options


def main():
    options = arguments()
    os.sched_setaffinity(0, {LOAD_CORE})
    pathlib.Path(options.dir).mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    results = {}
    try:
        for row in THROUGHPUT:
            if row in options.rows:
                results[row] = measure_throughput(bench, row)
        if {"memory", "restart"} & set(options.rows):
            measured = measure_memory_and_restart(bench)
            results |= {row: measured for row in ("memory", "restart") if row in options.rows}
        if "snapshot" in options.rows:
            results["snapshot"] = measure_snapshot(bench)
        if "expiry" in options.rows:
            results["expiry"] = measure_expiry(bench)
        if "overload" in options.rows:
            results["overload"] = measure_overload(bench)
    finally:
        bench.close()
    facts = facts_of(bench)
    table = markdown(results, facts)
    print(table)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "results": results}, indent=1))
    everything = set(options.rows) == set(ROWS) and not options.quick and not options.redis_as_flux
    if everything or options.write:
        write_into(ROOT / "PERFORMANCE.md", table)
    return 0 if all(row[-1] for row in summary_rows(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
