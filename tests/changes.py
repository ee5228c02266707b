"""What a node publishes, as tests follow it: messages taken from a queue by hand, records that are replayed
as a correct consumer does, and how far the nodes say they are.

Nothing here publishes, and nothing waits for a broker that is away.
"""

import base64
import collections
import contextlib
import json
import urllib.request

import jsonschema
import pika

import servers

EXCHANGE = "flux_kv_events"
SCHEMA = json.loads((servers.ROOT / "docs" / "cdc.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ALWAYS = (
    "op", "key", "value", "partition", "revision", "version", "previous_version", "expires_at_ms",
    "committed_at_ms",
)

Message = collections.namedtuple("Message", "routing_key properties records")
Entry = collections.namedtuple("Entry", "value version expires_at_ms")


def report(node):
    """`/cdc` of a node."""
    answer = urllib.request.urlopen(f"http://127.0.0.1:{node.admin_port}/cdc", timeout=10)
    with answer:
        return json.load(answer)


def metric(node, name):
    """The sum of a metric over its labels."""
    lines = [line.split() for line in node.metrics().splitlines() if line.startswith(f"flux_{name}")]
    values = [float(line[-1]) for line in lines if line[0].split("{")[0] == f"flux_{name}"]
    assert values, f"there is no flux_{name}"
    return sum(values)


def newest(nodes):
    """By partition, the newest revision as its leader has it; None where not all of it is confirmed, a
    partition has no leader that publishes, or has two."""
    found = {}
    for node in nodes:
        try:
            stands = report(node)
        except OSError:
            return None
        for one in stands["partitions"]:
            if one["lag_events"] or one["partition"] in found:
                return None
            found[one["partition"]] = one["newest"]
    return found


def wait_until_published(nodes, partitions, deadline_s=120.0):
    """Until the broker has confirmed all there is; gives the newest revision by partition."""

    def all_of_it():
        found = newest(nodes)
        return found if found is not None and len(found) == partitions else None

    try:
        return servers.wait_until(all_of_it, "all is published", deadline_s, 0.1)
    except TimeoutError as error:
        said = [report(node) | {"partitions": "…"} for node in nodes]
        raise TimeoutError(f"{error}; {said}") from error


class Queue:
    """A durable quorum queue of all events of an exchange, which it declares too if it must."""

    def __init__(self, broker, name, exchange=EXCHANGE):
        self.broker, self.name = broker, name
        with self.channel() as channel:
            channel.exchange_declare(exchange, "topic", durable=True)
            channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(name, exchange, "#")
        broker.sync_queues()

    @contextlib.contextmanager
    def channel(self):
        """A channel with a connection of its own: the broker may have been away since the last one."""
        connection = pika.BlockingConnection(pika.URLParameters(self.broker.url))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def take(self, revisions, deadline_s=60.0):
        """Takes messages until there are records of so many different changes; gives all messages."""
        found, seen = [], set()
        with self.channel() as channel:

            def enough():
                while len(seen) < revisions:
                    method, properties, body = channel.basic_get(self.name, auto_ack=True)
                    if method is None:
                        return False
                    message = Message(method.routing_key, properties, records_of(body))
                    found.append(message)
                    changes = [one for one in message.records if one["op"] != "gap"]
                    seen.update((one["partition"], one["revision"]) for one in changes)
                return True

            what = f"{revisions} changes in {self.name}"
            try:
                servers.wait_until(enough, what, deadline_s, 0.05)
            except TimeoutError as error:
                raise TimeoutError(f"{error}; there are {len(seen)}") from error
        return found

    def take_records(self, revisions, deadline_s=60.0):
        return [one for message in self.take(revisions, deadline_s) for one in message.records]


def records_of(body):
    """The records of a message or a line, each as the schema has it and its fields in order."""
    content = json.loads(body)
    VALIDATOR.validate(content)
    records = content if isinstance(content, list) else [content]
    for record in records:
        assert tuple(record)[: len(ALWAYS)] == ALWAYS, record
    return records


def decoded(record, field):
    """A key or value as bytes."""
    text = record.get(field)
    if text is None:
        return None
    return base64.b64decode(text, validate=True) if "encoding" in record else text.encode()


class Replay:
    """Takes records in their order and keeps the state that they give.

    What a partition's stream must not have goes to `wrong`: holes, and versions that contradict what came
    before. A change that came already is counted as a repeat and left out, as it may come twice to a queue,
    and may not to the file of `flux consume`.
    """

    def __init__(self, records=()):
        self.revisions = collections.Counter()
        self.table = {}
        self.wrong = []
        self.kinds = collections.Counter()
        self.repeats = 0
        # How many gaps each partition had.
        self.gaps = collections.Counter()
        # By partition, the gap under way and what its rows gave.
        self._in_gap = {}
        for record in records:
            self.take(record)

    def take(self, record):
        partition = record["partition"]
        if record["op"] == "gap":
            self._gap(partition, record)
        elif "row" in record:
            self._row(partition, record)
        else:
            self._change(partition, record)

    def _change(self, partition, record):
        revision, key = record["revision"], (partition, decoded(record, "key"))
        if revision <= self.revisions[partition]:
            self.repeats += 1
            return
        if revision != self.revisions[partition] + 1:
            self.wrong.append(f"hole before {record}"[:300])
        elif not self._follows(partition, key, record["previous_version"]):
            self.wrong.append(f"previous version is not that of {self.table.get(key)}: {record}"[:300])
        self.revisions[partition] = revision
        self.kinds[record["op"]] += 1
        if record["op"] == "set":
            if record["version"] != revision:
                self.wrong.append(f"version of {record}"[:300])
            self.table[key] = Entry(decoded(record, "value"), revision, record["expires_at_ms"])
        else:
            if record["previous_version"] == 0:
                self.wrong.append(f"end of an absent key: {record}"[:300])
            self.table.pop(key, None)

    def _follows(self, partition, key, previous_version):
        """Whether a change can come after what is known of its key. The rows of a gap leave out what was
        written while they were read."""
        known = self.table.get(key)
        if known is None:
            return previous_version == 0 or self.gaps[partition] > 0
        return previous_version == known.version

    def _gap(self, partition, record):
        if record["revision"] <= self.revisions[partition]:
            self.repeats += 1
        elif record["phase"] == "begin":
            if record["lost_from"] != self.revisions[partition] + 1:
                self.wrong.append(f"gap after {self.revisions[partition]}: {record}"[:300])
            self._in_gap[partition] = (record["gap"], {})
        else:
            gap, rows = self._in_gap.pop(partition, (None, {}))
            if (gap, len(rows)) != (record["gap"], record["rows"]):
                self.wrong.append(f"gap {gap} with {len(rows)} rows ends with {record}"[:300])
            for key in [key for key in self.table if key[0] == partition]:
                del self.table[key]
            self.table.update(rows)
            self.revisions[partition] = record["revision"]
            self.gaps[partition] += 1

    def _row(self, partition, record):
        gap, rows = self._in_gap.get(partition, (None, {}))
        if gap != record["gap"] or record["row"] <= len(rows):
            self.repeats += 1
            return
        if record["row"] != len(rows) + 1:
            self.wrong.append(f"row after {len(rows)}: {record}"[:300])
        key = (partition, decoded(record, "key"))
        rows[key] = Entry(decoded(record, "value"), record["version"], record["expires_at_ms"])
        self.kinds["row"] += 1
