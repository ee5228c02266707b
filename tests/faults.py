"""What can go wrong with a cluster, as functions that do it, wait for a while, and undo it.

A fault leaves the processes running and the network whole; whether the cluster gets well again is for the
caller to see. Everything is drawn from `weather.chance`, so that a seed gives the same faults in the same
order; how they fall on the load is up to the machine.
"""

import os
import pathlib
import random
import signal
import time

import cluster
import history

BLKIO = pathlib.Path("/sys/fs/cgroup/blkio")


class Weather:
    """A cluster, the chance that picks what happens to it, and all that clients did to it so far."""

    def __init__(self, made, seed=0):
        self.cluster = made
        self.chance = random.Random(seed)
        self.loads = []

    def nap(self, least, most):
        time.sleep(self.chance.uniform(least, most))

    def leader(self):
        """Who leads the first register of the present load."""
        key = self.loads[-1].choices[0][1]
        return self.cluster.leader_of(cluster.partition_of(key))

    def follower(self):
        leader = self.leader()
        return self.chance.choice([node for node in self.cluster.running() if node is not leader])

    def any(self):
        return self.chance.choice(self.cluster.running())

    def strike(self, fault, clients=4):
        """One fault under load; all that clients saw is checked. Returns counts, and how long it took."""
        begun = time.monotonic()
        load = history.Load(self.cluster.nodes, clients=clients, seed=self.chance.random())
        self.loads.append(load)
        with load:
            time.sleep(0.3)
            fault(self)
            struck = time.monotonic()
            self.cluster.wait_until_well()
            recovered = time.monotonic()
            time.sleep(0.3)
        result = load.check(self.cluster.running())
        for node in self.cluster.nodes:
            assert "panicked" not in node.logs(), node.logs()[-6000:]
        return result | {
            "recovered_s": round(recovered - struck, 2),
            "took_s": round(time.monotonic() - begun, 2),
        }

    def check_all_again(self):
        """Whatever was acknowledged in any load so far is still there. Returns how much that is."""
        self.cluster.wait_until_equal()
        for load in self.loads:
            lost = load.lost(self.cluster.running()[0])
            assert not lost, f"{len(lost)} acknowledged writes lost, among them {lost[:5]}"
        return sum(load.acknowledged for load in self.loads)


def kill_leader(weather):
    node = weather.leader()
    node.kill()
    weather.nap(0.2, 2.5)
    node.start()


def kill_follower(weather):
    node = weather.follower()
    node.kill()
    weather.nap(0.1, 1.5)
    node.start()


def kill_majority(weather):
    """Nothing can be written until one of them is back."""
    nodes = weather.chance.sample(weather.cluster.running(), 2)
    for node in nodes:
        node.kill()
        weather.nap(0.0, 0.3)
    weather.nap(0.5, 1.5)
    weather.cluster.start_nodes(nodes)


def kill_everything(weather):
    nodes = weather.cluster.running()
    for node in nodes:
        node.kill()
    weather.cluster.start_nodes(nodes)


def kill_again_while_starting(weather):
    node = weather.any()
    for _ in range(3):
        node.kill()
        node.spawn()
        weather.nap(0.0, 0.25)
    node.kill()
    node.start()


def kill_one_after_the_other(weather):
    """The next one as soon as the one before is ready, which may not have caught up."""
    for node in weather.chance.sample(weather.cluster.running(), 3):
        node.kill()
        node.start()


def pause_leader(weather):
    """It must not answer reads from what it knew when it wakes up."""
    node = weather.leader()
    node.stop_process()
    weather.nap(0.8, 3.5)
    node.resume_process()


def pause_leader_in_short_bursts(weather):
    """Each pause is about as long as a lease."""
    node = weather.leader()
    for _ in range(6):
        node.stop_process()
        weather.nap(0.3, 0.9)
        node.resume_process()
        weather.nap(0.01, 0.2)


def pause_majority(weather):
    nodes = weather.chance.sample(weather.cluster.running(), 2)
    for node in nodes:
        node.stop_process()
    weather.nap(0.8, 2.5)
    for node in nodes:
        node.resume_process()


def stop_leader(weather):
    node = weather.leader()
    assert node.stop() == 0, node.log()[-3000:]
    weather.nap(0.0, 1.0)
    node.start()


def pause_etcd(weather):
    weather.cluster.etcd.signal(signal.SIGSTOP)
    weather.nap(1.0, 3.0)
    weather.cluster.etcd.signal(signal.SIGCONT)


def kill_leader_without_etcd(weather):
    """Failover needs the nodes alone; so does starting again, from what the node remembers."""
    weather.cluster.etcd.kill()
    kill_leader(weather)
    weather.cluster.etcd.start()


def slow_disk(weather):
    """Each sync of one node takes a tenth of a second and more."""
    node = weather.any()
    with ThrottledDisk(node, writes_per_s=10):
        weather.nap(2.0, 4.0)


def slow_disk_then_kill(weather):
    node = weather.leader()
    with ThrottledDisk(node, writes_per_s=10):
        weather.nap(0.5, 1.5)
        node.kill()
    node.start()


def step_clock(weather):
    """The clock of the leader jumps by an hour, forward and back."""
    node = weather.leader()
    with FakeClock(node) as clock:
        for offset in ["+1h", "-1h", "+0"]:
            clock.set(offset)
            weather.nap(0.8, 1.2)


