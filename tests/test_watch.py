"""Watches: every committed change of the keys asked for, in order, once; over gRPC and over HTTP."""

import os
import signal
import threading
import time

import grpc
import pytest

import cluster
import servers
from test_cluster import admin
from test_grpc import SERVICE, Service, refused
from watching import Crowd, Follower, GrpcWatch, SseWatch, token_of

SET, DELETE, EXPIRE = 0, 1, 2
NAMES = {SET: "set", DELETE: "delete", EXPIRE: "expire"}


def told(changes):
    """Changes of gRPC in short."""
    return [(NAMES[one.kind], one.key, one.value) for one in changes]


def write(node, *commands):
    with node.connect() as connection:
        for command in commands:
            connection.call(*command)


@pytest.fixture
def kv(flux):
    with grpc.insecure_channel(f"127.0.0.1:{flux.grpc_port}") as channel:
        yield Service(channel, SERVICE)


def test_a_key_and_a_prefix_from_now_on(flux):
    write(flux, ("SET", "w:1", "before"))
    with (
        GrpcWatch(flux.grpc_port, key=b"w:1").started() as one,
        GrpcWatch(flux.grpc_port, prefix=b"w:").started() as some,
        GrpcWatch(flux.grpc_port, key=b"{w:1}").started() as same_partition,
    ):
        # What a key had before is known a moment after somebody has begun to watch its partition.
        def is_known():
            write(flux, ("SET", "{w:1}", "v"))
            changes = same_partition.changes()
            return changes and changes[-1].previous_version

        servers.wait_until(is_known, "versions from before", 10, 0.05)
        write(
            flux,
            ("SET", "w:1", "a"),
            ("SET", "x", "other"),
            ("INCRBY", "w:n", "5"),
            ("DEL", "w:1"),
            ("DEL", "w:absent"),
            ("SET", "w:1", "gone soon", "PX", "60"),
        )
        some.until(lambda messages: len(some.changes()) >= 5, "five changes")
        one.until(lambda messages: len(one.changes()) >= 4, "four changes")
        of_one = [
            ("set", b"w:1", b"a"),
            ("delete", b"w:1", b""),
            ("set", b"w:1", b"gone soon"),
            ("expire", b"w:1", b""),
        ]
        assert told(one.changes()) == of_one
        # The order is that of each partition.
        assert [change for change in told(some.changes()) if change[1] == b"w:1"] == of_one
        assert ("set", b"w:n", b"5") in told(some.changes())
        assert len(some.changes()) == 5
        first, second, third, fourth = one.changes()
        assert first.version == first.revision == second.previous_version
        assert second.version == 0 and third.previous_version == 0
        assert fourth.previous_version == third.version
        assert third.expires_at_ms > third.committed_at_ms and not first.HasField("expires_at_ms")


def test_a_token_resumes_and_nothing_comes_twice(flux):
    with GrpcWatch(flux.grpc_port, prefix=b"t:").started() as first:
        write(flux, *[("SET", f"t:{number}", "v") for number in range(200)])
        first.until(lambda messages: len(first.changes()) == 200, "all changes")
        middle = first.messages[100].token
        seen = told(first.changes()[:100])
    write(flux, *[("SET", f"t:{number}", "w") for number in range(50)])
    with GrpcWatch(flux.grpc_port, prefix=b"t:", token=middle).started() as second:
        second.until(lambda messages: len(second.changes()) >= 150, "the rest")
        all_told = seen + told(second.changes())
    expected = [("set", f"t:{n}".encode(), b"v") for n in range(200)]
    expected += [("set", f"t:{n}".encode(), b"w") for n in range(50)]
    # All once, and those of a key in order.
    assert sorted(all_told) == sorted(expected)
    for number in range(50):
        values = [value for _, key, value in all_told if key == f"t:{number}".encode()]
        assert values == [b"v", b"w"]


