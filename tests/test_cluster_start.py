"""Nodes that start or stop where something is missing: etcd, other nodes, the right settings or data.

What is wrong must be said, soon and where somebody looks, and must harm nobody else.
"""

import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import cluster
import resp
import servers
import up
from test_grpc import SERVICE, refused

pytestmark = pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")


# What lasts is told again after that.
WARNING_INTERVAL_S = 30


class Nowhere:
    """In place of an etcd: an address where none answers."""

    def __init__(self, address):
        self.address = address


@pytest.fixture
def make_cluster(flux_binary, tmp_path):
    """Makes clusters, of which only etcd is started; all processes are gone afterwards."""
    made = []

    def make(name="one", **settings):
        new = cluster.Cluster(tmp_path / name, binary=flux_binary, **settings)
        made.append(new)
        new.etcd.start()
        return new

    yield make
    for one in made:
        one.kill()


def readiness(node):
    """What `/ready` says, with the status."""
    try:
        with urllib.request.urlopen(f"{node.admin_url}/ready", timeout=5) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()
    except OSError:
        return None, ""


def lines(node, level):
    return [line for line in node.logs().splitlines() if f" {level} " in line]


def is_soon_known_to_be_missing(name):
    """Whether the resolver says so within the second: one that asks a server out of reach may take longer
    than a node asks it."""
    begun = time.monotonic()
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror:
        return time.monotonic() - begun < 1
    return False


def test_an_etcd_that_does_not_answer_is_named(flux_binary, tmp_path):
    """In the log within seconds and then seldom, at /ready, and by `flux admin`."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(60)
        closed = servers.free_port()
        cases = {
            f"127.0.0.1:{closed}": "Connection refused",
            f"http://127.0.0.1:{closed}": "Connection refused",
            "127.0.0.1:%d" % mute.getsockname()[1]: "no answer",
        }
        if is_soon_known_to_be_missing("no-such-host.invalid"):
            cases["no-such-host.invalid:2379"] = "lookup"
        nodes, begun = [], time.monotonic()
        for number, (address, cause) in enumerate(cases.items()):
            node = cluster.Node(tmp_path / f"n{number}", Nowhere(address), binary=flux_binary)
            node.spawn()
            nodes.append((node, address, cause))
        try:
            for node, address, cause in nodes:
                # As the setting is shown.
                address = address.removeprefix("http://")

                def warned(node=node):
                    return lines(node, "WARN")

                servers.wait_until(warned, f"a warning about {address}", 20, 0.1)
                warning = warned()[0]
                assert "etcd_endpoints" in warning and address in warning and cause in warning
                code, text = readiness(node)
                assert code == 503 and "waiting for etcd" in text and address in text, text
                asked = up.admin(node.admin_port, "status", binary=flux_binary)
                assert asked.returncode == 1 and "waiting for etcd" in asked.stderr, asked
            # Attempts go on, and each fails as the first one did.
            for _ in range(3):
                mute.accept()[0].close()
            often = 1 + (time.monotonic() - begun) // WARNING_INTERVAL_S
            assert all(len(lines(node, "WARN")) <= often for node, _, _ in nodes)
        finally:
            for node, _, _ in nodes:
                node.kill()


def test_clients_of_a_node_that_waits_for_others_are_told(make_cluster):
    made = make_cluster()
    first, second, third = made.nodes
    first.spawn()
    servers.wait_until(lambda: "1 of 3" in readiness(first)[1], "it says what it waits for", 20, 0.1)
    assert readiness(first) == (503, "waiting for 2 more nodes (1 of 3)")
    assert "waiting for 2 more nodes (1 of 3)" in first.logs()
    with first.connect() as connection:
        with pytest.raises(resp.ReplyError, match="LOADING .*waiting for 2 more nodes"):
            connection.call("SET", "key", "value")
        assert connection.call("PING") == b"PONG"
        assert b"loading:1" in connection.call("INFO")
    with socket.create_connection(("127.0.0.1", first.port), timeout=5) as native:
        native.sendall(b"\xf1FLUX\0\1\0\1\0\0\0")
        assert b"waiting for 2 more nodes" in native.recv(4096)

    second.spawn()
    servers.wait_until(lambda: "2 of 3" in readiness(first)[1], "another node is counted", 20, 0.1)
    assert readiness(first)[1] == "waiting for 1 more node (2 of 3)"
    third.spawn()
    servers.wait_until(lambda: all(node.ready() for node in made.nodes), "all are ready", 60, 0.1)
    made.wait_until_well()
    with first.connect() as connection:
        assert connection.call("SET", "key", "value") == b"OK"


def dial(node):
    """A channel with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    return grpc.insecure_channel(f"127.0.0.1:{node.grpc_port}", options=options)


# A GetRequest of the key "k", encoded: reflection, by which the other tests encode, is refused here.
GET_K = b"\x0a\x01k"


def call(channel, path, request=GET_K):
    return channel.unary_unary(path)(request, timeout=10)


