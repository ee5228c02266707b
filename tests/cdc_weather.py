"""Kills under change capture, for scripts/cdc-weather.sh: the leader, the broker and the consumer, in random
order, while everything is written to; then the consumer's file must be the store, event for event.

    python cdc_weather.py --kills 20 --seed 1
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback

import changes
import cluster
import rabbitmq
import resp
import servers
from test_consume import Consumer, verify

# Longer than a node takes to find out that it cannot answer.
TIMEOUT_S = 8.0
# First words of errors by which a node says that it cannot now.
PASSING = {"NOTLEADER", "UNAVAILABLE", "STOPPING", "OVERLOADED", "UNKNOWN", "EXECABORT", "CROSSSLOT"}
SHARED_KEYS = 300
# Keys with one of these tags are of one partition each, for transactions.
TAGS = 8


class Writer(threading.Thread):
    """Writes of every kind, through one node until that one fails. Every fifth is a key of its own, which is
    written once, so that it is known what must be there."""

    def __init__(self, storm, number):
        super().__init__(daemon=True, name=f"writer{number}")
        self.storm = storm
        self.number = number
        self.chance = random.Random(f"{storm.seed}/{number}")
        # By key, whether its write was acknowledged.
        self.own = {}
        self.commands = collections.Counter()
        self.errors = collections.Counter()
        self.broken = None
        self._connection = None

    def run(self):
        try:
            while not self.storm.calm.is_set():
                self._step()
                time.sleep(self.storm.pause_s)
        except BaseException as error:
            self.broken = error
            raise
        finally:
            self._leave()

    def _leave(self):
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _step(self):
        try:
            if self._connection is None:
                node = self.chance.choice(self.storm.cluster.nodes)
                self._connection = node.connect(timeout=TIMEOUT_S)
            if self.chance.random() < 0.2:
                self._write_own()
            else:
                commands = self._commands()
                self._note(commands, self._connection.pipeline(commands))
        except (OSError, resp.Closed) as error:
            self.errors[f"lost: {type(error).__name__}"] += 1
            self._leave()
            time.sleep(0.05)

    def _write_own(self):
        key = b"own:%d:%d" % (self.number, len(self.own))
        self.own[key] = False
        replies = self._connection.pipeline([("SET", key, key)])
        self._note([("SET",)], replies)
        self.own[key] = replies == [b"OK"]

    def _note(self, commands, replies):
        self.commands.update(command[0] for command in commands)
        for reply in replies:
            if isinstance(reply, resp.ReplyError):
                word = str(reply).split(" ")[0]
                self.errors[word] += 1
                if word not in PASSING:
                    raise AssertionError(f"{commands[:5]} was answered {reply}")

    def _commands(self):
        """One command, a pipeline, or a transaction."""
        kind = self.chance.random()
        if kind < 0.6:
            return [self._command()]
        if kind < 0.85:
            return [self._command() for _ in range(self.chance.randrange(2, 40))]
        tag = self.chance.randrange(TAGS)
        inside = [self._command("{t%d}" % tag, several=False) for _ in range(self.chance.randrange(1, 6))]
        inside.append(("SET", "{t%d}whole" % tag, self._value()))
        inside.append(("RENAME", "{t%d}whole" % tag, "{t%d}renamed" % tag))
        return [("MULTI",), *inside, ("EXEC",)]

    def _command(self, tag="", several=True):
        key = f"{tag}k:{self.chance.randrange(SHARED_KEYS)}"
        kinds = [
            lambda: ("SET", key, self._value()),
            lambda: ("SET", key, self._value()),
            lambda: ("SET", key, self._value(), "PX", self.chance.randrange(20, 2000)),
            lambda: ("SET", key, self._value(), "EX", 3600),
            lambda: ("SET", key, self._value(), "NX"),
            lambda: ("DEL", key),
            lambda: ("DEL", key),
            lambda: ("GETDEL", key),
            lambda: ("INCR", f"{tag}n:{self.chance.randrange(SHARED_KEYS)}"),
            lambda: ("APPEND", f"{tag}a:{self.chance.randrange(10 * SHARED_KEYS)}", "+"),
            lambda: ("PEXPIRE", key, self.chance.randrange(1, 1000)),
            lambda: ("PERSIST", key),
        ]
        if several:
            others = [f"k:{self.chance.randrange(SHARED_KEYS)}" for _ in range(5)]
            kinds.append(lambda: ("DEL", key, *others))
            kinds.append(lambda: ("MSET", *(part for other in others for part in (other, self._value()))))
        return self.chance.choice(kinds)()

    def _value(self):
        if self.chance.random() < 0.1:
            return self.chance.randbytes(self.chance.randrange(64))
        return b"v%d" % self.chance.randrange(10**9)


class Storm:
    """Three nodes, a broker, a consumer and writers. `run` does all of it and gives the figures."""

    def __init__(self, folder, seed=1, writers=4, pause_s=0.02, binary=None, **settings):
        self.folder = pathlib.Path(folder)
        self.seed = seed
        self.chance = random.Random(f"{seed}/faults")
        self.pause_s = pause_s
        self.calm = threading.Event()
        self.broker = rabbitmq.RabbitMQ(self.folder / "broker")
        settings = {"rabbitmq_url": self.broker.url, "binary": binary} | settings
        self.cluster = cluster.Cluster(self.folder / "cluster", **settings)
        arguments = ["--rotate-bytes", "0"]
        self.consumer = Consumer(
            self.folder / "consumer", self.broker, changes.EXCHANGE, *arguments
        )
        self.writers = [Writer(self, number) for number in range(writers)]
        self.struck = collections.Counter()
        # What was killed and is to be started after some further fault.
        self.later = []

    def __enter__(self):
        try:
            self.broker.start()
            self.cluster.start()
            self.consumer.start()
            self.broker.sync_queues()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.calm.set()
        self.consumer.kill()
        self.cluster.kill()
        self.broker.kill()

    def run(self, kills):
        order = [fault for fault in FAULTS for _ in range(kills)]
        self.chance.shuffle(order)
        begun = time.monotonic()
        for writer in self.writers:
            writer.start()
        for number, fault in enumerate(order, 1):
            time.sleep(self.chance.uniform(0.2, 2.0))
            self.bring_back(fault)
            said = fault(self)
            self.struck[fault.__name__] += 1
            lag = sum(self.lags())
            print(f"{number:4} {fault.__name__}{said}, lag {lag}", flush=True)
            assert not any(w.broken for w in self.writers), [w.broken for w in self.writers]
        self.bring_back()
        time.sleep(1.0)
        self.calm.set()
        for writer in self.writers:
            writer.join(timeout=60)
            assert not writer.is_alive(), f"{writer.name} hangs"
        weathered_s = time.monotonic() - begun
        return self.check() | {"weathered_s": round(weathered_s, 1)}

    def lags(self):
        for node in self.cluster.running():
            stands = node.ask("/cdc") or {"lag_events": 0}
            yield stands["lag_events"]

    def bring_back(self, fault=None):
        """Starts what is down and has to be there for this fault; all for none."""
        for needed, start in list(self.later):
            if fault in (None, needed) or self.chance.random() < 0.5:
                start()
                self.later.remove((needed, start))

    def start_later(self, fault, start):
        """Sometimes only when something else was killed too."""
        if self.chance.random() < 0.3:
            self.later.append((fault, start))
            return ", stays down"
        time.sleep(self.chance.uniform(0.0, 1.5))
        start()
        return ""

    def check(self):
        """After the writers: everything is published and in the file, and the file is the store."""
        begun = time.monotonic()
        self.cluster.wait_until_well()
        newest = self.settled()
        replay = self.consumed(newest)
        settled_s = time.monotonic() - begun
        assert self.consumer.stop() == 0, self.consumer.log()[-3000:]
        # Also what came last of all.
        replay = changes.Replay(lines_of(self.consumer.file))
        assert not replay.wrong, replay.wrong[:5]
        assert (replay.repeats, replay.gaps) == (0, {}), (replay.repeats, replay.gaps)
        assert replay.revisions == newest
        own = {key: was for writer in self.writers for key, was in writer.own.items()}
        values = {key: entry.value for (_, key), entry in replay.table.items()}
        lost = [key for key, was in own.items() if was and values.get(key) != key]
        assert not lost, f"{len(lost)} acknowledged writes are not in the file, among them {lost[:5]}"
        for node in self.cluster.nodes:
            code, lines = verify(self.consumer.file, address=f"127.0.0.1:{node.port}")
            assert code == 0, lines[:10]
            assert "panicked" not in node.logs(), node.logs()[-6000:]
            assert "changes are lost" not in node.logs(), node.logs()[-6000:]
        return {
            "faults": dict(self.struck),
            "events": sum(newest.values()),
            "kinds": dict(replay.kinds),
            "keys": len(replay.table),
            "acknowledged_own": sum(own.values()),
            "commands": dict(sum((writer.commands for writer in self.writers), collections.Counter())),
            "errors": dict(sum((writer.errors for writer in self.writers), collections.Counter())),
            "settled_s": round(settled_s, 1),
            "verify": lines[-1],
        }

    def settled(self):
        """By partition, the newest revision, once nothing expires any more and all is confirmed."""
        soon = time.monotonic() + 2.5
        servers.wait_until(lambda: time.monotonic() > soon, "short lives are over")
        seen = None

        def same_again():
            nonlocal seen
            before, seen = seen, changes.newest(self.cluster.nodes)
            return seen if seen == before and len(seen or ()) == cluster.PARTITIONS else None

        try:
            return servers.wait_until(same_again, "all is published", 600, 0.5)
        except TimeoutError as error:
            stand = [changes.report(node) | {"partitions": "…"} for node in self.cluster.nodes]
            raise TimeoutError(f"{error}; {stand}") from error

    def consumed(self, newest):
        """Waits until the file has everything up to there, reading on where it was."""
        replay = changes.Replay()
        lines = lines_of(self.consumer.file, follow=True)

        def has_all():
            for record in lines:
                if record is None:
                    return False
                replay.take(record)
                if replay.revisions == newest:
                    return True

        servers.wait_until(has_all, "the file has everything", 600, 0.2)
        return replay


def lines_of(path, follow=False):
    """The records of a file; with `follow` None where there is no further whole line yet, and then on."""
    with open(path, "rb") as file:
        rest = b""
        while True:
            rest += file.readline()
            if rest.endswith(b"\n"):
                yield json.loads(rest)
                rest = b""
            elif not follow:
                assert not rest, f"the last line of {path} has no end"
                return
            else:
                yield None


def kill_leader(storm):
    """Of the most partitions."""
    # Told by the nodes themselves, of which some may not answer now.
    node = max(storm.cluster.running(), key=lambda node: len(node.led()))
    led = len(node.led())
    node.kill()
    time.sleep(storm.chance.uniform(0.0, 2.5))
    node.start()
    return f" of {led} partitions ({node.directory.name})"


def kill_broker(storm):
    storm.broker.kill_broker()
    return storm.start_later(kill_broker, storm.broker.start)


def kill_consumer(storm):
    storm.consumer.kill()
    # It waits for a broker that is away by itself.
    return storm.start_later(kill_consumer, storm.consumer.spawn)


FAULTS = [kill_leader, kill_broker, kill_consumer]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="cdc_batch_max_events")
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=20, help="of a writer after each step")
    parser.add_argument("--keep", action="store_true", help="keep all files, also when all is well")
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-cdc-weather-"))
    print(f"binary {servers.flux_binary()}, seed {arguments.seed}, files in {folder}", flush=True)
    try:
        with Storm(
            folder,
            seed=arguments.seed,
            writers=arguments.writers,
            pause_s=arguments.pause_ms / 1000,
            cdc_batch_max_events=arguments.batch,
        ) as storm:
            result = storm.run(arguments.kills)
    except Exception:
        traceback.print_exc()
        print(f"failed; all files are in {folder}")
        return 1
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.keep:
        print(f"all files are in {folder}")
    else:
        shutil.rmtree(folder)
    print("no hole, no repeat, no gap: the file is the store")
    return 0


if __name__ == "__main__":
    sys.exit(main())