def test_a_snapshot_under_writes_is_the_store_in_the_end(flux):
    write(flux, *[("SET", f"s:{number}", "0") for number in range(500)])
    ended = threading.Event()

    def keep_writing():
        with flux.connect() as connection:
            turn = 0
            while not ended.is_set():
                turn += 1
                connection.call("SET", f"s:{turn * 7 % 600}", str(turn))
                connection.call("DEL", f"s:{turn * 11 % 600}")

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        with GrpcWatch(flux.grpc_port, prefix=b"s:", snapshot=True).started() as watch:
            watch.until(lambda messages: watch.kinds().count("rows_end") >= 1, "rows")
            seen = len(watch.changes())
            watch.until(lambda messages: len(watch.changes()) > seen + 200, "changes behind the rows")
            ended.set()
            writer.join()
            write(flux, ("SET", "s:last", "x"))
            # A partition's changes are in order; those of all are there when each has been silent.
            servers.wait_until(lambda: replay(watch.messages) == store(flux, b"s:"), "it is the store")
    finally:
        ended.set()
        writer.join()


def replay(messages):
    table, gaps = {}, {}
    for message in list(messages):
        kind = message.WhichOneof("kind")
        if kind == "gap":
            gaps[message.gap.partition] = 0
        elif kind == "row":
            gaps[message.row.partition] += 1
            assert message.row.number == gaps[message.row.partition]
            table[message.row.key] = (message.row.value, message.row.version)
        elif kind == "rows_end":
            assert message.rows_end.rows == gaps.pop(message.rows_end.partition)
        elif kind == "change" and message.change.kind == SET:
            table[message.change.key] = (message.change.value, message.change.version)
        elif kind == "change":
            table.pop(message.change.key, None)
    return table


def store(flux, prefix):
    with grpc.insecure_channel(f"127.0.0.1:{flux.grpc_port}") as channel:
        page = Service(channel, SERVICE).call("Scan", prefix=prefix, limit=10000)
        return {item.key: (item.value, item.version) for item in page.items}


def test_keep_alives_come_in_silence_and_have_a_token(flux):
    with GrpcWatch(flux.grpc_port, key=b"silent", keep_alive_ms=1000).started() as watch:
        write(flux, *[("SET", f"other:{number}", "v") for number in range(100)])
        watch.until(lambda messages: watch.kinds().count("keep_alive") >= 2, "signs of life", 10)
        token = watch.token()
    with GrpcWatch(flux.grpc_port, key=b"silent", token=token).started() as again:
        write(flux, ("SET", "silent", "v"))
        again.until(lambda messages: again.changes(), "a change")
        assert told(again.changes()) == [("set", b"silent", b"v")]


def test_what_cannot_be_watched_is_refused(flux, start_flux):
    with GrpcWatch(flux.grpc_port, key=b"k").started() as watch:
        token = watch.token()
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    for request in [
        {"key": b""},
        {"keep_alive_ms": 10},
        {"key": b"k", "token": b"made up"},
        {"key": b"l", "token": token},
        {"partitions": [60000]},
    ]:
        with GrpcWatch(flux.grpc_port, **request) as watch:
            assert watch.ended() == invalid, request
    other = start_flux(max_watches=2)
    with GrpcWatch(other.grpc_port, key=b"k", token=token) as watch:
        assert watch.ended() == invalid, "a token of another store"
    with GrpcWatch(other.grpc_port).started(), GrpcWatch(other.grpc_port).started():
        with GrpcWatch(other.grpc_port) as third:
            assert third.ended() == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")

    def has_place():
        with GrpcWatch(other.grpc_port) as watch:
            servers.wait_until(lambda: watch.messages or watch.error, "an answer")
            return bool(watch.messages)

    servers.wait_until(has_place, "a place that was given back", 10, 0.05)


def metric(node, name):
    for line in node.metrics().splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(f"there is no metric {name}")


def fill_the_pipe(node, prefix, count=400, size=100_000):
    """More than sockets and buffers take."""
    with node.connect() as connection:
        for number in range(count):
            assert connection.call("SET", f"{prefix}{number}", b"v" * size) == b"OK"


