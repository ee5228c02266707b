"""The gRPC service as a client sees it that knows nothing but server reflection."""

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICE = "flux.kv.v1.KV"


class Service:
    """Calls methods by name; requests are dicts, replies are messages."""

    def __init__(self, channel, name):
        self.channel = channel
        database = ProtoReflectionDescriptorDatabase(channel)
        self.services = set(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        self.descriptor = pool.FindServiceByName(name)

    def call(self, method, timeout=10.0, metadata=None, **fields):
        found = self.descriptor.methods_by_name[method]
        request = message_factory.GetMessageClass(found.input_type)(**fields)
        answer = message_factory.GetMessageClass(found.output_type)
        invoke = self.channel.unary_unary(
            f"/{self.descriptor.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return invoke(request, timeout=timeout, metadata=metadata)


@pytest.fixture
def channel(flux):
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{flux.grpc_port}", options=options) as channel:
        yield channel


@pytest.fixture
def kv(channel):
    return Service(channel, SERVICE)


def refused(code, flux_code=None):
    """A context in which a call must fail with this status."""

    class Refused:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, _):
            assert kind is not None, f"not refused with {code}"
            if not isinstance(error, grpc.RpcError):
                return False
            assert error.code() == code, error
            if flux_code:
                assert error.details(), "a status without a message"
                trailers = {item.key: item.value for item in error.trailing_metadata()}
                assert trailers.get("flux-code") == flux_code, trailers
            return True

    return Refused()


def test_reflection_lists_the_services(kv):
    assert {SERVICE, "grpc.health.v1.Health"} <= kv.services
    assert set(kv.descriptor.methods_by_name) == {
        "Get", "Set", "Delete", "Increment", "BatchGet", "BatchWrite", "Scan", "Watch",
    }


def test_health(channel):
    health = Service(channel, "grpc.health.v1.Health")
    serving = 1
    assert health.call("Check").status == serving
    assert health.call("Check", service=SERVICE).status == serving
    with refused(grpc.StatusCode.NOT_FOUND):
        health.call("Check", service="no.such.Service")


def test_set_get_delete(flux, kv):
    key, value = bytes(range(256)), b"\x00\xff" * 100
    written = kv.call("Set", key=key, value=value)
    assert written.written and written.version > 0
    got = kv.call("Get", key=key)
    assert (got.found, got.value, got.version) == (True, value, written.version)
    assert not got.HasField("expires_at_ms")
    with flux.connect() as connection:
        assert connection.call("GET", key) == value
    assert kv.call("Delete", key=key).deleted
    assert not kv.call("Delete", key=key).deleted
    assert not kv.call("Get", key=key).found


def test_versions_grow_over_deletes(kv):
    versions = []
    for number in range(5):
        versions.append(kv.call("Set", key=b"k", value=b"%d" % number).version)
        if number % 2:
            kv.call("Delete", key=b"k")
    assert versions == sorted(set(versions))


def test_conditions(kv):
    set_ = lambda value, **condition: kv.call("Set", key=b"k", value=value, only_if=condition)
    assert not set_(b"a", present=True).written
    assert not set_(b"a", version=7).written
    first = set_(b"a", absent=True)
    assert first.written
    again = set_(b"b", absent=True)
    assert not again.written and again.version == first.version
    assert not set_(b"b", version=0).written
    assert not set_(b"b", version=first.version + 1).written
    second = set_(b"b", version=first.version)
    assert second.written and second.version > first.version
    assert not set_(b"c", version=first.version).written
    assert set_(b"c", present=True).written
    conflict = kv.call("Delete", key=b"k", only_if={"version": first.version})
    assert not conflict.deleted and conflict.conflict_version > second.version
    assert kv.call("Get", key=b"k").value == b"c"
    assert kv.call("Delete", key=b"k", only_if={"version": conflict.conflict_version}).deleted
    assert set_(b"d", version=0).written


def test_previous_value(kv):
    first = kv.call("Set", key=b"k", value=b"a", return_previous=True)
    assert first.written and not first.HasField("previous")
    second = kv.call("Set", key=b"k", value=b"b", return_previous=True)
    assert second.written and second.previous.value == b"a"


def test_ttl(flux, kv):
    kv.call("Set", key=b"k", value=b"v", ttl_ms=100_000)
    with flux.connect() as connection:
        assert 90_000 < connection.call("PTTL", "k") <= 100_000
        assert kv.call("Get", key=b"k").expires_at_ms == connection.call("PEXPIRETIME", "k")
        kv.call("Set", key=b"k", value=b"w", keep_ttl=True)
        assert connection.call("PTTL", "k") > 0
        kv.call("Set", key=b"k", value=b"w")
        assert connection.call("PTTL", "k") == -1
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
        kv.call("Set", key=b"k", value=b"v", ttl_ms=0)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
        kv.call("Set", key=b"k", value=b"v", ttl_ms=2**64 - 1)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
        kv.call("Set", key=b"k", value=b"v", ttl_ms=5, keep_ttl=True)
    assert kv.call("Get", key=b"k").value == b"w"


def test_increment(flux, kv):
    assert kv.call("Increment", key=b"n").value == 1
    assert kv.call("Increment", key=b"n", delta=-5).value == -4
    assert kv.call("Increment", key=b"n", delta=0).value == -4
    assert kv.call("Increment", key=b"n").version > 0
    with flux.connect() as connection:
        connection.call("SET", "text", "abc")
        connection.call("SET", "most", 2**63 - 1)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_INTEGER"):
        kv.call("Increment", key=b"text")
    with refused(grpc.StatusCode.OUT_OF_RANGE, "OVERFLOW"):
        kv.call("Increment", key=b"most")


def test_batch_get_over_partitions(kv):
    for number in range(50):
        kv.call("Set", key=b"k%d" % number, value=b"%d" % number)
    keys = [b"k%d" % number for number in range(49, -1, -1)] + [b"missing", b"k0"]
    values = kv.call("BatchGet", keys=keys).values
    assert [v.value for v in values] == [b"%d" % n for n in range(49, -1, -1)] + [b"", b"0"]
    assert [v.found for v in values] == [True] * 50 + [False, True]


def test_batch_write_is_all_or_nothing(kv):
    first = kv.call("Set", key=b"{t}a", value=b"1")
    done = kv.call(
        "BatchWrite",
        ops=[
            {"set": {"key": b"{t}b", "value": b"2", "only_if": {"absent": True}}},
            {"increment": {"key": b"{t}a", "delta": 9}},
            {"delete": {"key": b"{t}missing"}},
        ],
        guards=[{"key": b"{t}a", "version": first.version}],
    )
    assert done.written and len(done.results) == 3
    assert done.results[1].value == 10 and not done.results[2].deleted
    refused_batch = kv.call(
        "BatchWrite",
        ops=[
            {"set": {"key": b"{t}c", "value": b"3"}},
            {"set": {"key": b"{t}b", "value": b"x", "only_if": {"absent": True}}},
        ],
    )
    assert not refused_batch.written and refused_batch.failed_op == 1
    stale = kv.call(
        "BatchWrite",
        ops=[{"set": {"key": b"{t}c", "value": b"3"}}],
        guards=[{"key": b"{t}a", "version": first.version}],
    )
    assert not stale.written and not stale.HasField("failed_op")
    assert not kv.call("Get", key=b"{t}c").found
    assert kv.call("Get", key=b"{t}b").value == b"2"
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_INTEGER"):
        kv.call("Set", key=b"{t}b", value=b"text")
        kv.call(
            "BatchWrite",
            ops=[
                {"set": {"key": b"{t}c", "value": b"3"}},
                {"increment": {"key": b"{t}b"}},
            ],
        )
    assert not kv.call("Get", key=b"{t}c").found


def test_batch_write_over_partitions_is_refused(kv):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "CROSS_SLOT"):
        kv.call(
            "BatchWrite",
            ops=[
                {"set": {"key": b"foo", "value": b"1"}},
                {"set": {"key": b"bar", "value": b"2"}},
            ],
        )
    assert not kv.call("Get", key=b"foo").found
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        kv.call("BatchWrite", ops=[{}])


