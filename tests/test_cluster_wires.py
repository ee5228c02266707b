"""Wires that are cut for long: a node that does not reach a leader asks through one that does."""

import time

import pytest

import cluster
import network
import servers

pytestmark = pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")


@pytest.fixture
def made(flux_binary, tmp_path):
    if reason := network.available():
        pytest.skip(reason)
    with network.Network(3) as wires:
        with cluster.Cluster(tmp_path / "wires", network=wires, binary=flux_binary) as made:
            yield made


def calls(connection, keys, number):
    """Writes and reads each key; what was answered other than it should be, and whether it is an error."""
    answers = connection.pipeline([("SET", key, str(number)) for key in keys])
    answers += connection.pipeline([("GET", key) for key in keys])
    right = [b"OK"] * len(keys) + [str(number).encode()] * len(keys)
    return [
        (str(answer), wanted, isinstance(answer, servers.resp.ReplyError))
        for answer, wanted in zip(answers, right)
        if answer != wanted
    ]


@pytest.mark.parametrize("one_way", [True, False], ids=["one way", "both ways"])
def test_a_wire_to_the_leader_is_cut_for_long(made, one_way):
    """A plain client of a node that does not reach the leader is served all the same."""
    here, there, _ = made.nodes
    servers.wait_until(lambda: len(there.led()) >= 10, "it leads some", 60, 0.2)
    keys = [cluster.ONE_OF_EACH[partition] for partition in sorted(there.led())]
    made.network.cut(here.place, there.place)
    if not one_way:
        made.network.cut(there.place, here.place)
    # What was on its way when the wire was cut is open, or waits for as long as a client does.
    deadline = time.monotonic() + 60
    with here.connect() as connection:
        while wrong := calls(connection, keys, 0):
            assert time.monotonic() < deadline, wrong[:3]
        disturbed = []
        for number in range(1, 21):
            asked = time.monotonic()
            wrong = calls(connection, keys, number)
            took = time.monotonic() - asked
            # An error is one thing, an old value another, however long it took.
            is_refused = any(is_error for _, _, is_error in wrong)
            assert is_refused or not wrong, wrong[:3]
            if took > 2.0 or is_refused:
                disturbed.append((number, took, wrong[:3]))
            time.sleep(0.2)
    # An election on a slow machine, or a third node that is too slow to be asked for a while.
    assert len(disturbed) <= 3, disturbed
    made.network.heal()
    made.wait_until_well()
