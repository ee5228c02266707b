//! A RabbitMQ of a test's own: on free ports, with its own node name and directory.
//!
//! The packaged start script changes to the user `rabbitmq` and writes to /var, so the one below it
//! is run.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};

const USER: &str = "flux";
const PASSWORD: &str = "s3cret";
static BROKERS: AtomicU32 = AtomicU32::new(1);

/// A broker that is killed when dropped.
pub struct Broker {
    directory: TempDir,
    node: String,
    port: u16,
    epmd_port: u16,
    distribution_port: u16,
    epmd: Child,
    process: Option<Child>,
}

impl Broker {
    /// Starts one and waits until it is ready.
    pub async fn start() -> Broker {
        let directory = tempfile::tempdir().expect("a directory");
        let (port, epmd_port, distribution_port) = (free_port(), free_port(), free_port());
        let number = BROKERS.fetch_add(1, Ordering::Relaxed);
        let node = format!("flux-{}-{number}@localhost", std::process::id());
        write_settings(directory.path(), port);
        // Its own, as a child: else Erlang leaves one behind as a daemon.
        let epmd = Command::new(newest("/usr/lib/erlang", "erts-").join("bin/epmd"))
            .args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("epmd is a part of Erlang");
        let mut broker =
            Broker { directory, node, port, epmd_port, distribution_port, epmd, process: None };
        broker.run_again().await;
        broker
    }

    pub fn url(&self) -> String {
        self.url_with(PASSWORD)
    }

    pub fn url_with(&self, password: &str) -> String {
        format!("amqp://{USER}:{password}@127.0.0.1:{}/%2f", self.port)
    }

    /// Starts it with the data it has, and waits until it is ready.
    pub async fn run_again(&mut self) {
        let log_path = self.log_path();
        let log = fs::File::create(&log_path).expect("a file");
        let child = self
            .command("rabbitmq-server")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("the start script can be run");
        self.process = Some(child);
        until("the broker is ready", Duration::from_secs(60), || {
            let log = fs::read_to_string(&log_path).unwrap_or_default();
            log.contains("Server startup complete")
        })
        .await;
    }

    /// Kills it: what is on disk stays.
    pub async fn kill(&mut self) {
        // Which quorum queues there are is written to disk minutes after one is declared. A broker
        // that is killed before never elects a leader for it again.
        self.ctl(&["eval", "[dets:sync(Table) || Table <- dets:all()]."]).await;
        self.signal(Signal::KILL);
        fs::remove_file(self.pid_file()).expect("a broker that runs has one");
        // The shell around it ends by itself.
        let mut child = self.process.take().expect("it runs");
        child.wait().await.expect("a child");
    }

    /// Stops it in its tracks.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Runs `rabbitmqctl`.
    pub async fn ctl(&self, arguments: &[&str]) {
        let output = self.command("rabbitmqctl").args(arguments).output().await;
        let output = output.expect("rabbitmqctl can be run");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "rabbitmqctl {arguments:?}: {text}");
    }

    /// From now on what is published is not taken, or is again.
    pub async fn alarm(&self, is_on: bool) {
        let arguments: &[&str] = if is_on { &["absolute", "1MB"] } else { &["0.4"] };
        self.ctl(&[&["set_vm_memory_high_watermark"], arguments].concat()).await;
    }

    /// Channels that are opened from now on take messages up to so many bytes.
    pub async fn max_message_size(&self, bytes: u32) {
        let set = format!("application:set_env(rabbit, max_message_size, {bytes}).");
        self.ctl(&["eval", &set]).await;
    }

    pub async fn change_password(&self, password: &str) {
        self.ctl(&["change_password", USER, password]).await;
    }

    fn command(&self, script: &str) -> Command {
        let directory = self.directory.path();
        let path = |name: &str| directory.join(name);
        let mut command = Command::new(
            newest("/usr/lib/rabbitmq/lib", "rabbitmq_server-").join("sbin").join(script),
        );
        command
            .current_dir(directory)
            .env("HOME", path("home"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_NODENAME", &self.node)
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_DIST_PORT", self.distribution_port.to_string())
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf"))
            .env("RABBITMQ_MNESIA_BASE", path("mnesia"))
            .env("RABBITMQ_LOG_BASE", path("log"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins"))
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
            );
        command
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("broker.log")
    }

    fn pid_file(&self) -> PathBuf {
        self.directory.path().join("mnesia").join(format!("{}.pid", self.node))
    }

    /// To the Erlang process: the child is a shell around it.
    fn signal(&self, signal: Signal) {
        let text = fs::read_to_string(self.pid_file()).expect("a broker that runs has one");
        let pid = text.trim().parse().ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("it runs");
    }
}

impl Drop for Broker {
    #[expect(clippy::print_stdout, reason = "shown where a test fails")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", fs::read_to_string(self.log_path()).unwrap_or_default());
        }
        if self.process.is_some() && self.pid_file().exists() {
            self.signal(Signal::KILL);
        }
        self.epmd.start_kill().expect("a child");
    }
}

fn write_settings(directory: &Path, port: u16) {
    fs::create_dir(directory.join("home")).expect("a directory");
    let cookie = directory.join("home/.erlang.cookie");
    fs::write(&cookie, "flux").expect("a file");
    fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400)).expect("a file of this test");
    fs::write(directory.join("plugins"), "[].").expect("a file");
    let settings = format!(
        "listeners.tcp.1 = 127.0.0.1:{port}\n\
         loopback_users = none\n\
         default_user = {USER}\n\
         default_pass = {PASSWORD}\n\
         log.console = true\n\
         log.file = false\n\
         disk_free_limit.absolute = 50MB\n"
    );
    fs::write(directory.join("rabbitmq.conf"), settings).expect("a file");
}

/// The directory of the newest version that is installed.
fn newest(directory: &str, prefix: &str) -> PathBuf {
    let entries = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{directory}: {error}: apt-get install rabbitmq-server"));
    let versions = entries.map(|entry| entry.expect("it can be read").path());
    let name = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    versions.filter(name).max().expect("a version is installed")
}

/// A port that was free a moment ago: Erlang cannot say which one it took.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// Looks again and again until something holds.
pub async fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