def test_scan(kv):
    expected = {b"key:%d" % number: b"v%d" % number for number in range(500)}
    for key, value in expected.items():
        kv.call("Set", key=key, value=value)
    kv.call("Set", key=b"other", value=b"x")
    for prefix, wanted in [(b"key:", expected), (b"", expected | {b"other": b"x"}), (b"zz", {})]:
        seen, token, pages = {}, b"", 0
        while True:
            page = kv.call("Scan", prefix=prefix, page_token=token, limit=50)
            seen.update((item.key, item.value) for item in page.items)
            token, pages = page.next_page_token, pages + 1
            assert pages < 2000, "the scan does not end"
            if not token:
                break
        assert seen == wanted
    names = kv.call("Scan", prefix=b"other", keys_only=True, limit=10_000)
    assert all(item.value == b"" for item in names.items)
    for bad in [b"x", b"\xff" * 100]:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
            kv.call("Scan", page_token=bad)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
        kv.call("Scan", limit=10_001)


def test_limits(kv):
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        kv.call("Get", key=b"")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        kv.call("Set", key=b"", value=b"v")
    assert kv.call("Set", key=b"k" * 65536, value=b"v").written
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "TOO_LARGE"):
        kv.call("Set", key=b"k" * 65537, value=b"v")
    value = b"v" * (16 << 20)
    assert kv.call("Set", key=b"big", value=value, timeout=60).written
    assert kv.call("Get", key=b"big", timeout=60).value == value
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "TOO_LARGE"):
        kv.call("Set", key=b"big", value=value + b"v", timeout=60)
    assert len(kv.call("Get", key=b"big", timeout=60).value) == 16 << 20


def test_deadline(flux, kv):
    """A call waits no longer than its deadline, and the node goes on."""
    kv.call("Get", key=b"k")
    try:
        kv.call("Set", key=b"k", value=b"v", timeout=0.000001)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert kv.call("Set", key=b"k", value=b"w").written
    assert kv.call("Get", key=b"k").value == b"w"


def test_malformed_message(channel):
    invoke = channel.unary_unary(f"/{SERVICE}/Get")
    with refused(grpc.StatusCode.INTERNAL):
        invoke(b"\xff\xff\xff\xff", timeout=10)
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        channel.unary_unary(f"/{SERVICE}/NoSuchMethod")(b"", timeout=10)
