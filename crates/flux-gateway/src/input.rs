//! What a client sends, made into a key, a value and a time to live, or an error that names the
//! field.

use std::fmt;

use flux_client::{Code, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};

use crate::error::ApiError;
use crate::form::{self, shorten};

/// The longest time to live: about 292 years, as many seconds as 63 bits of nanoseconds hold.
const MAX_TTL_SECONDS: u64 = 9_223_372_036;

/// The body of a set.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetInput {
    #[serde(deserialize_with = "key_text")]
    pub(crate) key: String,
    #[serde(deserialize_with = "value_text")]
    pub(crate) value: String,
    /// In seconds.
    #[serde(default, rename = "ttl", deserialize_with = "ttl_seconds")]
    pub(crate) ttl_s: Option<u64>,
}

impl SetInput {
    pub(crate) fn from_json(body: &[u8]) -> Result<SetInput, ApiError> {
        // A derived struct would also take an array of its fields.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(ApiError::invalid("the body is not a JSON object"));
        }
        let input: SetInput = serde_json::from_slice(body)
            .map_err(|error| ApiError::invalid(format!("JSON: {error}")))?;
        input.checked()
    }

    pub(crate) fn from_form(body: &[u8]) -> Result<SetInput, ApiError> {
        let [key, value, ttl] = form_fields(body, ["key", "value", "ttl"])?;
        let key = key.ok_or_else(|| missing("key"))?;
        let value = value.ok_or_else(|| missing("value"))?;
        let ttl_s = match ttl {
            None => None,
            Some(text) => Some(text.parse().map_err(|_| ttl_out_of_range())?),
        };
        SetInput { key, value, ttl_s }.checked()
    }

    fn checked(self) -> Result<SetInput, ApiError> {
        check_key(&self.key)?;
        if self.value.len() > MAX_VALUE_BYTES {
            let length = self.value.len();
            return Err(ApiError::new(
                Code::TooLarge,
                format!("`value` of {length} bytes is over the limit of {MAX_VALUE_BYTES}"),
            ));
        }
        if self.ttl_s.is_some_and(|ttl_s| !(1..=MAX_TTL_SECONDS).contains(&ttl_s)) {
            return Err(ttl_out_of_range());
        }
        Ok(self)
    }
}

/// The only field of the query string of a get or a delete.
pub(crate) fn key_of_query(query: Option<&str>) -> Result<String, ApiError> {
    let [key] = form_fields(query.unwrap_or("").as_bytes(), ["key"])?;
    let key = key.ok_or_else(|| missing("key"))?;
    check_key(&key)?;
    Ok(key)
}

/// The query string of a watch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchInput {
    /// One key; not together with a prefix. Without both all keys are watched.
    pub(crate) key: Option<String>,
    pub(crate) prefix: Option<String>,
    /// The current values first.
    pub(crate) snapshot: bool,
    pub(crate) token: Option<String>,
}

pub(crate) fn watch_of_query(query: Option<&str>) -> Result<WatchInput, ApiError> {
    let names = ["key", "prefix", "from", "token"];
    let [key, prefix, from, token] = form_fields(query.unwrap_or("").as_bytes(), names)?;
    if key.is_some() && prefix.is_some() {
        return Err(ApiError::invalid("`key` and `prefix` exclude each other"));
    }
    if from.is_some() && token.is_some() {
        return Err(ApiError::invalid("`from` and `token` exclude each other"));
    }
    key.as_deref().map(check_key).transpose()?;
    prefix.as_deref().filter(|prefix| !prefix.is_empty()).map(check_key).transpose()?;
    let snapshot = match from.as_deref() {
        None | Some("now") => false,
        Some("snapshot") => true,
        Some(_) => return Err(ApiError::invalid("`from` must be `now` or `snapshot`")),
    };
    Ok(WatchInput { key, prefix, snapshot, token })
}

