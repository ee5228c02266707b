"""`flux up --nodes 3`: a cluster in one process that is found again after a kill and after a stop."""

import subprocess
import urllib.request

import pytest

import servers
import up


@pytest.fixture
def start_up(flux_binary, tmp_path):
    """Starts clusters in one process each; all are gone afterwards."""

    def start(nodes=3, name="up", **settings):
        cluster = up.Up(tmp_path / name, nodes, binary=flux_binary, **settings)
        start.started.append(cluster)
        return cluster.start()

    start.started = []
    yield start
    for cluster in start.started:
        cluster.kill()


def admin_port(cluster):
    return cluster.rows()[0][2]


def well(cluster, nodes):
    """Whether all nodes are there and every partition has its replicas where they should be."""
    status = up.asked(admin_port(cluster), "status")
    return (
        status["nodes_alive"] == nodes
        and status["partitions"] == status["partitions_led"] == 64
        and status["partitions_moving"] == status["partitions_under_replicated"] == 0
    )


def test_a_cluster_is_found_again_after_a_kill_and_after_a_stop(start_up):
    cluster = start_up()
    names = [name for name, _, _ in cluster.rows()]
    assert len(set(names)) == 3
    servers.wait_until(lambda: well(cluster, 3), "a cluster of three nodes that is well")
    with cluster.connect_to(1) as first, cluster.connect_to(3) as third:
        for number in range(200):
            assert first.call("SET", f"key{number}", f"value{number}") == b"OK"
        assert [third.call("GET", f"key{number}") for number in range(200)] == [
            f"value{number}".encode() for number in range(200)
        ]
    # The gateway goes by the leaders, wherever they are.
    body = urllib.request.urlopen(f"{cluster.http_url}/api/v1/kv?key=key7", timeout=20).read()
    assert b"value7" in body

    cluster.kill()
    cluster.start()
    assert [name for name, _, _ in cluster.rows()] == names
    with cluster.connect_to(2) as second:
        assert [second.call("GET", f"key{number}") for number in range(200)] == [
            f"value{number}".encode() for number in range(200)
        ]
        assert second.call("SET", "after", "the kill") == b"OK"

    assert cluster.stop() == 0, cluster.log()
    assert "panicked" not in cluster.log()
    cluster.start()
    assert [name for name, _, _ in cluster.rows()] == names
    with cluster.connect_to(3) as third:
        assert third.call("GET", "after") == b"the kill"
        assert third.call("GET", "key199") == b"value199"


def test_more_nodes_join_and_fewer_are_refused(start_up):
    cluster = start_up()
    with cluster.connect_to(1) as first:
        assert first.call("SET", "here", "before") == b"OK"
    assert cluster.stop() == 0, cluster.log()

    cluster.nodes = 4
    cluster.start()

    def spread():
        nodes = up.asked(admin_port(cluster), "nodes")
        return all(node["replicas"] == node["placed"] > 32 for node in nodes) and well(cluster, 4)

    servers.wait_until(spread, "a cluster spread over four nodes", deadline_s=90, interval_s=0.5)
    with cluster.connect_to(4) as fourth:
        assert fourth.call("GET", "here") == b"before"
    assert cluster.stop() == 0, cluster.log()

    cluster.nodes = 3
    with pytest.raises(servers.StartFailed, match="give --nodes 4"):
        cluster.start()


def refused(binary, *arguments):
    """What `flux up` says to a data directory that it does not take."""
    done = subprocess.run(
        [str(part) for part in (binary, "up", *arguments)],
        capture_output=True, text=True, timeout=60, check=False, env=up.without_settings(),
    )  # fmt: skip
    assert done.returncode == 1, done
    return done.stderr


def test_a_data_directory_of_another_kind_is_refused(start_up, start_flux, flux_binary):
    cluster = start_up()
    assert cluster.stop() == 0, cluster.log()
    error = refused(flux_binary, "--data-dir", cluster.data_dir)
    assert "holds a cluster of 3 nodes: give --nodes 3" in error

    node = start_flux()
    assert node.stop() == 0
    error = refused(flux_binary, "--nodes", 3, "--data-dir", node.data_dir)
    assert "node alone" in error and "flux admin backup" in error


def test_what_cannot_be_a_cluster_is_told(flux_binary, tmp_path):
    directory = ("--data-dir", tmp_path / "data")
    assert "replication_factor 3" in refused(flux_binary, "--nodes", 2, *directory)
    etcd = ("--etcd-endpoints", "127.0.0.1:2379")
    assert "etcd_endpoints" in refused(flux_binary, "--nodes", 3, *etcd, *directory)
    assert not (tmp_path / "data").exists()


def test_lines_of_the_log_say_which_node_speaks_and_of_whom(start_up):
    cluster = start_up()
    names = [name for name, _, _ in cluster.rows()]

    def links_are_told():
        """From each node to the two others."""
        links = [line for line in cluster.log().splitlines() if "link to a node is up" in line]
        return all(
            any(f"node{{number={number}}}" in line and f"node={name}" in line for line in links)
            for number in range(1, 4)
            for place, name in enumerate(names, 1)
            if place != number
        )

    # A cluster serves with a majority of its links.
    servers.wait_until(links_are_told, "each link is in the log")
    recovered = [line for line in cluster.log().splitlines() if "data recovered" in line]
    assert len(recovered) == 3 and all("node{number=" in line for line in recovered)
