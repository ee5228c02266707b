"""Nodes come and go under load: one joins, is emptied, is lost for good, or loses its data."""

import collections
import json
import os
import shutil
import time

import pytest

import cluster
import history
import servers
from test_cluster import admin
from test_disk_full import fill_with_ballast, small_disk  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")

PARTITIONS = 64


@pytest.fixture
def start_cluster(flux_binary, tmp_path):
    started = []

    def start(count=3, disks=None, **settings):
        made = cluster.Cluster(
            tmp_path / f"c{len(started)}", count=count, binary=flux_binary, **settings
        )
        for number, folder in (disks or {}).items():
            made.nodes[number].data_dir = folder / "data"
        started.append(made)
        return made.start()

    yield start
    for made in started:
        for node in made.nodes:
            assert "panicked" not in node.logs(), node.logs()[-6000:]
        made.kill()


def node_report(made, node):
    reports = json.loads(admin(made.running()[0], "nodes", "--json"))
    return next((one for one in reports if one["node"] == node.node_id), None)


def settled(made, counts):
    """Whether each of these nodes has so many replicas, at least and at most, and nothing moves."""
    status = made.status()
    if not status or status["partitions_moving"] or status["partitions_under_replicated"]:
        return False
    for node, (least, most) in counts.items():
        report = node_report(made, node)
        if not report or report["replicas"] is None or not least <= report["replicas"] <= most:
            return False
    return True


def fill(made, count=2000, size=1000):
    """So that there is something to move."""
    with made.nodes[0].connect() as connection:
        for start in range(0, count, 200):
            some = range(start, start + 200)
            replies = connection.pipeline(
                [("SET", f"fill:{number}", b"%d:" % number + b"x" * size) for number in some]
            )
            assert set(replies) == {b"OK"}


def check_filled(node, count=2000):
    with node.connect() as connection:
        for start in range(0, count, 200):
            some = range(start, start + 200)
            replies = connection.pipeline([("GETRANGE", f"fill:{number}", 0, 5) for number in some])
            for number, reply in zip(some, replies):
                assert reply.startswith(b"%d:" % number), (number, reply)


def test_a_node_joins_and_is_drained(start_cluster):
    """Partitions move to it, and away again; no request fails for that. It has more workers than the others."""
    made = start_cluster()
    fill(made)
    with history.Load(made.nodes[:3]) as load:
        fourth = made.add(workers=2)
        fourth.start()
        everywhere = {node: (44, 52) for node in made.nodes}
        servers.wait_until(lambda: settled(made, everywhere), "all have a fair share", 120, 0.3)
        made.wait_until_well()
        # It forwards to nodes that answer on another worker's link, still when its links are older than a
        # node is taken for one that answers without having done so.
        until = time.monotonic() + 3
        while time.monotonic() < until:
            check_filled(fourth)
        admin(made.nodes[0], "drain", fourth.node_id)
        servers.wait_until(lambda: settled(made, {fourth: (0, 0)}), "it is empty", 120, 0.3)
        assert not fourth.led()
        assert fourth.stop() == 0
        load.wait_for_more()
    result = load.check(made.nodes[:3])
    print(f"\njoin and drain: {result}")
    assert not result["errors"], result
    assert result["slowest_s"] < 5.0, result
    check_filled(made.nodes[1])
    made.wait_until_equal()


def test_a_replica_is_moved_by_hand(start_cluster):
    """To the node that was named, with all its data; a rebalance has nothing to mend then."""
    made = start_cluster(5)
    # 192 replicas: a node has one more than another may have, and who that is does not matter.
    shares = {node: (38, 39) for node in made.nodes}
    servers.wait_until(lambda: settled(made, shares), "each has its share", 120, 0.3)
    fill(made)

    def placed():
        reports = json.loads(admin(made.nodes[0], "partitions", "--json"))
        return [{replica["node"] for replica in report["replicas"]} for report in reports]

    def nodes_of(partition):
        return placed()[partition]

    # From one with more to one with fewer: else the controller moves another one back.
    counts = collections.Counter(node for nodes in placed() for node in nodes)
    (source, _), *_, (target, _) = counts.most_common()
    has_source_alone = (source in nodes and target not in nodes for nodes in placed())
    partition = list(has_source_alone).index(True)
    before = nodes_of(partition)
    admin(made.nodes[1], "move", str(partition), source, target)
    servers.wait_until(
        lambda: nodes_of(partition) == before - {source} | {target}
        and not made.status()["partitions_moving"],
        "the replica is where it should be", 60, 0.2,
    )
    admin(made.nodes[2], "rebalance")
    servers.wait_until(lambda: settled(made, shares), "nothing moves", 60, 0.3)
    assert nodes_of(partition) == before - {source} | {target}
    for node in made.nodes:
        check_filled(node)
    made.wait_until_equal()


def test_a_lost_node_is_replaced(start_cluster):
    """Killed for good, its replicas are placed on the others once it has been away long enough."""
    made = start_cluster(4, replace_after_s=3, registry_ttl_s=2)
    fill(made)
    with history.Load(made.nodes[:3]) as load:
        lost = made.nodes[3]
        lost.kill()
        begun = time.monotonic()
        rest = made.nodes[:3]
        servers.wait_until(
            lambda: settled(made, {node: (PARTITIONS, PARTITIONS) for node in rest}),
            "the three have everything", 120, 0.3,
        )
        print(f"\nreplaced after {time.monotonic() - begun:.1f} s")
        # Now another one may go.
        rest[0].kill()
        servers.wait_until(lambda: made.serves(rest[1]), "the two serve", 30, 0.1)
        load.wait_for_more()
        rest[0].start()
        made.wait_until_well()
    load.check(rest)
    check_filled(rest[2])
    # The lost one comes back: it has nothing any more, and is given its share again.
    lost.start()
    servers.wait_until(
        lambda: settled(made, {node: (44, 52) for node in made.nodes}), "all have a share", 120, 0.3
    )
    check_filled(lost)


