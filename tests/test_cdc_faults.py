"""Change capture when the broker is away, slow, full or refuses: reads and writes go on, the lag grows, the log
says once what is wrong and once that it is over, and everything is published in order afterwards.
"""

import collections
import pathlib
import random
import re
import signal
import threading
import time

import pytest

import cdc_weather
import changes
import cluster
import rabbitmq
import servers
from test_consume import Consumer, verify

PARTITIONS = 4

pytestmark = pytest.mark.skipif(not rabbitmq.installed(), reason="rabbitmq-server is not installed")


@pytest.fixture(scope="module")
def one_broker(flux_binary, tmp_path_factory):
    broker = rabbitmq.RabbitMQ(tmp_path_factory.mktemp("rabbitmq")).start()
    yield broker
    broker.kill()


@pytest.fixture
def broker(one_broker):
    """The broker of all tests here, up and well."""
    if not one_broker.running():
        one_broker.start()
    return one_broker


class Published:
    """A node with an exchange of its own, a queue of it, and what was written and published so far."""

    def __init__(self, broker, start_flux, name):
        self.broker, self.start_flux = broker, start_flux
        # As the name of an exchange may be.
        self.name = re.sub(r"\W", "-", name)[:63]
        self.node = self.queue = None
        self.written = 0
        self.replay = changes.Replay()
        self.kinds = collections.Counter()

    def start(self, **settings):
        settings = {"partitions": PARTITIONS, "rabbitmq_url": self.broker.url} | settings
        self.node = self.start_flux(cdc_exchange=self.name, **settings)
        return self

    def bind(self):
        """Makes the queue, or makes it again."""
        self.queue = changes.Queue(self.broker, f"queue-of-{self.name}", self.name)
        return self

    def write(self, count=100):
        """Writes and reads so much, each of it answered as ever."""
        with self.node.connect() as connection:
            for _ in range(count):
                key, value = f"k:{self.written % 70}", b"%d" % self.written
                assert connection.pipeline([("SET", key, value), ("GET", key)]) == [b"OK", value]
                self.written += 1
        return self

    def take(self):
        """Takes what is published, which must be all that was written, in order."""
        changes.wait_until_published([self.node], PARTITIONS)
        for record in self.queue.take_records(self.written - self.replay.kinds["set"]):
            self.replay.take(record)
        assert self.replay.wrong == []
        assert self.replay.kinds == {"set": self.written}
        return self

    def lag(self):
        return changes.metric(self.node, "cdc_lag_events")

    def told(self):
        """How often the log says that each trouble begins, and that it is over."""
        lines = self.node.log().splitlines()
        return tuple(
            collections.Counter(re.search(r"trouble=(\w+)", line)[1] for line in lines if text in line)
            for text in ("changes are not published", "this trouble is over")
        )

    def wait_until_told(self, kind):
        what = f"the log says {kind}"
        servers.wait_until(lambda: self.told()[0][kind], what, 60, 0.05)

    def suffer(self, kind):
        """While the trouble lasts: the node serves, and says how far behind it is."""
        self.wait_until_told(kind)
        assert kind in changes.report(self.node)["troubles"]
        assert f'flux_cdc_trouble{{kind="{kind}"}} 1' in self.node.metrics()
        behind = self.written - self.replay.kinds["set"]
        servers.wait_until(lambda: self.lag() == behind, "it knows how far behind it is")
        self.write(200)
        assert self.lag() == behind + 200
        servers.wait_until(lambda: changes.metric(self.node, "cdc_lag_seconds") >= 1, "it grows old")
        return self

    def recover(self, *kinds):
        """When it is mended: all is published, and each of these kinds was told once, and once that it is
        over, and no other kind was."""
        self.write().take()
        once = dict.fromkeys(kinds, 1)
        servers.wait_until(lambda: not changes.report(self.node)["troubles"], "no trouble is left")
        assert self.told() == (once, once), self.node.log()[-4000:]
        assert changes.metric(self.node, "cdc_gaps_total") == 0
        assert self.lag() == 0
        assert "s3cret" not in self.node.log()


@pytest.fixture
def published(broker, start_flux, request):
    return Published(broker, start_flux, request.node.name)


def test_a_broker_that_is_not_there_at_the_start(broker, published):
    published.bind()
    broker.kill_broker()
    published.start().write().suffer("unreachable")
    broker.start()
    published.recover("unreachable")


def test_a_broker_that_dies(broker, published):
    published.bind().start().write().take()
    broker.kill_broker()
    published.write().suffer("unreachable")
    broker.start()
    published.recover("unreachable")


def test_a_broker_that_stands_still(broker, published):
    published.bind().start().write().take()
    broker.signal(signal.SIGSTOP)
    try:
        published.write().suffer("slow")
    finally:
        broker.signal(signal.SIGCONT)
    published.recover("slow")


def test_a_broker_that_stands_still_for_long(broker, published):
    """A connection that answers nothing for long is given up, and still it is one trouble."""
    published.bind().start().write().take()
    [connection] = connections_to(broker.port)
    broker.signal(signal.SIGSTOP)
    try:
        published.write().suffer("slow")
        servers.wait_until(lambda: connection not in connections_to(broker.port), "it is given up", 90, 0.2)
        published.suffer("slow")
    finally:
        broker.signal(signal.SIGCONT)
    published.recover("slow")
    assert changes.metric(published.node, "cdc_reconnects_total") >= 1


def connections_to(port):
    """The near ports of the connections of this machine to a port at 127.0.0.1."""
    established, there = "01", f"0100007F:{port:04X}"
    lines = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()]
    return {line[1] for line in lines if line[2] == there and line[3] == established}


