"""`flux consume` against a real RabbitMQ: each event is in its file once, whatever is killed, and the file
compares with the store. The events are published from here, as docs/cdc.md describes them.
"""

import contextlib
import json
import os
import pathlib
import random
import sqlite3
import subprocess
import sys
import threading
import time

import pika
import pytest
from redis.crc import key_slot

import rabbitmq
import servers

EXAMPLE = servers.ROOT / "examples" / "python" / "consumer.py"
RECORD = {
    "op": "set",
    "key": None,
    "value": None,
    "partition": 0,
    "revision": 0,
    "version": 0,
    "previous_version": 0,
    "expires_at_ms": None,
    "committed_at_ms": 0,
}

pytestmark = pytest.mark.skipif(not rabbitmq.installed(), reason="rabbitmq-server is not installed")


def put(partition, revision, key="k", value="v", **more):
    """The event of a write."""
    fields = {"key": key, "value": value, "partition": partition, "revision": revision}
    return RECORD | fields | {"version": revision} | more


def end(partition, revision, key="k", op="delete"):
    """The event of a key's end."""
    return RECORD | {"op": op, "key": key, "partition": partition, "revision": revision}


def gap(partition, lost_from, at, rows, term=1):
    """The records of a gap with these (key, value, version)."""
    name = f"{partition}/{at}/{term}"
    whole = RECORD | {"op": "gap", "partition": partition, "revision": at}
    begin = whole | {"phase": "begin", "lost_from": lost_from, "lost_to": at, "gap": name}
    numbered = [
        put(partition, version, key, value, gap=name, row=number)
        for number, (key, value, version) in enumerate(rows, 1)
    ]
    return [begin, *numbered, whole | {"phase": "end", "gap": name, "rows": len(rows)}]


def in_order(records):
    """Records by partition, in the order in which they stand."""
    partitions = {}
    for record in records:
        partitions.setdefault(record["partition"], []).append(record)
    return partitions


class Consumer(servers.Server):
    """`flux consume` with its own exchange and queue."""

    name = "consume"

    def __init__(self, directory, broker, exchange, *arguments, output=True, url=None):
        super().__init__(directory)
        self.url = url or broker.url
        self.queue = f"queue-of-{exchange}"
        self.file = self.directory / "changes.jsonl"
        self.arguments = ["--exchange", exchange, "--queue", self.queue, *arguments]
        if output:
            self.arguments += ["--output", self.file]

    def command(self):
        return [servers.flux_binary(), "consume", *self.arguments]

    def environment(self):
        return super().environment() | {"FLUX_RABBITMQ_URL": self.url}

    def ready(self):
        return "consuming" in self.log()

    def files(self):
        """The file, after those that it was rotated into."""
        numbers = sorted(
            int(path.suffix[1:])
            for path in self.directory.glob("changes.jsonl.*")
            if path.suffix[1:].isdigit()
        )
        return [pathlib.Path(f"{self.file}.{number}") for number in reversed(numbers)] + [self.file]

    def records(self):
        """The whole lines of all files."""
        text = b"".join(path.read_bytes() for path in self.files() if path.exists())
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]

    def wait_for(self, count, deadline_s=60.0):
        """Waits until the file has so many records, and gives them."""
        servers.wait_until(lambda: len(self.records()) >= count, f"{count} records", deadline_s, 0.05)
        return self.records()