def test_a_watcher_over_grpc_that_does_not_read_is_told_and_resumes(start_flux):
    node = start_flux(fsync="no")
    with GrpcWatch(node.grpc_port, prefix=b"p").started() as first:
        token = first.token()
    servers.wait_until(lambda: metric(node, "flux_watchers") == 0, "it is gone")
    # Where it begins is known, whenever it does.
    with GrpcWatch(node.grpc_port, takes=False, prefix=b"p", token=token) as slow:
        servers.wait_until(lambda: metric(node, "flux_watchers") == 1, "it watches")
        fill_the_pipe(node, "p")
        servers.wait_until(lambda: metric(node, "flux_watch_cut_total") == 1, "it is cut", 40, 0.1)
        assert metric(node, "flux_watchers") == 0
        slow.take()
        assert slow.ended() == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCH_TOO_SLOW")
        seen = [change.key for change in slow.changes()]
        assert 0 < len(seen) < 400
        token = slow.token()
    with GrpcWatch(node.grpc_port, prefix=b"p", token=token).started() as again:
        again.until(lambda messages: len(again.changes()) + len(seen) >= 400, "the rest")
        seen += [change.key for change in again.changes()]
    assert sorted(seen) == sorted(f"p{number}".encode() for number in range(400))


def test_a_client_over_http_that_does_not_read_is_told_and_resumes(start_flux):
    node = start_flux("up", fsync="no")
    with SseWatch(node.http_port, prefix="p", receive_buffer=1 << 16).started() as slow:
        fill_the_pipe(node, "p")
        servers.wait_until(lambda: metric(node, "flux_watch_cut_total") == 1, "it is cut", 40, 0.1)
        slow.until(lambda events: events[-1][0] == "too_slow", "it is told")
        assert slow.parser.events[-1][1]["error"]["code"] == "WATCH_TOO_SLOW"
        seen = [change["key"] for change in slow.changes()]
        last_id = slow.last_id
    with SseWatch(node.http_port, prefix="p", last_id=last_id).started() as again:
        again.until(lambda events: len(again.changes()) + len(seen) >= 400, "the rest")
        seen += [change["key"] for change in again.changes()]
    assert sorted(seen) == sorted(f"p{number}" for number in range(400))


def test_server_sent_events(flux):
    with SseWatch(flux.http_port, prefix="h:").started() as watch:
        write(flux, ("SET", "h:1", "a\nb"), ("DEL", "h:1"), ("SET", "h:2", b"\xff"))
        events = watch.until(lambda events: len(events) == 4, "three changes")
        of_one = [(name, data["value"]) for name, data in events[1:] if data["key"] == "h:1"]
        assert of_one == [("set", "a\nb"), ("delete", None)]
        binary = next(data for _, data in events[1:] if data["key"] != "h:1")
        assert (binary["value"], binary["encoding"]) == ("/w==", "base64")
        last_id = watch.last_id
    write(flux, ("SET", "h:3", "c"))
    for again in [
        SseWatch(flux.http_port, last_id=last_id, prefix="h:"),
        # The header is newer than what the address says.
        SseWatch(flux.http_port, last_id=last_id, prefix="h:", **{"from": "snapshot"}),
        SseWatch(flux.http_port, prefix="h:", token=last_id),
    ]:
        with again.started():
            again.until(lambda events: len(events) >= 2, "the next change")
            assert [data["key"] for data in again.changes()] == ["h:3"]
    with GrpcWatch(flux.grpc_port, prefix=b"h:", token=token_of(last_id)).started() as same:
        same.until(lambda messages: same.changes(), "the next change")
        assert told(same.changes()) == [("set", b"h:3", b"c")]
    with SseWatch(flux.http_port, key="h:3", **{"from": "snapshot"}).started() as snapshot:
        events = snapshot.until(lambda events: events[-1][0] == "rows_end", "all rows")
        assert [name for name, _ in events] == ["started", "gap", "row", "rows_end"]
        assert (events[2][1]["value"], events[3][1]["rows"]) == ("c", 1)


@pytest.mark.parametrize(
    "query",
    [{"key": "a", "prefix": "a"}, {"key": ""}, {"from": "then"}, {"token": "%%"}, {"token": "AAAA"}, {"k": "a"}],
)
def test_bad_watches_over_http(flux, query):
    with SseWatch(flux.http_port, **query) as watch:
        servers.wait_until(lambda: feed_once(watch) and watch.parser.status, "an answer")
        assert watch.parser.status == 400
        assert b"INVALID_ARGUMENT" in watch.parser.raw + watch.parser.body


