"""A network of namespaces whose wires can be cut, made one-way, slow or lossy.

Each node gets a network namespace with a TUN device; a process of its own (this file, run as a program)
carries the packets between them and does to them what it is told. That needs root and /dev/net/tun and
nothing else of the kernel: netem, which would be usual, is not in every one. The tests themselves are on
the network too, as place 0.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time

MTU = 16000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
# Packets that may be under way; more are dropped, as a switch does.
MAX_DELAYED = 20_000


def available():
    """Why there can be no such network here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    done = subprocess.run(["ip", "netns"], capture_output=True)
    return None if done.returncode == 0 else "iproute2 is not installed"


class Network:
    """Places 1 to `count` have namespaces; place 0 is the tests' own. Use it as a context."""

    _subnets = itertools.count(1 + os.getpid() % 200)

    def __init__(self, count):
        self.subnet = next(self._subnets) % 250
        self.count = count
        self.process = None

    def host(self, place):
        return f"10.213.{self.subnet}.{place + 1}"

    def namespace(self, place):
        return f"flux-{os.getpid()}-{self.subnet}-{place}"

    def prefix(self, place):
        """What a command is started by, so that it is at this place."""
        return ["ip", "netns", "exec", self.namespace(place)]

    def __enter__(self):
        try:
            return self._start()
        except BaseException:
            self.__exit__()
            raise

    def _start(self):
        for place in range(1, self.count + 1):
            _ip("netns", "add", self.namespace(place))
            _ip("-n", self.namespace(place), "link", "set", "lo", "up")
        devices = []
        for place in range(self.count + 1):
            devices.append(self._device(place))
        arguments = [str(device) for device in devices]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, pass_fds=devices
        )
        for device in devices:
            os.close(device)
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for place in range(1, self.count + 1):
            subprocess.run(["ip", "netns", "del", self.namespace(place)], capture_output=True)

    def _device(self, place):
        """Opens the TUN device of a place, with its address."""
        name = f"flux{self.subnet}" if place == 0 else "tun0"
        device = None

        def open_inside():
            nonlocal device
            if place:
                _enter(self.namespace(place))
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
            fcntl.ioctl(device, TUNSETIFF, request)

        # Only this thread moves into the namespace.
        thread = threading.Thread(target=open_inside)
        thread.start()
        thread.join()
        assert device is not None, "the TUN device cannot be made"
        inside = ["-n", self.namespace(place)] if place else []
        _ip(*inside, "addr", "add", f"{self.host(place)}/24", "dev", name)
        _ip(*inside, "link", "set", name, "mtu", str(MTU), "up")
        return device

    def _tell(self, *words):
        self.process.stdin.write((" ".join(str(word) for word in words) + "\n").encode())
        self.process.stdin.flush()

    def cut(self, source, target):
        """Loses every packet of this direction."""
        self._tell("set", source, target, 1.0, 0)

    def separate(self, some, others):
        """Loses all packets between two groups of places, both ways."""
        for a, b in itertools.product(some, others):
            self.cut(a, b)
            self.cut(b, a)

    def disturb(self, source, target, loss=0.0, delay_s=0.0):
        self._tell("set", source, target, loss, delay_s)

    def heal(self):
        self._tell("heal")


def _ip(*words):
    subprocess.run(["ip", *words], check=True)


def _enter(namespace):
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(handle, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(handle)


def carry(devices):
    """Carries packets until standard input ends, which is where rules come from."""
    chance = random.Random(1)
    rules, delayed, number = {}, [], itertools.count()
    places = {device: place for place, device in enumerate(devices)}
    poll = select.epoll()
    for device in [*devices, 0]:
        os.set_blocking(device, False)
        poll.register(device, select.EPOLLIN)
    told = b""
    while True:
        now = time.monotonic()
        while delayed and delayed[0][0] <= now:
            _, _, device, packet = heapq.heappop(delayed)
            send(device, packet)
        wait = max(0.0, delayed[0][0] - now) if delayed else -1
        for ready, _ in poll.poll(wait):
            if ready == 0:
                data = os.read(0, 65536)
                if not data:
                    return
                *lines, told = (told + data).split(b"\n")
                for line in lines:
                    follow(line.decode().split(), rules)
                continue
            for _ in range(64):
                try:
                    packet = os.read(ready, MTU + 100)
                except BlockingIOError:
                    break
                # IPv4 only; the last byte of the target's address is its place, plus one.
                if len(packet) < 20 or packet[0] >> 4 != 4 or not 0 < packet[19] <= len(devices):
                    continue
                target = packet[19] - 1
                loss, delay_s = rules.get((places[ready], target), (0.0, 0.0))
                if loss and chance.random() < loss:
                    continue
                if delay_s == 0.0:
                    send(devices[target], packet)
                elif len(delayed) < MAX_DELAYED:
                    due = time.monotonic() + delay_s
                    heapq.heappush(delayed, (due, next(number), devices[target], packet))


def follow(words, rules):
    if words[0] == "heal":
        rules.clear()
    else:
        source, target, loss, delay_s = words[1:]
        rules[int(source), int(target)] = (float(loss), float(delay_s))


def send(device, packet):
    try:
        os.write(device, packet)
    except OSError:
        # The device is full or gone: the packet is lost.
        pass


if __name__ == "__main__":
    carry([int(argument) for argument in sys.argv[1:]])
