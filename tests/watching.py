"""Watchers as clients are: over gRPC, and over HTTP as server-sent events; and what they must be told."""

import base64
import json
import selectors
import socket
import threading
import time
import urllib.parse

import grpc
from google.protobuf import message_factory

import changes
from test_grpc import SERVICE, Service

OPTIONS = [("grpc.max_receive_message_length", -1)]


class GrpcWatch:
    """A watch over gRPC. A thread takes what comes; use it as a context."""

    def __init__(self, port, takes=True, timeout=120.0, **request):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
        method = Service(self.channel, SERVICE).descriptor.methods_by_name["Watch"]
        response = message_factory.GetMessageClass(method.output_type)
        invoke = self.channel.unary_stream(
            f"/{SERVICE}/Watch",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        self.call = invoke(message_factory.GetMessageClass(method.input_type)(**request), timeout=timeout)
        self.messages, self.error = [], None
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._take, daemon=True)
        if takes:
            self.take()

    def take(self):
        self.thread.start()

    def _take(self):
        try:
            for message in self.call:
                with self.changed:
                    self.messages.append(message)
                    self.changed.notify_all()
        except grpc.RpcError as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.call.cancel()
        if self.thread.is_alive():
            self.thread.join(timeout=30)
        self.channel.close()

    def until(self, is_so, what, deadline_s=30.0):
        """Waits until something is so of the messages."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.error or is_so(self.messages), deadline_s):
                raise TimeoutError(f"{what}: {self.kinds()[-20:]}")
            if not is_so(self.messages):
                raise AssertionError(f"{what}: ended with {self.error}")
            return list(self.messages)

    def started(self):
        self.until(lambda messages: messages, "the watch is under way")
        assert self.messages[0].WhichOneof("kind") == "started"
        return self

    def ended(self, deadline_s=60.0):
        """(status, flux-code) of its end."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.error, deadline_s), "the watch goes on"
        trailers = {item.key: item.value for item in self.error.trailing_metadata()}
        return self.error.code(), trailers.get("flux-code")

    def kinds(self):
        return [message.WhichOneof("kind") for message in self.messages]

    def changes(self):
        return [message.change for message in self.messages if message.WhichOneof("kind") == "change"]

    def token(self):
        """That of the last message."""
        return self.messages[-1].token


class SseWatch:
    """A watch over HTTP, on a socket of its own that is read only when it is asked for events."""

    def __init__(self, port, last_id=None, receive_buffer=None, **query):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", port))
        path = f"/api/v1/watch?{urllib.parse.urlencode(query)}"
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        if last_id:
            head += f"Last-Event-ID: {last_id}\r\n"
        self.socket.sendall(f"{head}\r\n".encode())
        self.parser = SseParser()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    @property
    def last_id(self):
        return self.parser.last_id

    def until(self, is_so, what, deadline_s=30.0):
        """Reads until something is so of the events; the events as (name, data)."""
        ends = time.monotonic() + deadline_s
        while not is_so(self.parser.events):
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{what}: {self.parser.events[-5:]}")
            self.socket.settimeout(left)
            try:
                received = self.socket.recv(1 << 16)
            except TimeoutError:
                continue
            if not received:
                raise AssertionError(f"{what}: the answer ended: {self.parser.events[-5:]}")
            self.parser.feed(received)
        return self.parser.events

    def started(self):
        events = self.until(lambda events: events or self.parser.status not in (None, 200), "it starts")
        assert self.parser.status == 200, (self.parser.status, self.parser.body)
        assert events[0] == ("started", {})
        return self

    def changes(self):
        return [data for name, data in self.parser.events if name in ("set", "delete", "expire")]


class SseParser:
    """The bytes of an answer as events."""

    def __init__(self):
        self.raw = b""
        self.body = b""
        self.status = None
        self.events = []
        self.comments = []
        self.last_id = None
        self.is_over = False

    def feed(self, received):
        self.raw += received
        if self.status is None:
            head, found, rest = self.raw.partition(b"\r\n\r\n")
            if not found:
                return
            self.status = int(head.split()[1])
            self.raw = rest
        # Chunks: a size, the bytes, a line end.
        while True:
            size, found, rest = self.raw.partition(b"\r\n")
            if not found or self.status != 200:
                break
            length = int(size, 16)
            if length == 0:
                self.is_over = True
                break
            if len(rest) < length + 2:
                break
            self.body += rest[:length]
            self.raw = rest[length + 2 :]
        *blocks, self.body = self.body.split(b"\n\n")
        for block in blocks:
            self.take(block.decode())

    def take(self, block):
        name, data = None, None
        for line in block.split("\n"):
            field, _, value = line.partition(": ")
            if field == "id":
                self.last_id = value
            elif field == "event":
                name = value
            elif field == "data":
                data = json.loads(value)
            elif line.startswith(":"):
                self.comments.append(line[2:])
        if name in ("set", "delete", "expire", "gap", "row", "rows_end"):
            changes.VALIDATOR.validate(data)
        if name:
            self.events.append((name, data))


