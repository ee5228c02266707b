//! The settings of a client.

use std::fmt;
use std::time::Duration;

use crate::Error;

/// How a client connects, waits and retries.
#[derive(Clone, Debug)]
pub struct Config {
    /// Data ports of nodes, as `host:port`. Of a cluster some are enough: the others are learned.
    pub endpoints: Vec<String>,
    /// Connections to each node.
    pub connections_per_endpoint: usize,
    /// Sent on every connection before anything else, where the node asks for it.
    pub credentials: Option<Credentials>,
    /// How long a connection may take until it is ready, the handshake included.
    pub connect_timeout: Duration,
    /// How long a call may take, retries included. The node is told how much of it is left.
    pub request_timeout: Duration,
    /// A connection on which a request stays unanswered for this long is given up.
    pub stall_timeout: Duration,
    /// Requests under way on one connection; further ones wait for their turn. A request counts
    /// once, and once more for each 64 KiB.
    pub max_in_flight: usize,
    /// The pause before a second attempt to connect; it doubles from attempt to attempt.
    pub reconnect_min: Duration,
    /// The longest such pause.
    pub reconnect_max: Duration,
    /// Whether writes carry a session and a number where the node can tell a repeated one by them:
    /// then a write whose answer was lost is sent again, and takes place once.
    pub sessions: bool,
    /// In a cluster: after so long without an answer the client asks other nodes whether another one
    /// leads by now, and if so, sends the request there.
    pub silence_timeout: Duration,
    /// How often the client asks who leads, where nothing else makes it ask; half as long to half as
    /// long again.
    pub topology_refresh: Duration,
    /// When a failed request is sent again.
    pub retry: Retry,
}

/// When a failed request is sent again. Only what cannot take effect twice ever is.
///
/// In a cluster, to wait until a partition has a leader that can be reached is no attempt, and neither
/// is to be sent to another node or to be told that the partition cannot serve yet: that goes on until
/// the request's time is over.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Attempts at one request, the first included.
    pub max_attempts: u32,
    /// Retries per request over time: each request adds so many percent of a retry to the budget. What
    /// never left costs nothing, and neither does the first time that a call is sent to the leader by
    /// a node that knows it.
    pub budget_percent: u32,
    /// Retries that the budget holds at first, and at most.
    pub reserve: u32,
    /// The longest pause before the first retry; it doubles from retry to retry, and a random part
    /// of it is taken.
    pub backoff: Duration,
}

/// A user's name and password.
#[derive(Clone)]
pub struct Credentials {
    /// Empty for the default user.
    pub user: String,
    /// The password in clear.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            endpoints: vec!["127.0.0.1:7379".to_owned()],
            connections_per_endpoint: 2,
            credentials: None,
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            max_in_flight: 1024,
            sessions: true,
            silence_timeout: Duration::from_millis(500),
            topology_refresh: Duration::from_secs(30),
            reconnect_min: Duration::from_millis(50),
            reconnect_max: Duration::from_secs(2),
            retry: Retry::default(),
        }
    }
}

impl Default for Retry {
    /// A tenth of the requests may be retries, as in Finagle and Envoy. The reserve is what may be
    /// under way when a leader goes away.
    fn default() -> Retry {
        Retry {
            max_attempts: 3,
            budget_percent: 10,
            reserve: 1000,
            backoff: Duration::from_millis(20),
        }
    }
}

impl Config {
    /// The defaults with these endpoints.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Config {
        let endpoints = endpoints.into_iter().map(Into::into).collect();
        Config { endpoints, ..Config::default() }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.endpoints.is_empty() {
            return wrong("`endpoints` is empty".to_owned());
        }
        for endpoint in &self.endpoints {
            if !is_host_and_port(endpoint) {
                return wrong(format!("endpoint `{endpoint}` is not `host:port`"));
            }
        }
        if !(1..=1024).contains(&self.connections_per_endpoint) {
            return wrong("`connections_per_endpoint` must be 1 to 1024".to_owned());
        }
        if !(1..=1 << 20).contains(&self.max_in_flight) {
            return wrong("`max_in_flight` must be 1 to 1048576".to_owned());
        }
        for (name, duration) in [
            ("connect_timeout", self.connect_timeout),
            ("request_timeout", self.request_timeout),
            ("stall_timeout", self.stall_timeout),
            ("silence_timeout", self.silence_timeout),
            ("topology_refresh", self.topology_refresh),
            ("reconnect_min", self.reconnect_min),
            ("reconnect_max", self.reconnect_max),
        ] {
            if duration.is_zero() {
                return wrong(format!("`{name}` must be longer than 0"));
            }
        }
        if self.retry.max_attempts == 0 {
            return wrong("`retry.max_attempts` must be at least 1".to_owned());
        }
        Ok(())
    }
}

pub(crate) fn is_host_and_port(text: &str) -> bool {
    let (host, port) = text.rsplit_once(':').unwrap_or_default();
    !host.is_empty() && matches!(port.parse::<u16>(), Ok(1..))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_setting_names_itself() {
        let wrong = |config: Config| config.check().unwrap_err().to_string();
        assert!(Config::default().check().is_ok());
        assert!(wrong(Config::new(Vec::<String>::new())).contains("endpoints"));
        assert!(wrong(Config::new(["localhost"])).contains("`localhost`"));
        assert!(wrong(Config::new([":7379"])).contains("`:7379`"));
        assert!(wrong(Config::new(["a:1", "b:0"])).contains("`b:0`"));
        let none = Config { max_in_flight: 0, ..Config::default() };
        assert!(wrong(none).contains("max_in_flight"));
        let at_once = Config { request_timeout: Duration::ZERO, ..Config::default() };
        assert!(wrong(at_once).contains("request_timeout"));
    }

    #[test]
    fn a_password_is_not_printed() {
        let credentials = Credentials { user: "u".to_owned(), password: "hunter2".to_owned() };
        assert!(!format!("{credentials:?}").contains("hunter2"));
    }
}
