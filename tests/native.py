"""The native protocol as far as the tests speak it, see docs/protocol.md. One request at a time, or sets in a row."""

import socket
import struct

PING, INFO, GET, SET, INCREMENT, BATCH_GET, SCAN = 1, 3, 16, 17, 19, 32, 34
STALE, SESSION, POSITION, REDIRECT, TRACE = 1, 2, 4, 8, 16
SESSIONS, POSITIONS, REDIRECTS, PARTITION_SCANS, TRACES = 1, 2, 4, 8, 16
ALL_FEATURES = SESSIONS | POSITIONS | REDIRECTS | PARTITION_SCANS | TRACES
NOT_LEADER = 303
UNKNOWN_AGE = 2**64 - 1


class Failure(Exception):
    """An answer with a status; `hint` is (partition, address) where a leader was named."""

    def __init__(self, status, message, hint):
        super().__init__(f"{status}: {message}")
        self.status, self.hint = status, hint


def packed(data):
    return struct.pack("<I", len(data)) + data


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self, form):
        (number,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return number

    def bytes(self):
        length = self.number("I")
        self.at += length
        return self.data[self.at - length : self.at]

    def list(self, read):
        return [read() for _ in range(self.number("I"))]

    def rest(self):
        return self.data[self.at :]

    def stored(self):
        version, expires_at_ms = self.number("Q"), self.number("Q")
        return {"version": version, "expires_at_ms": expires_at_ms, "value": self.bytes()}

    def found(self):
        return self.stored() if self.number("B") else None


class Client:
    """A connection that asks for all features."""

    def __init__(self, port, host="127.0.0.1", features=ALL_FEATURES, timeout=20.0):
        self.socket = socket.create_connection((host, port), timeout=timeout)
        self.input = b""
        self.position = None
        self.next_id = 0
        self.socket.sendall(b"\xf1FLUX\0" + struct.pack("<HHH", 1, 1, features))
        head = self.take(14)
        assert head[:6] == b"\xf1FLUX\0", head
        version, self.features, length = struct.unpack_from("<HHI", head, 6)
        assert version == 1
        rest = Reader(self.take(length))
        rest.at = 12
        self.partitions, self.node = rest.number("H"), rest.bytes().decode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def take(self, count):
        while len(self.input) < count:
            received = self.socket.recv(1 << 16)
            assert received, "the node closed the connection"
            self.input += received
        taken, self.input = self.input[:count], self.input[count:]
        return taken

    def call(self, opcode, body, **how):
        """The body of the answer; how old it is goes to `position`, as (revision, age_ms)."""
        self.socket.sendall(self.frame(opcode, body, **how))
        return self.answer(opcode, self.next_id)

    def frame(self, opcode, body, flags=0, session=None, trace=None, deadline_ms=0):
        """The next request. `trace` is as the header `traceparent`, or 25 bytes."""
        self.next_id += 1
        fields = b""
        if session:
            flags |= SESSION
            fields += struct.pack("<QQQ", *session)
        if trace:
            flags |= TRACE
            fields += bytes.fromhex(trace[2:].replace("-", "")) if isinstance(trace, str) else trace
        return packed(struct.pack("<QBBI", self.next_id, opcode, flags, deadline_ms) + fields + body)

    def answer(self, opcode, expected):
        answer = Reader(self.take(struct.unpack("<I", self.take(4))[0]))
        number, status, kind, marks = (answer.number(form) for form in "QHBB")
        assert (number, kind) == (expected, opcode), (number, kind)
        if status:
            message = answer.bytes().decode()
            hint = None
            if status == NOT_LEADER and answer.rest():
                hint = answer.number("H"), answer.bytes().decode()
            raise Failure(status, message, hint)
        self.position = (answer.number("Q"), answer.number("Q")) if marks & 1 else None
        return answer

    def info(self):
        answer = self.call(INFO, b"")
        text = lambda: answer.bytes().decode()
        info = {"node": text(), "version": text()}
        info["members"] = answer.list(lambda: (text(), text()))
        info["leaders"] = answer.list(lambda: answer.number("H"))
        info["epoch"] = answer.number("Q")
        info["zones"] = answer.list(text)
        info["replicas"] = answer.list(lambda: answer.list(lambda: answer.number("H")))
        assert not answer.rest()
        return info

    def get(self, key, **how):
        return self.call(GET, packed(key), **how).found()

    def set(self, key, value, **how):
        """The version written."""
        return self.written(self.call(SET, self.set_body(key, value), **how))

    def set_all(self, writes):
        """The versions of (key, value, trace), which are sent at once."""
        frames = [self.frame(SET, self.set_body(key, value), trace=trace) for key, value, trace in writes]
        first = self.next_id - len(frames) + 1
        self.socket.sendall(b"".join(frames))
        return [self.written(self.answer(SET, first + number)) for number in range(len(frames))]

    @staticmethod
    def set_body(key, value):
        return bytes([0, 0, 0]) + packed(key) + packed(value)

    @staticmethod
    def written(answer):
        outcome, version = answer.number("B"), answer.number("Q")
        assert outcome == 3, outcome
        return version

    def increment(self, key, delta=1, **how):
        """Sum and version."""
        answer = self.call(INCREMENT, struct.pack("<q", delta) + packed(key), **how)
        return answer.number("q"), answer.number("Q")

    def batch_get(self, keys, **how):
        body = struct.pack("<I", len(keys)) + b"".join(map(packed, keys))
        answer = self.call(BATCH_GET, body, **how)
        return answer.list(answer.found)

    def page(self, cursor=b"", limit=0, prefix=b"", partition=None, keys_only=True, **how):
        """The next cursor, and keys with what is stored."""
        options = int(keys_only) | (2 if partition is not None else 0)
        body = bytes([options])
        if partition is not None:
            body += struct.pack("<H", partition)
        body += struct.pack("<I", limit) + packed(prefix) + packed(cursor)
        answer = self.call(SCAN, body, **how)
        return answer.bytes(), answer.list(lambda: (answer.bytes(), answer.stored()))

    def scan(self, **how):
        """The keys of all pages."""
        keys, cursor = [], b""
        while True:
            cursor, items = self.page(cursor, **how)
            keys += [key for key, _ in items]
            if not cursor:
                return keys
