"""A load generator in the little that Python does fast: large prepared pipelines, replies counted.

Every command is a SET, so every good reply is the same five bytes. It is for filling a server and for
throughput over time; latencies are redis-benchmark's job.

    load.py series PORT SECONDS     runs, then prints JSON: [milliseconds since the epoch, replies] per 10 ms
"""

import json
import pathlib
import selectors
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import resp

VALUE = b"x" * 64
OK = b"+OK\r\n"
DEPTH = 256
CONNECTIONS = 8


def key(number, prefix=b"key:"):
    """16 bytes, as redis-benchmark names its keys."""
    return b"%s%012d" % (prefix, number)


def set_command(name, expires_at_ms=None):
    if expires_at_ms is None:
        return b"*3\r\n$3\r\nSET\r\n$16\r\n%s\r\n$64\r\n%s\r\n" % (name, VALUE)
    return b"*5\r\n$3\r\nSET\r\n$16\r\n%s\r\n$64\r\n%s\r\n$4\r\nPXAT\r\n$13\r\n%d\r\n" % (
        name, VALUE, expires_at_ms,
    )


def chunks(commands):
    """Commands joined into pipelines, with the count of each."""
    batch = []
    for command in commands:
        batch.append(command)
        if len(batch) == DEPTH:
            yield b"".join(batch), len(batch)
            batch = []
    if batch:
        yield b"".join(batch), len(batch)


class Lane:
    """One connection with at most one pipeline under way."""

    def __init__(self, port):
        self.connection = resp.Connection(port, timeout=120)
        self.socket = self.connection.socket
        self.awaited = 0

    def begin(self, data, count):
        self.awaited = count * len(OK)
        self.socket.sendall(data)

    def receive(self):
        data = self.socket.recv(1 << 16)
        if not data or b"-" in data:
            raise RuntimeError(f"a SET was refused: {data[:200]!r}")
        self.awaited -= len(data)
        return len(data)


def drive(port, source, until=None, on_replies=lambda count: None):
    """Sends pipelines from the source over all connections until it ends or the time has come."""
    selector = selectors.DefaultSelector()
    lanes = [Lane(port) for _ in range(CONNECTIONS)]
    for lane in lanes:
        selector.register(lane.socket, selectors.EVENT_READ, lane)
        _next(lane, source)
    while any(lane.awaited for lane in lanes):
        for ready, _ in selector.select():
            lane = ready.data
            on_replies(lane.receive() // len(OK))
            if lane.awaited == 0 and (until is None or time.monotonic() < until):
                _next(lane, source)
    for lane in lanes:
        lane.connection.close()


def _next(lane, source):
    data, count = next(source, (None, 0))
    if count:
        lane.begin(data, count)


def fill(port, count, prefix=b"key:", expires_at_ms=None):
    """Sets `count` keys; `expires_at_ms` maps a key's number to when it expires."""
    if expires_at_ms is None:
        commands = (set_command(key(number, prefix)) for number in range(count))
    else:
        commands = (
            set_command(key(number, prefix), expires_at_ms(number)) for number in range(count)
        )
    drive(port, chunks(commands))


def series(port, seconds, keys=1000):
    """SETs of a few keys as fast as they are answered; replies counted per 10 ms."""
    prepared = list(chunks(set_command(key(number % keys)) for number in range(DEPTH * 40)))
    counts = {}

    def forever():
        while True:
            yield from prepared

    def count_now(count):
        slot = int(time.time() * 100) * 10
        counts[slot] = counts.get(slot, 0) + count

    drive(port, forever(), time.monotonic() + seconds, count_now)
    return sorted(counts.items())


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "series":
        sys.exit(__doc__)
    json.dump(series(int(sys.argv[2]), float(sys.argv[3])), sys.stdout)
