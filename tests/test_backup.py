"""`flux admin backup` and `flux admin restore`: what was acknowledged before a backup is in it, whole,
and comes back in clusters of any shape; a backup that is not whole changes nothing."""

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

import resp
import servers
import up

TAGS = 60


@pytest.fixture
def start_up(flux_binary, tmp_path):
    """Starts clusters in one process each; all are gone afterwards."""

    def start(nodes=3, **settings):
        directory = tmp_path / f"up{len(start.started)}"
        cluster = up.Up(directory, nodes, binary=flux_binary, **settings)
        start.started.append(cluster)
        return cluster.start()

    start.started = []
    yield start
    for cluster in start.started:
        cluster.kill()


class Load:
    """Writers that set two keys of one hash tag to the same number, always together."""

    def __init__(self, ports):
        self.stopping = threading.Event()
        self.acknowledged = [0] * TAGS
        self.failures = []
        tags = [range(number, TAGS, len(ports)) for number in range(len(ports))]
        self.threads = [
            threading.Thread(target=self.run, args=(port, own))
            for port, own in zip(ports, tags, strict=True)
        ]

    def run(self, port, tags):
        try:
            with resp.Connection(port) as connection:
                number = 0
                while not self.stopping.is_set():
                    number += 1
                    for tag in tags:
                        keys = (f"{{{tag}}}:left", number, f"{{{tag}}}:right", number)
                        assert connection.call("MSET", *keys) == b"OK"
                        self.acknowledged[tag] = number
        except Exception as error:  # noqa: BLE001 - told by the test
            self.failures.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        while min(self.acknowledged) < 3 and not self.failures:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()


def pairs(connection):
    """The number of each tag, and that no pair is torn."""
    found = []
    for tag in range(TAGS):
        left, right = connection.call("MGET", f"{{{tag}}}:left", f"{{{tag}}}:right")
        assert left == right, f"the pair of tag {tag} is torn: {left} and {right}"
        found.append(int(left))
    return found


def test_a_backup_under_load_comes_back_whole_in_other_clusters(start_up, start_flux, tmp_path):
    cluster = start_up()
    ports = [data for _, data, _ in cluster.rows()]
    large = bytes(range(256)) * 8192
    with cluster.connect_to(2) as connection:
        assert connection.call("SET", "large", large) == b"OK"
        assert connection.call("SET", b"\x00\xff binary", b"\r\n") == b"OK"
        assert connection.call("SET", "hour", "left", "EX", 3600) == b"OK"
        assert connection.call("SET", "moment", "left", "PX", 1500) == b"OK"
    written = time.monotonic()
    folder = tmp_path / "backup"
    with Load(ports) as load:
        before = list(load.acknowledged)
        taken = cluster.admin("--json", "backup", folder)
        after = list(load.acknowledged)
    assert load.failures == []
    assert taken.returncode == 0, taken.stderr
    manifest = json.loads(taken.stdout)
    assert manifest == json.loads((folder / "backup.json").read_text())
    assert len(manifest["partitions"]) == 64 and manifest["cluster_id"]
    assert not list(folder.glob("*.new"))

    time.sleep(max(0.0, written + 1.6 - time.monotonic()))
    node = start_flux(partitions=4)
    other = start_up(partitions=128)
    for admin_port, data_port in ((node.admin_port, node.port), other.rows()[1][:0:-1]):
        restored = up.admin(admin_port, "--json", "restore", folder)
        assert restored.returncode == 0, restored.stderr
        assert json.loads(restored.stdout)["keys"] == 2 * TAGS + 3
        with resp.Connection(data_port) as connection:
            numbers = pairs(connection)
            # What was acknowledged before is in it, and nothing that was written after.
            outside = [
                tag for tag in range(TAGS) if not before[tag] <= numbers[tag] <= after[tag] + 1
            ]
            assert not outside, (before, numbers, after)
            assert connection.call("GET", "large") == large
            assert connection.call("GET", b"\x00\xff binary") == b"\r\n"
            assert 3500 <= connection.call("TTL", "hour") <= 3600
            assert connection.call("EXISTS", "moment") == 0