def test_a_follower_far_behind_gets_a_snapshot(start_cluster):
    """While it was away, the log that it needs was trimmed everywhere."""
    small = {"segment_bytes": 1 << 20, "snapshot_log_bytes": 2 << 20, "replication_memory": 1 << 20}
    made = start_cluster(**small)
    away = made.nodes[2]
    away.kill()
    with made.nodes[0].connect() as connection:
        for turn in range(30):
            commands = [("SET", f"far:{number}", b"%d" % turn + b"x" * 1000) for number in range(500)]
            assert set(connection.pipeline(commands)) == {b"OK"}
    with history.Load(made.nodes[:2]) as load:
        away.start()
        made.wait_until_well(deadline_s=120)
    load.check(made.nodes)
    made.wait_until_equal()
    assert metric(away, "flux_snapshots_received_total") > 0
    # It is a full member: with one of the others gone, everything is still there.
    made.nodes[0].kill()
    servers.wait_until(lambda: made.serves(away), "the others serve", 30, 0.1)
    with away.connect() as connection:
        replies = connection.pipeline([("GET", f"far:{number}") for number in range(500)])
        assert all(reply.startswith(b"29x") for reply in replies)


def metric(node, name):
    """A metric, or None where the node has none of that name."""
    with servers.urllib.request.urlopen(f"{node.admin_url}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
    return None


def damaged(node):
    """The file of a stopped node's log in the middle of which bytes were flipped."""
    logs = sorted(node.data_dir.glob("log-*/*.log"), key=lambda path: path.stat().st_size)
    used = [path for path in logs if path.read_bytes().rstrip(b"\0")]
    path = used[0]
    length = len(path.read_bytes().rstrip(b"\0"))
    with open(path, "r+b") as file:
        file.seek(length // 2)
        data = file.read(64)
        file.seek(length // 2)
        file.write(bytes(byte ^ 0x55 for byte in data))
    return path


def test_a_damaged_log_is_rebuilt_from_the_others(start_cluster):
    """The node comes back as a new one, which votes for nothing that the old one did; the old data is kept."""
    made = start_cluster(replace_after_s=3, registry_ttl_s=2)
    fill(made)
    victim = made.nodes[1]
    old_id = victim.node_id
    assert victim.stop() == 0
    path = damaged(victim)
    with history.Load([made.nodes[0], made.nodes[2]]) as load:
        victim.start()
        servers.wait_until(
            lambda: settled(made, {victim: (PARTITIONS, PARTITIONS)}), "it has everything", 120, 0.3
        )
        made.wait_until_well(nodes=3)
    load.check(made.nodes)
    assert victim.node_id != old_id
    assert path.name in victim.log() and "offset" in victim.log(), victim.log()[-3000:]
    aside = [found for found in victim.directory.rglob(path.name) if victim.data_dir not in found.parents]
    aside += [found for found in victim.data_dir.rglob(path.name) if "damaged" in str(found)]
    assert aside, "the damaged files are kept"
    check_filled(victim)
    # And it counts: with another one gone, nothing is missing.
    made.nodes[0].kill()
    servers.wait_until(lambda: made.serves(victim), "the others serve", 30, 0.1)
    check_filled(victim)


def test_a_node_whose_data_is_gone_is_rebuilt(start_cluster):
    """Its directory is empty: it comes as a new node, and takes the place of the old one."""
    made = start_cluster(replace_after_s=3, registry_ttl_s=2)
    fill(made)
    victim = made.nodes[1]
    old_id = victim.node_id
    victim.kill()
    shutil.rmtree(victim.data_dir)
    with history.Load([made.nodes[0], made.nodes[2]]) as load:
        victim.start()
        servers.wait_until(
            lambda: settled(made, {victim: (PARTITIONS, PARTITIONS)}), "it has everything", 120, 0.3
        )
    load.check(made.nodes)
    assert victim.node_id != old_id
    check_filled(victim)


def test_a_full_disk_on_one_node(start_cluster, small_disk):  # noqa: F811
    """The others go on, with what it led too, and its own clients are answered; it catches up when there is
    room again."""
    made = start_cluster(
        disks={2: small_disk}, segment_bytes=4 << 20, snapshot_log_bytes=1 << 30, max_inflight_bytes="4mb"
    )
    node, rest = made.nodes[2], made.nodes[:2]
    ballast = fill_with_ballast(small_disk)
    with history.Load(rest) as load, history.Load([node]) as inside:
        with rest[0].connect() as connection:
            # More than what is preallocated.
            for turn in range(20):
                connection.pipeline([("SET", f"big:{turn}:{n}", b"x" * 10_000) for n in range(50)])
        servers.wait_until(lambda: not node.led(), "it leads nothing", 30, 0.1)
        servers.wait_until(lambda: made.serves(rest[1]), "all partitions are led", 30, 0.1)
        servers.wait_until(lambda: made.serves(node), "the full node asks the others", 30, 0.1)
        answered = inside.acknowledged
        servers.wait_until(lambda: inside.acknowledged > answered, "its clients go on", 30, 0.1)
        with rest[1].connect() as connection:
            replies = connection.pipeline([("SET", key, "v") for key in cluster.keys_of_all()])
            assert set(replies) == {b"OK"}
        os.unlink(ballast)
        made.wait_until_well()
    load.check(made.nodes)
    inside.check(made.nodes)
    made.wait_until_equal()
    assert node.running()
    unanswered = [error for error in inside.errors if error.startswith("lost")]
    assert not unanswered, inside.errors
