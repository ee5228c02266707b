"""The native protocol, gRPC, and commands without keys in a cluster: any node answers for all of it."""

import contextlib
import random
import time

import grpc
import pytest

import cluster
import native
import servers
from test_grpc import SERVICE, Service, refused

KEYS = [b"key:%d" % number for number in range(500)]
REDIRECTING = 2
# The age of a replica that hears of its leader, also on a machine that stands still for seconds.
SOON_MS = 10_000


@pytest.fixture(scope="module")
def shared(flux_binary, shared_folder):
    """Four nodes of two workers, of which one sends RESP clients elsewhere. Each partition has three
    replicas, so that no node has all."""
    with shared_folder("cluster") as folder:
        nodes = cluster.Cluster(folder, 4, binary=flux_binary, fsync="no", workers=2)
        nodes.nodes[REDIRECTING].settings["resp_redirect"] = "true"
        with nodes:
            yield nodes


def at_rest(nodes):
    """Whether each node has its share of replicas, and each partition the leader that the map prefers: then
    nothing moves any more."""
    with native.Client(nodes[0].port) as client:
        info = client.info()
    led_as_preferred = all(leader == order[0] for leader, order in zip(info["leaders"], info["replicas"]))
    return led_as_preferred and all(44 <= len(held_by(node)) <= 52 for node in nodes)


@pytest.fixture
def nodes(shared):
    """The nodes, empty."""
    shared.wait_until_well()
    servers.wait_until(lambda: at_rest(shared.nodes), "nothing moves any more", 60, 0.1)
    with shared.nodes[0].connect() as connection:
        assert connection.call("FLUSHALL") == b"OK"
    return shared.nodes


@pytest.fixture
def filled(shared, nodes):
    """The nodes with `KEYS`, each its own value, and known by all replicas."""
    with nodes[0].connect() as connection:
        written = connection.pipeline([("SET", key, b"v:" + key) for key in KEYS])
        assert written == [b"OK"] * len(KEYS)
    shared.wait_until_equal()
    return nodes


@contextlib.contextmanager
def clients(nodes):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(native.Client(node.port)) for node in nodes]


@contextlib.contextmanager
def services(nodes):
    with contextlib.ExitStack() as stack:
        dial = lambda node: grpc.insecure_channel(f"127.0.0.1:{node.grpc_port}")
        yield [Service(stack.enter_context(dial(node)), SERVICE) for node in nodes]


def held_by(node):
    """The partitions that it has a replica of."""
    return {one["partition"] for one in node.ask("/cluster/partitions")["partitions"]}


def new_session():
    return random.getrandbits(64) | 1


def test_info_tells_the_whole_topology(nodes):
    addresses = {f"127.0.0.1:{node.port}" for node in nodes}
    with clients(nodes) as asked:
        for client, node in zip(asked, nodes):
            assert client.features == native.ALL_FEATURES
            info = client.info()
            assert {address for _, address in info["members"]} == addresses
            assert info["node"] == node.node_id == client.node
            assert info["epoch"] > 0 and len(info["zones"]) == 4
            assert len(info["leaders"]) == len(info["replicas"]) == client.partitions == cluster.PARTITIONS
            names = [name for name, _ in info["members"]]
            places = names.index(node.node_id)
            held = {p for p, replicas in enumerate(info["replicas"]) if places in replicas}
            assert held == held_by(node) and len(held) < cluster.PARTITIONS
            assert all(len(set(replicas)) == 3 for replicas in info["replicas"])

            def leads_as_told():
                leaders = client.info()["leaders"]
                return {p for p, place in enumerate(leaders) if place == places} == node.led()

            # Leaders may be on the move, to be spread evenly.
            servers.wait_until(leads_as_told, "INFO tells who leads")
            assert all(place in replicas for place, replicas in zip(info["leaders"], info["replicas"]))


def test_features_are_granted_only_if_asked_for(nodes):
    with native.Client(nodes[0].port, features=native.SESSIONS | 0x8000) as client:
        assert client.features == native.SESSIONS


