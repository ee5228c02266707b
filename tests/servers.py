"""Starts and stops the processes that the tests and benchmarks talk to: Flux-KV, and Redis as the peer.

Every server listens on free loopback ports and keeps its files in a directory of its own. Nothing here
retries a failed start, and only processes started here are ever signalled.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import weakref

import resp

ROOT = pathlib.Path(__file__).resolve().parent.parent
REDIS_SERVER = shutil.which("redis-server")


def flux_binary():
    """`$FLUX_BIN`, else the dev build under the target directory."""
    given = os.environ.get("FLUX_BIN")
    if given:
        return pathlib.Path(given)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "debug" / "flux"


def wait_until(condition, what, deadline_s=30.0, interval_s=0.01):
    """Polls until the condition gives something true, and returns that."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s} s: {what}")
        time.sleep(interval_s)


_HELD = []


def free_port(owner=None):
    """A loopback port that nobody listens on. It is nobody else's while its owner lives, or this process: a
    bound socket keeps the system from giving it away again, also as the near end of a connection, which a
    server that is started anew needs as much as one that is started first. The server itself can listen
    there since it sets SO_REUSEADDR, as servers do."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if owner is None:
        _HELD.append(held)
    else:
        weakref.finalize(owner, held.close)
    return held.getsockname()[1]


class StartFailed(Exception):
    """The process ended before it was ready; `code` is its exit code and `log` what it printed."""

    def __init__(self, name, code, log):
        super().__init__(f"{name} ended with code {code} before it was ready:\n{log}")
        self.code = code
        self.log = log


class Server:
    """A child process with a log file. Subclasses say how it starts and when it is ready."""

    name = "server"

    def __init__(self, directory, pin_to_core=None):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_path = self.directory / f"{self.name}.log"
        self.pin_to_core = pin_to_core
        self.process = None
        self.log_start = 0
        self.port = free_port(self)

    def command(self):
        raise NotImplementedError

    def ready(self):
        raise NotImplementedError

    def start(self, deadline_s=60.0):
        self.spawn()
        try:
            wait_until(self._ready_or_ended, f"{self.name} ready", deadline_s, 0.005)
        except BaseException:
            self.kill()
            raise
        return self

    def spawn(self):
        """Starts the process without waiting for it to be ready."""
        command = [str(part) for part in self.command()]
        if self.pin_to_core is not None:
            command = ["taskset", "-c", str(self.pin_to_core)] + command
        with open(self.log_path, "ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self.environment(),
            )
        return self

    def environment(self):
        return {key: value for key, value in os.environ.items() if not key.startswith("FLUX_")}

    def _ready_or_ended(self):
        code = self.process.poll()
        if code is not None:
            raise StartFailed(self.name, code, self.log())
        return self.ready()

    def log(self):
        """What the process has printed since it was started."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self.log_start :].decode(errors="replace")

    @property
    def pid(self):
        return self.process.pid

    def running(self):
        return self.process is not None and self.process.poll() is None

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, deadline_s=30.0):
        """The exit code, once the process has ended."""
        try:
            return self.process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise TimeoutError(f"{self.name} did not end in {deadline_s} s:\n{self.log()}") from error

    def stop(self, deadline_s=30.0):
        """SIGTERM, then the exit code."""
        if self.running():
            self.signal(signal.SIGTERM)
        return self.wait(deadline_s)

    def kill(self):
        """SIGKILL, and reaps the process."""
        if self.running():
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def connect(self, timeout=20.0):
        return resp.Connection(self.port, timeout=timeout)

    def rss_bytes(self):
        return memory_bytes(self.pid, "VmRSS")


class Flux(Server):
    """`flux server` or `flux up` with the given settings, e.g. `fsync="always"`."""

    name = "flux"

    def __init__(self, directory, mode="server", pin_to_core=None, binary=None, **settings):
        super().__init__(directory, pin_to_core)
        self.mode = mode
        self.binary = binary or flux_binary()
        self.admin_port = free_port(self)
        self.grpc_port = free_port(self)
        self.http_port = free_port(self)
        self.peer_port = free_port(self)
        self.settings = settings
        self.data_dir = self.directory / "data"

    def command(self):
        flags = {
            "data_addr": f"127.0.0.1:{self.port}",
            "admin_addr": f"127.0.0.1:{self.admin_port}",
            "peer_addr": f"127.0.0.1:{self.peer_port}",
            "grpc_addr": f"127.0.0.1:{self.grpc_port}",
            "data_dir": self.data_dir,
        }
        if self.mode == "up":
            flags["http_addr"] = f"127.0.0.1:{self.http_port}"
        command = [self.binary, self.mode]
        for key, value in flags.items():
            command += [f"--{key.replace('_', '-')}", value]
        return command

    def environment(self):
        # The addresses go in as flags and the rest as environment, so both ways are exercised.
        settings = {f"FLUX_{key.upper()}": str(value) for key, value in self.settings.items()}
        return super().environment() | settings

    def ready(self):
        if self.admin_status("/ready") != 200:
            return False
        return self.mode != "up" or http_status(f"http://127.0.0.1:{self.http_port}/health") == 200

    def admin_status(self, path):
        return http_status(f"http://127.0.0.1:{self.admin_port}{path}")

    def metrics(self):
        """The text of /metrics."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.admin_port}/metrics", timeout=10
        ) as answer:
            return answer.read().decode()


class Redis(Server):
    """The peer, with snapshots off and the append-only file as asked."""

    name = "redis"

    def __init__(self, directory, fsync=None, pin_to_core=None, extra=()):
        super().__init__(directory, pin_to_core)
        self.fsync = fsync
        self.extra = list(extra)

    def command(self):
        command = [REDIS_SERVER, "--port", self.port, "--bind", "127.0.0.1"]
        command += ["--dir", self.directory, "--save", "", "--enable-debug-command", "local"]
        if self.fsync:
            command += ["--appendonly", "yes", "--appendfsync", self.fsync]
        return command + self.extra

    def ready(self):
        try:
            with self.connect(timeout=60.0) as connection:
                return connection.raw("PING") == b"+PONG\r\n"
        except (ConnectionRefusedError, ConnectionResetError, resp.Closed):
            return False


def http_status(url):
    """The status of a GET, or None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return None


def memory_bytes(pid, field):
    """A field of /proc/<pid>/status that is given in kB."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def cpu_seconds(pid):
    """User and system time of all threads of a process."""
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
