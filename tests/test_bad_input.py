"""Bytes that no well-behaved client sends, and clients that behave badly.

The rule everywhere: an error in the protocol's own form, the connection closed where framing is lost,
memory bounded, nothing stored, and other connections none the wiser.
"""

import random
import select
import socket
import struct
import threading

import pytest

import resp
import servers

MIB = 1 << 20


@pytest.fixture
def bystander(flux):
    """A connection that must not notice anything, and a database that must stay empty."""
    with flux.connect() as connection:
        assert connection.call("PING") == b"PONG"
        yield connection
        assert connection.call("PING") == b"PONG"
        assert connection.call("DBSIZE") == 0


def exchange(port, data):
    """Sends the bytes and returns all that is answered until the server closes."""
    with resp.Connection(port) as connection:
        try:
            connection.send(data)
        except resp.Closed:
            pass
        return connection.closed_by_peer()


FRAMES = [
    b"*-2147483649\r\n*1\r\n$-1\r\n",
    b"*2147483647\r\n",
    b"*2147483648\r\n",
    b"*9223372036854775807\r\n",
    b"*9223372036854775808\r\n",
    b"*18446744073709551616\r\n",
    b"*99999999999999999999999999999999\r\n",
    b"*\r\n",
    b"*abc\r\n",
    b"*1.5\r\n",
    b"* 1\r\n",
    b"*+1\r\n",
    b"*1048577\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$-1\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2147483648\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$9223372036854775807\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$9223372036854775808\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$x\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n:5\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n+v\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n*1\r\n$1\r\nv\r\n",
    b"*1\r\n*1\r\n*1\r\n*1\r\n",
    b"*1\r\n*0\r\n",
    b"*2\r\n_\r\n",
    b"*1\r\n%1\r\n",
    b"*3\r\nSET k v\r\n",
    b"*" + b"1" * 100_000,
    b"*1\r\n$" + b"1" * 100_000,
    b"SET k \"v\r\n",
    b"SET k 'v\r\n",
    b"a" * 100_000,
]


@pytest.mark.parametrize("frame", FRAMES, ids=[repr(frame[:40]) for frame in FRAMES])
def test_malformed_frames(flux, bystander, frame):
    answer = exchange(flux.port, frame)
    assert answer.startswith(b"-ERR Protocol error: "), answer
    assert answer.endswith(b"\r\n") and answer.count(b"\r\n") == 1


@pytest.mark.parametrize("frame", FRAMES[:5], ids=[repr(frame) for frame in FRAMES[:5]])
def test_commands_before_a_malformed_frame_are_answered(flux, frame):
    answer = exchange(flux.port, resp.encode("SET", "k", "v") + resp.encode("GET", "k") + frame)
    assert answer.startswith(b"+OK\r\n$1\r\nv\r\n-ERR Protocol error: "), answer


def test_bulk_without_its_line_end(flux, bystander):
    # Redis skips the two bytes unseen; Flux may too or refuse. Either way framing stays sound.
    with resp.Connection(flux.port) as connection:
        connection.send(b"*1\r\n$4\r\nPINGxx" + resp.encode("PING"))
        try:
            first = connection.raw_reply()
        except resp.Closed:
            return
        assert first == b"+PONG\r\n" or first.startswith(b"-ERR Protocol error")


@pytest.mark.parametrize("end", range(1, len(resp.encode("SET", "key", "value")) - 1))
def test_half_a_command_then_close(flux, bystander, end):
    with resp.Connection(flux.port) as connection:
        connection.send(resp.encode("SET", "key", "value")[:end])
        connection.socket.shutdown(socket.SHUT_WR)
        connection.closed_by_peer()


def test_reset_in_the_middle(flux, bystander):
    for _ in range(50):
        connection = resp.Connection(flux.port)
        connection.send(resp.encode("SET", "key", "v" * 100_000)[:50_000])
        linger = struct.pack("ii", 1, 0)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()


@pytest.mark.parametrize(
    "data",
    [
        # A TLS client hello.
        bytes.fromhex("16030100a5010000a10303") + bytes(range(150)) + b"\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 11\r\n\r\nSET k v\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00" * 100 + b"\n",
        b"\xff" * 100 + b"\n",
        bytes(range(256)) * 10 + b"\n",
    ],
    ids=["tls", "http get", "http post", "ssh", "zeros", "ones", "all bytes"],
)
def test_other_protocols(flux, bystander, data):
    with resp.Connection(flux.port) as connection:
        connection.send(data)
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = connection.closed_by_peer()
    # HTTP's first line is a wrong command; its next must close the connection, for a browser can be
    # made to send such requests.
    assert answer == b"" or not answer.isascii() or b"+OK" not in answer


