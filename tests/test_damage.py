"""Damaged files: a torn tail is cut and reported, anything else is refused with file and offset."""

import re
import signal

import pytest

import servers

MIB = 1 << 20
SMALL_SEGMENTS = {"workers": 1, "segment_bytes": MIB, "snapshot_log_bytes": 1 << 30}


def marker(number):
    return b"<marker %06d>" % number


def write(node, count, size=1000):
    with node.connect() as connection:
        for start in range(0, count, 100):
            commands = [
                ("SET", f"k{n}", marker(n) + b"x" * size) for n in range(start, start + 100)
            ]
            assert set(connection.pipeline(commands)) == {b"OK"}


def find(node, number, suffix):
    """The file with this ending that holds the marker, and the marker's offset."""
    for path in sorted(node.data_dir.rglob("*")):
        if path.is_file() and path.name.endswith(suffix):
            offset = path.read_bytes().find(marker(number))
            if offset >= 0:
                return path, offset
    return None


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def assert_refused(start_flux, directory, path, settings):
    with pytest.raises(servers.StartFailed) as failed:
        start_flux(directory=directory, **settings)
    assert failed.value.code not in (0, -signal.SIGABRT, -signal.SIGSEGV)
    log = failed.value.log
    assert path.name in log, log[-3000:]
    assert re.search(r"offset \d+", log), log[-3000:]
    assert "panicked" not in log, log[-3000:]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_damage_in_the_middle_of_the_log_is_refused(start_flux, tmp_path, how):
    settings = {"fsync": "always", **SMALL_SEGMENTS}
    node = start_flux(directory=tmp_path / "node", **settings)
    write(node, 5000)
    if how == "stopped":
        assert node.stop() == 0, node.log()
    else:
        node.kill()
    path, offset = find(node, 2500, ".log")
    before = path.read_bytes()
    flip(path, offset + 3)
    damaged = path.read_bytes()
    assert_refused(start_flux, tmp_path / "node", path, settings)
    assert path.read_bytes() == damaged, "a refused start changes nothing"
    # Mended, it starts again with everything.
    path.write_bytes(before)
    node = start_flux(directory=tmp_path / "node", **settings)
    with node.connect() as connection:
        assert connection.call("DBSIZE") == 5000


def test_missing_segment_is_refused(start_flux, tmp_path):
    settings = {"fsync": "always", **SMALL_SEGMENTS}
    node = start_flux(directory=tmp_path / "node", **settings)
    write(node, 5000)
    node.kill()
    path, _ = find(node, 2500, ".log")
    path.unlink()
    with pytest.raises(servers.StartFailed) as failed:
        start_flux(directory=tmp_path / "node", **settings)
    assert failed.value.code != 0 and "panicked" not in failed.value.log


@pytest.mark.parametrize("how", ["truncated", "zeroed", "garbage"])
def test_torn_tail_is_cut_and_reported(start_flux, tmp_path, how):
    """As a power cut leaves it where nothing had been synced."""
    settings = {"fsync": "no", **SMALL_SEGMENTS}
    node = start_flux(directory=tmp_path / "node", **settings)
    write(node, 3000)
    with node.connect() as connection:
        # A write of its own after the batches: only it is torn.
        connection.call("SET", "last", marker(999_999) + b"x" * 1000)
    node.kill()
    path, offset = find(node, 999_999, ".log")
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(offset + 100)
        if how != "truncated":
            file.seek(0, 2)
            length = size - offset - 100
            file.write((b"\0" if how == "zeroed" else b"\xa5") * length)
    node = start_flux(directory=tmp_path / "node", **settings)
    assert re.search(r"\b(torn|cut)\b", node.log()), node.log()[-3000:]
    assert path.name in node.log(), node.log()[-3000:]
    with node.connect() as connection:
        assert connection.call("DBSIZE") == 3000
        assert connection.call("GET", "last") is None
        assert connection.call("SET", "last", "again") == b"OK"
    node.kill()
    node = start_flux(directory=tmp_path / "node", **settings)
    with node.connect() as connection:
        assert connection.call("DBSIZE") == 3001


def test_damaged_snapshot_is_refused(start_flux, tmp_path):
    settings = {
        "fsync": "no", "workers": 1, "partitions": 1, "segment_bytes": MIB, "snapshot_log_bytes": MIB
    }
    node = start_flux(directory=tmp_path / "node", **settings)
    write(node, 5000)

    def in_snapshot():
        with node.connect() as connection:
            connection.pipeline([("SET", "other", b"x" * 1000)] * 100)
        return find_snapshot(node)

    servers.wait_until(in_snapshot, "a snapshot holds the key", 60)
    assert node.stop() == 0, node.log()
    path, offset = find_snapshot(node)
    flip(path, offset + 3)
    assert_refused(start_flux, tmp_path / "node", path, settings)


def find_snapshot(node):
    """The finished snapshot that holds a key which no segment of the log holds any more."""
    for path in sorted(node.data_dir.rglob("*")):
        if path.is_file() and not path.name.endswith((".log", ".tmp")):
            offset = path.read_bytes().find(marker(2500))
            if offset >= 0 and find(node, 2500, ".log") is None:
                return path, offset
    return None


def test_a_log_that_is_gone_is_not_started_anew(start_flux):
    node = start_flux(**SMALL_SEGMENTS)
    write(node, 100)
    assert node.stop() == 0
    [log] = [path for path in node.data_dir.iterdir() if path.name.startswith("log-")]
    for file in log.iterdir():
        file.unlink()
    for _ in range(2):
        with pytest.raises(servers.StartFailed) as failed:
            start_flux(directory=node.directory, **SMALL_SEGMENTS)
        assert "is gone" in failed.value.log and log.name in failed.value.log, failed.value.log