class Publisher:
    """Publishes records as a node does: persistent, mandatory, confirmed."""

    def __init__(self, broker, exchange, declare=True):
        self.exchange = exchange
        self.connection = pika.BlockingConnection(pika.URLParameters(broker.url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        if declare:
            self.declare()

    def declare(self):
        self.channel.exchange_declare(self.exchange, "topic", durable=True)

    def publish(self, *bodies):
        """Each is a record, a list of records, or bytes."""
        for body in bodies:
            first = body[0] if isinstance(body, list) else body
            key = "junk"
            if isinstance(first, dict):
                name = first["key"] or f"partition-{first['partition']}"
                key = f"{first['op']}.{name}"
                body = json.dumps(body).encode()
            properties = pika.BasicProperties(delivery_mode=2, content_type="application/json")
            self.channel.basic_publish(self.exchange, key, body, properties, mandatory=True)

    def close(self):
        self.connection.close()


@pytest.fixture(scope="module")
def broker(flux_binary, tmp_path_factory):
    """The broker of all tests here."""
    broker = rabbitmq.RabbitMQ(tmp_path_factory.mktemp("rabbitmq")).start()
    yield broker
    broker.kill()


@pytest.fixture
def exchange(request):
    return request.node.name


@pytest.fixture
def publisher(broker, exchange):
    publisher = Publisher(broker, exchange)
    yield publisher
    publisher.close()


@pytest.fixture
def consumer(broker, exchange, tmp_path):
    """Makes consumers of the test's queue; `consumer("--prefetch", 10)` is not started yet."""
    made = []

    def make(*arguments, directory="consumer", **options):
        made.append(Consumer(tmp_path / directory, broker, exchange, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def queues(broker):
    """What the broker says of each queue, by its name."""
    columns = ("name", "type", "durable", "arguments", "messages")
    text = broker.ctl("list_queues", "--formatter=json", *columns)
    return {queue["name"]: queue for queue in json.loads(text)}


def wait_until_empty(broker, queue):
    """Waits until all is acknowledged; the broker counts with a delay."""
    servers.wait_until(lambda: queues(broker)[queue]["messages"] == 0, "all is acknowledged", 30, 0.3)


def test_each_event_is_a_line_once(broker, publisher, consumer):
    events = [
        put(0, 1, "user:7", "Ann", expires_at_ms=4_000_000_000_000, committed_at_ms=1_700_000_000_123),
        put(3, 1, "quoted \"\\\n", "\u00e9\u2028\U0001f600"),
        end(0, 2, "user:7") | {"previous_version": 1, "previous_value": "Ann"},
        put(0, 3, "a2V5/w==", "", encoding="base64"),
        end(3, 2, "x", op="expire"),
        *gap(3, 3, 9, [("a", "1", 5), ("b", "2", 9)]),
        put(3, 10),
    ]
    one = consumer().start()
    publisher.publish(events[0], events[0], events[1:4], *events[4:], events[2], events[8])
    assert one.wait_for(len(events)) == events
    assert one.stop() == 0
    assert "10 events written, 3 repeats dropped, 0 holes, 1 gap of 7 revisions" in one.log()
    # What is in the file was acknowledged, and nothing else is read again.
    assert one.records() == events
    queue = queues(broker)[one.queue]
    assert (queue["type"], queue["durable"]) == ("quorum", True)
    assert ["x-single-active-consumer", "bool", True] in queue["arguments"]
    wait_until_empty(broker, one.queue)
    assert one.start().stop() == 0
    assert "read_again=0" in one.log() and "revisions=13" in one.log(), one.log()


def test_a_killed_consumer_misses_and_repeats_nothing(broker, exchange, publisher, consumer):
    partitions, each, kills = 6, 2500, 12
    dice = random.Random(4)
    one = consumer("--rotate-bytes", "300kb", "--keep", "0", "--prefetch", "200").start()
    sent, done = [], threading.Event()

    def publish():
        publisher = Publisher(broker, exchange)
        revisions = [0] * partitions
        while min(revisions) < each:
            partition = dice.choice([p for p in range(partitions) if revisions[p] < each])
            batch = []
            for _ in range(dice.choice([1, 1, 1, 40])):
                revisions[partition] += 1
                batch.append(put(partition, revisions[partition], f"key:{dice.randrange(100)}"))
            publisher.publish(batch if len(batch) > 1 else batch[0])
            if dice.random() < 0.02:
                publisher.publish(batch)
            sent.extend(batch)
        publisher.close()
        done.set()

    thread = threading.Thread(target=publish)
    thread.start()
    killed = 0
    while killed < kills or not done.is_set():
        before = len(one.records())
        # Once it has taken something, at a moment that it does not choose.
        servers.wait_until(
            lambda: done.is_set() or len(one.records()) > before, "it consumes", 60, 0.01
        )
        time.sleep(dice.random() * 0.3)
        one.kill()
        killed += 1
        one.start()
    thread.join()
    records = one.wait_for(len(sent))
    assert one.stop() == 0
    assert in_order(records) == in_order(sent)
    assert len(one.files()) > 3
    wait_until_empty(broker, one.queue)


def test_old_files_go(publisher, consumer):
    one = consumer("--rotate-bytes", "2kb", "--keep", "2").start()
    for revision in range(1, 101):
        publisher.publish(put(0, revision))
        if revision % 20 == 0:
            newest = put(0, revision)
            servers.wait_until(lambda: newest in one.records(), "it is written")
    assert one.stop() == 0
    revisions = [record["revision"] for record in one.records()]
    assert revisions == list(range(revisions[0], 101)) and revisions[0] > 1
    assert len(one.files()) == 3


def test_standard_output(broker, publisher, consumer, tmp_path):
    one = consumer(output=False).start()
    publisher.publish(put(0, 1), put(0, 2), put(0, 2), put(0, 3))
    # Standard error and standard output go to the same file here.
    servers.wait_until(lambda: one.log().count('{"op"') == 3, "three lines", 30)
    assert one.stop() == 0
    lines = [json.loads(line) for line in one.log().splitlines() if line.startswith("{")]
    assert [line["revision"] for line in lines] == [1, 2, 3]
    assert "come again after a restart" in one.log()
    wait_until_empty(broker, one.queue)


def test_what_comes_out_of_order_waits_for_what_is_missing(publisher, consumer):
    one = consumer().start()
    publisher.publish(put(0, 1), put(0, 4), put(0, 3), put(1, 1), put(0, 2), put(0, 5))
    records = in_order(one.wait_for(6))
    assert [record["revision"] for record in records[0]] == [1, 2, 3, 4, 5]
    assert one.stop() == 0
    assert "0 holes" in one.log()


def test_what_does_not_come_is_reported(publisher, consumer):
    one = consumer().start()
    publisher.publish(put(7, 1), put(7, 5), put(7, 6), put(2, 1))
    servers.wait_until(lambda: len(one.records()) == 2, "what is not behind the hole", 4)
    assert [record["revision"] for record in one.wait_for(4)] == [1, 1, 5, 6]
    assert "events are missing" in one.log() and "partition 7, 2 to 4" in one.log()
    assert one.stop() == 0
    assert one.log().endswith("4 events written, 0 repeats dropped, 1 hole\nhole: partition 7, 2 to 4\n")


def test_a_queue_that_was_bound_late_begins_with_what_it_has(publisher, consumer):
    one = consumer().start()
    publisher.publish(put(7, 40), put(7, 41), put(2, 1))
    servers.wait_until(lambda: len(one.records()) == 1, "the partition that begins at its beginning", 4)
    assert [record["revision"] for record in one.wait_for(3)] == [1, 40, 41]
    assert one.stop() == 0
    assert one.log().endswith("3 events written, 0 repeats dropped, 0 holes\n")


def test_a_consumer_of_some_events_waits_for_no_other(publisher, consumer):
    one = consumer("--bind", "delete.#", "--bind", "expire.#").start()
    # Somebody must take the others, or the publisher gets them back.
    publisher.channel.queue_declare("takes-all", durable=True)
    publisher.channel.queue_bind("takes-all", publisher.exchange, "#")
    events = [put(0, 1), end(0, 2), put(0, 3), put(0, 4), end(0, 5, op="expire"), end(0, 2), end(0, 6)]
    publisher.publish(*events)
    servers.wait_until(lambda: len(one.records()) == 3, "it does not wait", 4)
    assert one.stop() == 0
    assert [record["revision"] for record in one.records()] == [2, 5, 6]
    assert "3 events written, 1 repeat dropped, 0 holes" in one.log()


def test_what_is_no_event_is_rejected(broker, publisher, consumer):
    one = consumer().start()
    publisher.publish(b"hello", put(0, 1), b'{"op":"set"}', put(0, 2))
    one.wait_for(2)
    assert one.stop() == 0
    assert one.log().count("a message is no change event") == 2
    assert "2 events written, 0 repeats dropped, 0 holes, 2 messages rejected" in one.log()
    wait_until_empty(broker, one.queue)


def test_a_broker_that_dies_is_waited_for(broker, exchange, consumer):
    first = Publisher(broker, exchange)
    one = consumer().start()
    first.publish(put(0, 1), put(0, 2))
    one.wait_for(2)
    broker.sync_queues()
    broker.kill_broker()
    servers.wait_until(lambda: "no events come" in one.log(), "it is told", 30)
    broker.start()
    servers.wait_until(lambda: "consuming again" in one.log(), "it goes on", 60)
    second = Publisher(broker, exchange)
    second.publish(put(0, 2), put(0, 3))
    assert [record["revision"] for record in one.wait_for(3)] == [1, 2, 3]
    second.close()
    assert one.stop() == 0
    # Lost, then unreachable: each was told once, however often it was tried.
    assert 1 <= one.log().count("no events come") <= 4, one.log()


def test_connections_that_are_closed_are_opened_again(broker, publisher, consumer):
    one = consumer().start()
    publisher.publish(put(0, 1))
    one.wait_for(1)
    broker.close_connections()
    servers.wait_until(lambda: "consuming again" in one.log(), "it goes on", 30)
    again = Publisher(broker, publisher.exchange)
    again.publish(put(0, 1), put(0, 2))
    assert len(one.wait_for(2)) == 2
    again.close()
    publisher.connection = again.connection = pika.BlockingConnection(pika.URLParameters(broker.url))
    assert one.stop() == 0


@pytest.mark.parametrize(
    ("change", "complaint", "level"),
    [
        (lambda url: url.replace("s3cret", "wr0ng"), "name or the password of user `flux`", "ERROR"),
        (lambda url: url + "/nowhere", "no virtual host `nowhere`", "ERROR"),
        (lambda url: url[: url.rindex(":")] + f":{servers.free_port()}", "cannot be reached", "WARN"),
    ],
    ids=["password", "vhost", "port"],
)
def test_a_wrong_address_is_told_once_and_tried_again(broker, consumer, change, complaint, level):
    one = consumer(url=change(broker.url))
    one.spawn()
    servers.wait_until(lambda: complaint in one.log(), complaint, 30)
    assert level in one.log()
    assert "s3cret" not in one.log() and "wr0ng" not in one.log()
    assert one.stop() == 0
    assert one.log().count("no events come") == 1, one.log()


def test_a_user_without_rights_is_told(broker, consumer):
    broker.ctl("add_user", "reader", "reader")
    try:
        one = consumer(url=broker.url.replace("flux:s3cret", "reader:reader"))
        one.spawn()
        servers.wait_until(lambda: "may not enter it" in one.log(), "no permissions at all", 30)
        broker.ctl("set_permissions", "reader", "^$", "^$", ".*")
        servers.wait_until(lambda: "may not do what a consumer must" in one.log(), "not enough", 30)
        broker.ctl("set_permissions", "reader", ".*", ".*", ".*")
        servers.wait_until(lambda: "there is no exchange" in one.log(), "enough", 30)
        assert one.stop() == 0
    finally:
        broker.ctl("delete_user", "reader")


def test_an_exchange_that_is_not_there_yet_is_waited_for(broker, exchange, consumer):
    one = consumer()
    one.spawn()
    servers.wait_until(lambda: "there is no exchange" in one.log(), "it is told", 30)
    publisher = Publisher(broker, exchange)
    servers.wait_until(one.ready, "it consumes", 30)
    publisher.publish(put(0, 1))
    one.wait_for(1)
    publisher.close()
    assert one.stop() == 0
    assert one.log().count("there is no exchange") == 1


def test_a_queue_that_is_deleted_is_made_again(broker, publisher, consumer):
    one = consumer().start()
    publisher.publish(put(0, 1))
    one.wait_for(1)
    broker.delete_queue(one.queue)
    servers.wait_until(lambda: "consuming again" in one.log(), "it goes on", 30)
    assert "the queue was deleted" in one.log()
    publisher.publish(put(0, 2))
    one.wait_for(2)
    assert one.stop() == 0


def test_a_queue_with_other_settings_is_used_as_it_is(publisher, consumer):
    one = consumer()
    publisher.channel.queue_declare(one.queue, durable=True)
    publisher.channel.queue_bind(one.queue, publisher.exchange, "#")
    publisher.publish(put(0, 1))
    one.start()
    publisher.publish(put(0, 2))
    one.wait_for(2)
    assert one.stop() == 0
    assert "made by somebody else" in one.log()


def test_a_second_consumer_takes_over(publisher, consumer):
    one, other = consumer().start(), consumer(directory="other").start()
    assert "the queue has another consumer" in other.log()
    publisher.publish(put(0, 1), put(0, 2))
    one.wait_for(2)
    assert other.records() == []
    assert one.stop() == 0
    publisher.publish(put(0, 3))
    assert [record["revision"] for record in other.wait_for(1)] == [3]
    assert other.stop() == 0


def test_a_file_has_one_consumer(publisher, consumer):
    one = consumer().start()
    same = consumer()
    same.log_path = same.directory / "same.log"
    same.spawn()
    assert same.wait() == 1
    assert "another consumer writes to" in same.log()
    assert one.stop() == 0


def test_a_damaged_file_is_refused(consumer):
    one = consumer()
    lines = [json.dumps(put(0, revision)) + "\n" for revision in (1, 2, 3)]
    one.file.write_text(lines[0] + "{}\n" + lines[2])
    one.spawn()
    assert one.wait() == 1
    assert f"is damaged at byte {len(lines[0])}" in one.log()
    one.file.write_text("".join(lines) + lines[0][:20])
    one.spawn()
    servers.wait_until(lambda: "an unfinished line at the end was cut off" in one.log(), "it is cut", 30)
    assert one.stop() == 0
    assert len(one.records()) == 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    # Lazily: the consumer may still hold it when its test failed.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(broker, publisher, consumer, small_disk):
    one = consumer("--output", small_disk / "changes.jsonl", output=False)
    one.file = small_disk / "changes.jsonl"
    one.start()
    events = [put(0, revision, value="x" * 100_000) for revision in range(1, 101)]
    publisher.publish(*events)
    assert one.wait() == 1
    assert f"there is no room for {one.file}" in one.log()
    text = one.file.read_bytes()
    # What came together is written together, or not at all.
    assert text[-2:] in (b"", b"}\n") and text.count(b"\n") < 45
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    one.start()
    assert one.wait_for(100) == events
    assert one.stop() == 0
    wait_until_empty(broker, one.queue)


@pytest.mark.parametrize("url", ["amqps://flux:s3cret@h", "flux:s3cret@h"], ids=["tls", "form"])
def test_what_is_no_address_is_refused_without_showing_it(consumer, url):
    one = consumer(url=url)
    one.spawn()
    assert one.wait() == 1
    assert "FLUX_RABBITMQ_URL" in one.log() and "s3cret" not in one.log()


def verify(*files, address=None):
    """The exit code and the lines of a comparison."""
    command = [servers.flux_binary(), "consume", "--verify", *files]
    if address:
        command += ["--addr", address]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLUX_")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


class Store:
    """A node alone, and the events of what is written to it: it counts as the node does."""

    def __init__(self, node, partitions):
        self.node, self.partitions = node, partitions
        self.revisions = [0] * partitions
        self.versions = {}
        self.events = []

    def write(self, connection, key, value, expires_at_ms=None):
        command = ["SET", key, value]
        if expires_at_ms is not None:
            command += ["PXAT", expires_at_ms]
        assert connection.call(*command) == b"OK"
        partition, revision = self.next(key)
        event = put(partition, revision, key, value, expires_at_ms=expires_at_ms)
        self.events.append(event | {"previous_version": self.versions.get(key, 0)})
        self.versions[key] = revision

    def remove(self, connection, key):
        was_there = self.versions.pop(key, 0)
        assert connection.call("DEL", key) == (1 if was_there else 0)
        if was_there:
            partition, revision = self.next(key)
            self.events.append(end(partition, revision, key) | {"previous_version": was_there})

    def next(self, key):
        partition = key_slot(key.encode()) * self.partitions // 16384
        self.revisions[partition] += 1
        return partition, self.revisions[partition]


def test_verify_compares_the_file_with_the_store(start_flux, publisher, consumer):
    node = start_flux(fsync="no", partitions=4)
    store, dice = Store(node, 4), random.Random(7)
    far = int(time.time() * 1000) + 3_600_000
    with node.connect() as connection:
        for number in range(2000):
            key = f"key:{dice.randrange(300)}"
            if dice.random() < 0.2:
                store.remove(connection, key)
            else:
                store.write(connection, key, f"value {number}", far if dice.random() < 0.1 else None)
        one = consumer("--rotate-bytes", "100kb", "--keep", "0").start()
        publisher.publish(*store.events)
        one.wait_for(len(store.events))
        assert one.stop() == 0
        address = f"127.0.0.1:{node.port}"
        keys, events = len(store.versions), len(store.events)
        code, lines = verify(one.file, address=address)
        assert (code, lines) == (0, [f"equal: {keys} keys of {events} events in 4 partitions"])
        assert len(one.files()) > 2
        assert verify(*one.files(), address=address)[0] == 0

        # A change that the file does not have, of each kind.
        alive = sorted(key for key, version in store.versions.items())
        changed, gone = alive[0], alive[1]
        old = store.versions[changed]
        store.write(connection, changed, "other")
        store.write(connection, "new", "x")
        store.remove(connection, gone)
        code, lines = verify(one.file, address=address)
        assert code == 1
        assert lines[-1] == f"3 differences: {keys} keys of {events} events in 4 partitions"
        partition = key_slot(changed.encode()) * 4 // 16384
        assert lines[0].startswith(f'differs: "{changed}" of partition {partition}, version {old} in the')
        assert lines[1].startswith(f'only in the file: "{gone}", version')
        assert lines[2] == f'only in the store: "new", version {store.versions["new"]}'

    # Holes and repeats in the file itself.
    whole = one.records()
    other = one.directory / "other.jsonl"
    last = {record["partition"]: index for index, record in enumerate(whole)}
    index = next(i for i, record in enumerate(whole) if record["revision"] == 5)
    partition = whole[index]["partition"]
    for records, complaint in [
        (whole[:index] + whole[index + 1 :], f"hole: partition {partition}, 5 to 5"),
        (whole + [whole[last[2]]], f"repeat: partition 2, {whole[last[2]]['revision']}"),
    ]:
        other.write_text("".join(json.dumps(record) + "\n" for record in records))
        code, lines = verify(other, address=address)
        assert code == 2 and complaint in lines, lines[:5]

    assert verify(one.directory / "none", address=address)[0] == 3
    code, lines = verify(one.file, address=f"127.0.0.1:{servers.free_port()}")
    assert code == 3 and "cannot reach the data port" in lines[-1], lines
    other.write_text("no event\n")
    code, lines = verify(other, address=address)
    assert code == 3 and "is damaged at byte 0" in lines[-1], lines


def test_verify_leaves_out_what_has_expired(start_flux, tmp_path):
    node = start_flux(fsync="no", partitions=1)
    soon = int(time.time() * 1000) + 300
    with node.connect() as connection:
        connection.call("SET", "stays", "1")
        connection.call("SET", "goes", "2", "PXAT", soon)
        servers.wait_until(lambda: connection.call("GET", "goes") is None, "it expires")
    file = tmp_path / "changes.jsonl"
    events = [put(0, 1, "stays", "1"), put(0, 2, "goes", "2", expires_at_ms=soon)]
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    code, lines = verify(file, address=f"127.0.0.1:{node.port}")
    assert (code, lines[-1]) == (0, "equal: 2 keys of 2 events in 1 partition")


def test_the_python_example_is_a_correct_consumer(broker, tmp_path):
    """Run as written: the queue and the exchange are those that it names."""
    log, copy = tmp_path / "example.log", tmp_path / "copy.db"

    def start():
        with open(log, "ab") as out:
            command = [sys.executable, str(EXAMPLE), broker.url]
            return subprocess.Popen(
                command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def read(query):
        with contextlib.closing(sqlite3.connect(f"file:{copy}?mode=rw", uri=True)) as database:
            return database.execute(query).fetchall()

    def seen():
        return read("SELECT partition, revision, gap FROM seen ORDER BY partition")

    publisher = Publisher(broker, "flux_kv_events")
    process = start()
    try:
        servers.wait_until(lambda: "flux-python" in queues(broker), "its queue is there", 30)
        for revision in range(1, 301):
            publisher.publish(put(1, revision, f"key:{revision % 20}", str(revision)))
            if revision % 100 == 0:
                process.kill()
                process.wait()
                process = start()
        publisher.publish(put(1, 300, "key:0", "300"), put(1, 299, "key:19", "299"))
        publisher.publish(end(1, 301, "key:3"), put(2, 1, "/w==", "AAE=", encoding="base64"))
        servers.wait_until(lambda: seen() == [(1, 301, None), (2, 1, None)], "all of it", 30)
        assert read("SELECT count(*) FROM copy") == [(20,)]
        assert read("SELECT value FROM copy WHERE key = x'ff'") == [(b"\x00\x01",)]

        # Of a gap only what it names is left; a first attempt at it was replaced by a second one.
        rows = [("key:1", "new", 305), ("key:2", "", 306)]
        publisher.publish(*gap(1, 302, 310, rows[:1])[:2], *gap(1, 302, 312, rows, term=2))
        publisher.publish(*gap(1, 302, 310, rows[:1]), put(1, 313, "key:4", "last"))
        servers.wait_until(lambda: seen()[0] == (1, 313, None), "the gap", 30)
        text = "SELECT CAST(key AS TEXT), CAST(value AS TEXT) FROM copy WHERE partition = 1 ORDER BY key"
        assert read(text) == [("key:1", "new"), ("key:2", ""), ("key:4", "last")]
        # While a gap comes, a leader that was replaced sends what is lost to the newer one: it counts, but not
        # over a row, and the gap goes on. One of the same revision and a later term replaces it.
        rows = [("key:1", "newest", 318), ("key:5", "five", 317)]
        first, second = gap(1, 314, 320, rows, term=3), gap(1, 314, 320, rows, term=4)
        older = [put(1, 314, "key:1", "old"), put(1, 315, "key:6", "gone"), end(1, 316, "key:1")]
        older += [put(1, 317, "key:5", "five"), put(1, 318, "key:1", "newest")]
        publisher.publish(*first[:2], older[0], *second[:2], *older[1:], *first[2:], *second[2:])
        publisher.publish(put(1, 321, "key:7", "seven"))
        servers.wait_until(lambda: seen()[0] == (1, 321, None), "the gaps", 30)
        assert read(text) == [("key:1", "newest"), ("key:5", "five"), ("key:7", "seven")]
        # Changes that reach the gap's revision end it: its rows are of no use any more.
        begun = gap(1, 322, 323, [("key:1", "no", 300)])
        publisher.publish(begun[0], put(1, 322), put(1, 323, "k", "2"), *begun[1:], put(1, 324, "k", "3"))
        servers.wait_until(lambda: seen()[0] == (1, 324, None), "the changes", 30)
        kept = [("k", "3"), ("key:1", "newest"), ("key:5", "five"), ("key:7", "seven")]
        assert read(text) == kept
        assert log.read_text() == ""

        publisher.publish(put(1, 327))
        servers.wait_until(lambda: seen()[0] == (1, 327, None), "what came after a hole", 30)
        wait_until_empty(broker, "flux-python")
        assert log.read_text() == "partition 1: nothing came between 324 and 327\n"
    finally:
        process.kill()
        process.wait()
        publisher.close()