def test_binary_keys_and_values(flux):
    with flux.connect() as connection:
        for byte in range(256):
            key = bytes([byte, 0, 13, 10])
            connection.call("SET", key, key * 3)
        assert connection.call("DBSIZE") == 256
        for byte in range(256):
            key = bytes([byte, 0, 13, 10])
            assert connection.call("GET", key) == key * 3


def test_empty_key(flux, bystander):
    with flux.connect() as connection:
        for command in [("SET", "", "v"), ("INCR", ""), ("APPEND", "", "v"), ("MSET", "", "v")]:
            assert connection.raw(*command).startswith(b"-ERR "), command
        assert connection.raw("PING") == b"+PONG\r\n"


def test_key_length_limit(flux):
    with flux.connect() as connection:
        assert connection.raw("SET", "k" * 65536, "v") == b"+OK\r\n"
        for command in [("SET", "k" * 65537, "v"), ("INCR", "k" * 65537), ("MSET", "k" * 65537, "v")]:
            assert connection.raw(*command).startswith(b"-ERR "), command[0]
        assert connection.call("GET", "k" * 65536) == b"v"
        assert connection.call("DBSIZE") == 1


def test_value_length_limit(flux):
    with flux.connect() as connection:
        value = b"v" * (16 * MIB)
        assert connection.raw("SET", "k", value) == b"+OK\r\n"
        assert connection.call("STRLEN", "k") == len(value)
        assert connection.raw("APPEND", "k", "x").startswith(b"-ERR ")
        assert connection.raw("SETRANGE", "k", len(value), "x").startswith(b"-ERR ")
        assert connection.raw("SET", "k", value + b"x").startswith(b"-ERR ")
        assert connection.raw("PING") == b"+PONG\r\n"
        assert connection.call("GET", "k") == value
    answer = exchange(flux.port, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % (64 * MIB))
    assert answer.startswith(b"-ERR Protocol error: invalid bulk length")


def test_one_byte_at_a_time(flux):
    data = resp.encode("SET", "key", "value") + b"GET key\r\n" + resp.encode("INCR", "n")
    with flux.connect() as connection:
        for byte in data:
            connection.send(bytes([byte]))
        replies = [connection.raw_reply() for _ in range(3)]
    assert replies == [b"+OK\r\n", b"$5\r\nvalue\r\n", b":1\r\n"]


def test_split_at_every_place(flux):
    data = resp.encode("SET", "key", "value") + resp.encode("GET", "key")
    with flux.connect() as connection:
        for place in range(1, len(data)):
            connection.send(data[:place])
            # Another connection's round trip lets the node see the first part alone.
            with flux.connect() as other:
                other.call("PING")
            connection.send(data[place:])
            assert connection.raw_reply() == b"+OK\r\n"
            assert connection.raw_reply() == b"$5\r\nvalue\r\n"


def test_coalesced_pipeline_of_10000(flux):
    commands = []
    for number in range(2500):
        commands += [("SET", f"k{number}", number), ("GET", f"k{number}"), ("INCR", "n"), ("PING",)]
    with flux.connect() as connection:
        replies = connection.pipeline(commands)
    for number in range(2500):
        at = 4 * number
        assert replies[at : at + 4] == [b"OK", b"%d" % number, number + 1, b"PONG"]


def test_pipeline_over_many_keys_keeps_order(flux):
    with flux.connect() as connection:
        keys = [f"key:{number}" for number in range(200)]
        for round_ in range(5):
            commands = [("MSET", *sum(([key, round_] for key in keys), []))]
            commands += [("GET", key) for key in keys] + [("MGET", *keys), ("DEL", *keys)]
            replies = connection.pipeline(commands)
            value = b"%d" % round_
            assert replies[0] == b"OK"
            assert replies[1:201] == [value] * 200
            assert replies[201] == [value] * 200
            assert replies[202] == 200