def follow(client, key, asked, addresses):
    """Follows hints until somebody answers."""
    for _ in range(3):
        try:
            return client.get(key, flags=native.REDIRECT)
        except native.Failure as failure:
            client = asked[addresses[failure.hint[1]]]
    raise AssertionError("too many hints")


def test_any_node_answers_and_a_client_that_follows_is_sent_to_the_leader(nodes):
    addresses = {f"127.0.0.1:{node.port}": place for place, node in enumerate(nodes)}
    keys = cluster.keys_of_all()
    with clients(nodes) as asked:
        led = [0] * len(nodes)
        for partition, key in enumerate(keys):
            # Before anything was passed on: a node without a replica names one that has one.
            for client in asked:
                follow(client, key, asked, addresses)
            written = asked[partition % len(asked)].set(key, b"v")
            hints = {}
            for place, client in enumerate(asked):
                assert client.get(key)["version"] == written
                try:
                    assert client.get(key, flags=native.REDIRECT)["value"] == b"v"
                    led[place] += 1
                except native.Failure as failure:
                    assert failure.status == native.NOT_LEADER
                    assert failure.hint[0] == partition
                    hints[place] = addresses[failure.hint[1]]
            # All but one refuse, and name that one.
            assert len(hints) == len(nodes) - 1 and len(set(hints.values())) == 1
            assert set(hints.values()).isdisjoint(hints)
        assert sum(led) == len(keys) and all(led)
        with pytest.raises(native.Failure) as failure:
            asked[0].batch_get(keys, flags=native.REDIRECT)
        assert failure.value.status == native.NOT_LEADER
        assert failure.value.hint[0] not in nodes[0].led()
        assert [found["value"] for found in asked[0].batch_get(keys)] == [b"v"] * len(keys)


def test_a_repeated_write_takes_effect_once_at_any_node(nodes):
    with clients(nodes) as asked:
        session = new_session()
        for number, key in enumerate(cluster.keys_of_all(prefix=b"n")[:12], 1):
            once = (session, number, number)
            answers = {client.increment(key, 5, session=once) for client in asked}
            assert len(answers) == 1 and asked[0].get(key)["value"] == b"5", answers
        with pytest.raises(native.Failure) as failure:
            asked[0].increment(b"n", session=(session, 1, 2))
        assert failure.value.status == 100


def test_stale_reads_tell_how_old_they_are(filled):
    with clients(filled) as asked:
        flags = native.STALE | native.POSITION
        held = {node.node_id: held_by(node) for node in filled}
        for partition, key in enumerate(cluster.keys_of_all(prefix=b"s")):
            version = asked[0].set(key, b"v")
            for client, node in zip(asked, filled):
                # A follower hears of it with the next message of its leader.
                servers.wait_until(lambda: client.get(key, flags=native.STALE), "the write is there", 5)
                assert client.position is None
                assert client.get(key, flags=flags)["version"] == version
                revision, age_ms = client.position
                if partition in held[client.node]:
                    assert revision >= version and age_ms < SOON_MS
                    assert age_ms == 0 or partition not in node.led()
                else:
                    assert (revision, age_ms) == (0, 0), "the leader was asked"
        for client in asked:
            values = client.batch_get(KEYS, flags=flags)
            assert [found["value"] for found in values] == [b"v:" + key for key in KEYS]
            assert client.position[0] == 0 and client.position[1] < SOON_MS
            mine = [key for key in KEYS if cluster.partition_of(key) in held[client.node]]
            values = client.batch_get(mine, flags=flags)
            assert [found["value"] for found in values] == [b"v:" + key for key in mine]
            assert client.position[0] == 0 and client.position[1] < SOON_MS
            assert set(KEYS) <= set(client.scan(flags=flags, limit=100))
            assert client.position[1] < SOON_MS


def test_scans_cover_everything_from_any_node(filled):
    with clients(filled) as asked:
        for client in asked:
            assert sorted(client.scan(limit=37)) == sorted(KEYS)
            assert sorted(client.scan(limit=1000, prefix=b"key:1")) == sorted(
                key for key in KEYS if key.startswith(b"key:1")
            )
            _, items = client.page(limit=10_000, keys_only=False)
            assert {key: stored["value"] for key, stored in items} == {k: b"v:" + k for k in KEYS}
        # A cursor goes on at another node.
        keys, cursor, turn = [], b"", 0
        while cursor or not turn:
            cursor, items = asked[turn % len(asked)].page(cursor, limit=20)
            keys += [key for key, _ in items]
            turn += 1
        assert turn > 10 and sorted(keys) == sorted(KEYS)