def drift_clock(weather):
    """All clocks of a node, the monotonic one too, are within the bound of 10 % too fast or too slow."""
    node = weather.leader()
    for speed in ["+0 x1.08", "+0 x0.93"]:
        with FakeClock(node, monotonic=True, clock=speed):
            weather.nap(0.5, 1.0)
            node.stop_process()
            weather.nap(0.4, 0.8)
            node.resume_process()
            weather.nap(0.5, 1.0)


def isolate_leader(weather):
    """From the other nodes, not from clients: it must not answer them from what it knows."""
    isolate(weather, weather.leader())


def isolate_follower(weather):
    isolate(weather, weather.follower())


def isolate(weather, node):
    network = weather.cluster.network
    network.separate([node.place], [other.place for other in others(weather, node)])
    weather.nap(0.5, 4.0)
    network.heal()


def isolate_leader_and_etcd(weather):
    """No node sees any other one, nor etcd: nobody can write."""
    places = [node.place for node in weather.cluster.nodes]
    for place in places:
        others_places = [0] if place == places[0] else [0, *places[: places.index(place)]]
        weather.cluster.network.separate([place], others_places)
    weather.nap(0.5, 2.0)
    weather.cluster.network.heal()


def mute_leader(weather):
    """It hears the others and they do not hear it."""
    node = weather.leader()
    for other in others(weather, node):
        weather.cluster.network.cut(node.place, other.place)
    weather.nap(1.0, 4.0)
    weather.cluster.network.heal()


def deafen_leader(weather):
    """They hear it, and it does not hear them: without a check of the quorum it would lead for ever."""
    node = weather.leader()
    for other in others(weather, node):
        weather.cluster.network.cut(other.place, node.place)
    weather.nap(1.0, 4.0)
    weather.cluster.network.heal()


def cut_one_wire(weather):
    """Two nodes do not see each other, and both see the third."""
    a, b = weather.chance.sample(weather.cluster.running(), 2)
    weather.cluster.network.separate([a.place], [b.place])
    weather.nap(1.0, 4.0)
    weather.cluster.network.heal()


def delay_everything(weather):
    """200 ms each way between any two nodes."""
    disturb(weather, weather.cluster.nodes, delay_s=0.2)


def delay_leader(weather):
    disturb(weather, [weather.leader()], delay_s=0.2)


def lose_packets(weather):
    disturb(weather, weather.cluster.nodes, loss=0.15)


def disturb(weather, nodes, **how):
    for node in nodes:
        for other in others(weather, node):
            weather.cluster.network.disturb(node.place, other.place, **how)
            weather.cluster.network.disturb(other.place, node.place, **how)
    weather.nap(2.0, 4.0)
    weather.cluster.network.heal()


def others(weather, node):
    return [other for other in weather.cluster.nodes if other is not node]


PROCESS_FAULTS = [
    kill_leader, kill_follower, kill_majority, kill_everything, kill_again_while_starting,
    kill_one_after_the_other, pause_leader, pause_leader_in_short_bursts, pause_majority, stop_leader,
    pause_etcd, kill_leader_without_etcd,
]
DISK_FAULTS = [slow_disk, slow_disk_then_kill]
CLOCK_FAULTS = [step_clock, drift_clock]
NETWORK_FAULTS = [
    isolate_leader, isolate_follower, isolate_leader_and_etcd, mute_leader, deafen_leader, cut_one_wire,
    delay_everything, delay_leader, lose_packets,
]


class ThrottledDisk:
    """A node whose writes to its disk are held back by the block layer, while the context lasts.

    That is the first version of cgroups, where a sync is charged to who calls it.
    """

    def __init__(self, node, writes_per_s):
        self.node = node
        self.writes_per_s = writes_per_s
        self.group = BLKIO / f"flux-{os.getpid()}-{node.pid}"

    @staticmethod
    def available():
        """Why there can be none, or None."""
        if not os.access(BLKIO / "blkio.throttle.write_iops_device", os.W_OK):
            return "no blkio controller of cgroups v1 that may be written to"
        return None

    def __enter__(self):
        device = os.stat(self.node.data_dir).st_dev
        self.group.mkdir()
        limit = f"{os.major(device)}:{os.minor(device)} {self.writes_per_s}"
        (self.group / "blkio.throttle.write_iops_device").write_text(limit)
        (self.group / "cgroup.procs").write_text(str(self.node.pid))
        return self

    def __exit__(self, *_):
        if self.node.running():
            (BLKIO / "cgroup.procs").write_text(str(self.node.pid))
        self.group.rmdir()


FAKETIME = next(
    iter(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None
)


class FakeClock:
    """A node that is started again with a clock that can be set, and with the true one at the end."""

    def __init__(self, node, monotonic=False, clock="+0"):
        self.node = node
        self.file = node.directory / "clock"
        self.set(clock)
        self.variables = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "0" if monotonic else "1",
            "DONT_FAKE_MONOTONIC": "0" if monotonic else "1",
        }

    @staticmethod
    def available():
        return None if FAKETIME else "apt-get install faketime"

    def set(self, clock):
        """As faketime writes it: `+1h`, or `+0 x1.05` for one that is 5 % too fast."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(clock + "\n")
        fresh.rename(self.file)

    def __enter__(self):
        self._restart(self.variables)
        return self

    def __exit__(self, *_):
        self._restart({})

    def _restart(self, variables):
        self.node.kill()
        self.node.extra_environment = variables
        self.node.start()
