"""Clients that write down what they asked and what they were answered, while things go wrong.

Each client is a thread with a connection to some node, which it leaves for another one when it breaks. An
answer that is missing or `UNKNOWN` leaves it open whether the operation took effect; every other error says
that it did not, and is taken at its word: the checkers find the server out if that is wrong.
"""

import itertools
import random
import threading
import time
from collections import Counter

import linearizability
import resp
import servers
from linearizability import Operation

# Longer than a node takes to find out that it cannot answer.
TIMEOUT_S = 8.0
SLOW_S = 2.0


class Client(threading.Thread):
    """One client. Besides the shared keys it writes keys of its own once each, to count what is lost."""

    def __init__(self, load, number):
        super().__init__(daemon=True, name=f"client{number}")
        self.load = load
        self.chance = random.Random(f"{load.seed}/{number}")
        self.number = number
        self.operations = []
        # What it wrote once: by key, whether that was acknowledged.
        self.own = {}
        self.errors = Counter()
        # What took longer than SLOW_S, as text.
        self.slow = []
        self.slowest = 0.0
        self.broken = None
        self._connection = None
        self._node = None

    def run(self):
        try:
            while not self.load.ended.is_set():
                self._step()
                time.sleep(self.load.pause_s)
        except BaseException as error:
            self.broken = error
            raise
        finally:
            self._leave()

    def _leave(self):
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connected(self):
        if self._connection is None:
            self._node = self.chance.choice(self.load.nodes())
            try:
                self._connection = self._node.connect(timeout=TIMEOUT_S)
            except OSError as error:
                self.errors[f"connect: {type(error).__name__}"] += 1
                time.sleep(0.02)
                return False
        elif self.chance.random() < 0.02:
            self._leave()
            return self._connected()
        return True

    def _step(self):
        if not self._connected():
            return
        if self.chance.random() < 0.3:
            key = b"own:%s:%d:%d" % (self.load.name, self.number, len(self.own))
            self.own[key] = False
            if self.call("set", key, key)[0]:
                self.own[key] = True
            return
        kind, key = self.chance.choice(self.load.choices)
        argument = self.load.unique() if kind in ("set", "setnx") else None
        called = time.monotonic()
        answered, result = self.call(kind, key, argument)
        if answered is False:
            return
        returned = time.monotonic() if answered else None
        self.operations.append(
            Operation(self.name, key, kind, argument, called, returned, result)
        )

    def call(self, kind, key, argument):
        """(True, reply), (None, None) where the outcome is unknown, (False, error) where it was refused."""
        words = {
            "get": ("GET", key),
            "set": ("SET", key, argument),
            "setnx": ("SET", key, argument, "NX"),
            "getdel": ("GETDEL", key),
            "incr": ("INCR", key),
        }[kind]
        begun, reply = time.monotonic(), None
        try:
            reply = resp.parse(self._connection.raw(*words))
        except (OSError, resp.Closed) as error:
            self.errors[f"lost: {type(error).__name__}"] += 1
            self._leave()
            return None, None
        finally:
            took = time.monotonic() - begun
            self.slowest = max(self.slowest, took)
            if took > SLOW_S:
                ended = time.strftime("%H:%M:%S")
                where = self._node.directory.name
                self.slow.append(f"{ended} {where}: {kind} {key.decode()} {took:.2f} s -> {reply!r:.40}")
        if not isinstance(reply, resp.ReplyError):
            return True, reply
        self.errors[str(reply)[:60]] += 1
        time.sleep(0.005)
        if str(reply).startswith("UNKNOWN"):
            return None, None
        return False, reply


class Load:
    """Several clients on a few keys; use it as a context around what goes wrong, then `check`."""

    _names = itertools.count()

    def __init__(self, nodes, clients=4, registers=4, counters=1, pause_s=0.004, seed=0):
        self.nodes = nodes if callable(nodes) else lambda: nodes
        self.seed = seed
        self.pause_s = pause_s
        self.name = b"%d" % next(self._names)
        self.ended = threading.Event()
        self._values = itertools.count()
        kinds = ["set", "set", "get", "get", "get", "setnx", "getdel"]
        keys = [b"register:%s:%d" % (self.name, number) for number in range(registers)]
        self.choices = [(kind, key) for key in keys for kind in kinds]
        for number in range(counters):
            key = b"counter:%s:%d" % (self.name, number)
            self.choices += [(kind, key) for kind in ["incr", "incr", "incr", "get", "get"]]
        self.clients = [Client(self, number) for number in range(clients)]

    def unique(self):
        return b"v%d" % next(self._values)

    def __enter__(self):
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self.ended.set()
        for client in self.clients:
            client.join(timeout=60)
            assert not client.is_alive(), f"{client.name} hangs"

    @property
    def acknowledged(self):
        """Operations that were answered, so far."""
        return sum(
            sum(1 for o in client.operations if o.returned is not None) for client in self.clients
        ) + sum(sum(client.own.values()) for client in self.clients)

    @property
    def errors(self):
        return sum((client.errors for client in self.clients), Counter())

    def wait_for_more(self, count=100):
        """Until so many more operations were answered."""
        enough = self.acknowledged + count
        servers.wait_until(lambda: self.acknowledged >= enough, f"{count} more answers", 60)

    def check(self, readers):
        """Reads everything through each of these nodes and checks all that was seen. Returns counts."""
        self.end()
        assert not any(client.broken for client in self.clients), [c.broken for c in self.clients]
        operations = [one for client in self.clients for one in client.operations]
        for reader in readers:
            with reader.connect(timeout=TIMEOUT_S) as connection:
                for key in sorted({key for _, key in self.choices}):
                    called = time.monotonic()
                    value = connection.call("GET", key)
                    operations.append(
                        Operation("last", key, "get", None, called, time.monotonic(), value)
                    )
        lost = self.lost(readers[-1])
        assert not lost, f"{len(lost)} acknowledged writes lost, among them {lost[:5]}"
        linearizability.check(operations)
        return {
            "operations": len(operations),
            "unknown": sum(1 for one in operations if one.returned is None),
            "acknowledged": self.acknowledged,
            "errors": dict(self.errors),
            "slow": [line for client in self.clients for line in client.slow],
            "slowest_s": round(max(client.slowest for client in self.clients), 3),
        }

    def lost(self, reader):
        lost = []
        with reader.connect(timeout=TIMEOUT_S) as connection:
            for client in self.clients:
                keys = list(client.own)
                for start in range(0, len(keys), 100):
                    some = keys[start : start + 100]
                    for key, value in zip(some, connection.pipeline([("GET", key) for key in some])):
                        if value != key and (client.own[key] or value is not None):
                            lost.append((key, value))
        return lost