def feed_once(watch):
    watch.parser.feed(watch.socket.recv(1 << 16))
    return True


def test_a_stop_ends_watches_at_once(start_flux):
    node = start_flux("up")
    with (
        GrpcWatch(node.grpc_port, prefix=b"").started() as over_grpc,
        SseWatch(node.http_port, prefix="").started() as over_http,
    ):
        begun = time.monotonic()
        node.signal(signal.SIGTERM)
        assert over_grpc.ended() == (grpc.StatusCode.UNAVAILABLE, "STOPPING")
        with pytest.raises(AssertionError, match="the answer ended"):
            over_http.until(lambda events: False, "the end")
        assert node.wait() == 0
        assert time.monotonic() - begun < 8


def test_a_watch_resumes_after_the_node_was_killed(start_flux):
    node = start_flux(fsync="always")
    with GrpcWatch(node.grpc_port, prefix=b"").started() as watch:
        write(node, *[("SET", f"k{number}", "v") for number in range(300)])
        watch.until(lambda messages: len(watch.changes()) == 300, "all changes")
        token = watch.messages[150].token
        known = told(watch.changes()[:150])
        node.kill()
    node.start()
    write(node, ("SET", "k0", "w"))
    with GrpcWatch(node.grpc_port, prefix=b"", token=token).started() as again:
        again.until(lambda messages: len(again.changes()) >= 151, "the rest, from the log")
        all_told = known + told(again.changes())
    expected = [("set", f"k{number}".encode(), b"v") for number in range(300)] + [("set", b"k0", b"w")]
    assert sorted(all_told) == sorted(expected)


def test_a_thousand_watchers_of_one_node(start_flux):
    node = start_flux("up", fsync="no", workers=1, partitions=16)
    before = node.rss_bytes()
    with Crowd(node.http_port, 1000, prefix="c:") as crowd:
        crowd.until(lambda watch: watch.parser.events, "all have started")
        with node.connect() as connection:
            for number in range(100):
                assert connection.call("SET", f"c:{number % 20}", str(number)) == b"OK"
        crowd.until(lambda watch: len(watch.parser.events) >= 101, "all have all", 120)
        for watch in crowd.watches:
            of_key = {}
            for change in watch.changes():
                of_key.setdefault(change["key"], []).append(int(change["value"]))
            assert of_key == {f"c:{key}": list(range(key, 100, 20)) for key in range(20)}
        grown = node.rss_bytes() - before
        print(f"\n1,000 watchers take {grown >> 20} MiB")
        assert grown < 400 << 20
        assert metric(node, "flux_watchers") == 1000
    servers.wait_until(lambda: metric(node, "flux_watchers") == 0, "all are gone", 30, 0.1)


class Gateway(servers.Flux):
    """`flux gateway` before some nodes."""

    name = "gateway"

    def __init__(self, directory, nodes, **settings):
        super().__init__(directory, mode="gateway", **settings)
        self.nodes = nodes

    def command(self):
        return [self.binary, "gateway", "--http-addr", f"127.0.0.1:{self.http_port}"]

    def environment(self):
        return super().environment() | {
            "FLUX_GATEWAY_KV_ENDPOINTS": ",".join(f"127.0.0.1:{node.port}" for node in self.nodes),
            "FLUX_GATEWAY_GRPC_ENDPOINTS": ",".join(f"127.0.0.1:{node.grpc_port}" for node in self.nodes),
        }

    def ready(self):
        return servers.http_status(f"http://127.0.0.1:{self.http_port}/health") == 200


class Writers:
    """Writes through some nodes until it ends; a write that fails is let go."""

    def __init__(self, nodes, keys=200):
        self.nodes, self.keys = nodes, keys
        self.ended = threading.Event()
        self.written = 0
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(2)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join(timeout=60)

    def _run(self, number):
        connection, turn = None, number
        while not self.ended.is_set():
            turn += 2
            try:
                if connection is None:
                    connection = self.nodes[turn % len(self.nodes)].connect(timeout=5)
                key = f"k{turn * 7919 % self.keys}"
                connection.call("DEL", key) if turn % 5 == 0 else connection.call("SET", key, str(turn))
                self.written += 1
            except (OSError, servers.resp.Closed, servers.resp.ReplyError):
                if connection is not None:
                    connection.close()
                connection = None
                time.sleep(0.05)


