//! The address of a broker: `amqp://user:password@host:port/vhost`.
//!
//! The password is shown nowhere: neither by `Debug` nor by `Display`, nor in an error. What this
//! module does not do: TLS (`amqps`), or parameters behind a `?`.

use std::fmt;
use std::str::FromStr;

const DEFAULT_PORT: u16 = 5672;
const DEFAULT_USER: &str = "guest";
const SCHEME: &str = "amqp://";

/// What stands for a password where an address is shown, and is refused as one: what was shown does
/// not pass for the address itself.
const HIDDEN: &str = "***";

/// The address of a broker. `Display` and `Debug` hide the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    user: String,
    password: String,
    host: String,
    port: u16,
    vhost: String,
    shown: String,
}

/// The text is no address of a broker. It does not say which text, since that may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the address of a broker must be {}", Url::ALLOWED)]
pub struct UrlError;

impl Url {
    /// What is allowed, as the end of a sentence that begins with "must be".
    pub const ALLOWED: &str = "an address like amqp://user:password@host:5672/vhost, where port, vhost \
                               and user may be left out; special characters are written %40 for @, and \
                               *** only shows where a password is hidden";

    /// Who connects: `guest` where the address does not say.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The password, to be shown to nobody: `guest` where the address names no user.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// A name or an IP address, one of version 6 without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port: 5672 where the address does not say.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The virtual host: `/` where the address does not say.
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    fn parse(text: &str) -> Option<Url> {
        let rest = text.strip_prefix(SCHEME)?;
        let (authority, vhost) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, address) = match authority.rsplit_once('@') {
            Some((login, address)) => (Some(login), address),
            None => (None, authority),
        };
        let (user, password) = match login {
            Some(login) => login.split_once(':').map_or((login, None), |(u, p)| (u, Some(p))),
            None => (DEFAULT_USER, Some(DEFAULT_USER)),
        };
        let (host, port) = host_and_port(address)?;
        if user.is_empty() || password == Some(HIDDEN) {
            return None;
        }
        let hidden = if login.is_some() && password.is_some() { ":***" } else { "" };
        let login = login.map_or(String::new(), |_| format!("{user}{hidden}@"));
        let path = &rest[authority.len()..];
        Some(Url {
            user: decoded(user)?,
            password: decoded(password.unwrap_or(""))?,
            host: host.to_owned(),
            port: port.unwrap_or(DEFAULT_PORT),
            vhost: if vhost.is_empty() { "/".to_owned() } else { decoded(vhost)? },
            shown: format!("{SCHEME}{login}{address}{path}"),
        })
    }
}

/// A name or an IP address, and a port.
fn host_and_port(text: &str) -> Option<(&str, Option<u16>)> {
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (host, port) = match bracketed {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (host, Some(rest.strip_prefix(':')?)),
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let sound = match bracketed {
        Some(_) => host.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !host.is_empty() && host.chars().all(named)
        }
    };
    if !sound {
        return None;
    }
    let Some(port) = port else { return Some((host, None)) };
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0)?;
    Some((host, Some(port)))
}

/// A part of the address with `%40` and the like read. Unescaped it has only characters that cannot be
/// taken for the end of a part.
fn decoded(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'%' => {
                let (digits, after) = rest.split_at_checked(2)?;
                let high = char::from(digits[0]).to_digit(16)?;
                let low = char::from(digits[1]).to_digit(16)?;
                bytes.push((high << 4 | low) as u8);
                rest = after;
            }
            b'@' | b':' | b'/' | b'?' | b'#' | b'[' | b']' => return None,
            0x21..=0x7e => bytes.push(byte),
            _ => return None,
        }
    }
    String::from_utf8(bytes).ok()
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Url, UrlError> {
        Url::parse(text).ok_or(UrlError)
    }
}

/// The address as it was written, but for its password.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Url({})", self.shown)
    }
}