def health_of(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def follow_health(channel):
    """How the health changes, as it is told to whoever asked once."""
    answers = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    return (answer.status for answer in answers)


def test_calls_to_a_node_that_waits_are_refused_and_later_carried_out_on_the_same_connection(make_cluster):
    made = make_cluster()
    first, second, third = made.nodes
    first.spawn()
    servers.wait_until(lambda: "1 of 3" in readiness(first)[1], "it says what it waits for", 20, 0.1)
    get, not_serving = f"/{SERVICE}/Get", health_pb2.HealthCheckResponse.NOT_SERVING
    with dial(first) as channel:
        states = []
        channel.subscribe(states.append)
        with pytest.raises(grpc.RpcError) as error:
            call(channel, get)
        assert error.value.details() == "the node is starting: waiting for 2 more nodes (1 of 3)"
        reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        for path in (get, f"/{SERVICE}/Scan", "/no.such.Service/Method", reflection):
            with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"):
                call(channel, path)
        # No more of these is taken than the connection's window, over and over.
        for _ in range(4):
            with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"):
                call(channel, f"/{SERVICE}/Set", bytes(1 << 20))
        assert health_of(channel) == health_of(channel, SERVICE) == not_serving
        followed = follow_health(channel)
        assert next(followed) == not_serving

        for node in (second, third):
            node.spawn()
        answers = []

        def served():
            with dial(first) as another:
                try:
                    answers.append(call(another, get))
                    return True
                except grpc.RpcError as error:
                    # Where the connection is refused nobody says the `flux-code`.
                    code = dict(error.trailing_metadata()).get("flux-code")
                    assert code in ("UNAVAILABLE", "NOT_LEADER"), error
                    answers.append(code)
            return False

        servers.wait_until(served, "calls are carried out", 60, 0.001)
        assert "UNAVAILABLE" in answers
        assert next(followed) == health_pb2.HealthCheckResponse.SERVING
        assert health_of(channel) == health_of(channel, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        made.wait_until_well()
        assert call(channel, get) == b""
        lost = {grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.IDLE}
        assert not lost & set(states[1:]), states


def test_a_node_that_waits_stops_at_once(make_cluster):
    """Whoever is connected and asks on."""
    first = make_cluster(shutdown_timeout_ms=20000).nodes[0]
    first.spawn()
    servers.wait_until(lambda: "1 of 3" in readiness(first)[1], "it says what it waits for", 20, 0.1)
    with dial(first) as channel, first.connect() as connection:
        assert next(follow_health(channel)) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert connection.call("PING") == b"PONG"
        assert first.stop(deadline_s=5) == 0


def test_settings_that_must_be_the_same_are_compared(make_cluster):
    """Whoever reckons leases otherwise is refused; what else differs is told."""
    made = make_cluster()
    odd = made.add(election_timeout_ms=5000, clock_drift_percent=0)
    odd.spawn()
    made.start_nodes(made.nodes[:3])
    assert odd.wait(30) == 1
    assert "election_timeout_ms is 5000 and clock_drift_percent 0 here" in odd.log()
    assert "was created with 600 and 10" in odd.log()
    made.nodes.remove(odd)
    made.wait_until_well()
    assert made.status()["nodes_alive"] == 3

    other = made.add(replication_factor=5, partitions=128)
    other.start()
    warnings = " ".join(lines(other, "WARN"))
    assert "replication_factor is 5 here, and the cluster was created with 3" in warnings
    assert "partitions is 128 here, and the cluster was created with 64" in warnings
    made.wait_until_well()

    # A member is refused too, also by what it remembers of the cluster.
    member = made.nodes[0]
    assert member.stop() == 0
    made.etcd.kill()
    member.settings["election_timeout_ms"] = 300
    member.spawn()
    assert member.wait(30) == 1
    assert "election_timeout_ms is 300" in member.log()


def test_a_copy_beside_its_node_is_refused_at_once(make_cluster):
    """Although the registration of the one that runs lasts for long yet."""
    made = make_cluster(registry_ttl_s=60)
    made.start_nodes(made.nodes)
    made.wait_until_well()
    original = made.nodes[0]
    copy = made.add()
    original.copy_data(copy.data_dir)
    copy.spawn()
    assert copy.wait(50) == 1
    log = copy.log()
    assert "two processes run as" in log and f"127.0.0.1:{original.peer_port}" in log, log
    made.nodes.remove(copy)
    made.wait_until_well()


def test_a_node_without_its_old_data_is_no_second_one(make_cluster):
    """Its old registration lasts, at its own address: it meets itself there, and nobody else."""
    made = make_cluster(registry_ttl_s=20)
    made.start_nodes(made.nodes)
    made.wait_until_well()
    node = made.nodes[0]
    old_id = node.node_id
    node.kill()
    shutil.rmtree(node.data_dir)
    before = len(lines(node, "ERROR"))
    node.start()

    def all_have_looked():
        """Each has asked at the address for the old node, and was told that this is another one."""
        refused = [[line for line in lines(one, "WARN") if "refuses this one" in line] for one in made.nodes]
        return all(any(old_id in line for line in of_one) for of_one in refused)

    servers.wait_until(all_have_looked, "all have looked for the old node", 20, 0.1)
    assert len(lines(node, "ERROR")) == before, node.logs()
    assert not any("two nodes have the id" in one.logs() for one in made.nodes)


def test_the_last_nodes_do_not_wait_for_heirs(make_cluster):
    """One after the other, and the last two at the same time."""
    made = make_cluster()
    made.start_nodes(made.nodes)
    made.wait_until_well()
    assert made.nodes[0].stop() == 0
    servers.wait_until(lambda: len(made.nodes[1].led() | made.nodes[2].led()) == 64, "they lead", 30, 0.1)
    stopping = [threading.Thread(target=node.stop) for node in made.nodes[1:]]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()
    for node in made.nodes[1:]:
        assert "found no new leader in time" not in node.logs()