def test_only_the_leader_hands_out_a_snapshot(start_up):
    cluster = start_up()

    def status(port, partition):
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/cluster/backup/{partition}", timeout=60
            ) as answer:
                assert len(answer.read()) == int(answer.headers["content-length"])
                return answer.status
        except urllib.error.HTTPError as error:
            assert json.load(error)["error"]
            return error.code

    ports = [admin for _, _, admin in cluster.rows()]
    for partition in range(4):
        # Between two questions leadership may move, to be spread evenly.
        servers.wait_until(
            lambda: sorted(status(port, partition) for port in ports) == [200, 421, 421],
            f"one node alone hands out partition {partition}",
        )
    assert status(ports[0], 64) == 400


def test_a_node_alone_is_backed_up_and_restored(start_flux, tmp_path):
    node = start_flux(mode="up", partitions=8)
    with node.connect() as connection:
        for number in range(1000):
            connection.call("SET", f"key{number}", number)
    folder = tmp_path / "deep" / "backup"
    done = up.admin(node.admin_port, "backup", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1000 keys of 8 partitions, ")
    with node.connect() as connection:
        connection.call("SET", "key1", "changed")
        connection.call("SET", "new", "stays")
        connection.call("DEL", "key2")

    refused = up.admin(node.admin_port, "restore", folder)
    assert refused.returncode == 1 and "--force" in refused.stderr
    with node.connect() as connection:
        assert connection.call("GET", "key1") == b"changed", "nothing is written"

    forced = up.admin(node.admin_port, "restore", folder, "--force")
    assert forced.returncode == 0, forced.stderr
    assert forced.stdout.startswith("1000 keys restored")
    with node.connect() as connection:
        assert connection.call("MGET", "key1", "key2", "new") == [b"1", b"2", b"stays"]


def test_what_is_wrong_with_a_backup_is_told_and_nothing_is_written(start_flux, tmp_path):
    node = start_flux(partitions=4)
    with node.connect() as connection:
        for number in range(100):
            connection.call("SET", f"key{number}", number)
    folder = tmp_path / "backup"
    assert up.admin(node.admin_port, "backup", folder).returncode == 0
    target = start_flux(partitions=2)

    def refused(path, *words):
        done = up.admin(target.admin_port, "restore", path)
        assert done.returncode == 1, done
        for word in words:
            assert word in done.stderr, done.stderr
        with target.connect() as connection:
            assert connection.call("DBSIZE") == 0

    refused(tmp_path / "none", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a backup, or one that was not finished")

    file = folder / "2.snapshot"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    refused(folder, "the backup is damaged", "2.snapshot", "its checksum is")
    file.write_bytes(whole[:-1])
    refused(folder, "2.snapshot", f"it has {len(whole) - 1} bytes and had {len(whole)}")
    file.unlink()
    refused(folder, "2.snapshot is missing")
    file.write_bytes(whole)
    manifest = folder / "backup.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    refused(folder, "is not the description of a backup")
    manifest.write_text(text)
    assert up.admin(target.admin_port, "restore", folder).returncode == 0
    with target.connect() as connection:
        assert connection.call("DBSIZE") == 100


def test_a_backup_goes_nowhere_where_something_would_be_lost(start_flux, tmp_path):
    node = start_flux()
    folder = tmp_path / "backup"
    assert up.admin(node.admin_port, "backup", folder).returncode == 0
    again = up.admin(node.admin_port, "backup", folder)
    assert again.returncode == 1 and "holds a backup already" in again.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    other = up.admin(node.admin_port, "backup", tmp_path / "other")
    assert other.returncode == 1 and "letter.txt" in other.stderr

    # A backup that broke off has no manifest; the next one takes its place.
    (folder / "backup.json").unlink()
    assert up.admin(node.admin_port, "backup", folder).returncode == 0

    assert node.stop() == 0
    gone = up.admin(node.admin_port, "backup", tmp_path / "gone")
    assert gone.returncode == 1 and "cannot reach the admin port" in gone.stderr
    assert not (tmp_path / "gone").exists()
    gone = up.admin(node.admin_port, "restore", folder)
    assert gone.returncode == 1 and "cannot reach the admin port" in gone.stderr


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_no_backup(start_flux, tiny_disk):
    node = start_flux(partitions=1)
    with node.connect() as connection:
        for number in range(4):
            connection.call("SET", f"key{number}", os.urandom(1 << 19))
    done = up.admin(node.admin_port, "backup", tiny_disk / "backup")
    assert done.returncode == 1 and "there is no room for" in done.stderr, done
    assert not (tiny_disk / "backup" / "backup.json").exists()
    refused = up.admin(node.admin_port, "restore", tiny_disk / "backup")
    assert refused.returncode == 1 and "was not finished" in refused.stderr