def test_a_broker_without_memory(broker, published):
    published.bind().start().write().take()
    broker.raise_memory_alarm()
    try:
        published.write().suffer("blocked")
    finally:
        broker.clear_memory_alarm()
    published.recover("blocked")


def test_a_queue_that_is_not_there_yet(published):
    published.start().write().suffer("unroutable")
    published.bind().recover("unroutable")


def test_a_queue_that_is_deleted(broker, published):
    published.bind().start().write().take()
    broker.delete_queue(published.queue.name)
    published.write().suffer("unroutable")
    published.bind().recover("unroutable")


def test_an_exchange_that_is_deleted(broker, published):
    """It is made again at once; then nothing is bound to it."""
    published.bind().start().write().take()
    broker.delete_exchange(published.name)
    published.write().suffer("unroutable")
    published.bind().recover("no_exchange", "unroutable")


def test_connections_that_are_closed(broker, published):
    published.bind().start().write().take()
    for _ in range(3):
        broker.close_connections()
        published.write()
    servers.wait_until(
        lambda: changes.metric(published.node, "cdc_reconnects_total") >= 1, "it connects again"
    )
    published.wait_until_told("unreachable")
    published.recover("unreachable")


def test_credentials_that_are_wrong_and_mended(broker, published):
    published.bind()
    broker.change_password("an0ther")
    try:
        published.start().write().suffer("refused")
        assert "ERROR" in next(line for line in published.node.log().splitlines() if "refused" in line)
    finally:
        broker.change_password(broker.password)
    published.recover("refused")


def test_a_right_that_is_taken_away_and_given_back(broker, published):
    published.bind().start().write().take()
    broker.ctl("set_permissions", rabbitmq.USER, ".*", "^$", ".*")
    try:
        broker.close_connections()
        published.write().suffer("refused")
    finally:
        broker.ctl("set_permissions", rabbitmq.USER, ".*", ".*", ".*")
    published.recover("refused", "unreachable")


def small_log(**settings):
    """So little log is kept that a reader soon finds that it is gone."""
    size = "1mb"
    names = ["segment_bytes", "snapshot_log_bytes", "cdc_retention_bytes", "cdc_memory_bytes"]
    return dict.fromkeys(names, size) | {"workers": 1, "fsync": "no"} | settings


@pytest.mark.parametrize("batch", [1, 50])
def test_what_is_past_retention_is_a_gap_and_the_current_values(broker, published, tmp_path, batch):
    consumer = Consumer(tmp_path / "consumer", broker, published.name, "--rotate-bytes", "0")
    published.start(**small_log(cdc_batch_max_events=batch))
    node, dice = published.node, random.Random(8)

    def write(connection, count):
        for _ in range(count):
            key = f"k:{dice.randrange(500)}"
            command = ("DEL", key) if dice.random() < 0.3 else ("SET", key, dice.randbytes(1000).hex())
            connection.call(*command)

    try:
        consumer.start()
        broker.sync_queues()
        with node.connect() as connection:
            write(connection, 1000)
            changes.wait_until_published([node], PARTITIONS)
            broker.kill_broker()
            write(connection, 15_000)
            # Neither the log nor memory grows with what is not published.
            size = sum(file.stat().st_size for file in node.data_dir.rglob("*") if file.is_file())
            assert size < 20 << 20
        broker.start()
        over = threading.Event()

        def write_on():
            with node.connect() as connection:
                while not over.is_set():
                    write(connection, 10)
                    time.sleep(0.01)

        thread = threading.Thread(target=write_on)
        thread.start()
        try:
            servers.wait_until(lambda: changes.metric(node, "cdc_gaps_total") > 0, "a gap", 60)
            servers.wait_until(lambda: b'"phase":"end"' in consumer.file.read_bytes(), "its end", 60, 0.1)
        finally:
            over.set()
            thread.join()
        newest = changes.wait_until_published([node], PARTITIONS)
        servers.wait_until(
            lambda: changes.Replay(consumer.records()).revisions == newest, "all of it", 120, 0.5
        )
        assert consumer.stop() == 0
    finally:
        consumer.kill()
    replay = changes.Replay(consumer.records())
    assert (replay.wrong, replay.repeats) == ([], 0)
    assert sum(replay.gaps.values()) >= 1 and replay.kinds["row"] > 10
    begins = [one for one in consumer.records() if one.get("phase") == "begin"]
    log = node.log()
    for one in begins:
        named = f"partition={one['partition']} lost_from={one['lost_from']} lost_to={one['lost_to']}"
        assert named in log
    assert log.count("changes are lost to the broker") == changes.metric(node, "cdc_gaps_total")
    assert changes.metric(node, "cdc_gap_revisions_total") >= sum(
        one["lost_to"] - one["lost_from"] + 1 for one in begins
    )
    code, lines = verify(consumer.file, address=f"127.0.0.1:{node.port}")
    assert code == 0, lines[:10]


@pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")
@pytest.mark.parametrize("batch", [1, 100])
def test_leader_broker_and_consumer_are_killed(flux_binary, shared_folder, batch):
    with shared_folder("storm") as folder:
        settings = {"binary": flux_binary, "cdc_batch_max_events": batch}
        with cdc_weather.Storm(folder, seed=batch, **settings) as storm:
            result = storm.run(kills=2)
    print(result)
    assert result["faults"] == {"kill_leader": 2, "kill_broker": 2, "kill_consumer": 2}
    assert min(result["kinds"].values()) > 100
