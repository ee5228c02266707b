"""Clusters of real nodes and a real etcd, each with files and ports of its own.

A `Cluster` starts etcd and its nodes, asks them how they are, and waits until all is well. What goes wrong
in a test is done by the test; nothing here restarts or repairs anything by itself.
"""

import json
import pathlib
import shutil
import signal
import urllib.error
import urllib.request

import servers

ETCD = shutil.which("etcd")
PARTITIONS = 64
SLOTS = 16384


class Etcd(servers.Server):
    """One etcd, without redundancy."""

    name = "etcd"

    def __init__(self, directory, host="127.0.0.1"):
        super().__init__(directory)
        self.host = host
        self.peer_port = servers.free_port(self)
        self.data_dir = self.directory / "data"

    @property
    def address(self):
        return f"{self.host}:{self.port}"

    def command(self):
        client, peer = f"http://{self.address}", f"http://{self.host}:{self.peer_port}"
        return [
            ETCD, "--name", "e", "--data-dir", self.data_dir, "--log-level", "warn",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"e={peer}", "--unsafe-no-fsync",
        ]

    def ready(self):
        try:
            with urllib.request.urlopen(f"http://{self.address}/health", timeout=5) as answer:
                return json.load(answer)["health"] == "true"
        except (OSError, ValueError, KeyError):
            return False

    def wipe(self):
        """Takes away all that it knew; only while it is stopped."""
        shutil.rmtree(self.data_dir)


