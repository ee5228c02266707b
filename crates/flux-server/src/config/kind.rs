//! The kinds of value that a setting can have: how each is read from text, written, and explained.
//!
//! A kind knows nothing of where the text came from; it accepts or refuses.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use flux_cdc::Url;

/// How a setting is written in TOML and on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A string.
    Text,
    /// A whole number, or a string for a number with a unit.
    Number,
    /// `true` or `false`; as a flag it needs no value.
    Switch,
    /// An array of strings; elsewhere, parts between commas.
    List,
    /// A string with a password in it, which is never shown.
    Secret,
}

/// A kind of value.
pub(super) trait Kind {
    /// What the text is read into.
    type Value;

    /// The value, if the text is allowed.
    fn parse(&self, text: &str) -> Option<Self::Value>;

    /// Text that `parse` reads back as the same value.
    fn render(&self, value: &Self::Value) -> String;

    /// What is allowed, as the end of a sentence that begins with "must be".
    fn allowed(&self) -> String;
}

/// An address to listen on: an IP address and a port. `localhost` stands for 127.0.0.1; other names
/// are refused, since what they resolve to is not known to be a listener of this machine.
pub(super) struct Address;

impl Address {
    pub(super) const fn form(&self) -> Form {
        Form::Text
    }
}

impl Kind for Address {
    type Value = SocketAddr;

    fn parse(&self, text: &str) -> Option<SocketAddr> {
        if let Some(port) = text.strip_prefix("localhost:") {
            return Some((Ipv4Addr::LOCALHOST, port.parse::<u16>().ok()?).into());
        }
        text.parse().ok()
    }

    fn render(&self, value: &SocketAddr) -> String {
        value.to_string()
    }

    fn allowed(&self) -> String {
        "an IP address (or localhost) and a port, like 127.0.0.1:7379; port 0 is any free one"
            .into()
    }
}

/// Addresses to connect to; names are allowed.
pub(super) struct Endpoints;

impl Endpoints {
    pub(super) const fn form(&self) -> Form {
        Form::List
    }
}

fn endpoint(part: &str) -> Option<String> {
    let (host, port) = part.trim().rsplit_once(':')?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let sound = !host.is_empty()
        && (bracketed || !host.contains(':'))
        && !host.contains(|c: char| c.is_whitespace() || c == '/');
    (sound && port.parse::<u16>().is_ok_and(|port| port != 0)).then(|| part.trim().to_owned())
}

impl Kind for Endpoints {
    type Value = Vec<String>;

    fn parse(&self, text: &str) -> Option<Vec<String>> {
        text.split(',').map(endpoint).collect()
    }

    fn render(&self, value: &Vec<String>) -> String {
        value.join(",")
    }

    fn allowed(&self) -> String {
        "one or more host:port, separated by commas".into()
    }
}

/// Servers of a registry, or none. They may be written as `http://` addresses, as etcd's own tools
/// write them.
pub(super) struct Registries;

impl Registries {
    pub(super) const fn form(&self) -> Form {
        Form::List
    }
}

impl Kind for Registries {
    type Value = Vec<String>;

    fn parse(&self, text: &str) -> Option<Vec<String>> {
        if text.trim().is_empty() {
            return Some(Vec::new());
        }
        let plain = |part: &str| {
            let part = part.trim();
            endpoint(part.strip_prefix("http://").unwrap_or(part).trim_end_matches('/'))
        };
        text.split(',').map(plain).collect()
    }

    fn render(&self, value: &Vec<String>) -> String {
        value.join(",")
    }

    fn allowed(&self) -> String {
        "empty, or one or more host:port, separated by commas".into()
    }
}

/// A name of letters, digits, `-`, `_` and `.`.
pub(super) struct Label {
    /// Whether there may be none.
    pub(super) empty: bool,
}

/// As long as a label of a host's name.
const MAX_LABEL_BYTES: usize = 63;

impl Label {
    pub(super) const fn form(&self) -> Form {
        Form::Text
    }
}

