"""Change capture end to end: what a node publishes to a real RabbitMQ, field by field, and that a cluster
publishes all of it in order. test_cdc_faults.py has what goes wrong.
"""

import base64
import random
import time

import pytest

import changes
import cluster
import rabbitmq
import servers
from test_consume import Consumer, verify

FAR_MS = 4_000_000_000_000

pytestmark = pytest.mark.skipif(not rabbitmq.installed(), reason="rabbitmq-server is not installed")


@pytest.fixture(scope="module")
def broker(flux_binary, tmp_path_factory):
    """The broker of all tests here."""
    broker = rabbitmq.RabbitMQ(tmp_path_factory.mktemp("rabbitmq")).start()
    yield broker
    broker.kill()


@pytest.fixture
def publishing(broker, start_flux, request):
    """Starts a node with an exchange of its own; gives it, and a queue of all that it publishes."""

    def start(**settings):
        name = request.node.name
        queue = changes.Queue(broker, f"queue-of-{name}", name)
        settings = {"partitions": 1, "fsync": "no"} | settings
        return start_flux(rabbitmq_url=broker.url, cdc_exchange=name, **settings), queue

    return start


def shown(record, *fields):
    return tuple(record[field] for field in fields)


def change(op, key, revision, previous_version, **more):
    is_set = op == "set"
    fields = (op, key, "v" if is_set else None, 0, revision, revision if is_set else 0, previous_version, None, 5)
    return dict(zip(changes.ALWAYS, fields)) | more


def test_these_tests_see_what_is_wrong():
    good = [
        change("set", "a", 1, 0), change("set", "a", 2, 1), change("expire", "a", 3, 2),
        change("set", "b", 4, 0), change("delete", "b", 5, 4),
    ]
    assert changes.Replay(good).wrong == []
    assert changes.Replay([*good, good[0]]).repeats == 1
    for wrong in [
        good[1:],
        good[:2] + good[3:],
        [good[1], good[0]],
        [good[0], change("set", "a", 2, 0)],
        [good[0], change("set", "other", 2, 1)],
        [good[0], change("set", "a", 2, 1, version=1)],
        [good[0], change("delete", "other", 2, 0)],
    ]:
        assert changes.Replay(wrong).wrong, wrong
    begin = change("gap", None, 9, 0, phase="begin", gap="0/9/1", lost_from=6, lost_to=9)
    row = change("set", "c", 7, 0, gap="0/9/1", row=1)
    ending = change("gap", None, 9, 0, phase="end", gap="0/9/1", rows=1)
    whole = changes.Replay([*good, begin, row, ending])
    assert (whole.wrong, whole.revisions, len(whole.table)) == ([], {0: 9}, 1)
    for wrong in [[begin, ending], [row, ending], [begin, row, row | {"row": 3}, ending]]:
        assert changes.Replay([*good, *wrong]).wrong, wrong

    for record in [*good, begin, row, ending, good, [row]]:
        changes.VALIDATOR.validate(record)
    for record in [
        good[0] | {"value": None}, good[2] | {"version": 3}, good[0] | {"op": "put"}, good[0] | {"row": 1},
        good[0] | {"encoding": "hex"}, good[0] | {"revision": "1"}, begin | {"key": "k"}, row | {"row": 0},
        {name: value for name, value in good[0].items() if name != "version"}, [], [begin],
        good[0] | {"traceparent": "01"}, ending | {"phase": "begin"},
    ]:
        assert not changes.VALIDATOR.is_valid(record), record