class Node(servers.Flux):
    """`flux server` as a node of a cluster."""

    def __init__(self, directory, etcd, host="127.0.0.1", prefix=(), extra_environment=None, **settings):
        super().__init__(directory, **settings)
        self.etcd = etcd
        self.host = host
        # What the process is started by, as `ip netns exec …`.
        self.prefix = list(prefix)
        self.extra_environment = extra_environment or {}

    def command(self):
        command = [str(part).replace("127.0.0.1", self.host) for part in super().command()]
        command += ["--etcd-endpoints", self.etcd.address]
        return self.prefix + command

    def environment(self):
        return super().environment() | self.extra_environment

    def connect(self, timeout=20.0):
        return servers.resp.Connection(self.port, timeout=timeout, host=self.host)

    def ready(self):
        return servers.http_status(f"{self.admin_url}/ready") == 200

    @property
    def admin_url(self):
        return f"http://{self.host}:{self.admin_port}"

    def ask(self, path, timeout=10.0):
        """The JSON at a path of the admin port, or None where nobody answers well."""
        try:
            with urllib.request.urlopen(self.admin_url + path, timeout=timeout) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None

    @property
    def node_id(self):
        """The name it gave itself, from its data directory."""
        for line in (self.data_dir / "node.toml").read_text().splitlines():
            if "node-" in line:
                return line.split('"')[1]
        raise AssertionError("node.toml names no node")

    def logs(self):
        """All that it has printed, over restarts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def copy_data(self, to):
        """Copies its data directory, which it may be at work in: what is only there until it has its name is
        left out."""
        shutil.copytree(self.data_dir, to, ignore=shutil.ignore_patterns("LOCK", "*.new", "*.tmp", "*.in"))

    def led(self):
        """The partitions that it says it leads."""
        report = self.ask("/cluster/partitions") or {"partitions": []}
        return {one["partition"] for one in report["partitions"] if one["role"] == "leader"}

    def stop_process(self):
        """Stops it in the middle of whatever it does, as a long pause of its machine."""
        self.signal(signal.SIGSTOP)

    def resume_process(self):
        self.signal(signal.SIGCONT)

    def kill(self):
        if self.running():
            # A stopped process is killed at once too, but its port is free only when it is gone.
            self.process.kill()
        if self.process is not None:
            self.process.wait()


class Cluster:
    """etcd and nodes. Use it as a context: all processes are gone afterwards.

    With a `network.Network`, each node is at a place of its own there, the first one at 1, and etcd at the
    tests' place, which is 0.
    """

    def __init__(self, directory, count=3, network=None, **settings):
        self.directory = pathlib.Path(directory)
        self.network = network
        self.settings = {"workers": 1, "replication_factor": 3} | settings
        if network is not None:
            self.settings["insecure"] = "true"
        host = "127.0.0.1" if network is None else network.host(0)
        self.etcd = Etcd(self.directory / "etcd", host)
        self.nodes = []
        for _ in range(count):
            self.add()

    def add(self, **settings):
        """A further node, not started."""
        place = len(self.nodes) + 1
        at = {}
        if self.network is not None:
            at = {"host": self.network.host(place), "prefix": self.network.prefix(place)}
        node = Node(self.directory / f"n{place}", self.etcd, **(at | self.settings | settings))
        node.place = place
        self.nodes.append(node)
        return node

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, kind, *_):
        self.kill()

    def start(self):
        self.etcd.start()
        self.start_nodes(self.nodes)
        self.wait_until_well()
        return self

    def start_nodes(self, nodes):
        """Starts several at a time: none of the first is ready before there are enough."""
        for node in nodes:
            node.spawn()
        for node in nodes:
            servers.wait_until(node._ready_or_ended, f"{node.directory.name} ready", 60, 0.02)

    def kill(self):
        for server in [*self.nodes, self.etcd]:
            server.kill()

    def running(self):
        return [node for node in self.nodes if node.running()]

    def status(self):
        """`/cluster/status` of the first running node that answers."""
        for node in self.running():
            status = node.ask("/cluster/status")
            if status:
                return status
        return None

    def wait_until_well(self, nodes=None, deadline_s=60.0, lag=100):
        """Until every partition has a leader and all its replicas, on so many nodes (all that run), and
        each node that runs answers for all of them.

        Followers may be `lag` entries behind, which they are under load.
        """
        last = None

        def well():
            nonlocal last
            last = self.status()
            wanted = len(self.running()) if nodes is None else nodes
            return (
                last is not None
                and last["nodes_alive"] == wanted
                and last["partitions_led"] == last["partitions"] > 0
                and last["partitions_under_replicated"] == 0
                and last["partitions_moving"] == 0
                and not self.behind(lag)
                and all(self.serves(node) for node in self.running())
                and last
            )

        try:
            return servers.wait_until(well, "the cluster is well", deadline_s, 0.1)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; status {last}; behind {self.behind()}") from error

    def serves(self, node):
        """Whether this node answers a read of every partition, or says who does."""
        try:
            with node.connect() as connection:
                replies = connection.pipeline([("GET", key) for key in ONE_OF_EACH])
        except (OSError, servers.resp.Closed):
            return False
        errors = [str(reply) for reply in replies if isinstance(reply, servers.resp.ReplyError)]
        return all(error.startswith("MOVED ") for error in errors)

    def replicas(self):
        """By partition, what each running node says of its replica."""
        found = {}
        for node in self.running():
            report = node.ask("/cluster/partitions") or {"partitions": []}
            for one in report["partitions"]:
                found.setdefault(one["partition"], []).append(one | {"node": node.directory.name})
        return found

    def behind(self, lag=0):
        """Partitions whose replicas are further apart than so many entries."""
        return {
            partition: [(one["node"], one["role"], one["term"], one["applied"]) for one in replicas]
            for partition, replicas in self.replicas().items()
            if max(one["applied"] for one in replicas) - min(one["applied"] for one in replicas) > lag
        }

    def wait_until_equal(self):
        """Without load: until the replicas of each partition are at one index; then they must be the same."""
        def settled():
            replicas = self.replicas()
            at_one = all(len({one["applied"] for one in of}) == 1 for of in replicas.values())
            return replicas if at_one else None

        for partition, replicas in servers.wait_until(settled, "replicas are at one index", 30, 0.1).items():
            seen = {(one["applied"], one["revision"], one["keys"]) for one in replicas}
            assert len(seen) == 1, (partition, replicas)

    def leader_of(self, partition):
        """The running node that leads a partition, as it says itself."""
        return servers.wait_until(
            lambda: next((node for node in self.running() if partition in node.led()), None),
            f"somebody leads partition {partition}",
        )

    def logs(self):
        """The ends of all logs, for the report of a failed test."""
        return {node.directory.name: node.logs()[-6000:] for node in self.nodes} | {
            "etcd": self.etcd.log()[-2000:]
        }


def slot(key):
    """The slot of a key without a hash tag."""
    value = 0
    for byte in key:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1) ^ 0x1021 if value & 0x8000 else value << 1
            value &= 0xFFFF
    return value % SLOTS


def partition_of(key, partitions=PARTITIONS):
    return slot(key) * partitions // SLOTS


def keys_of_all(partitions=PARTITIONS, prefix=b"p"):
    """One key of each partition."""
    found, number = {}, 0
    while len(found) < partitions:
        key = b"%s%d" % (prefix, number)
        found.setdefault(partition_of(key, partitions), key)
        number += 1
    return [found[partition] for partition in range(partitions)]


ONE_OF_EACH = keys_of_all(prefix=b"serves")
