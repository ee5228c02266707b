"""Clients of Redis Cluster, unchanged: redis-py's RedisCluster, redis-cli -c, redis-benchmark --cluster.

A cluster of three nodes that redirect, with every key on each of them.
"""

import asyncio
import re
import shutil
import subprocess

import pytest
import redis.asyncio.cluster
import redis.cluster
import redis.crc

import cluster
import servers
from golden import script
from test_golden import check

SCRIPTS = script.cluster_scripts()


@pytest.fixture(scope="module")
def all_nodes(flux_binary, shared_folder):
    settings = {"fsync": "no", "resp_redirect": "true"}
    with (
        shared_folder("redirecting") as folder,
        cluster.Cluster(folder, binary=flux_binary, **settings) as made,
    ):
        settle(made)
        yield made.nodes


@pytest.fixture(scope="module")
def lone_node(flux_binary, shared_folder):
    """A cluster of one node, which leads everything."""
    settings = {"fsync": "no", "resp_redirect": "true", "replication_factor": 1}
    with (
        shared_folder("lone") as folder,
        cluster.Cluster(folder, count=1, binary=flux_binary, **settings) as made,
    ):
        yield made.nodes[0]


def settle(made):
    """Until leadership is where it stays, so that no test sees it move."""
    made.wait_until_well()
    servers.wait_until(
        lambda: all(18 <= len(node.led()) <= 25 for node in made.nodes), "leaders are spread", 60, 0.2
    )
    # What each node tells clients is what the nodes say of themselves.
    servers.wait_until(lambda: len({shown(node) for node in made.nodes}) == 1, "one map", 30, 0.2)


def shown(node):
    with node.connect() as connection:
        return tuple(
            (first, last, leader[1]) for first, last, leader, *_ in connection.call("CLUSTER", "SLOTS")
        )


@pytest.fixture
def nodes(all_nodes):
    """Three nodes that lead a third of the slots each, empty."""
    # With redirection a node answers for what it leads, as in Redis Cluster.
    for node in all_nodes:
        with node.connect() as connection:
            assert connection.call("FLUSHALL") == b"OK"
    servers.wait_until(lambda: size(all_nodes) == 0, "all nodes are empty")
    return all_nodes


def size(nodes):
    """The keys that all nodes together have."""
    total = 0
    for node in nodes:
        with node.connect() as connection:
            total += connection.call("DBSIZE")
    return total


@pytest.fixture(scope="module")
def cluster_redis(tmp_path_factory):
    if servers.REDIS_SERVER is None:
        pytest.skip("redis-server is not installed")
    server = script.start_cluster_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


def parameters():
    for one in SCRIPTS:
        for case in one.cases:
            for version in case.versions:
                yield pytest.param(one, case, version, id=f"{case.name}-resp{version}")


@pytest.mark.parametrize("one, case, version", list(parameters()))
def test_golden_flux(lone_node, one, case, version):
    check(lone_node.port, one, case, version)


@pytest.mark.parametrize("one, case, version", list(parameters()))
def test_golden_redis(cluster_redis, one, case, version):
    with cluster_redis.connect() as connection:
        if b"redis_version:7.0." not in connection.call("INFO", "server"):
            pytest.skip("the scripts are recorded from Redis 7.0")
    check(cluster_redis.port, one, case, version)


