"""More work than the node takes: writes are refused at once, reads go on, and it recovers by itself."""

import threading

import grpc

import resp
import servers
from test_grpc import SERVICE, Service

VALUE = b"v" * (64 * 1024)
CONNECTIONS = 24
DEPTH = 40


def flood(port, name, replies):
    """One pipeline of large writes; the replies are added to the list."""
    with resp.Connection(port, timeout=60) as connection:
        commands = [("SET", b"%s:%d" % (name, n), VALUE) for n in range(DEPTH)]
        sender = threading.Thread(
            target=connection.send, args=[b"".join(resp.encode(*c) for c in commands)]
        )
        sender.start()
        for command in commands:
            replies.append((command[1], resp.parse(connection.raw_reply())))
        sender.join()


def overload(node):
    """Floods the node from many connections and returns all replies, and the reads meanwhile."""
    replies, reads, done = [], [], threading.Event()

    def read():
        with node.connect() as connection:
            while not done.is_set():
                reads.append(resp.parse(connection.raw("GET", "k")))

    reader = threading.Thread(target=read)
    reader.start()
    threads = [
        threading.Thread(target=flood, args=[node.port, b"f%d" % n, replies])
        for n in range(CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    done.set()
    reader.join(timeout=30)
    assert len(replies) == CONNECTIONS * DEPTH
    return replies, reads


def test_overload(start_flux):
    node = start_flux(fsync="always", workers=1, max_inflight_bytes="1mb", overload_wait_ms=1)
    with node.connect() as connection:
        connection.call("SET", "k", "v")
        refused = []
        for _ in range(5):
            replies, reads = overload(node)
            assert set(reads) == {b"v"}, "reads are answered all the while"
            for key, reply in replies:
                if reply == b"OK":
                    assert connection.call("STRLEN", key) == len(VALUE)
                else:
                    assert str(reply).startswith("OVERLOADED "), reply
                    refused.append(key)
            connection.call("FLUSHALL")
            servers.wait_until(
                lambda: resp.parse(connection.raw("SET", "k", "v")) == b"OK", "it recovers", 10
            )
            if refused:
                break
        assert refused, "nothing was refused"
        # Recovered: a light load is taken again, all of it.
        assert [connection.call("SET", f"k{n}", "v") for n in range(100)] == [b"OK"] * 100
    with grpc.insecure_channel(f"127.0.0.1:{node.grpc_port}") as channel:
        assert Service(channel, SERVICE).call("Set", key=b"k", value=b"w").written
    assert node.stop() == 0, node.log()
