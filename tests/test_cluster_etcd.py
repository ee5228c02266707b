"""A cluster and its etcd: away for long, back without its data; and nodes that are not who they say."""

import signal
import time

import pytest

import cluster
import history
import resp
import servers
from test_cluster import admin

pytestmark = pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")

TTL_S = 2


@pytest.fixture
def start_cluster(flux_binary, tmp_path):
    """Starts clusters; all are gone afterwards."""
    started = []

    def start(name="one", **settings):
        made = cluster.Cluster(
            tmp_path / name, binary=flux_binary, registry_ttl_s=TTL_S, **settings
        )
        started.append(made)
        return made.start()

    yield start
    for made in started:
        made.kill()


def test_etcd_away_for_longer_than_leases_last(start_cluster):
    """First silent, then gone: not one request fails, and nobody is replaced for having no lease."""
    made = start_cluster(replace_after_s=5)
    before = made.replicas()
    with history.Load(made.nodes) as load:
        made.etcd.signal(signal.SIGSTOP)
        time.sleep(3 * TTL_S)
        made.etcd.kill()
        time.sleep(2 * TTL_S)
        status = made.status()
        assert status["partitions_led"] == 64
        assert status["registry_away_s"] is not None
        made.etcd.start()
        made.wait_until_well()
        load.wait_for_more()
    result = load.check(made.nodes)
    assert not result["errors"] and result["unknown"] == 0, result
    # Less than etcd was away for.
    assert result["slowest_s"] < 5.0, result
    servers.wait_until(
        lambda: made.status()["registry_away_s"] is None, "etcd is heard of again", 30, 0.1
    )
    ids = lambda replicas: {p: sorted(r["replica"] for r in all_) for p, all_ in replicas.items()}
    assert ids(made.replicas()) == ids(before)


def test_nodes_start_while_etcd_is_away(start_cluster):
    """From what they remember of the cluster."""
    made = start_cluster()
    with made.nodes[0].connect() as connection:
        connection.call("SET", "before", "1")
    made.etcd.kill()
    for node in made.nodes:
        node.kill()
    made.start_nodes(made.nodes)
    servers.wait_until(lambda: all(made.serves(node) for node in made.nodes), "all serve", 30, 0.1)
    with made.nodes[1].connect() as connection:
        assert connection.call("GET", "before") == b"1"
        assert connection.call("SET", "after", "2") == b"OK"
    made.etcd.start()
    made.wait_until_well()


def test_a_client_of_a_node_that_starts_while_etcd_is_away(start_cluster):
    """It is told so until the node serves, and then gets its answer: it never waits for the start."""
    made = start_cluster()
    node = made.nodes[0]
    key = b"waits"
    with made.nodes[1].connect() as connection:
        assert connection.call("SET", key, "1") == b"OK"
    assert node.stop() == 0
    made.etcd.kill()
    node.spawn()
    slowest, answered, begun = 0.0, False, time.monotonic()
    while not answered:
        assert time.monotonic() - begun < 30, node.log()
        asked = time.monotonic()
        try:
            with node.connect(timeout=20) as connection:
                assert connection.call("GET", key) == b"1"
                answered = True
        except (ConnectionRefusedError, resp.Closed):
            time.sleep(0.02)
        except resp.ReplyError as error:
            assert str(error).startswith("LOADING"), error
            time.sleep(0.02)
        slowest = max(slowest, time.monotonic() - asked)
    served = time.monotonic() - begun
    print(f"\nslowest {slowest:.2f} s, served after {served:.2f} s")
    assert slowest < 5
    made.etcd.start()
    made.wait_until_well()


def is_told(made):
    """Whether an operator sees that the map is gone and how to bring it back."""
    trouble = (made.status() or {}).get("trouble") or ""
    return "republish" in trouble


def test_etcd_without_its_data(start_cluster):
    """It is a clear error, nothing is destroyed and no second cluster made; an operator puts it right."""
    made = start_cluster()
    cluster_id = made.status()["cluster_id"]
    with history.Load(made.nodes) as load:
        made.etcd.kill()
        made.etcd.wipe()
        made.etcd.start()
        servers.wait_until(lambda: is_told(made), "the status says what to do", 30, 0.1)
        # A node that is started again meanwhile comes back as it was.
        made.nodes[0].kill()
        made.nodes[0].start()
        servers.wait_until(lambda: made.serves(made.nodes[0]), "it serves", 30, 0.1)
        time.sleep(3 * TTL_S)
        assert is_told(made)
    load.check(made.nodes)

    def is_logged():
        return any("ERROR" in line and "etcd" in line for line in made.nodes[1].logs().splitlines())

    # It is told when it lasts.
    servers.wait_until(is_logged, "the log says what to do", 30, 0.1)
    with history.Load(made.nodes) as load:
        admin(made.nodes[1], "republish")
        made.wait_until_well()
        load.wait_for_more()
    result = load.check(made.nodes)
    assert not result["errors"], result
    assert made.status()["trouble"] is None
    assert made.status()["cluster_id"] == cluster_id


def test_two_nodes_of_one_id(start_cluster):
    """A copy of a data directory is started beside its node: the later one says why, and stops."""
    made = start_cluster()
    original = made.nodes[0]
    copy = made.add()
    original.copy_data(copy.data_dir)
    with history.Load([original, made.nodes[1]]) as load:
        copy.spawn()
        code = copy.wait(30)
        load.wait_for_more()
    made.nodes.remove(copy)
    assert code != 0
    log = copy.log()
    for address in (original, copy):
        assert f"127.0.0.1:{address.port}" in log or f"127.0.0.1:{address.peer_port}" in log, log
    assert original.node_id in log, log
    assert "panicked" not in log
    result = load.check(made.nodes)
    assert not result["errors"], result
    assert original.running()


def test_a_copy_started_while_the_node_is_down(start_cluster):
    """Whoever comes later is refused, also if that is the original."""
    made = start_cluster()
    original = made.nodes[0]
    assert original.stop() == 0
    copy = made.add()
    original.copy_data(copy.data_dir)
    copy.start()
    original.spawn()
    assert original.wait(30) != 0
    assert original.node_id in original.log()
    made.nodes.remove(original)
    made.wait_until_well()
    # All of it, so that the original is not left to the fixture.
    made.nodes.append(original)


def test_data_of_another_cluster_is_refused(start_cluster, tmp_path):
    """Whether the other cluster has another name on the same etcd, or another etcd."""
    one = start_cluster("one")
    two = start_cluster("two")
    stranger = two.nodes[0]
    with stranger.connect() as connection:
        connection.call("SET", "its", "own")
    assert stranger.stop() == 0
    files = sorted(path.relative_to(stranger.data_dir) for path in stranger.data_dir.rglob("*"))
    home, stranger.etcd = stranger.etcd, one.etcd
    stranger.spawn()
    assert stranger.wait(30) != 0
    log = stranger.log()
    assert one.status()["cluster_id"] in log and two.status()["cluster_id"] in log, log
    assert "panicked" not in log
    assert files == sorted(p.relative_to(stranger.data_dir) for p in stranger.data_dir.rglob("*"))
    one.wait_until_well()
    # At home it is welcome as before.
    stranger.etcd = home
    stranger.start()
    two.wait_until_well()
    with stranger.connect() as connection:
        assert connection.call("GET", "its") == b"own"
