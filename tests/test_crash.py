"""Killed nodes lose nothing that they acknowledged; stopped nodes stop cleanly."""

import random
import signal
import time

import pytest

import resp
import servers
import workload

KILLS = 20
WRITERS = 4
SMALL_LOG = {"segment_bytes": 1 << 20, "snapshot_log_bytes": 4 << 20}


def wait_for_writes(writers, count, node):
    """Until each writer has had so many more acknowledgements."""
    goals = [writer.acknowledged + count for writer in writers]
    servers.wait_until(
        lambda: all(w.acknowledged >= goal or w.refused for w, goal in zip(writers, goals)),
        "writes are acknowledged",
        interval_s=0.002,
    )
    assert not any(w.refused for w in writers), ([w.refused[:1] for w in writers], node.log()[-2000:])


@pytest.mark.parametrize("fsync", ["always", "everysec", "no"])
def test_kill_loses_no_acknowledged_write(start_flux, tmp_path, fsync):
    """20 kills at random moments; a small log, so that snapshots and trimming are hit too."""
    chance = random.Random(fsync)
    directory = tmp_path / "node"
    state = {f"w{n}": (0, 0) for n in range(WRITERS)}
    for cycle in range(KILLS):
        node = start_flux(directory=directory, fsync=fsync, workers=2, **SMALL_LOG)
        writers = [workload.Writer(node.port, name, *state[name]) for name in state]
        for writer in writers:
            writer.start()
        wait_for_writes(writers, chance.randrange(16, 1500), node)
        node.kill()
        for writer in writers:
            writer.join(timeout=30)
        checked = start_flux(directory=directory, fsync=fsync, workers=2, **SMALL_LOG)
        with checked.connect() as connection:
            for writer in writers:
                # The last round looks at everything ever written.
                first = 0 if cycle == KILLS - 1 else state[writer.tag][0]
                counter = writer.check(connection, first)
                state[writer.tag] = (writer.sent, counter)
                # A key that was sent and not acknowledged may be there or not, for ever after.
                writer.acknowledged = writer.sent
                fill = [
                    ("SET", writer.key(n), writer.value(n)) for n in range(first, writer.sent)
                ]
                replies = connection.pipeline(fill)
                assert set(replies) <= {b"OK"}
        # The next kill falls on an idle node that has just written.
        checked.kill()


def test_other_number_of_workers(start_flux, tmp_path):
    directory = tmp_path / "node"
    written = {}
    for round_, workers in enumerate([1, 4, 2, 3, 1]):
        node = start_flux(directory=directory, fsync="no", workers=workers, **SMALL_LOG)
        with node.connect() as connection:
            keys = list(written)
            if keys:
                assert connection.call("MGET", *keys) == [written[key] for key in keys]
            assert connection.call("DBSIZE") == len(written)
            fresh = {b"k:%d:%d" % (round_, n): b"%d" % n for n in range(2000)}
            replies = connection.pipeline([("SET", key, value) for key, value in fresh.items()])
            assert set(replies) == {b"OK"}
            written |= fresh
        if round_ % 2:
            node.kill()
        else:
            assert node.stop() == 0, node.log()


def test_everything_about_a_key_survives(start_flux, tmp_path):
    directory = tmp_path / "node"
    node = start_flux(directory=directory, fsync="always")
    with node.connect() as connection:
        connection.call("SET", "plain", "v")
        connection.call("SET", "expires", "v", "PXAT", 33177117420123)
        connection.call("SET", "short", "v", "PX", 1)
        connection.call("SET", "deleted", "v")
        connection.call("DEL", "deleted")
        connection.call("SET", b"\x00\xff", b"\r\n" * 100)
        connection.call("SET", "large", b"x" * (16 << 20))
        connection.call("SET", "empty", "")
        connection.call("SET", "{t}a", 1, "EX", 1000)
        connection.call("RENAME", "{t}a", "{t}b")
        connection.pipeline([("MULTI",), ("SET", "{m}a", 1), ("INCR", "{m}a"), ("EXEC",)])
    node.kill()
    node = start_flux(directory=directory, fsync="always")
    with node.connect() as connection:
        assert connection.call("GET", "plain") == b"v"
        assert connection.call("TTL", "plain") == -1
        assert connection.call("PEXPIRETIME", "expires") == 33177117420123
        assert connection.call("EXISTS", "short") == 0
        assert connection.call("EXISTS", "deleted") == 0
        assert connection.call("GET", b"\x00\xff") == b"\r\n" * 100
        assert connection.call("GET", "large") == b"x" * (16 << 20)
        assert connection.call("GET", "empty") == b""
        assert 900 < connection.call("TTL", "{t}b") <= 1000
        assert connection.call("EXISTS", "{t}a") == 0
        assert connection.call("GET", "{m}a") == b"2"


@pytest.mark.parametrize("fsync", ["always", "no"])
def test_sigterm_under_load_exits_cleanly_and_loses_nothing(start_flux, tmp_path, fsync):
    directory = tmp_path / "node"
    state = {f"w{n}": (0, 0) for n in range(WRITERS)}
    for _ in range(3):
        node = start_flux(directory=directory, fsync=fsync, shutdown_timeout_ms=60_000, **SMALL_LOG)
        writers = [workload.Writer(node.port, name, *state[name]) for name in state]
        for writer in writers:
            writer.start()
        servers.wait_until(
            lambda: all(w.acknowledged >= state[w.tag][0] + 500 or w.refused for w in writers),
            "writes are acknowledged",
        )
        # Clients that go on writing do not keep the node from stopping.
        assert node.stop(deadline_s=20) == 0, node.log()
        for writer in writers:
            writer.join(timeout=30)
        again = start_flux(directory=directory, fsync=fsync, **SMALL_LOG)
        with again.connect() as connection:
            for writer in writers:
                counter = writer.check(connection, state[writer.tag][0])
                state[writer.tag] = (writer.sent, counter)
        assert again.stop() == 0, again.log()


def test_sigint_stops_cleanly(start_flux):
    node = start_flux(mode="up", fsync="no")
    node.signal(signal.SIGINT)
    assert node.wait() == 0, node.log()


def test_second_signal_ends_at_once(start_flux):
    node = start_flux(fsync="no", shutdown_timeout_ms=60_000)
    with node.connect() as connection:
        # Keeps the node from finishing what is in flight.
        connection.send(resp.encode("DEBUG", "SLEEP", "20"))
        with node.connect() as other:
            # The sleeper's command was sent first, but nothing orders two connections: wait for it.
            servers.wait_until(lambda: b"cmd=debug" in _clients(other), "the sleep has begun", 5)
        node.signal(signal.SIGTERM)
        servers.wait_until(lambda: node.admin_status("/ready") != 200, "the stop has begun", 10)
        assert node.running(), "the stop did not wait for what is in flight"
        node.signal(signal.SIGTERM)
        started = time.monotonic()
        node.wait(deadline_s=10)
        assert time.monotonic() - started < 5


def _clients(connection):
    try:
        return connection.call("CLIENT", "LIST")
    except resp.ReplyError:
        return b""


def test_a_used_data_directory_is_refused(start_flux, tmp_path):
    directory = tmp_path / "node"
    node = start_flux(directory=directory, fsync="no")
    with pytest.raises(servers.StartFailed) as failed:
        start_flux(directory=directory, fsync="no")
    assert failed.value.code != 0
    assert str(node.data_dir) in failed.value.log
    with node.connect() as connection:
        assert connection.call("PING") == b"PONG"
