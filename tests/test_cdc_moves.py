"""Change capture when the leader's own log lacks what is to be published: its replica began from a snapshot, since
it moved there, and the changes are read from the logs of the other nodes.
"""

import json
import re

import pytest

import changes
import cluster
import rabbitmq
import servers
from test_cluster import admin
from watching import GrpcWatch

pytestmark = [
    pytest.mark.skipif(not rabbitmq.installed(), reason="rabbitmq-server is not installed"),
    pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server"),
]


@pytest.fixture(scope="module")
def one_broker(tmp_path_factory):
    broker = rabbitmq.RabbitMQ(tmp_path_factory.mktemp("rabbitmq")).start()
    yield broker
    broker.kill()


# So that what is on its way between two nodes is only a part of it.
PADDING = "." * 1500


class Moving:
    """Five nodes and one partition of three replicas. What is written is one revision each."""

    def __init__(self, directory, binary, broker, name, **settings):
        self.broker = broker
        # As the name of an exchange may be.
        self.exchange = re.sub(r"\W", "-", name)[:63]
        settings = {
            "partitions": 1, "fsync": "no", "rabbitmq_url": broker.url, "cdc_exchange": self.exchange,
        } | settings
        self.made = cluster.Cluster(directory, count=5, binary=binary, **settings)
        self.queue = None
        self.written = 0

    def start(self):
        if not self.broker.running():
            self.broker.start()
        self.queue = changes.Queue(self.broker, f"queue-of-{self.exchange}", self.exchange)
        self.made.start()
        return self

    def write(self, count):
        with self.made.running()[0].connect() as connection:
            for begin in range(0, count, 500):
                numbers = range(self.written + 1, self.written + 1 + min(500, count - begin))
                commands = [("SET", f"k:{number % 300}", f"{number}{PADDING}") for number in numbers]
                assert set(connection.pipeline(commands)) == {b"OK"}
                self.written += len(commands)
        return self

    def published(self):
        changes.wait_until_published(self.made.running(), 1)

    def node(self, node_id):
        return next(node for node in self.made.nodes if node.node_id == node_id)

    def holders(self):
        [report] = json.loads(admin(self.made.running()[0], "partitions", "--json"))
        return [self.node(replica["node"]) for replica in report["replicas"]]

    def move(self, source, target):
        """Moves a replica, which begins from a snapshot."""
        received = changes.metric(target, "snapshots_received_total")
        admin(self.made.running()[0], "move", "0", source.node_id, target.node_id)
        wanted = {node.directory for node in self.holders()} - {source.directory} | {target.directory}
        servers.wait_until(
            lambda: {node.directory for node in self.holders()} == wanted
            and self.made.status()["partitions_moving"] == 0,
            "the replica is where it should be", 60, 0.2,
        )
        self.made.wait_until_well()
        assert changes.metric(target, "snapshots_received_total") > received
        return self

    def without_log(self):
        """Moves the leader's replica, and the lead stays with it: (its node, those with the whole log, the one
        that never had a replica)."""
        holders = self.holders()
        fresh, never = [node for node in self.made.nodes if node not in holders]
        [source] = [node for node in holders if node.led()]
        self.move(source, fresh)
        if not fresh.led():
            admin(fresh, "transfer", "0", fresh.node_id)
        servers.wait_until(lambda: fresh.led() == {0}, "it leads", 30, 0.1)
        return fresh, [node for node in holders if node is not source], never

    def check_published(self):
        """All that was written has come, in order, and no gap."""
        self.published()
        replay = changes.Replay(self.queue.take_records(self.written))
        assert (replay.wrong, replay.gaps) == ([], {})
        assert replay.revisions == {0: self.written} and replay.kinds == {"set": self.written}
        assert sum(changes.metric(node, "cdc_gaps_total") for node in self.made.running()) == 0


@pytest.fixture
def moving(flux_binary, tmp_path, one_broker, request):
    made = Moving(tmp_path / "c", flux_binary, one_broker, request.node.name)
    try:
        yield made
    finally:
        made.made.kill()
    for node in made.made.nodes:
        assert "panicked" not in node.logs(), node.logs()[-6000:]


def test_a_leader_whose_log_begins_later_publishes_from_the_others(moving):
    """The broker is away while the replica moves and the lead with it."""
    moving.start().write(500).published()
    moving.broker.kill_broker()
    moving.write(2000)
    fresh, *_ = moving.without_log()
    moving.write(500)
    moving.broker.start()
    moving.check_published()
    assert changes.metric(fresh, "feed_remote_changes_total") >= 2000


def test_a_killed_node_is_waited_for_if_only_it_has_the_changes(moving):
    moving.start().write(500).published()
    moving.broker.kill_broker()
    moving.write(5000)
    fresh, [keeps, leaves], never = moving.without_log()
    # So that only one node is left whose log goes back so far.
    moving.move(leaves, never)
    keeps.kill()
    moving.write(200)
    moving.broker.start()
    servers.wait_until(lambda: "which is waited for" in fresh.logs(), "it is waited for", 60)
    waits = [line for line in fresh.logs().splitlines() if "which is waited for" in line]
    assert len(waits) == 1 and "WARN" in waits[0], waits
    assert "partition=0" in waits[0] and keeps.node_id in waits[0], waits
    # Reads and writes go on, and nothing is given up.
    moving.write(300)
    assert changes.metric(fresh, "cdc_gaps_total") == 0
    keeps.start()
    moving.check_published()


def test_a_watcher_resumes_where_the_log_begins_later(moving):
    """At the node with the new replica, and at the one that has none and asks that one."""
    moving.start().write(300)
    with GrpcWatch(moving.made.nodes[0].grpc_port) as watch:
        watch.started()
        moving.write(1)
        watch.until(lambda _: len(watch.changes()) == 1, "a change")
        token, begin = watch.token(), moving.written
    moving.write(3000)
    fresh, _, never = moving.without_log()
    moving.write(100)
    for node in (fresh, never):
        with GrpcWatch(node.grpc_port, token=token) as watch:
            watch.until(lambda _: len(watch.messages) > moving.written - begin, "all changes")
            assert set(watch.kinds()) <= {"started", "change", "keep_alive"}
            came = [change.revision for change in watch.changes()]
            assert came == list(range(begin + 1, moving.written + 1))
    assert changes.metric(fresh, "feed_remote_changes_total") >= 3000
    assert changes.metric(fresh, "feed_gaps_total") == 0