def test_scans_of_one_partition(filled):
    with clients(filled) as asked:
        found = []
        for partition in range(cluster.PARTITIONS):
            keys = asked[partition % len(asked)].scan(partition=partition, limit=3)
            assert {cluster.partition_of(key) for key in keys} <= {partition}
            found += keys
        assert sorted(found) == sorted(KEYS)
        for client, node in zip(asked, filled):
            led = node.led()
            for partition in range(cluster.PARTITIONS):
                if partition in led:
                    client.page(partition=partition, flags=native.REDIRECT)
                    continue
                with pytest.raises(native.Failure) as failure:
                    client.page(partition=partition, flags=native.REDIRECT)
                assert failure.value.hint[0] == partition
        with pytest.raises(native.Failure) as failure:
            asked[0].page(partition=cluster.PARTITIONS)
        assert failure.value.status == 100


def test_large_values_fit_into_pages(nodes):
    large = {b"large:%d" % number: bytes([number]) * size for number, size in enumerate(
        [4 << 20, 3 << 20, 3 << 20, 1 << 20, 4 << 20, 10]
    )}
    with clients(nodes) as asked:
        for key, value in large.items():
            asked[0].set(key, value)
        for client in asked:
            found, cursor = {}, b""
            while cursor or not found:
                cursor, items = client.page(cursor, keys_only=False)
                found |= {key: stored["value"] for key, stored in items}
            assert found == large


def test_resp_commands_without_keys_are_about_the_whole_cluster(filled):
    for node in filled[:REDIRECTING] + filled[REDIRECTING + 1 :]:
        with node.connect() as connection:
            assert connection.call("DBSIZE") == len(KEYS)
            assert sorted(connection.call("KEYS", "*")) == sorted(KEYS)
            assert sorted(connection.call("KEYS", "key:?")) == sorted(KEYS[:10])
            keys, cursor = [], b"0"
            while True:
                cursor, page = connection.call("SCAN", cursor, "COUNT", "50")
                keys += page
                if cursor == b"0":
                    break
            assert sorted(keys) == sorted(KEYS)
            drawn = {connection.call("RANDOMKEY") for _ in range(200)}
            assert drawn <= set(KEYS) and len(drawn) > 60
            # What is sent behind them waits for them.
            commands = [("KEYS", "*"), ("SET", "later", "v"), ("DBSIZE",), ("DEL", "later"), ("DBSIZE",)]
            keys, *rest = connection.pipeline(commands)
            assert sorted(keys) == sorted(KEYS)
            assert rest == [b"OK", len(KEYS) + 1, 1, len(KEYS)]
    with filled[1].connect() as connection:
        assert connection.call("FLUSHALL") == b"OK"
        assert connection.call("RANDOMKEY") is None
        assert connection.call("DBSIZE") == 0


def test_a_redirecting_node_speaks_for_what_it_leads(filled):
    node = filled[REDIRECTING]
    led = node.led()
    mine = sorted(key for key in KEYS if cluster.partition_of(key) in led)
    assert 0 < len(mine) < len(KEYS)
    with node.connect() as connection:
        assert connection.call("DBSIZE") == len(mine)
        assert sorted(connection.call("KEYS", "*")) == mine
        keys, cursor = [], b"0"
        while True:
            cursor, page = connection.call("SCAN", cursor)
            keys += page
            if cursor == b"0":
                break
        assert sorted(keys) == mine
        assert connection.call("RANDOMKEY") in mine
        assert connection.call("FLUSHALL") == b"OK"
        assert connection.call("DBSIZE") == 0
    with filled[0].connect() as connection:
        assert connection.call("DBSIZE") == len(KEYS) - len(mine)


