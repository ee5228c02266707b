//! Where the broker is and as whom to enter: it never shows its password.

use std::fmt;
use std::str::FromStr;

use lapin::uri::{AMQPScheme, AMQPUri};

/// How often one of both sides must say something, where the address does not say otherwise: a broker
/// that is gone without a word is noticed after twice this.
const HEARTBEAT_S: u16 = 10;

/// The address of a broker: `amqp://user:password@host:port/virtual-host`.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerAddress(AMQPUri);

/// Why a text is no address of a broker. It does not repeat the text, which has a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerAddressError {
    /// It has another form.
    #[error("must be of the form amqp://user:password@host:port/virtual-host")]
    Malformed,
    /// It asks for TLS.
    #[error("amqps is not supported: use amqp")]
    Tls,
}

impl BrokerAddress {
    pub(crate) fn uri(&self) -> AMQPUri {
        let mut uri = self.0.clone();
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        uri
    }

    pub(crate) fn user(&self) -> &str {
        &self.0.authority.userinfo.username
    }

    pub(crate) fn virtual_host(&self) -> &str {
        &self.0.vhost
    }
}

impl FromStr for BrokerAddress {
    type Err = BrokerAddressError;

    /// Without them, user and password are `guest`, the port is 5672, and the virtual host is `/`.
    fn from_str(text: &str) -> Result<BrokerAddress, BrokerAddressError> {
        let uri: AMQPUri = text.parse().map_err(|_| BrokerAddressError::Malformed)?;
        // An IPv6 address in brackets is no domain to the parser, which takes localhost instead.
        let authority = text.split_once("://").map_or("", |(_, rest)| rest);
        let authority = authority.split(['/', '?']).next().unwrap_or("");
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        if host.is_empty() || host.starts_with(['[', ':']) {
            return Err(BrokerAddressError::Malformed);
        }
        match uri.scheme {
            AMQPScheme::AMQP => Ok(BrokerAddress(uri)),
            AMQPScheme::AMQPS => Err(BrokerAddressError::Tls),
        }
    }
}

/// Without the password.
impl fmt::Display for BrokerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AMQPUri { authority, vhost, .. } = &self.0;
        write!(f, "amqp://{}:***@{}:{}", self.user(), authority.host, authority.port)?;
        if vhost == "/" { Ok(()) } else { write!(f, "/{vhost}") }
    }
}

impl fmt::Debug for BrokerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown() {
        let address: BrokerAddress = "amqp://u:s%2Fecret@broker:5673/shop".parse().expect("one");
        assert_eq!(address.to_string(), "amqp://u:***@broker:5673/shop");
        assert_eq!(format!("{address:?}"), "amqp://u:***@broker:5673/shop");
        assert_eq!(address.uri().authority.userinfo.password, "s/ecret");
        let short: BrokerAddress = "amqp://broker".parse().expect("one");
        assert_eq!(short.to_string(), "amqp://guest:***@broker:5672");
        assert_eq!(short.uri().query.heartbeat, Some(HEARTBEAT_S));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in
            ["", "broker:5672", "http://broker", "amqp://", "amqp://[::1]:5672", "amqp://u:p@:1/"]
        {
            let error = text.parse::<BrokerAddress>().expect_err(text);
            assert_eq!(error, BrokerAddressError::Malformed, "{text}");
        }
        let tls = "amqps://broker".parse::<BrokerAddress>();
        assert_eq!(tls, Err(BrokerAddressError::Tls));
    }
}