@pytest.mark.parametrize("seed", range(20))
def test_pipelines_behave_as_if_sent_one_by_one(flux, seed):
    """Random commands on few keys, of one and of many partitions, against a dictionary."""
    chance = random.Random(seed)
    keys = [b"key:%d" % number for number in range(12)]
    model, commands, expected = {}, [], []
    for step in range(400):
        one, some = chance.choice(keys), chance.sample(keys, chance.randrange(1, 12))
        value = b"%d" % step
        command, reply = chance.choice(
            [
                lambda: (("SET", one, value), set_all(model, [one], value)),
                lambda: (("GET", one), model.get(one)),
                lambda: (("DEL", *some), sum(model.pop(key, None) is not None for key in some)),
                lambda: (("MGET", *some), [model.get(key) for key in some]),
                lambda: (("EXISTS", *some), sum(key in model for key in some)),
                lambda: (("MSET", *(x for key in some for x in (key, value))), set_all(model, some, value)),
                lambda: (("GETSET", one, value), [model.get(one), set_all(model, [one], value)][0]),
                lambda: (("STRLEN", one), len(model.get(one, b""))),
                lambda: (("DBSIZE",), len(model)),
                lambda: (("ECHO", value), value),
            ]
        )()
        commands.append(command)
        expected.append(reply)
    with flux.connect() as connection:
        replies = connection.pipeline(commands)
    wrong = [(n, c, r, e) for n, (c, r, e) in enumerate(zip(commands, replies, expected)) if r != e]
    assert not wrong, f"{len(wrong)} of 400, first: {wrong[0]}"


def set_all(model, keys, value):
    model.update((key, value) for key in keys)
    return b"OK"


def test_2000_connections_at_once(flux):
    connections = [flux.connect() for _ in range(2000)]
    try:
        for number, connection in enumerate(connections):
            connection.send(resp.encode("SET", f"k{number}", number) + resp.encode("INCR", "n"))
        counts = set()
        for connection in connections:
            assert connection.raw_reply() == b"+OK\r\n"
            counts.add(resp.parse(connection.raw_reply()))
        assert counts == set(range(1, 2001))
    finally:
        for connection in connections:
            connection.close()
    with flux.connect() as connection:
        listed = lambda: len(connection.call("CLIENT", "LIST").splitlines()) == 1
        servers.wait_until(listed, "closed connections are forgotten")
        assert connection.call("DBSIZE") == 2001


def test_connection_limit(start_flux):
    node = start_flux(fsync="no", max_connections=10)
    connections = [node.connect() for _ in range(10)]
    for connection in connections:
        assert connection.call("PING") == b"PONG"
    with node.connect() as refused:
        answer = refused.closed_by_peer()
        assert answer.startswith(b"-ERR max number of clients reached"), answer
    for connection in connections:
        assert connection.call("PING") == b"PONG"
    connections.pop().close()

    def room_again():
        with node.connect() as connection:
            try:
                return connection.raw("PING") == b"+PONG\r\n"
            except resp.Closed:
                return False

    servers.wait_until(room_again, "a place is free again")
    for connection in connections:
        connection.close()


def test_idle_timeout(start_flux):
    node = start_flux(fsync="no", idle_timeout_s=1)
    with node.connect() as idle, node.connect() as busy:
        assert idle.call("PING") == b"PONG"
        while not select.select([idle.socket], [], [], 0.05)[0]:
            assert busy.call("PING") == b"PONG"
        assert idle.closed_by_peer() == b""
        assert busy.call("PING") == b"PONG"


class PeakMemory:
    """The most resident memory that a node takes inside a `with`, above what it had before."""

    def __init__(self, node):
        self.node = node
        self.more = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        before = self.node.rss_bytes()
        while not self.stop.wait(0.005):
            self.more = max(self.more, self.node.rss_bytes() - before)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def test_slow_reader_costs_bounded_memory_and_disturbs_nobody(start_flux):
    node = start_flux(fsync="no", output_buffer_limit=1 * MIB)
    value, requests = b"v" * (64 * 1024), 1000
    with node.connect() as bystander, node.connect() as slow, PeakMemory(node) as peak:
        bystander.call("SET", "k", value)
        assert slow.call("GET", "k") == value
        # 64 MiB of answers, more than the sockets' own buffers hold.
        slow.send(resp.encode("GET", "k") * requests)
        for number in range(2000):
            assert bystander.call("SET", f"other{number}", "v") == b"OK"
        assert bystander.call("GET", "k") == value
        # Either it has been cut, or it gets every answer once it reads.
        try:
            for _ in range(requests):
                assert slow.raw_reply() == b"$65536\r\n" + value + b"\r\n"
        except resp.Closed:
            pass
    assert peak.more < 32 * MIB, f"{peak.more / MIB:.0f} MiB more"


