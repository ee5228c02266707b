"""`flux up --nodes N`: a cluster in one process, on free ports, and `flux admin` to ask it."""

import json
import os
import subprocess

import resp
import servers


class Up(servers.Server):
    """A process with several nodes. Every port is a free one, and read off the banner."""

    name = "up"

    def __init__(self, directory, nodes, binary=None, **settings):
        super().__init__(directory)
        self.nodes = nodes
        self.binary = binary or servers.flux_binary()
        self.settings = settings
        self.data_dir = self.directory / "data"

    def command(self):
        command = [self.binary, "up", "--nodes", self.nodes, "--data-dir", self.data_dir]
        for flag in ("data", "admin", "peer", "grpc", "http"):
            command += [f"--{flag}-addr", "127.0.0.1:0"]
        return command

    def environment(self):
        settings = {f"FLUX_{key.upper()}": str(value) for key, value in self.settings.items()}
        return super().environment() | settings

    def ready(self):
        return "Ctrl-C stops it" in self.log()

    def rows(self):
        """(name, data port, admin port) of each node, the first one first."""
        rows = []
        for line in self.log().splitlines():
            words = line.split()
            if len(words) == 4 and words[0].startswith("node-") and words[3].startswith("http://"):
                rows.append((words[0], port_of(words[1]), port_of(words[3])))
        return rows

    @property
    def http_url(self):
        return next(
            words[-1] for words in map(str.split, self.log().splitlines()) if words[:1] == ["HTTP,"]
        )

    def connect_to(self, number):
        """A connection to node `number`, counted from 1."""
        return resp.Connection(self.rows()[number - 1][1])

    def admin(self, *arguments):
        return admin(self.rows()[0][2], *arguments, binary=self.binary)


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def without_settings():
    """The environment for a process that is to have the default settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("FLUX_")}


def admin(port, *arguments, binary=None):
    """Runs `flux admin`; the finished process."""
    command = [binary or servers.flux_binary(), "admin", "--addr", f"127.0.0.1:{port}", *arguments]
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def asked(port, *arguments, binary=None):
    """The JSON that `flux admin --json` answers."""
    done = admin(port, "--json", *arguments, binary=binary)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
