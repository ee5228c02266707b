"""RabbitMQ as Debian packages it, without its daemon: each broker has its own ports, node name and directory.

The packaged start script changes to the user `rabbitmq` and writes to /var, so the one below it is run.
"""

import glob
import itertools
import os
import pathlib
import signal
import subprocess

import servers

SCRIPTS = sorted(glob.glob("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin"))
EPMD = sorted(glob.glob("/usr/lib/erlang/erts-*/bin/epmd"))
USER = "flux"
_NUMBERS = itertools.count(1)


def installed():
    return bool(SCRIPTS and EPMD)


class RabbitMQ(servers.Server):
    """A broker with one user, `flux`, who may do everything. `start` after `kill` keeps its data."""

    name = "rabbitmq"

    def __init__(self, directory, pin_to_core=None, password="s3cret"):
        super().__init__(directory, pin_to_core)
        if not installed():
            raise RuntimeError("RabbitMQ is not installed: apt-get install rabbitmq-server")
        self.password = password
        self.epmd_port = servers.free_port()
        self.distribution_port = servers.free_port()
        self.node = f"flux-{os.getpid()}-{next(_NUMBERS)}@localhost"
        self.epmd = None
        home = self.directory / "home"
        home.mkdir(exist_ok=True)
        cookie = home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text("flux")
            cookie.chmod(0o400)
        (self.directory / "plugins").write_text("[].")
        (self.directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "loopback_users = none\n"
            f"default_user = {USER}\n"
            f"default_pass = {self.password}\n"
            "log.console = true\n"
            "log.file = false\n"
            "disk_free_limit.absolute = 50MB\n"
        )

    @property
    def url(self):
        return f"amqp://{USER}:{self.password}@127.0.0.1:{self.port}"

    def start(self, deadline_s=180.0):
        """Takes 6 seconds of a whole core, and longer beside others."""
        return super().start(deadline_s)

    def command(self):
        return [f"{SCRIPTS[-1]}/rabbitmq-server"]

    def environment(self):
        kept = {
            key: value
            for key, value in super().environment().items()
            if not key.startswith(("RABBITMQ_", "ERL_"))
        }
        return kept | {
            "HOME": str(self.directory / "home"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_NODENAME": self.node,
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1"
            ),
        }

    def spawn(self):
        # Its own, as a child: else Erlang leaves one behind as a daemon.
        if self.epmd is None:
            self.epmd = subprocess.Popen(
                [EPMD[-1], "-port", str(self.epmd_port), "-address", "127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return super().spawn()

    def ready(self):
        return "Server startup complete" in self.log()

    @property
    def erlang_pid(self):
        """The process that is the broker; the child is a shell around it."""
        return int((self.directory / "mnesia" / f"{self.node}.pid").read_text())

    @property
    def pid(self):
        return self.erlang_pid

    def signal(self, number):
        os.kill(self.erlang_pid, number)

    def sync_queues(self):
        """To be called once after quorum queues were declared, where the broker will be killed.

        Which ones there are is written to disk minutes later only (RabbitMQ 3.10: `names.dets`, which
        is not synced). A broker killed before that never elects a leader for them again.
        """
        self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def kill_broker(self):
        """SIGKILL of the broker alone: `start` runs it again with what it has on disk."""
        pid_file = self.directory / "mnesia" / f"{self.node}.pid"
        if self.running():
            if pid_file.exists():
                try:
                    os.kill(self.erlang_pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                pid_file.unlink()
            else:
                self.process.kill()
        if self.process is not None:
            self.process.wait()

    def stop(self, deadline_s=60.0):
        code = super().stop(deadline_s)
        self._end_epmd()
        return code

    def kill(self):
        self.kill_broker()
        self._end_epmd()

    def _end_epmd(self):
        if self.epmd is not None:
            self.epmd.kill()
            self.epmd.wait()
            self.epmd = None

    def ctl(self, *arguments):
        """Runs `rabbitmqctl` and gives what it prints."""
        command = [f"{SCRIPTS[-1]}/rabbitmqctl", "--quiet", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def raise_memory_alarm(self):
        """From now on publishers are blocked."""
        self.ctl("set_vm_memory_high_watermark", "absolute", "1MB")

    def clear_memory_alarm(self):
        self.ctl("set_vm_memory_high_watermark", "0.4")

    def close_connections(self):
        self.ctl("close_all_connections", "a test")

    def change_password(self, password):
        """What connects after this needs the new password; `url` stays as it was."""
        self.ctl("change_password", USER, password)

    def delete_queue(self, name):
        self.ctl("delete_queue", name)

    def delete_exchange(self, name):
        """There is no command for it: the broker evaluates it."""
        self.ctl(
            "eval",
            "rabbit_exchange:delete(rabbit_misc:r(<<\"/\">>, exchange, "
            f"<<\"{name}\">>), false, <<\"test\">>).",
        )
