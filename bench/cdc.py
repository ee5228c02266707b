#!/usr/bin/env python3
"""What change capture costs, and how fast and how late changes come: writes the table in PERFORMANCE.md.

The server is held to core 0; the load, RabbitMQ and the consumer share core 1. Every figure is the median of
some turns, and servers that are compared take turns: a figure counts only as a ratio to another of the same
run. Nothing here listens beyond loopback, and it all ends by itself.

    bench/cdc.py                       every row, a quarter of an hour and more; rewrites the table
    bench/cdc.py --rows cpu,lag        only these; prints the table
    bench/cdc.py --quick               small and rough, to see that it works

Rows: cpu (CPU of the server for a SET, and throughput, with the feed off and on), outage (memory while the broker
is away, and catching up), lag (from the write to the consumer). Needs rabbitmq-server, taskset, pika (it is
among the packages of tests/requirements.txt), and a release build.
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
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pika

import rabbitmq
import servers

SERVER_CORE, LOAD_CORE = 0, 1
BEGIN, END = "<!-- cdc:begin -->", "<!-- cdc:end -->"
ROWS = ("cpu", "outage", "lag")
# Side: its settings, `None` for the broker's address.
OFF = {}
SIDES = {
    "off": OFF,
    "batch 1": {"rabbitmq_url": None, "cdc_batch_max_events": 1},
    "batch 100": {"rabbitmq_url": None, "cdc_batch_max_events": 100},
}
EXCHANGE, QUEUE = "flux_kv_events", "bench"
# Load: what of it is said, flags of `flux bench`.
LOADS = {
    "10,000 SET/s": ["--rate", "10000", "--clients", "50"],
    "as fast as answered": ["--clients", "50"],
    "pipeline 16": ["--clients", "50", "--pipeline", "16"],
}


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Bench:
    def __init__(self, options):
        self.options = options
        self.seconds = options.seconds or (2 if options.quick else 5)
        self.repeat = options.repeat or (1 if options.quick else 3)
        self.outage_sets = options.outage_sets or (300_000 if options.quick else 10_000_000)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-cdc-bench-", dir=options.dir))
        self.started = 0
        self.broker = rabbitmq.RabbitMQ(self.folder / "broker", pin_to_core=LOAD_CORE)
        self.broker.start()

    def server(self, side, fsync, **settings):
        directory = self.folder / f"node{self.started}"
        self.started += 1
        settings = SIDES[side] | settings
        if "rabbitmq_url" in settings:
            settings["rabbitmq_url"] = self.broker.url
        # What waits of a server before is nobody's any more.
        self.new_queue()
        return servers.Flux(
            directory, pin_to_core=SERVER_CORE, binary=self.options.flux_binary, fsync=fsync, **settings
        ).start()

    def channel(self):
        return pika.BlockingConnection(pika.URLParameters(self.broker.url)).channel()

    def new_queue(self):
        channel = self.channel()
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_delete(QUEUE)
        # The oldest go where nobody consumes: what is measured is not the broker's disk.
        arguments = {"x-max-length": 100_000, "x-overflow": "drop-head"}
        channel.queue_declare(QUEUE, durable=True, arguments=arguments)
        channel.queue_bind(QUEUE, EXCHANGE, "#")
        channel.connection.close()

    def load(self, server, *flags):
        command = [
            "taskset", "-c", str(LOAD_CORE), self.options.flux_binary, "bench",
            "--addr", f"127.0.0.1:{server.port}", "--mix", "set=1", "--keys", "100000",
            "--value-size", "64", "--json", "-", *flags,
        ]
        done = subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError(f"flux bench: {done.stderr[-2000:]}")
        return json.loads(done.stdout)["run"]

    def discard(self, server):
        server.stop(deadline_s=120)
        shutil.rmtree(server.directory)

    def close(self):
        self.broker.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def cdc(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.admin_port}/cdc", timeout=10) as answer:
        return json.load(answer)


def metric(server, name):
    return float(re.search(rf"^flux_{name} ([\d.]+)", server.metrics(), re.MULTILINE)[1])


def wait_for_no_lag(server, deadline_s=600):
    servers.wait_until(lambda: cdc(server)["lag_events"] == 0, "all is published", deadline_s, 0.05)


# ---- CPU and throughput ----------------------------------------------------------------------------


def measure_cpu(bench):
    found = {}
    for fsync in ("always", "everysec"):
        running = {side: bench.server(side, fsync) for side in SIDES}
        # All servers publish into the same queue: only one is under load at a time.
        for name, flags in LOADS.items():
            # One by one the broker takes minutes for what is written in seconds.
            sides = [side for side in SIDES if (name, side) != ("pipeline 16", "batch 1")]
            runs = {side: [] for side in sides}
            for turn in range(bench.repeat):
                for side in sides if turn % 2 == 0 else reversed(sides):
                    runs[side].append(cpu_run(bench, running[side], side, flags))
                    say(f"{fsync}, {name}, {side}: " + ", ".join(
                        f"{key} {value:.2f}" for key, value in runs[side][-1].items()
                    ))
            found[f"{fsync}, {name}"] = {side: medians(some) for side, some in runs.items()}
        for server in running.values():
            bench.discard(server)
    return found


def cpu_run(bench, server, side, flags):
    before = servers.cpu_seconds(server.pid)
    confirmed = metric(server, "cdc_confirmed_total") if SIDES[side] else 0
    begun = time.monotonic()
    run = bench.load(server, "--duration", str(bench.seconds), *flags)
    took = time.monotonic() - begun
    sets = run["operations"]["set"]["requests"]
    if SIDES[side]:
        published = metric(server, "cdc_confirmed_total") - confirmed
    else:
        published = 0
    cpu = servers.cpu_seconds(server.pid) - before
    if SIDES[side]:
        wait_for_no_lag(server)
    whole = servers.cpu_seconds(server.pid) - before
    return {
        "sets_s": run["operations"]["set"]["throughput_per_s"],
        "cpu_us": cpu / sets * 1e6,
        # With what was published only after the load had ended.
        "whole_cpu_us": whole / sets * 1e6,
        "published_s": published / took,
        "p99_us": run["latency_us"]["p99"],
    }


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


# ---- an outage of the broker -----------------------------------------------------------------------


def measure_outage(bench):
    found = {}
    for side in ("batch 100", "batch 1"):
        server = bench.server(side, "everysec")
        bench.load(server, "--requests", "100000", "--pipeline", "16")
        wait_for_no_lag(server)
        before = server.rss_bytes()
        sets = bench.outage_sets if side == "batch 100" else bench.outage_sets // 10
        bench.broker.kill_broker()
        bench.load(server, "--requests", str(sets), "--pipeline", "64")
        during = server.rss_bytes()
        lag = cdc(server)["lag_events"]
        bench.broker.start()
        begun = confirmed_at = None
        while (left := cdc(server)["lag_events"]) > 0:
            if begun is None and left < lag:
                begun, confirmed_at = time.monotonic(), left
            time.sleep(0.05)
        took = time.monotonic() - begun
        found[side] = {
            "sets": sets,
            "before_mb": before / 1e6,
            "during_mb": during / 1e6,
            "after_mb": server.rss_bytes() / 1e6,
            "catch_up_s": took,
            "events_s": confirmed_at / took,
            "gaps": metric(server, "cdc_gaps_total"),
        }
        say(f"outage, {side}: {found[side]}")
        bench.discard(server)
    return found


# ---- lag -------------------------------------------------------------------------------------------


class Consumer(threading.Thread):
    """Notes how long each change took from its commit; the queue is in memory of one machine's clock."""

    def __init__(self, bench):
        super().__init__(daemon=True)
        self.lags = []
        self.ended = False
        self.channel = bench.channel()
        self.channel.basic_qos(prefetch_count=2000)

    def run(self):
        committed = re.compile(rb'"committed_at_ms":(\d+)')
        count = 0
        for method, _, body in self.channel.consume(QUEUE, inactivity_timeout=0.1):
            if method is None:
                if self.ended:
                    break
                continue
            now = time.time() * 1000
            self.lags += [now - int(at) for at in committed.findall(body)]
            count += 1
            if count % 500 == 0:
                self.channel.basic_ack(method.delivery_tag, multiple=True)
        self.channel.connection.close()


