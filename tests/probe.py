"""For how long writes stand still: to a key of each partition, again and again, through some nodes."""

import threading
import time

import cluster
import resp

THREADS = 8


class Probe:
    """Writers that repeat what was refused or lost until it is taken; use it as a context."""

    def __init__(self, nodes, partitions=cluster.PARTITIONS, pause_s=0.01):
        self.nodes = nodes
        self.pause_s = pause_s
        keys = cluster.keys_of_all(partitions, b"probe")
        # By key, when each of its writes was acknowledged.
        self.times = {key: [] for key in keys}
        self.errors = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, keys[number::THREADS]), daemon=True)
            for number in range(THREADS)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _run(self, number, keys):
        connection, turn = None, number
        while not self._ended.is_set():
            try:
                if connection is None:
                    connection = self.nodes[turn % len(self.nodes)].connect(timeout=10)
                self._write(connection, keys)
                time.sleep(self.pause_s)
            except (OSError, resp.Closed) as error:
                self.errors.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                if connection is not None:
                    connection.close()
                connection, turn = None, turn + 1
                time.sleep(0.005)
        if connection is not None:
            connection.close()

    def _write(self, connection, keys):
        connection.send(b"".join(resp.encode("SET", key, "v") for key in keys))
        for key in keys:
            reply = resp.parse(connection.raw_reply())
            if reply == b"OK":
                self.times[key].append(time.monotonic())
            else:
                self.errors.append((time.monotonic(), str(reply)))

    def gap(self, moment):
        """The longest time without a write to some key, of those that end after the moment."""
        longest = 0.0
        for key, times in self.times.items():
            assert times and times[-1] > moment, f"{key} was not written again"
            ends = [(a, b) for a, b in zip(times, times[1:]) if b > moment]
            longest = max([longest] + [b - a for a, b in ends])
        return longest

    def flowing_since(self, moment):
        """Whether every key was written after the moment, twice."""
        return all(len(times) > 1 and times[-2] > moment for times in self.times.values())