impl Kind for Label {
    type Value = String;

    fn parse(&self, text: &str) -> Option<String> {
        let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let allowed = (self.empty || !text.is_empty())
            && text.len() <= MAX_LABEL_BYTES
            && text.chars().all(sound);
        allowed.then(|| text.to_owned())
    }

    fn render(&self, value: &String) -> String {
        value.clone()
    }

    fn allowed(&self) -> String {
        let empty = if self.empty { "empty, or " } else { "" };
        format!("{empty}up to {MAX_LABEL_BYTES} letters, digits, hyphens, underscores and dots")
    }
}

/// One of a few numbers.
pub(super) struct OneOf(pub(super) &'static [u8]);

impl OneOf {
    pub(super) const fn form(&self) -> Form {
        Form::Number
    }
}

impl Kind for OneOf {
    type Value = u8;

    fn parse(&self, text: &str) -> Option<u8> {
        let value = u8::try_from(digits(text)?).ok()?;
        self.0.contains(&value).then_some(value)
    }

    fn render(&self, value: &u8) -> String {
        value.to_string()
    }

    fn allowed(&self) -> String {
        format!("one of {}", self.0.iter().map(u8::to_string).collect::<Vec<_>>().join(", "))
    }
}

/// The address of a RabbitMQ broker, or none. What is shown of it lacks the password, and so does not
/// read back as the same value.
pub(super) struct Broker;

impl Broker {
    pub(super) const fn form(&self) -> Form {
        Form::Secret
    }
}

impl Kind for Broker {
    type Value = Option<Url>;

    fn parse(&self, text: &str) -> Option<Option<Url>> {
        if text.is_empty() { Some(None) } else { text.parse().ok().map(Some) }
    }

    fn render(&self, value: &Option<Url>) -> String {
        value.as_ref().map(Url::to_string).unwrap_or_default()
    }

    fn allowed(&self) -> String {
        format!("empty, or {}", Url::ALLOWED)
    }
}

/// A path.
pub(super) struct Folder;

impl Folder {
    pub(super) const fn form(&self) -> Form {
        Form::Text
    }
}

impl Kind for Folder {
    type Value = PathBuf;

    fn parse(&self, text: &str) -> Option<PathBuf> {
        (!text.is_empty() && !text.contains('\0')).then(|| PathBuf::from(text))
    }

    fn render(&self, value: &PathBuf) -> String {
        value.display().to_string()
    }

    fn allowed(&self) -> String {
        "the path of a folder".into()
    }
}

/// A whole number in a range.
pub(super) struct Count {
    pub(super) least: u64,
    pub(super) most: u64,
}

impl Count {
    pub(super) const fn form(&self) -> Form {
        Form::Number
    }
}

/// One kind for every unsigned type that a row may ask for.
impl Count {
    pub(super) fn parse<T: TryFrom<u64>>(&self, text: &str) -> Option<T> {
        let value = digits(text)?;
        (self.least..=self.most).contains(&value).then(|| T::try_from(value).ok()).flatten()
    }

    pub(super) fn render<T: ToString>(&self, value: &T) -> String {
        value.to_string()
    }

    pub(super) fn allowed(&self) -> String {
        format!("a whole number from {} to {}", self.least, self.most)
    }
}

/// A power of two from 1 on, or 0 to leave it open.
pub(super) struct PowerOfTwo {
    pub(super) most: u32,
}

impl PowerOfTwo {
    pub(super) const fn form(&self) -> Form {
        Form::Number
    }
}

impl Kind for PowerOfTwo {
    type Value = u32;

    fn parse(&self, text: &str) -> Option<u32> {
        let value = u32::try_from(digits(text)?).ok()?;
        (value == 0 || value.is_power_of_two() && value <= self.most).then_some(value)
    }

    fn render(&self, value: &u32) -> String {
        value.to_string()
    }

    fn allowed(&self) -> String {
        format!("0 or a power of two from 1 to {}", self.most)
    }
}

/// A number of bytes, with an optional unit in powers of 1024.
pub(super) struct Size {
    pub(super) least: u64,
}

const UNITS: [(&str, u64); 4] =
    [("tb", 1 << 40), ("gb", 1 << 30), ("mb", 1 << 20), ("kb", 1 << 10)];

impl Size {
    pub(super) const fn form(&self) -> Form {
        Form::Number
    }
}

impl Kind for Size {
    type Value = u64;

    fn parse(&self, text: &str) -> Option<u64> {
        let lower = text.to_ascii_lowercase();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(suffix, unit)| Some((lower.strip_suffix(suffix)?, *unit)))
            .unwrap_or((lower.strip_suffix('b').unwrap_or(&lower), 1));
        let bytes = digits(number)?.checked_mul(unit)?;
        // The file format's integers are signed.
        (bytes >= self.least && i64::try_from(bytes).is_ok()).then_some(bytes)
    }

    fn render(&self, value: &u64) -> String {
        UNITS
            .iter()
            .find(|(_, unit)| *value != 0 && value.is_multiple_of(*unit))
            .map_or_else(|| value.to_string(), |(suffix, unit)| format!("{}{suffix}", value / unit))
    }

    fn allowed(&self) -> String {
        let least = self.render(&self.least);
        format!("a size of {least} or more, like 1000000, 512mb or 2gb")
    }
}