def leader_of(nodes, key):
    """The node that leads the key, by what the first one says."""
    with nodes[0].connect() as connection:
        slot = connection.call("CLUSTER", "KEYSLOT", key)
        for first, last, leader, *_ in connection.call("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return slot, next(node for node in nodes if node.port == leader[1])
    raise AssertionError(f"nobody has slot {slot}")


def test_a_command_of_another_node_is_moved(nodes):
    slot, leader = leader_of(nodes, "foo")
    other = next(node for node in nodes if node is not leader)
    moved = b"-MOVED %d 127.0.0.1:%d\r\n" % (slot, leader.port)
    with other.connect() as connection, leader.connect() as right:
        assert connection.raw("SET", "foo", "bar") == moved
        assert connection.raw("GET", "foo") == moved
        assert right.raw("SET", "foo", "bar") == b"+OK\r\n"
        # It spoils a transaction.
        assert connection.raw("MULTI") == b"+OK\r\n"
        assert connection.raw("GET", "foo") == moved
        assert connection.raw("EXEC").startswith(b"-EXECABORT ")
        # Reads of a replica are allowed to who asks for them; it has what the leader had a moment ago.
        assert connection.raw("READONLY") == b"+OK\r\n"
        servers.wait_until(lambda: connection.raw("GET", "foo") == b"$3\r\nbar\r\n", "it has the value")
        assert connection.raw("SET", "foo", "bar") == moved
        assert connection.raw("READWRITE") == b"+OK\r\n"
        assert connection.raw("GET", "foo") == moved
        # A pipeline is answered in order.
        replies = connection.pipeline([("PING",), ("GET", "foo"), ("CLUSTER", "KEYSLOT", "foo")])
        assert replies[0] == b"PONG" and replies[2] == slot
        assert str(replies[1]).encode() == moved[1:-2]


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def client(nodes, request):
    with redis.cluster.RedisCluster(
        host="127.0.0.1", port=nodes[1].port, protocol=request.param, decode_responses=True
    ) as client:
        yield client


def test_redis_cluster_knows_all_leaders(client, nodes):
    ports = {node.port for node in nodes}
    assert {node.port for node in client.get_primaries()} == ports
    # Each of them is a replica of the others' slots, too, and is named as one once it was named as a leader.
    cached = client.nodes_manager.slots_cache
    assert {len(cached[slot]) for slot in range(16384)} == {1, 2, 3}


def test_redis_cluster_commands(client):
    c = client
    for number in range(300):
        assert c.set(f"k{number}", number, ex=1000)
    assert [c.get(f"k{number}") for number in range(300)] == [str(n) for n in range(300)]
    sizes = c.dbsize(target_nodes=c.PRIMARIES)
    assert sum(sizes.values() if isinstance(sizes, dict) else [sizes]) == 300
    assert sorted(c.scan_iter(count=50)) == sorted(f"k{number}" for number in range(300))
    assert c.mset_nonatomic({"a": "1", "b": "2", "c": "3"})
    assert c.mget_nonatomic("a", "b", "c", "absent") == ["1", "2", "3", None]
    assert c.exists("a", "b", "absent") == 2
    assert c.delete("a", "b", "c") == 3
    assert c.mset({"{t}a": "1", "{t}b": "2"})
    assert c.mget("{t}a", "{t}b") == ["1", "2"]
    assert c.rename("{t}a", "{t}c")
    assert c.incr("counter", 5) == 5
    slot = c.keyslot("k7")
    assert c.cluster_keyslot("k7") == slot
    assert c.cluster_countkeysinslot(slot) >= 1
    assert "k7" in c.cluster_get_keys_in_slot(slot, 10)
    assert c.cluster_info()["cluster_state"] == "ok"
    assert len(c.cluster_nodes()) == 3
    assert c.cluster_slots() and c.cluster_shards()
    assert c.info("cluster")["cluster_enabled"] == 1
    assert c.flushall()
    assert c.get("k7") is None
    with pytest.raises(redis.ResponseError, match="flux admin"):
        c.cluster_meet("127.0.0.1", 7000)


def test_redis_cluster_pipelines_and_transactions(client):
    pipeline = client.pipeline()
    for number in range(200):
        pipeline.set(f"k{number}", number)
        pipeline.get(f"k{number}")
    replies = pipeline.execute()
    assert replies[0::2] == [True] * 200
    assert replies[1::2] == [str(number) for number in range(200)]
    with client.pipeline(transaction=True) as pipeline:
        pipeline.set("{t}n", 1)
        pipeline.incr("{t}n")
        assert pipeline.execute()[-1] == 2

    def add(pipeline):
        value = int(pipeline.get("{t}n"))
        pipeline.multi()
        pipeline.set("{t}n", value + 1)

    client.transaction(add, "{t}n")
    assert client.get("{t}n") == "3"


def test_redis_cluster_follows_moved(client):
    """Whatever the client takes for the leader, it ends up at the right one."""
    manager = client.nodes_manager
    for wrong in list(manager.nodes_cache.values()):
        for slot in range(16384):
            manager.slots_cache[slot] = [wrong]
        for number in range(60):
            assert client.set(f"k{number}", wrong.port)
        for slot in range(16384):
            manager.slots_cache[slot] = [wrong]
        pipeline = client.pipeline()
        for number in range(60):
            pipeline.get(f"k{number}")
        assert pipeline.execute() == [str(wrong.port)] * 60


def test_redis_cluster_reads_from_replicas(nodes):
    """It sends READONLY, and reads that nodes may answer though another one leads."""
    with redis.cluster.RedisCluster(
        host="127.0.0.1", port=nodes[0].port, read_from_replicas=True
    ) as client:
        assert client.set("k", "v")
        servers.wait_until(lambda: {client.get("k") for _ in range(20)} == {b"v"}, "all replicas have it")


@pytest.mark.parametrize("protocol", [2, 3])
def test_asynchronous_redis_cluster(nodes, protocol):
    async def run():
        client = redis.asyncio.cluster.RedisCluster(
            host="127.0.0.1", port=nodes[2].port, protocol=protocol, decode_responses=True
        )
        try:
            # Before that it does not know where keys are in commands, and sends them anywhere.
            await client.initialize()
            await asyncio.gather(*(client.set(f"k{number}", number) for number in range(100)))
            values = await asyncio.gather(*(client.get(f"k{number}") for number in range(100)))
            assert values == [str(number) for number in range(100)]
            assert {node.port for node in client.get_primaries()} == {n.port for n in nodes}
        finally:
            await client.aclose()

    asyncio.run(run())


def run_tool(name, *arguments, data=None):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install redis-tools")
    done = subprocess.run(
        [path, *(str(argument) for argument in arguments)],
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return done.returncode, done.stdout.decode(errors="replace")


@pytest.mark.parametrize("pipeline", [1, 16])
def test_redis_benchmark(nodes, pipeline):
    code, text = run_tool(
        "redis-benchmark", "--cluster", "-p", nodes[0].port, "-t", "set,get,incr,mset",
        "-P", pipeline, "-n", 10_000, "-c", 20, "-r", 1000, "-q",
    )
    assert code == 0, text
    assert "Cluster has 3 master nodes" in text
    assert "error" not in text.lower() and "MOVED" not in text, text
    for name in ["SET", "GET", "INCR", "MSET"]:
        assert re.search(rf"{name}[^:\n]*: [\d.]+ requests per second", text), text
    for node in nodes:
        with node.connect() as connection:
            assert connection.call("DBSIZE") > 100


def test_redis_cli_follows_moved(nodes):
    keys = [f"k{number}" for number in range(20)]
    for node in nodes:
        commands = "".join(f"SET {key} {node.port}\nGET {key}\n" for key in keys)
        code, text = run_tool("redis-cli", "-c", "-p", node.port, data=commands.encode())
        assert code == 0, text
        lines = [line for line in text.splitlines() if "Redirected" not in line]
        assert lines == ["OK", str(node.port)] * 20


def test_redis_cli_checks_the_cluster(nodes):
    code, text = run_tool("redis-cli", "--cluster", "check", f"127.0.0.1:{nodes[0].port}")
    assert code == 0, text
    assert "All nodes agree about slots configuration" in text
    assert "All 16384 slots covered" in text


def test_keys_of_a_slot_are_counted_in_steps(flux_binary, tmp_path):
    """A partition of more keys than one step looks at; what is sent behind the count waits its turn."""
    settings = {"fsync": "no", "resp_redirect": "true", "partitions": 1, "replication_factor": 1}
    with cluster.Cluster(tmp_path, count=1, binary=flux_binary, **settings) as made:
        with made.nodes[0].connect() as connection:
            keys = [b"key:%d" % number for number in range(40_000)]
            for start in range(0, len(keys), 1000):
                connection.pipeline([("SET", key, "v") for key in keys[start : start + 1000]])
            by_slot = {}
            for key in keys:
                by_slot.setdefault(redis.crc.key_slot(key), []).append(key)
            slot, expected = max(by_slot.items(), key=lambda item: len(item[1]))
            replies = connection.pipeline(
                [
                    ("SET", "{%s}more" % expected[0].decode(), "v"),
                    ("CLUSTER", "COUNTKEYSINSLOT", slot),
                    ("DEL", "{%s}more" % expected[0].decode()),
                    ("CLUSTER", "COUNTKEYSINSLOT", slot),
                    ("CLUSTER", "GETKEYSINSLOT", slot, 1000),
                    ("CLUSTER", "GETKEYSINSLOT", slot, 1),
                    ("PING",),
                ]
            )
            assert replies[:2] == [b"OK", len(expected) + 1]
            assert replies[2:4] == [1, len(expected)]
            assert sorted(replies[4]) == sorted(expected)
            assert len(replies[5]) == 1 and replies[5][0] in expected
            assert replies[6] == b"PONG"


def answers_of_all(made):
    """What each running node says: slots ok, pfail and fail, and who leads each slot."""
    answers = []
    for node in made.running():
        with node.connect() as connection:
            info = connection.call("CLUSTER", "INFO").decode()
            fields = dict(line.split(":") for line in info.split())
            counts = tuple(int(fields[f"cluster_slots_{state}"]) for state in ("ok", "pfail", "fail"))
            leaders = [None] * cluster.SLOTS
            for first, last, leader, *_ in connection.call("CLUSTER", "SLOTS"):
                leaders[first : last + 1] = [leader[1]] * (last + 1 - first)
        answers.append((counts, tuple(leaders)))
    return answers


def leaders_by_admin(made):
    """The data port of who leads each slot, as the nodes that lead say themselves."""
    leaders = [None] * cluster.SLOTS
    width = cluster.SLOTS // cluster.PARTITIONS
    for node in made.running():
        for partition in node.led():
            leaders[partition * width : (partition + 1) * width] = [node.port] * width
    return tuple(leaders)


@pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")
def test_nodes_know_who_leads_what_they_do_not_hold(flux_binary, tmp_path):
    """Five nodes, three replicas: each node holds only some partitions and knows all leaders, at rest and
    after one was killed."""
    with cluster.Cluster(tmp_path, count=5, binary=flux_binary, fsync="no", workers=2) as made:

        def agreed():
            expected = ((cluster.SLOTS, 0, 0), leaders_by_admin(made))
            return None not in expected[1] and all(seen == expected for seen in answers_of_all(made))

        servers.wait_until(agreed, "all nodes know all leaders", 60, 0.2)
        made.nodes[2].kill()
        servers.wait_until(agreed, "the four that are left know all leaders", 30, 0.2)
        port = made.nodes[0].port
        code, text = run_tool("redis-cli", "--cluster", "check", f"127.0.0.1:{port}")
        assert "All 16384 slots covered" in text, (code, text)
        assert "Nodes don't agree" not in text, text