def test_grpc_at_any_node(filled):
    stale = 1
    with services(filled) as asked:
        session = new_session()
        for number, kv in enumerate(asked):
            key = b"grpc:%d" % number
            version = kv.call("Set", key=key, value=b"v").version
            for other, node in zip(asked, filled):
                assert not other.call("Get", key=key).HasField("position")
                servers.wait_until(lambda: other.call("Get", key=key, consistency=stale).found, "it", 5)
                found = other.call("Get", key=key, consistency=stale)
                assert (found.version, found.value) == (version, b"v")
                partition = cluster.partition_of(key)
                if partition in held_by(node):
                    assert found.position.revision >= version and found.position.age_ms < SOON_MS
                    assert found.position.age_ms == 0 or partition not in node.led()
                else:
                    assert (found.position.revision, found.position.age_ms) == (0, 0)
            values = kv.call("BatchGet", keys=KEYS)
            assert [one.value for one in values.values] == [b"v:" + key for key in KEYS]
            assert not values.HasField("position")
            values = kv.call("BatchGet", keys=KEYS, consistency=stale)
            assert [one.value for one in values.values] == [b"v:" + key for key in KEYS]
            assert values.HasField("position") and values.position.age_ms < SOON_MS
            for consistency in 0, stale:
                keys, token = [], b""
                while True:
                    page = kv.call(
                        "Scan", prefix=b"key:", page_token=token, keys_only=True, consistency=consistency
                    )
                    assert page.HasField("position") == bool(consistency)
                    keys += [item.key for item in page.items]
                    token = page.next_page_token
                    if not token:
                        break
                assert sorted(keys) == sorted(KEYS)
            once = {"id": session, "sequence": number + 1, "acked_below": number + 1}
            sums = {
                (answer.value, answer.version)
                for other in asked
                for answer in [other.call("Increment", key=b"sum:%d" % number, session=once)]
            }
            assert len(sums) == 1 and asked[0].call("Get", key=b"sum:%d" % number).value == b"1"
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
            asked[0].call("Increment", key=b"k", session={"id": 0, "sequence": 1, "acked_below": 0})


def has_own(client, key, value):
    """Whether the replica of the client's node answers a stale read, and has that value. An answer without
    a revision is the leader's."""
    flags = native.STALE | native.POSITION | native.REDIRECT
    try:
        return client.get(key, flags=flags)["value"] == value and client.position[0] > 0
    except native.Failure as failure:
        assert failure.status == native.NOT_LEADER
        return False


def test_the_first_answer_survives_its_leader_and_what_is_left_reads_stale(flux_binary, tmp_path):
    with cluster.Cluster(tmp_path, binary=flux_binary, fsync="no") as nodes:
        key, session = b"counted", new_session()
        leader = nodes.leader_of(cluster.partition_of(key))
        first, last = [node for node in nodes.nodes if node is not leader]
        with native.Client(leader.port) as client:
            answer = client.increment(key, session=(session, 1, 1))
        leader.kill()
        with native.Client(first.port) as client:
            assert client.increment(key, session=(session, 1, 1)) == answer
            assert client.increment(key, session=(session, 2, 2))[0] == 2
            assert client.get(key)["value"] == b"2"
            flags = native.STALE | native.POSITION
            servers.wait_until(lambda: has_own(client, key, b"2"), "the replica has it", 5)
            last.kill()
            # No majority is left: a read in time is refused, a stale one tells how old it is.
            begun = time.monotonic()
            with pytest.raises(native.Failure) as failure:
                while time.monotonic() < begun + 10:
                    client.get(key, deadline_ms=500)
            assert failure.value.status == native.NOT_LEADER
            ages = []
            for _ in range(2):
                assert client.get(key, flags=flags)["value"] == b"2"
                ages.append(client.position[1])
                with pytest.raises(native.Failure):
                    client.get(key, deadline_ms=300)
            assert 0 < ages[0] < ages[1] < native.UNKNOWN_AGE
        with services([first]) as [kv]:
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError):
                kv.call("Set", key=key, value=b"v", timeout=0.5)
            assert time.monotonic() - begun < 5
            found = kv.call("Get", key=key, consistency=1)
            assert found.value == b"2" and found.position.age_ms > ages[1]