class Crowd:
    """Many watches over HTTP, which one thread reads. Counts events by name, and checks their revisions."""

    def __init__(self, port, count, **query):
        self.watches = [SseWatch(port, **query) for _ in range(count)]
        self.selector = selectors.DefaultSelector()
        for watch in self.watches:
            watch.socket.setblocking(False)
            self.selector.register(watch.socket, selectors.EVENT_READ, watch)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for watch in self.watches:
            watch.socket.close()

    def until(self, is_so, what, deadline_s=60.0):
        """Reads until something is so of each watch."""
        missing = [watch for watch in self.watches if not is_so(watch)]
        ends = time.monotonic() + deadline_s
        while missing:
            if time.monotonic() > ends:
                raise TimeoutError(f"{what}: {len(missing)} watches miss it")
            for key, _ in self.selector.select(1.0):
                received = key.data.socket.recv(1 << 16)
                assert received, f"a watch ended: {key.data.parser.status} {key.data.parser.events[-2:]}"
                key.data.parser.feed(received)
            missing = [watch for watch in missing if not is_so(watch)]


class Follower(threading.Thread):
    """Watches all keys from the first change on over HTTP, for ever, as a browser does: when an answer ends
    it comes again with the last id. Checks that each partition's revisions are 1, 2, 3, … without a repeat."""

    def __init__(self, port, **query):
        super().__init__(daemon=True)
        self.port = port
        self.query = query
        self.last_id = None
        # By partition, up to which revision it knows; and what it makes of that.
        self.known = {}
        self.table = {}
        self.wrong = []
        self.came_again = -1
        self.resumed = 0
        self.events = 0
        self.ended = threading.Event()
        self.has_started = threading.Event()
        self.start()
        assert self.has_started.wait(30), self.wrong

    def run(self):
        try:
            while not self.ended.is_set():
                self.came_again += 1
                self.watch()
        except Exception as error:
            self.wrong.append(repr(error))

    def watch(self):
        try:
            with SseWatch(self.port, last_id=self.last_id, **self.query) as watch:
                watch.socket.settimeout(0.2)
                while not self.ended.is_set() and not watch.parser.is_over:
                    try:
                        received = watch.socket.recv(1 << 16)
                    except TimeoutError:
                        continue
                    if not received:
                        break
                    watch.parser.feed(received)
                    if watch.parser.status not in (None, 200):
                        break
                    for name, data in watch.parser.events:
                        self.take(name, data)
                    watch.parser.events.clear()
                    self.last_id = watch.parser.last_id or self.last_id
                self.resumed += watch.parser.comments.count("resumed")
        except OSError:
            pass
        self.ended.wait(0.05)

    def take(self, name, data):
        if name in ("started", "too_slow"):
            self.has_started.set()
            return
        self.events += 1
        partition, revision = data["partition"], data["revision"]
        if name == "gap":
            self.known[partition] = None
            self.table = {key: at for key, at in self.table.items() if at[0] != partition}
        elif name == "rows_end":
            self.known[partition] = revision
        else:
            key = data["key"]
            if name == "row":
                if self.known.get(partition, 0) is not None:
                    self.wrong.append(f"a row of {partition} without a gap")
            else:
                known = self.known.get(partition, 0)
                if known is None or revision != known + 1:
                    self.wrong.append(f"{partition}: {revision} after {known}")
                self.known[partition] = revision
            if name in ("set", "row"):
                self.table[key] = (partition, data["version"], data["value"])
            else:
                self.table.pop(key, None)

    def stop(self):
        self.ended.set()
        self.join(timeout=30)
        assert not self.wrong, self.wrong[:5]


def token_of(last_id):
    """The token of gRPC that an id of HTTP is."""
    return base64.urlsafe_b64decode(last_id + "=" * (-len(last_id) % 4))