/// The fields with these names; each at most once, and no others.
fn form_fields<const N: usize>(
    text: &[u8],
    names: [&str; N],
) -> Result<[Option<String>; N], ApiError> {
    let mut found = [const { None }; N];
    for field in form::fields(text) {
        let (name, value) = field?;
        let place = names.iter().zip(&mut found).find(|(known, _)| **known == name);
        let Some((_, place)) = place else {
            return Err(ApiError::invalid(format!("unknown field `{}`", shorten(&name))));
        };
        if place.is_some() {
            return Err(ApiError::invalid(format!("duplicate field `{name}`")));
        }
        *place = Some(value.into_owned());
    }
    Ok(found)
}

fn check_key(key: &str) -> Result<(), ApiError> {
    match key.len() {
        0 => Err(ApiError::invalid("`key` is empty")),
        1..=MAX_KEY_BYTES => Ok(()),
        length => Err(ApiError::new(
            Code::TooLarge,
            format!("`key` of {length} bytes is over the limit of {MAX_KEY_BYTES}"),
        )),
    }
}

fn missing(field: &str) -> ApiError {
    ApiError::invalid(format!("missing field `{field}`"))
}

fn ttl_out_of_range() -> ApiError {
    ApiError::invalid(format!("`ttl` must be a whole number of seconds, 1 to {MAX_TTL_SECONDS}"))
}

fn key_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_string(Text("key"))
}

fn value_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_string(Text("value"))
}

fn ttl_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    deserializer.deserialize_u64(Seconds).map(Some)
}

/// A string, whose field an error names.
struct Text(&'static str);

impl Visitor<'_> for Text {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string for `{}`", self.0)
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_string<E>(self, text: String) -> Result<String, E> {
        Ok(text)
    }
}

struct Seconds;