#[cfg(feature = "amqp")]
impl From<&Url> for lapin::uri::AMQPUri {
    fn from(url: &Url) -> lapin::uri::AMQPUri {
        use lapin::uri::{AMQPAuthority, AMQPUri, AMQPUserInfo};
        let userinfo = AMQPUserInfo { username: url.user.clone(), password: url.password.clone() };
        let authority = AMQPAuthority { userinfo, host: url.host.clone(), port: url.port };
        AMQPUri { authority, vhost: url.vhost.clone(), ..AMQPUri::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> (String, String, String, u16, String) {
        let url: Url = text.parse().unwrap_or_else(|_| panic!("{text} is allowed"));
        (url.user, url.password, url.host, url.port, url.vhost)
    }

    fn owned(parts: (&str, &str, &str, u16, &str)) -> (String, String, String, u16, String) {
        let (user, password, host, port, vhost) = parts;
        (user.into(), password.into(), host.into(), port, vhost.into())
    }

    #[test]
    fn an_address_has_its_parts_and_defaults() {
        for (text, expected) in [
            ("amqp://u:p@mq.example:5673/prod", ("u", "p", "mq.example", 5673, "prod")),
            ("amqp://127.0.0.1", ("guest", "guest", "127.0.0.1", 5672, "/")),
            ("amqp://localhost/", ("guest", "guest", "localhost", 5672, "/")),
            ("amqp://u@h:1/%2F", ("u", "", "h", 1, "/")),
            ("amqp://u:@h", ("u", "", "h", 5672, "/")),
            ("amqp://[::1]:5672", ("guest", "guest", "::1", 5672, "/")),
            ("amqp://a%40b:p%2fw%3a%25%C3%A9@h", ("a@b", "p/w:%\u{e9}", "h", 5672, "/")),
            ("amqp://u:****@h", ("u", "****", "h", 5672, "/")),
        ] {
            assert_eq!(parts(text), owned(expected), "{text}");
        }
    }

    #[test]
    fn the_password_is_never_shown() {
        let url: Url = "amqp://user:hunter2@mq:5672/prod".parse().unwrap();
        assert_eq!(url.to_string(), "amqp://user:***@mq:5672/prod");
        assert_eq!(format!("{url:?}"), "Url(amqp://user:***@mq:5672/prod)");
        assert_eq!(url.password(), "hunter2");
        for text in ["amqp://mq", "amqp://user@mq/", "amqp://[::1]:1/v"] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), text, "nothing to hide");
        }
        let shown = url.to_string().parse::<Url>();
        assert_eq!(shown, Err(UrlError), "what is shown is not taken for the address");
    }

    #[test]
    fn what_is_no_address_is_refused_without_a_word_of_it() {
        for text in [
            "",
            "amqp://",
            "amqps://h",
            "http://h",
            "user:hunter2@h",
            "amqp://u:hunter2@",
            "amqp://:hunter2@h",
            "amqp://u:hunter2@h:0",
            "amqp://u:hunter2@h:65536",
            "amqp://u:hunter2@h:+1",
            "amqp://u:hunter2@h:",
            "amqp://u:hunter/2@h",
            "amqp://u:1/hunter2@h",
            "amqp://u:hun@ter2@h",
            "amqp://u:hun:ter2@h",
            "amqp://u:hunter2%@h",
            "amqp://u:hunter2%4@h",
            "amqp://u:hunter2%4x@h",
            "amqp://u:%ff@h",
            "amqp://u:hunter 2@h",
            "amqp://u:hunter\u{e9}@h",
            "amqp://u:hunter2@h/a/b",
            "amqp://u:hunter2@h/?heartbeat=5",
            "amqp://u:hunter2@h?heartbeat=5",
            "amqp://u:hunter2@h#x",
            "amqp://u:hunter2@[::1",
            "amqp://u:hunter2@[::1]x",
            "amqp://u:hunter2@[h]",
            "amqp://u:hunter2@::1",
            "amqp://u:hunter2@a b",
        ] {
            let error = text.parse::<Url>().expect_err(text);
            assert!(!format!("{error} {error:?}").contains("hunter"), "{text}");
        }
    }

    #[cfg(feature = "amqp")]
    #[test]
    fn lapin_is_told_the_same() {
        let url: Url = "amqp://a%40b:p%2fw@[::1]:5673".parse().unwrap();
        let uri = lapin::uri::AMQPUri::from(&url);
        assert_eq!(uri.authority.userinfo.username, "a@b");
        assert_eq!(uri.authority.userinfo.password, "p/w");
        assert_eq!((uri.authority.host.as_str(), uri.authority.port), ("::1", 5673));
        assert_eq!(uri.vhost, "/");
        let plain: Url = "amqp://u:p@h:1/v".parse().unwrap();
        assert_eq!(lapin::uri::AMQPUri::from(&plain), "amqp://u:p@h:1/v".parse().unwrap());
    }
}