/// On or off.
pub(super) struct Switch;

impl Switch {
    pub(super) const fn form(&self) -> Form {
        Form::Switch
    }
}

impl Kind for Switch {
    type Value = bool;

    fn parse(&self, text: &str) -> Option<bool> {
        match text {
            "true" | "yes" | "on" | "1" => Some(true),
            "false" | "no" | "off" | "0" => Some(false),
            _ => None,
        }
    }

    fn render(&self, value: &bool) -> String {
        value.to_string()
    }

    fn allowed(&self) -> String {
        "true or false".into()
    }
}

/// One of a few names.
pub(super) struct Choice<T: 'static>(pub(super) &'static [(&'static str, T)]);

impl<T> Choice<T> {
    pub(super) const fn form(&self) -> Form {
        Form::Text
    }
}

impl<T: Copy + PartialEq> Kind for Choice<T> {
    type Value = T;

    fn parse(&self, text: &str) -> Option<T> {
        self.0.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
    }

    fn render(&self, value: &T) -> String {
        let name = self.0.iter().find(|(_, choice)| choice == value).map(|(name, _)| *name);
        name.expect("every variant has a name").to_owned()
    }

    fn allowed(&self) -> String {
        let names: Vec<&str> = self.0.iter().map(|(name, _)| *name).collect();
        format!("one of {}", names.join(", "))
    }
}

/// Declares an enum whose variants have names in the settings.
macro_rules! choices {
    ($(#[$meta:meta])* $type:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $type {
            $($(#[$doc])* $variant,)+
        }

        impl $type {
            pub(super) const NAMES: &[(&str, $type)] = &[$(($name, $type::$variant),)+];

            /// The name in the settings.
            pub fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $name,)+
                }
            }
        }
    };
}

choices! {
    /// When the log is forced to the disk.
    Fsync {
        /// Before a write is acknowledged.
        Always = "always",
        /// About once a second.
        EverySec = "everysec",
        /// When the operating system pleases.
        No = "no",
    }
}

choices! {
    /// The least important messages that the log shows.
    LogLevel {
        /// A person must look.
        Error = "error",
        /// Something is not as it should be.
        Warn = "warn",
        /// Starts, stops and other rare events.
        Info = "info",
        /// What a developer wants to know.
        Debug = "debug",
        /// Everything, even for single requests.
        Trace = "trace",
    }
}

choices! {
    /// How log messages are written.
    LogFormat {
        /// Lines for people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

/// A number of decimal digits only: no sign, no spaces.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| u64::from_str(text).ok()).flatten()
}