def test_every_kind_of_change_is_a_message(publishing):
    node, queue = publishing()
    before_ms = int(time.time() * 1000)
    with node.connect() as connection:
        call = connection.call
        call("SET", "user:7/name", "Ann")
        call("SET", "user:7/name", "Bob", "PXAT", FAR_MS)
        call("DEL", "nobody")
        call("INCR", "n")
        call("APPEND", "user:7/name", "by")
        call("PERSIST", "user:7/name")
        call("RENAME", "n", "m")
        call("DEL", "m", "nobody", "user:7/name")
        call("SET", "gone", "x", "PX", 50)
        messages = queue.take(11)
        after_ms = int(time.time() * 1000)
        call("GETDEL", "nobody")
        call("DEL", "gone")
        call("SET", "last", "")
        messages += queue.take(1)
    records = [record for message in messages for record in message.records]
    assert [len(message.records) for message in messages] == [1] * 12
    gone_at = next(record["expires_at_ms"] for record in records if record["key"] == "gone")
    assert before_ms + 50 <= gone_at <= after_ms + 50
    fields = ("op", "key", "value", "revision", "version", "previous_version", "expires_at_ms")
    assert [shown(record, *fields) for record in records] == [
        ("set", "user:7/name", "Ann", 1, 1, 0, None),
        ("set", "user:7/name", "Bob", 2, 2, 1, FAR_MS),
        ("set", "n", "1", 3, 3, 0, None),
        ("set", "user:7/name", "Bobby", 4, 4, 2, FAR_MS),
        ("set", "user:7/name", "Bobby", 5, 5, 4, None),
        ("set", "m", "1", 6, 6, 0, None),
        ("delete", "n", None, 7, 0, 3, None),
        ("delete", "m", None, 8, 0, 6, None),
        ("delete", "user:7/name", None, 9, 0, 5, None),
        ("set", "gone", "x", 10, 10, 0, gone_at),
        ("expire", "gone", None, 11, 0, 10, None),
        ("set", "last", "", 12, 12, 0, None),
    ]
    for record in records:
        # Nothing more: no encoding, no previous value, no trace.
        assert tuple(record) == changes.ALWAYS and record["partition"] == 0
        assert before_ms <= record["committed_at_ms"] <= after_ms + 10_000
    replay = changes.Replay(records)
    assert (replay.wrong, replay.repeats) == ([], 0)


