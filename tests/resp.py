"""A RESP connection that shows raw bytes.

The tests compare what a server really sent, so replies are framed here but not interpreted; `parse`
turns a raw reply into Python values where a test wants them. It does not retry, pool or hide errors.
"""

import socket


class Closed(Exception):
    """The server closed the connection."""


class ReplyError(Exception):
    """An error reply, raised by `Connection.call`."""


def encode(*args):
    """A command as RESP sends it: an array of bulk strings."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        data = to_bytes(arg)
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)


def to_bytes(value):
    if isinstance(value, bytes):
        return value
    return str(value).encode()


class Connection:
    """One client connection; every read ends by `timeout` seconds."""

    def __init__(self, port, timeout=20.0, host="127.0.0.1"):
        self.socket = socket.create_connection((host, port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed(str(error)) from error

    def _fill(self):
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError as error:
            raise Closed(str(error)) from error
        if not data:
            raise Closed("end of stream")
        self.buffer += data

    def _line_end(self, start):
        searched = start
        while True:
            end = self.buffer.find(b"\r\n", searched)
            if end >= 0:
                return end + 2
            searched = max(start, len(self.buffer) - 1)
            self._fill()

    def _reply_end(self, start):
        end = self._line_end(start)
        line = bytes(self.buffer[start : end - 2])
        kind, rest = line[:1], line[1:]
        if kind in b"+-:_,#(":
            return end
        length = int(rest)
        if length < 0:
            return end
        if kind in b"$=!":
            while len(self.buffer) < end + length + 2:
                self._fill()
            return end + length + 2
        if kind in b"*~>":
            count = length
        elif kind == b"%":
            count = 2 * length
        else:
            raise ValueError(f"not the start of a RESP reply: {line!r}")
        for _ in range(count):
            end = self._reply_end(end)
        return end

    def raw_reply(self):
        """The bytes of the next reply."""
        end = self._reply_end(0)
        reply = bytes(self.buffer[:end])
        del self.buffer[:end]
        return reply

    def raw(self, *args):
        """Sends a command and returns the bytes of its reply."""
        self.send(encode(*args))
        return self.raw_reply()

    def call(self, *args):
        """Sends a command and returns its reply as Python values; an error reply is raised."""
        reply = parse(self.raw(*args))
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def pipeline(self, commands):
        """Sends all commands at once and returns their replies, errors among them."""
        self.send(b"".join(encode(*command) for command in commands))
        return [parse(self.raw_reply()) for _ in commands]

    def closed_by_peer(self):
        """Reads until the server closes; what it sent before is returned."""
        try:
            while True:
                self._fill()
        except Closed:
            return bytes(self.buffer)


def parse(raw):
    """A raw reply as Python values: bytes, int, float, bool, None, list, dict, `ReplyError`."""
    value, end = _parse(raw, 0)
    if end != len(raw):
        raise ValueError(f"{len(raw) - end} bytes after the reply")
    return value


def _parse(raw, start):
    end = raw.index(b"\r\n", start)
    kind, rest = raw[start : start + 1], raw[start + 1 : end]
    end += 2
    if kind == b"+":
        return rest, end
    if kind == b"-":
        return ReplyError(rest.decode("utf-8", "replace")), end
    if kind in b":(":
        return int(rest), end
    if kind == b",":
        return float(rest), end
    if kind == b"#":
        return rest == b"t", end
    if kind == b"_":
        return None, end
    length = int(rest)
    if length < 0:
        return None, end
    if kind in b"$=!":
        data = raw[end : end + length]
        end += length + 2
        if kind == b"=":
            data = data[4:]
        if kind == b"!":
            return ReplyError(data.decode("utf-8", "replace")), end
        return data, end
    count = 2 * length if kind == b"%" else length
    values = []
    for _ in range(count):
        value, end = _parse(raw, end)
        values.append(value)
    if kind == b"%":
        return dict(zip(values[0::2], values[1::2])), end
    return values, end