impl Visitor<'_> for Seconds {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number of seconds for `ttl`")
    }

    fn visit_u64<E>(self, seconds: u64) -> Result<u64, E> {
        Ok(seconds)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<u64, E> {
        Err(E::custom(format!("`ttl` must be 1 to {MAX_TTL_SECONDS} seconds")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(ttl_s: Option<u64>) -> SetInput {
        SetInput { key: "k".to_owned(), value: "v".to_owned(), ttl_s }
    }

    fn json_fault(body: &str) -> String {
        SetInput::from_json(body.as_bytes()).unwrap_err().message().to_owned()
    }

    fn form_fault(body: &str) -> String {
        SetInput::from_form(body.as_bytes()).unwrap_err().message().to_owned()
    }

    #[test]
    fn both_forms_give_the_same() {
        assert_eq!(SetInput::from_json(br#" {"value":"v","key":"k"}"#), Ok(input(None)));
        assert_eq!(SetInput::from_form(b"value=v&key=k"), Ok(input(None)));
        assert_eq!(
            SetInput::from_json(br#"{"key":"k","value":"v","ttl":60}"#),
            Ok(input(Some(60)))
        );
        assert_eq!(SetInput::from_form(b"key=k&value=v&ttl=60"), Ok(input(Some(60))));
        assert_eq!(SetInput::from_form(b"key=k&value=").unwrap().value, "");
        assert_eq!(SetInput::from_json(br#"{"key":"\u00e4","value":""}"#).unwrap().key, "ä");
    }

    #[test]
    fn json_faults_name_the_field() {
        let deep = format!(r#"{{"key":"k","value":{}"#, "[".repeat(100_000));
        for (body, words) in [
            ("", "not a JSON object"),
            ("[\"k\",\"v\"]", "not a JSON object"),
            ("{\"key\":\"k\"", "EOF"),
            (r#"{"key":"k"}"#, "missing field `value`"),
            (r#"{"value":"v"}"#, "missing field `key`"),
            (r#"{"key":"k","value":"v","key":"x"}"#, "duplicate field `key`"),
            (r#"{"key":"k","value":"v","tll":1}"#, "unknown field `tll`"),
            (r#"{"key":5,"value":"v"}"#, "a string for `key`"),
            (r#"{"key":"k","value":null}"#, "a string for `value`"),
            (r#"{"key":"k","value":"v"} x"#, "trailing characters"),
            (r#"{"key":"","value":"v"}"#, "`key` is empty"),
            (r#"{"key":"k","value":"\ud800"}"#, "JSON"),
            (&deep, "a string for `value`"),
        ] {
            let message = json_fault(body);
            assert!(message.contains(words), "{words}: {message}");
        }
        let bytes = SetInput::from_json(b"{\"key\":\"k\",\"value\":\"\xff\"}").unwrap_err();
        assert!(bytes.message().contains("unicode"), "{bytes:?}");
    }

    #[test]
    fn times_to_live_out_of_range() {
        for ttl in ["0", "-1", "9223372037", "18446744073709551616", "1e3", "1.5", "\"60\"", "null"]
        {
            let message = json_fault(&format!(r#"{{"key":"k","value":"v","ttl":{ttl}}}"#));
            assert!(message.contains("`ttl`"), "{ttl}: {message}");
        }
        for ttl in ["0", "-1", "9223372037", "18446744073709551616", "1e3", "1.5", "", "x", "%31x"]
        {
            let message = form_fault(&format!("key=k&value=v&ttl={ttl}"));
            assert!(message.contains("`ttl`"), "{ttl}: {message}");
        }
    }

    #[test]
    fn form_faults_name_the_field() {
        for (body, words) in [
            ("", "missing field `key`"),
            ("key=k", "missing field `value`"),
            ("value=v", "missing field `key`"),
            ("key=&value=v", "`key` is empty"),
            ("key=k&value=v&key=x", "duplicate field `key`"),
            ("key=k&value=v&tll=1", "unknown field `tll`"),
            ("key=k&value=%ff", "`value` is not UTF-8"),
        ] {
            let message = form_fault(body);
            assert!(message.contains(words), "{words}: {message}");
        }
    }

    #[test]
    fn a_watch_is_of_a_key_or_a_prefix_and_from_one_place() {
        let input = |query| watch_of_query(Some(query)).expect("valid");
        assert_eq!(watch_of_query(None).expect("valid"), WatchInput::default());
        assert_eq!(input("from=now"), WatchInput::default());
        let (key, prefix) = (Some("a b".to_owned()), Some(String::new()));
        assert_eq!(input("key=a+b"), WatchInput { key, ..WatchInput::default() });
        let snapshot = WatchInput { prefix, snapshot: true, ..WatchInput::default() };
        assert_eq!(input("prefix=&from=snapshot"), snapshot);
        let token = Some("t".to_owned());
        assert_eq!(input("token=t"), WatchInput { token, ..WatchInput::default() });
        for (query, words) in [
            ("key=a&prefix=a", "exclude"),
            ("from=now&token=t", "exclude"),
            ("key=", "`key` is empty"),
            ("from=later", "`from`"),
            ("keys=a", "unknown field `keys`"),
        ] {
            let refused = watch_of_query(Some(query)).expect_err("refused");
            assert!(refused.message().contains(words), "{query}: {refused:?}");
        }
        let long = format!("prefix={}", "p".repeat(MAX_KEY_BYTES + 1));
        assert!(watch_of_query(Some(&long)).is_err());
    }

    #[test]
    fn keys_and_values_have_limits() {
        let long = "k".repeat(MAX_KEY_BYTES + 1);
        assert!(key_of_query(Some(&format!("key={}", &long[1..]))).is_ok());
        assert!(key_of_query(Some(&format!("key={long}"))).unwrap_err().message().contains("key"));
        let large = "v".repeat(MAX_VALUE_BYTES + 1);
        assert!(SetInput::from_form(format!("key=k&value={}", &large[1..]).as_bytes()).is_ok());
        assert!(form_fault(&format!("key=k&value={large}")).contains("`value` of 16777217 bytes"));
    }
}
