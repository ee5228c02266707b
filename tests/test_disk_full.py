"""A full disk and a full memory: writes are refused, all else goes on, nothing is lost."""

import os
import subprocess

import pytest

import resp
import servers

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    # Lazily: the node may still hold the folder when its test failed.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_with_ballast(folder):
    """Takes all free space, and returns the file that holds it."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        block = b"\0" * MIB
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]
    return ballast


def write_until_refused(connection, first, limit, size):
    """Sets `k<number>` until an error; returns how many were written and the error."""
    for number in range(first, first + limit):
        reply = resp.parse(connection.raw("SET", f"k{number}", b"%d" % number + b"x" * size))
        if isinstance(reply, resp.ReplyError):
            return number, str(reply)
    raise AssertionError(f"{limit} writes of {size} bytes, and none was refused")


def check(connection, count):
    for number in range(count):
        value = connection.call("GET", f"k{number}")
        assert value is not None and value.startswith(b"%dx" % number), f"k{number} is {value!r:.40}"


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_disk_full(start_flux, small_disk, fsync):
    settings = {"fsync": fsync, "workers": 1, "segment_bytes": 4 * MIB, "snapshot_log_bytes": 1 << 30}
    node = start_flux(directory=small_disk, **settings)
    with node.connect() as connection, node.connect() as other:
        connection.call("SET", "k0", b"0x")
        ballast = fill_with_ballast(small_disk)
        written, error = write_until_refused(connection, 1, 1000, 100_000)
        assert error.startswith("DISKFULL "), error
        # Refused again, at once and the same on another connection; reads go on.
        assert str(resp.parse(other.raw("SET", "no", "x" * 100_000))).startswith("DISKFULL ")
        check(connection, written)
        assert connection.call("EXISTS", "no", f"k{written}") == 0
        assert node.running()

        ballast.unlink()
        again = lambda: resp.parse(connection.raw("SET", f"k{written}", b"%dx" % written)) == b"OK"
        servers.wait_until(again, "writes are taken again", 20, 0.05)
        for number in range(written + 1, written + 200):
            connection.call("SET", f"k{number}", b"%dx" % number)
        written += 200
        check(other, written)
    node.kill()
    node = start_flux(directory=small_disk, **settings)
    with node.connect() as connection:
        check(connection, written)
        assert connection.call("DBSIZE") == written
    assert node.stop() == 0, node.log()


def test_disk_full_then_killed(start_flux, small_disk):
    """What was acknowledged before the disk filled is there after a crash on the full disk."""
    settings = {
        "fsync": "always", "workers": 1, "segment_bytes": 4 * MIB, "snapshot_log_bytes": 1 << 30
    }
    node = start_flux(directory=small_disk, **settings)
    with node.connect() as connection:
        connection.call("SET", "k0", b"0x")
        ballast = fill_with_ballast(small_disk)
        written, _ = write_until_refused(connection, 1, 1000, 100_000)
    node.kill()
    os.unlink(ballast)
    node = start_flux(directory=small_disk, **settings)
    with node.connect() as connection:
        check(connection, written)


def test_max_memory(start_flux, tmp_path):
    directory = tmp_path / "node"
    node = start_flux(directory=directory, fsync="no", max_memory="32mb")
    with node.connect() as connection:
        connection.call("SET", "n", 1)
        written, error = write_until_refused(connection, 0, 100_000, 1000)
        assert error.startswith("OOM "), error
        assert 10_000 < written < 34_000, f"{written} values of 1000 bytes in 32 MiB"
        check(connection, written)
        for refused in [("APPEND", "k0", "x" * 5000), ("SETRANGE", "k0", 5000, "x"), ("SET", "a", "b" * 5000)]:
            assert str(resp.parse(connection.raw(*refused))).startswith("OOM "), refused[0]
        assert connection.call("STRLEN", "k0") == 1001
        assert connection.call("DEL", *[f"k{n}" for n in range(written - 100, written)]) == 100
        written -= 100
        assert connection.call("SET", "after", "v" * 1000) == b"OK"
        assert node.rss_bytes() < 200 * MIB
    assert node.stop() == 0, node.log()

    # A lower limit than what is stored: the node starts, reads and deletes, and takes no writes.
    node = start_flux(directory=directory, fsync="no", max_memory="8mb")
    with node.connect() as connection:
        check(connection, written)
        assert str(resp.parse(connection.raw("SET", "new", "v"))).startswith("OOM ")
        for number in range(written):
            assert connection.call("DEL", f"k{number}") == 1
        assert connection.call("SET", "new", "v") == b"OK"
