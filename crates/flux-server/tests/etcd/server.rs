//! An etcd of a test's own, and a way to it that can be cut.

use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An etcd server with one member, killed when dropped.
pub struct Server {
    directory: TempDir,
    endpoint: String,
    peer: String,
    process: Option<Child>,
}

impl Server {
    /// Starts one and waits until it answers.
    pub async fn start() -> Server {
        let directory = tempfile::tempdir().expect("a directory");
        let (endpoint, peer) = (free_address(), free_address());
        let mut server = Server { directory, endpoint, peer, process: None };
        server.run_again().await;
        server
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Starts it with the data it has.
    pub async fn run_again(&mut self) {
        let url = |address: &str| format!("http://{address}");
        let child = Command::new("etcd")
            .args(["--data-dir", &self.data_dir(), "--log-level", "error", "--unsafe-no-fsync"])
            .args(["--listen-client-urls", &url(&self.endpoint)])
            .args(["--advertise-client-urls", &url(&self.endpoint)])
            .args(["--listen-peer-urls", &url(&self.peer)])
            .args(["--initial-advertise-peer-urls", &url(&self.peer)])
            .args(["--initial-cluster", &format!("default={}", url(&self.peer))])
            .args(["--heartbeat-interval", "50", "--election-timeout", "300"])
            .env_remove("ETCD_DATA_DIR")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("cannot run etcd ({error}): apt-get install etcd-server")
        });
        self.process = Some(child);
        let answers = async {
            loop {
                if let Ok(mut client) = etcd_client::Client::connect([&self.endpoint], None).await
                    && let Ok(Ok(_)) =
                        tokio::time::timeout(Duration::from_secs(1), client.get("x", None)).await
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(15), answers).await.expect("etcd never answered");
    }

    /// Stops it in its tracks.
    pub fn freeze(&self) {
        kill_process(self.pid(), Signal::STOP).expect("it runs");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        kill_process(self.pid(), Signal::CONT).expect("it runs");
    }

    /// Kills it.
    pub fn kill(&mut self) {
        kill_process(self.pid(), Signal::KILL).expect("it runs");
        self.process = None;
    }

    /// Removes its data.
    pub fn wipe(&self) {
        std::fs::remove_dir_all(self.data_dir()).expect("removed");
    }

    fn data_dir(&self) -> String {
        self.directory.path().join("data").display().to_string()
    }

    fn pid(&self) -> Pid {
        let id = self.process.as_ref().and_then(Child::id).expect("it runs");
        Pid::from_raw(id as i32).expect("a process id")
    }
}

/// An address that was free a moment ago: etcd cannot say which port it took.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").to_string()
}

/// A way to a server that can be shut.
pub struct Tap {
    endpoint: String,
    open: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Tap {
    pub async fn open(to: &str) -> Tap {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = listener.local_addr().expect("bound").to_string();
        let to: SocketAddr = to.parse().expect("an address");
        let (open, is_open) = watch::channel(true);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let is_open = is_open.clone();
                if *is_open.borrow() {
                    tokio::spawn(pass(stream, to, is_open));
                }
            }
        });
        Tap { endpoint, open, task }
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Cuts every connection and lets none through.
    pub fn shut(&self) {
        self.open.send_replace(false);
    }

    pub fn open_again(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut from: TcpStream, to: SocketAddr, mut open: watch::Receiver<bool>) {
    let Ok(mut to) = TcpStream::connect(to).await else {
        return;
    };
    tokio::select! {
        // Either end may go whenever it likes.
        _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
        _ = open.wait_for(|open| !open) => {}
    }
}