def test_reader_past_the_output_limit_is_cut(start_flux):
    node = start_flux(fsync="no", output_buffer_limit=1 * MIB)
    with node.connect() as bystander, node.connect() as slow, PeakMemory(node) as peak:
        bystander.call("SET", "k", b"v" * (12 * MIB))
        slow.call("PING")
        slow.send(resp.encode("GET", "k") * 20)
        alone = lambda: len(bystander.call("CLIENT", "LIST").splitlines()) == 1
        servers.wait_until(alone, "the slow reader is cut", 20)
        assert len(slow.closed_by_peer()) < 20 * 12 * MIB
        assert bystander.call("STRLEN", "k") == 12 * MIB
    assert peak.more < 96 * MIB, f"{peak.more / MIB:.0f} MiB more"


def test_a_reader_that_keeps_up_is_not_cut(start_flux):
    """Far more than the limit in all, but never more than half of it at one time."""
    node = start_flux(fsync="no", output_buffer_limit=8 * MIB)
    value = b"v" * (64 * 1024)
    with node.connect() as connection:
        connection.call("SET", "k", value)
        for _ in range(20):
            assert connection.pipeline([("GET", "k")] * 64) == [value] * 64


def test_many_large_unfinished_commands_are_bounded(start_flux):
    """Announcing 16 MiB costs the node nothing until the bytes arrive."""
    node = start_flux(fsync="no")
    before = node.rss_bytes()
    connections = []
    for _ in range(200):
        connection = node.connect()
        connection.send(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\nstart" % (16 * MIB))
        connections.append(connection)
    with node.connect() as bystander:
        assert bystander.call("PING") == b"PONG"
        assert node.rss_bytes() - before < 64 * MIB
        for connection in connections:
            connection.close()
        assert bystander.call("DBSIZE") == 0


NATIVE_MAGIC = b"\xf1FLUX\0"


def native_preface(low=1, high=1, flags=0):
    return NATIVE_MAGIC + struct.pack("<HHH", low, high, flags)


def test_native_preface_is_answered(flux):
    with resp.Connection(flux.port) as connection:
        connection.send(native_preface(1, 7))
        head = connection.socket.recv(8, socket.MSG_WAITALL)
        assert head == NATIVE_MAGIC + struct.pack("<H", 1)


@pytest.mark.parametrize("versions", [(0, 0), (2, 2), (99, 99), (65535, 65535), (2, 1)])
def test_native_preface_of_an_unknown_version(flux, bystander, versions):
    answer = exchange(flux.port, native_preface(*versions))
    head, rest = answer[:14], answer[14:]
    magic, version, _, length = struct.unpack("<6sHHI", head)
    assert (magic, version, length) == (NATIVE_MAGIC, 0, len(rest))
    assert struct.unpack_from("<H", rest) == (108,), "the code of UNSUPPORTED"


@pytest.mark.parametrize(
    "data",
    [
        b"\xf1FLUY\0\x01\0\x01\0\0\0",
        b"\xf1PING\r\n",
        b"\xf1" * 100,
        native_preface() + b"\xff" * 4,
        native_preface() + struct.pack("<I", 0x7FFFFFFF),
        native_preface() + struct.pack("<I", 0x80000000) + b"x" * 100,
        native_preface() + struct.pack("<I", 0) + b"x" * 100,
        native_preface() + resp.encode("SET", "k", "v") * 10,
        native_preface() + b"\x00" * 1000,
    ],
    ids=repr,
)
def test_native_garbage_ends_the_connection(flux, bystander, data):
    answer = exchange(flux.port, data)
    assert b"+OK" not in answer


@pytest.mark.parametrize("end", [1, 3, 5, 6, 11])
def test_half_a_native_preface_then_close(flux, bystander, end):
    with resp.Connection(flux.port) as connection:
        connection.send(native_preface()[:end])
        connection.socket.shutdown(socket.SHUT_WR)
        connection.closed_by_peer()