def test_a_message_carries_what_the_broker_and_cloudevents_need(publishing):
    node, queue = publishing()
    long = "k" * 300
    with node.connect() as connection:
        keys = ["user:7/name", "a b\u00e9#*", b"\xff:/x", "line\nbreak", long]
        for key in keys:
            connection.call("SET", key, "v")
        connection.call("DEL", "user:7/name")
    messages = queue.take(6)
    assert [message.routing_key for message in messages] == [
        "set.user.7.name", "set.a b\u00e9#*", "set._..x", "set.line\nbreak",
        "set." + "k" * 251, "delete.user.7.name",
    ]
    subjects = ["user:7/name", "a b\u00e9#*", None, None, long, "user:7/name"]
    cluster_name = messages[0].properties.message_id.split("/")[0]
    assert cluster_name
    for message, subject in zip(messages, subjects):
        properties, [record] = message.properties, message.records
        assert properties.delivery_mode == 2
        assert properties.content_type == "application/json"
        assert properties.message_id == f"{cluster_name}/0/{record['revision']}"
        assert properties.timestamp == record["committed_at_ms"] // 1000
        at = time.gmtime(record["committed_at_ms"] // 1000)
        text = f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{record['committed_at_ms'] % 1000:03}Z"
        expected = {
            "cloudEvents:specversion": "1.0",
            "cloudEvents:id": properties.message_id,
            "cloudEvents:source": f"/flux-kv/{cluster_name}/0",
            "cloudEvents:type": f"flux-kv.{record['op']}",
            "cloudEvents:time": text,
        }
        if subject is not None:
            expected["cloudEvents:subject"] = subject
        # The queue counts deliveries there.
        assert {k: v for k, v in properties.headers.items() if k != "x-delivery-count"} == expected


def test_keys_and_values_that_are_no_text_are_base64(publishing):
    node, queue = publishing(cdc_include_previous="true")
    every_byte = bytes(range(256))
    with node.connect() as connection:
        connection.call("SET", every_byte, "text")
        connection.call("SET", "text", every_byte)
        connection.call("SET", "text", "\u00e9\u2028\U0001f600\x00\"\\")
        connection.call("SET", "text", "plain")
        connection.call("DEL", every_byte)
    records = queue.take_records(5)
    assert ["encoding" in record for record in records] == [True, True, True, False, True]
    decoded = [
        tuple(changes.decoded(record, field) for field in ("key", "value", "previous_value"))
        for record in records
    ]
    text = "\u00e9\u2028\U0001f600\x00\"\\".encode()
    assert decoded == [
        (every_byte, b"text", None),
        (b"text", every_byte, None),
        (b"text", text, every_byte),
        (b"text", b"plain", text),
        (every_byte, None, b"text"),
    ]
    assert records[0]["key"] == base64.b64encode(every_byte).decode()


def test_the_largest_value(publishing):
    node, queue = publishing(cdc_include_previous="true")
    size = 16 << 20
    text, binary = b"t" * size, random.Random(3).randbytes(size)
    with node.connect(timeout=60) as connection:
        connection.call("SET", "large", text)
        connection.call("SET", "large", binary)
        connection.call("SET", "large", "small")
    records = queue.take_records(3, deadline_s=120)
    assert [changes.decoded(record, "value") for record in records] == [text, binary, b"small"]
    # Before there is one, and then the values in turn.
    previous = [changes.decoded(record, "previous_value") for record in records]
    assert previous[0] is None and previous[2] == binary
    assert previous[1] == text


def test_previous_values_are_sent_where_they_are_asked_for(publishing):
    node, queue = publishing(cdc_include_previous="true")
    with node.connect() as connection:
        # Also where the write before is still under way.
        connection.pipeline([("SET", "k", "1"), ("INCR", "k"), ("APPEND", "k", "0"), ("DEL", "k")])
        connection.pipeline([("MULTI",), ("SET", "k", "a"), ("SET", "k", ""), ("SET", "k", "b"), ("EXEC",)])
        connection.call("PEXPIRE", "k", 30)
    records = queue.take_records(9)
    found = [shown(record, "op", "value") + (record.get("previous_value"),) for record in records]
    assert found == [
        ("set", "1", None), ("set", "2", "1"), ("set", "20", "2"), ("delete", None, "20"),
        ("set", "a", None), ("set", "", "a"), ("set", "b", ""), ("set", "b", "b"),
        ("expire", None, "b"),
    ]


def test_batches_hold_the_changes_of_one_partition(publishing):
    node, queue = publishing(cdc_batch_max_events=10, partitions=4)
    with node.connect() as connection:
        for start in range(0, 2000, 200):
            numbers = range(start, start + 200)
            connection.pipeline([("SET", f"k:{number % 300}", number) for number in numbers])
    messages = queue.take(2000)
    replay = changes.Replay(record for message in messages for record in message.records)
    assert (replay.wrong, replay.repeats, sum(replay.revisions.values())) == ([], 0, 2000)
    # One alone is an array too.
    with node.connect() as connection:
        connection.call("SET", "one", "1")
    messages += queue.take(1)
    for message in messages:
        first, last = message.records[0], message.records[-1]
        assert {record["partition"] for record in message.records} == {first["partition"]}
        assert message.routing_key == f"batch.partition-{first['partition']}"
        place = f"{first['partition']}/{first['revision']}-{last['revision']}"
        assert message.properties.message_id.split("/", 1)[1] == place
        assert message.properties.headers["cloudEvents:type"] == "flux-kv.batch"
    sizes = [len(message.records) for message in messages]
    assert max(sizes) == 10 and len(sizes) < 1000


def test_what_changes_nothing_leaves_no_hole(publishing):
    """Neither deletes of absent keys, nor writes that are refused, nor the cursor's own entries."""
    node, queue = publishing(partitions=2)
    with node.connect() as connection:
        for number in range(200):
            connection.call("SET", f"k:{number}", "text")
            replies = connection.pipeline([
                ("DEL", "absent"), ("GETDEL", "absent"), ("UNLINK", "absent", "other"),
                ("INCR", f"k:{number}"), ("SET", f"k:{number}", "x", "NX"), ("SET", "absent", "x", "XX"),
                ("PEXPIRE", "absent", 10), ("PERSIST", f"k:{number}"), ("GET", f"k:{number}"),
            ])
            assert replies[:3] == [0, None, 0] and replies[4:] == [None, None, 0, 0, b"text"]
            if number % 50 == 49:
                # As the cursor is written now.
                found = changes.wait_until_published([node], 2)
        assert sum(found.values()) == 200
        connection.call("FLUSHALL")
        connection.call("FLUSHALL")
        found = changes.wait_until_published([node], 2)
    assert sum(found.values()) == 400
    replay = changes.Replay(queue.take_records(400))
    assert (replay.wrong, replay.repeats, replay.table) == ([], 0, {})
    assert replay.kinds == {"set": 200, "delete": 200}
    assert replay.revisions == found


def test_a_restarted_node_goes_on_where_it_was(publishing):
    node, queue = publishing(partitions=4, fsync="always")
    for number in range(4):
        with node.connect() as connection:
            connection.pipeline([("SET", f"k:{key}", number) for key in range(100)])
        if number == 3:
            break
        changes.wait_until_published([node], 4)
        servers.wait_until(lambda: cursor_is_there(node), "the cursor is in the log")
        assert node.stop() == 0, node.log()[-3000:]
        node.start()
    replay = changes.Replay(queue.take_records(400))
    # Nothing is sent again.
    assert (replay.wrong, replay.repeats) == ([], 0)
    assert sum(replay.revisions.values()) == 400


def cursor_is_there(node):
    return all(one["cursor"] == one["newest"] for one in changes.report(node)["partitions"])


def test_metrics_say_how_it_stands(publishing):
    node, queue = publishing(partitions=4)
    with node.connect() as connection:
        connection.pipeline([("SET", f"k:{number}", "v") for number in range(100)])
    changes.wait_until_published([node], 4)
    names = ["published_total", "confirmed_total", "returned_total", "nacked_total", "gaps_total",
             "gap_revisions_total", "reconnects_total", "lag_events", "lag_seconds", "in_flight_bytes",
             "trouble"]
    values = {name: changes.metric(node, f"cdc_{name}") for name in names}
    assert values == dict.fromkeys(names, 0) | {"published_total": 100, "confirmed_total": 100}
    stands = changes.report(node)
    assert (stands["publishes"], stands["troubles"]) == (True, [])
    assert [one["partition"] for one in stands["partitions"]] == [0, 1, 2, 3]
    assert sum(one["confirmed"] for one in stands["partitions"]) == 100
    # The password is nowhere.
    assert broker_password_of(node) not in node.log()
    queue.take(100)


def broker_password_of(node):
    return str(node.settings["rabbitmq_url"]).split(":")[2].split("@")[0]


def test_a_node_without_a_broker_publishes_nothing(start_flux):
    node = start_flux(fsync="no")
    assert changes.report(node) == {
        "publishes": False, "troubles": [], "lag_events": 0, "lag_ms": 0, "partitions": [],
    }
    assert "flux_cdc_lag_events" not in node.metrics()


@pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")
def test_a_cluster_publishes_each_partition_in_order(flux_binary, broker, shared_folder, request):
    exchange = request.node.name
    with (
        shared_folder("cluster") as folder,
        cluster.Cluster(
            folder, binary=flux_binary, rabbitmq_url=broker.url, cdc_exchange=exchange
        ) as made,
    ):
        consumer = Consumer(folder / "consumer", broker, exchange, "--rotate-bytes", "0")
        try:
            consumer.spawn()
            dice = random.Random(5)
            for turn in range(30):
                with made.nodes[turn % 3].connect() as connection:
                    replies = connection.pipeline([one_write(dice) for _ in range(100)])
                    assert not [one for one in replies if isinstance(one, Exception)], replies
            a_planned_stop_repeats_nothing(made)
            # What expires is gone before it is counted.
            servers.wait_until(
                lambda: not any(changes.metric(node, "volatile_keys") for node in made.nodes),
                "what expires is gone",
            )
            found = changes.wait_until_published(made.nodes, cluster.PARTITIONS)
            consumer.wait_for(sum(found.values()), deadline_s=120)
            assert consumer.stop() == 0
        finally:
            consumer.kill()
        replay = changes.Replay(consumer.records())
        assert (replay.wrong, replay.repeats, replay.gaps) == ([], 0, {})
        assert replay.revisions == found
        assert len(replay.revisions) == cluster.PARTITIONS
        assert min(replay.kinds[op] for op in ("set", "delete", "expire")) > 50, replay.kinds
        code, lines = verify(consumer.file, address=f"127.0.0.1:{made.nodes[0].port}")
        assert code == 0, lines[:10]


def a_planned_stop_repeats_nothing(made):
    """The cursor goes before the lead does."""
    changes.wait_until_published(made.nodes, cluster.PARTITIONS)
    victim = max(made.nodes, key=lambda node: len(node.led()))
    rest = [node for node in made.nodes if node is not victim]

    def published_by_the_rest():
        return sum(changes.metric(node, "cdc_published_total") for node in rest)

    before = published_by_the_rest()
    assert victim.stop() == 0, victim.log()[-3000:]
    servers.wait_until(
        lambda: sum(len(node.led()) for node in rest) == cluster.PARTITIONS, "the rest leads all", 30, 0.1
    )
    # One change of each partition, which would come after what is repeated.
    with rest[0].connect() as connection:
        keys = cluster.keys_of_all(prefix=b"after")
        assert connection.pipeline([("SET", key, "1") for key in keys]) == [b"OK"] * len(keys)
    changes.wait_until_published(rest, cluster.PARTITIONS)
    assert published_by_the_rest() == before + len(keys)
    victim.start()
    made.wait_until_well()


def one_write(dice):
    key = f"key:{dice.randrange(400)}"
    return dice.choice([
        ("SET", key, dice.randrange(10**6)), ("SET", key, dice.randrange(10**6)), ("INCR", f"n:{key}"),
        ("DEL", key), ("SET", f"short:{key}", "x", "PX", dice.randrange(1, 100)),
        ("MSET", key, "1", f"n:{key}", "5"),
    ])
