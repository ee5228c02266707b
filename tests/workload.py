"""Writers for crash tests: they remember what was acknowledged, and can say what must be found.

Each writer owns its keys, so what it knows is exact: unique keys that are written once in order, and a
counter. Of a counter it is known that it is at least what was acknowledged and at most what was sent.
"""

import threading

import resp

DEPTH = 16


class Writer(threading.Thread):
    """Writes in pipelines until the connection breaks or `stop` is called."""

    def __init__(self, port, name, first=0, counter=0):
        super().__init__(daemon=True)
        self.port = port
        self.tag = name
        # Unique keys below `acknowledged` are acknowledged, below `sent` they may be there.
        self.acknowledged = self.sent = first
        self.counter_acknowledged = self.counter_sent = counter
        self.refused = []
        self._stopping = threading.Event()

    def key(self, number):
        return b"%s:%d" % (self.tag.encode(), number)

    def value(self, number):
        return b"value of %s:%d" % (self.tag.encode(), number)

    @property
    def counter(self):
        return b"counter:%s" % self.tag.encode()

    def stop(self):
        self._stopping.set()
        self.join(timeout=30)

    def run(self):
        try:
            with resp.Connection(self.port) as connection:
                while not self._stopping.is_set() and not self.refused:
                    self._batch(connection)
        except (OSError, resp.Closed):
            pass

    def _batch(self, connection):
        first = self.sent
        data = b"".join(
            resp.encode("SET", self.key(number), self.value(number)) + resp.encode("INCR", self.counter)
            for number in range(first, first + DEPTH)
        )
        self.sent += DEPTH
        self.counter_sent += DEPTH
        connection.send(data)
        for number in range(first, first + DEPTH):
            reply = resp.parse(connection.raw_reply())
            if reply == b"OK":
                self.acknowledged = number + 1
            else:
                self.refused.append(reply)
            reply = resp.parse(connection.raw_reply())
            if isinstance(reply, int):
                self.counter_acknowledged = max(self.counter_acknowledged, reply)
            else:
                self.refused.append(reply)

    def check(self, connection, first=0):
        """Asserts that all that was acknowledged is there; returns the counter's value."""
        for start in range(first, self.sent, 500):
            numbers = range(start, min(start + 500, self.sent))
            values = connection.call("MGET", *[self.key(number) for number in numbers])
            for number, value in zip(numbers, values):
                if number < self.acknowledged:
                    assert value == self.value(number), f"lost: {self.key(number)} is {value}"
                else:
                    assert value in (None, self.value(number)), f"{self.key(number)} is {value}"
        counter = int(connection.call("GET", self.counter) or 0)
        assert self.counter_acknowledged <= counter <= self.counter_sent, (
            f"{self.counter} is {counter}, acknowledged {self.counter_acknowledged}, "
            f"sent {self.counter_sent}"
        )
        return counter
