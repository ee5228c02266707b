"""W3C trace contexts end to end: what a client says of a write comes with its event, at the broker and to watchers."""

import contextlib
import http.client
import random
import urllib.parse

import grpc
import pytest

import changes
import cluster
import native
import rabbitmq
from test_grpc import SERVICE, Service
from test_watch import Gateway
from watching import GrpcWatch, SseWatch

TRACE, OTHER = (
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
)
BAD = [
    [""],
    ["nonsense"],
    [TRACE.upper()],
    [TRACE + "-"],
    ["ff" + TRACE[2:]],
    ["00-" + "0" * 32 + TRACE[35:]],
    [TRACE[:36] + "0" * 16 + TRACE[52:]],
    [TRACE, OTHER],
    [TRACE, TRACE],
]
# Of two entries this client of gRPC sends the last one alone.
BAD_ALONE = [traces for traces in BAD if len(traces) == 1]

pytestmark = pytest.mark.skipif(not rabbitmq.installed(), reason="rabbitmq-server is not installed")


@pytest.fixture(scope="module")
def broker(flux_binary, tmp_path_factory):
    broker = rabbitmq.RabbitMQ(tmp_path_factory.mktemp("rabbitmq")).start()
    yield broker
    broker.kill()


class Http:
    """The gateway; headers as they are given, also two of a name."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def send(self, method, query, traces, body=b""):
        self.connection.putrequest(method, f"/api/v1/kv{query}")
        for trace in traces:
            self.connection.putheader("Traceparent", trace)
        # It is not handed on, and disturbs nobody.
        self.connection.putheader("Tracestate", "rojo=00f067aa0ba902b7")
        self.connection.putheader("Content-Type", "application/x-www-form-urlencoded")
        self.connection.putheader("Content-Length", str(len(body)))
        self.connection.endheaders(body)
        answer = self.connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()

    def set(self, key, traces):
        self.send("POST", "", traces, urllib.parse.urlencode({"key": key, "value": "v"}).encode())

    def delete(self, key, traces):
        self.send("DELETE", f"?key={urllib.parse.quote(key)}", traces)


def metadata(traces):
    return [("traceparent", trace) for trace in traces] + [("tracestate", "rojo=1")]


def trace_of(number):
    return f"00-{number:032x}-{number:016x}-01"


def write_over_http(port):
    """Writes; gives (op, key, trace) of each, in order."""
    api = Http(port)
    api.set("http", [TRACE])
    api.set("http", [])
    api.delete("http", [OTHER])
    api.set("later", ["cc" + TRACE[2:] + "-what-version-cc-has"])
    for traces in BAD:
        api.set("bad", traces)
    return [
        ("set", "http", TRACE), ("set", "http", None), ("delete", "http", OTHER), ("set", "later", TRACE),
        *[("set", "bad", None)] * len(BAD),
    ]


def write_over_grpc(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        kv = Service(channel, SERVICE)
        traced = metadata([TRACE])
        kv.call("Set", metadata=traced, key=b"grpc", value=b"v")
        kv.call("Set", key=b"grpc", value=b"w")
        kv.call("Increment", metadata=metadata([OTHER]), key=b"n")
        ops = [{"set": {"key": b"one", "value": b"1"}}, {"delete": {"key": b"grpc"}}, {"increment": {"key": b"n"}}]
        assert kv.call("BatchWrite", metadata=traced, ops=ops).written
        kv.call("Delete", metadata=metadata([OTHER]), key=b"one")
        # A read changes nothing, whatever it comes with.
        assert kv.call("Get", metadata=traced, key=b"n").found
        for traces in BAD_ALONE:
            kv.call("Set", metadata=metadata(traces), key=b"bad", value=b"v")
    return [
        ("set", "grpc", TRACE), ("set", "grpc", None), ("set", "n", OTHER),
        ("set", "one", TRACE), ("delete", "grpc", TRACE), ("set", "n", TRACE), ("delete", "one", OTHER),
        *[("set", "bad", None)] * len(BAD_ALONE),
    ]


def write_over_the_data_port(node, short):
    with native.Client(node.port) as client, node.connect() as resp:
        session = (random.getrandbits(64) | 1, 1, 1)
        client.set(b"native", b"v", trace=TRACE)
        client.set(b"native", b"v")
        total, _ = client.increment(b"m", session=session, trace=OTHER)
        # Again, which changes nothing, though it says to be another's.
        assert client.increment(b"m", session=session, trace=TRACE)[0] == total
        assert client.get(b"m", trace=TRACE)["value"] == b"%d" % total
        client.set(b"native", b"v", trace=b"\0" * 24 + b"\1")
        # RESP has no place for one.
        resp.call("SET", "resp", "v")
        body = bytes([0, 2]) + (30).to_bytes(8, "little") + bytes([0])
        client.call(native.SET, body + native.packed(short) + native.packed(b"v"), trace=OTHER)
    return [
        ("set", "native", TRACE), ("set", "native", None), ("set", "m", OTHER), ("set", "native", None),
        ("set", "resp", None), ("set", short.decode(), OTHER),
    ]


@pytest.mark.parametrize("batch", [1, 10])
def test_the_trace_of_a_write_comes_with_its_event(broker, start_flux, batch):
    name = f"traces-{batch}"
    queue = changes.Queue(broker, name, name)
    # Connections are with both workers in turn, and the partition with one.
    node = start_flux(
        mode="up", rabbitmq_url=broker.url, cdc_exchange=name, cdc_batch_max_events=batch,
        partitions=1, workers=2, fsync="no",
    )
    with GrpcWatch(node.grpc_port).started() as watch, SseWatch(node.http_port).started() as events:
        expected = write_over_http(node.http_port) + write_over_grpc(node.grpc_port)
        for short in (b"short1", b"short2"):
            expected += write_over_the_data_port(node, short)
        count = len(expected) + 2
        messages = queue.take(count)
        watch.until(lambda _: len(watch.changes()) == count, "all changes")
        events.until(lambda _: len(events.changes()) == count, "all changes")

    def told(records):
        found = [(record["op"], record["key"], record.get("traceparent")) for record in records]
        # When the keys expire is not known; that nobody's request did it is.
        assert {one for one in found if one[0] == "expire"} == {("expire", f"short{n}", None) for n in (1, 2)}
        return [one for one in found if one[0] != "expire"]

    assert told(record for message in messages for record in message.records) == expected
    assert told(events.changes()) == expected
    kinds = ["set", "delete", "expire"]
    assert told(
        {"op": kinds[one.kind], "key": one.key.decode(), "traceparent": one.traceparent or None}
        for one in watch.changes()
    ) == expected
    for message in messages:
        header = message.properties.headers.get("traceparent")
        assert header == (message.records[0].get("traceparent") if batch == 1 else None)


def test_each_write_keeps_its_own_trace_where_many_come_at_once(broker, start_flux):
    name = "traces-at-once"
    queue = changes.Queue(broker, name, name)
    node = start_flux(
        rabbitmq_url=broker.url, cdc_exchange=name, cdc_batch_max_events=50, partitions=2, workers=2,
    )
    dice = random.Random(7)
    expected = {}
    with native.Client(node.port) as one, native.Client(node.port) as other:
        for turn in range(20):
            for client in (one, other):
                writes = []
                for _ in range(50):
                    key = f"k{len(expected)}"
                    # Several in a row may be of one trace, as those of one request are.
                    expected[key] = dice.choice([None, trace_of(1 + turn), trace_of(1000 + len(expected))])
                    writes.append((key.encode(), b"v", expected[key]))
                client.set_all(writes)
    records = queue.take_records(len(expected))
    assert {record["key"]: record.get("traceparent") for record in records} == expected


@pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")
def test_a_trace_goes_with_a_write_to_whoever_leads(flux_binary, broker, shared_folder):
    name = "traces-of-a-cluster"
    queue = changes.Queue(broker, name, name)
    with shared_folder("cluster") as folder, contextlib.ExitStack() as stack:
        made = stack.enter_context(cluster.Cluster(
            folder, binary=flux_binary, rabbitmq_url=broker.url, cdc_exchange=name, fsync="no", workers=2,
        ))
        asked, another = made.nodes[:2]
        gateway = Gateway(folder / "gateway", [asked], binary=flux_binary).start()
        stack.callback(gateway.kill)
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{asked.grpc_port}"))
        watch = stack.enter_context(GrpcWatch(another.grpc_port)).started()
        client = stack.enter_context(native.Client(asked.port))
        api, kv = Http(gateway.http_port), Service(channel, SERVICE)
        led = asked.led()
        keys = cluster.keys_of_all()
        led_elsewhere = [key for number, key in enumerate(keys) if number not in led]
        assert len(led_elsewhere) >= cluster.PARTITIONS // 3, led
        expected = {}
        for number, key in enumerate(keys):
            name_of = key.decode()
            traces = [trace_of(1 + 3 * number + way) for way in range(3)]
            api.set(name_of, traces[:1])
            kv.call("Set", metadata=metadata(traces[1:2]), key=key, value=b"v")
            client.set(key, b"v", trace=traces[2])
            client.set(key, b"v")
            expected[name_of] = [*traces, None]
        count = sum(map(len, expected.values()))
        found = {}
        for record in queue.take_records(count):
            found.setdefault(record["key"], []).append(record.get("traceparent"))
        assert found == expected
        watch.until(lambda _: len(watch.changes()) == count, "all changes")
        found = {}
        for one in watch.changes():
            found.setdefault(one.key.decode(), []).append(one.traceparent or None)
        assert found == expected