def measure_lag(bench):
    found = {}
    for side in ("batch 100", "batch 1"):
        server = bench.server(side, "always")
        bench.load(server, "--rate", "10000", "--duration", "1")
        wait_for_no_lag(server)
        bench.new_queue()
        consumer = Consumer(bench)
        consumer.start()
        bench.load(server, "--rate", "10000", "--duration", str(2 * bench.seconds))
        wait_for_no_lag(server)
        consumer.ended = True
        consumer.join()
        lags = sorted(consumer.lags)
        found[side] = {
            "events": len(lags),
            "p50_ms": lags[len(lags) // 2],
            "p99_ms": lags[len(lags) * 99 // 100],
        }
        say(f"lag, {side}: {found[side]}")
        bench.discard(server)
    return found


# ---- the table -------------------------------------------------------------------------------------


def markdown(results, facts):
    lines = [facts, ""]
    if cpu := results.get("cpu"):
        lines += [
            "| fsync, load | capture | SET/s | of off | CPU of a SET | of off | with what was published later | "
            "published/s | p99 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, sides in cpu.items():
            off = sides["off"]
            for side, run in sides.items():
                lines.append(
                    f"| {name} | {side} | {run['sets_s']:,.0f} | {run['sets_s'] / off['sets_s']:.2f}x | "
                    f"{run['cpu_us']:.1f} µs | {run['cpu_us'] / off['cpu_us']:.2f}x | "
                    f"{run['whole_cpu_us'] / off['whole_cpu_us']:.2f}x | {run['published_s']:,.0f} | "
                    f"{run['p99_us'] / 1000:.2f} ms |"
                )
        lines.append("")
    if outage := results.get("outage"):
        lines += [
            "| broker away for | memory before | during | after catching up | caught up at | gaps |",
            "|---|---|---|---|---|---|",
        ]
        for side, run in outage.items():
            lines.append(
                f"| {run['sets']:,} SETs, {side} | {run['before_mb']:.0f} MB | {run['during_mb']:.0f} MB | "
                f"{run['after_mb']:.0f} MB | {run['events_s']:,.0f} changes/s | {run['gaps']:.0f} |"
            )
        lines.append("")
    if lag := results.get("lag"):
        lines += ["| 10,000 SET/s | p50 | p99 |", "|---|---|---|"]
        for side, run in lag.items():
            lines.append(f"| commit to consumer, {side} | {run['p50_ms']:.0f} ms | {run['p99_ms']:.0f} ms |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def write_into(path, table):
    text = path.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(text[:begin] + "\n" + table + text[end:])


def facts_of(bench):
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return (
        f"Measured {time.strftime('%Y-%m-%d')} by `{' '.join(['bench/cdc.py', *sys.argv[1:]])}` on "
        f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()}), Linux {platform.release()}; "
        f"medians of {bench.repeat} runs of {bench.seconds} s; 100,000 keys, values of 64 bytes."
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--repeat", type=int)
    parser.add_argument("--outage-sets", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dir", help="where servers keep their data")
    parser.add_argument("--flux-binary", default=str(ROOT / "target/release/flux"))
    parser.add_argument("--write", action="store_true", help="rewrite the table though not all rows are measured")
    options = parser.parse_args()
    options.rows = options.rows.split(",")
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return options


def main():
    options = arguments()
    bench = Bench(options)
    measures = {"cpu": measure_cpu, "outage": measure_outage, "lag": measure_lag}
    try:
        table = markdown({row: measures[row](bench) for row in options.rows}, facts_of(bench))
    finally:
        bench.close()
    print(table)
    if options.write or (set(options.rows) == set(ROWS) and not options.quick):
        write_into(ROOT / "PERFORMANCE.md", table)


if __name__ == "__main__":
    main()