def cluster_store(node):
    with grpc.insecure_channel(f"127.0.0.1:{node.grpc_port}") as channel:
        page = Service(channel, SERVICE).call("Scan", limit=10000, timeout=20)
        return {item.key.decode(): (item.version, item.value.decode()) for item in page.items}


def knows_all(follower, node):
    """Whether the follower's table is the cluster's."""
    known = {key: (version, value) for key, (_, version, value) in list(follower.table.items())}
    return known == cluster_store(node)


needs_etcd = pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")


@needs_etcd
def test_a_watch_survives_kills_of_the_nodes_it_goes_through(flux_binary, tmp_path):
    with cluster.Cluster(tmp_path / "c", 3, binary=flux_binary, fsync="no") as made:
        gateway = Gateway(tmp_path / "gateway", made.nodes, binary=flux_binary).start()
        try:
            followers = [Follower(gateway.http_port), Follower(gateway.http_port, **{"from": "snapshot"})]
            for node in made.nodes:
                with Writers([other for other in made.nodes if other is not node]) as writers:
                    servers.wait_until(lambda: writers.written > 200, "writes under way")
                    node.kill()
                    written = writers.written
                    servers.wait_until(lambda: writers.written > written + 500, "writes go on", 60)
                node.start()
                made.wait_until_well()
            for follower in followers:
                servers.wait_until(lambda: knows_all(follower, made.nodes[0]), "all is known", 60, 0.2)
                follower.stop()
                print(f"\n{follower.events} events, resumed {follower.resumed}, came again {follower.came_again}")
            assert sum(follower.resumed for follower in followers) >= 1, "a node was lost under a watch"
            assert all(follower.came_again == 0 for follower in followers), "the gateway went on by itself"
        finally:
            gateway.kill()
        assert_no_panic(made)


@needs_etcd
def test_a_watch_at_a_node_without_replicas_survives_a_drain_and_a_kill(flux_binary, tmp_path):
    with cluster.Cluster(tmp_path / "c", 4, binary=flux_binary, fsync="no") as made:
        first, second = made.nodes[0], made.nodes[1]
        gateway = Gateway(tmp_path / "gateway", [first], binary=flux_binary).start()
        try:
            follower = Follower(gateway.http_port)
            with Writers(made.nodes[1:]) as writers:
                servers.wait_until(lambda: writers.written > 200, "writes under way")
                # The node that is watched loses all its replicas, and the watch goes on at the others'.
                drained = admin(second, "drain", first.node_id)
                print(drained)
                servers.wait_until(lambda: not replicas_of(made, first), "it has nothing left", 120, 0.2)
                written = writers.written
                servers.wait_until(lambda: writers.written > written + 500, "writes go on", 60)
                second.kill()
                written = writers.written
                servers.wait_until(lambda: writers.written > written + 500, "writes go on", 60)
            second.start()
            servers.wait_until(lambda: knows_all(follower, first), "all is known", 60, 0.2)
            follower.stop()
            print(f"\n{follower.events} events, resumed {follower.resumed}, came again {follower.came_again}")
            assert follower.came_again == 0 and follower.resumed == 0, "the node went on by itself"
            # A watch that begins at a node without replicas.
            with GrpcWatch(first.grpc_port, prefix=b"late").started() as late:
                write(made.nodes[2], *[("SET", f"late{number}", "v") for number in range(100)])
                late.until(lambda messages: len(late.changes()) >= 100, "all changes")
                token = late.token()
            with GrpcWatch(made.nodes[3].grpc_port, prefix=b"late", token=token).started() as elsewhere:
                write(made.nodes[2], ("SET", "late", "w"))
                elsewhere.until(lambda messages: elsewhere.changes(), "the next change")
                assert told(elsewhere.changes()) == [("set", b"late", b"w")]
        finally:
            gateway.kill()
        assert_no_panic(made)


def replicas_of(made, node):
    report = node.ask("/cluster/partitions") or {"partitions": [None]}
    return report["partitions"]


def assert_no_panic(made):
    for node in made.nodes:
        assert "panicked" not in node.logs(), node.logs()[-6000:]
