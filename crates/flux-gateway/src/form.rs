//! `application/x-www-form-urlencoded`, for bodies and query strings, without any leniency.
//!
//! Common decoders replace what is not UTF-8 and pass over half escapes; here something other than
//! what was meant would be stored, so both are errors that name the field.

use std::borrow::Cow;

use crate::error::ApiError;

/// The fields in the order they come; a field without `=` has an empty value.
pub(crate) fn fields(
    text: &[u8],
) -> impl Iterator<Item = Result<(Cow<'_, str>, Cow<'_, str>), ApiError>> {
    text.split(|&byte| byte == b'&').filter(|field| !field.is_empty()).map(|field| {
        let mut halves = field.splitn(2, |&byte| byte == b'=');
        let (name, value) = (halves.next().unwrap_or(b""), halves.next().unwrap_or(b""));
        let name = decode(name).map_err(|fault| fault.of("a field name"))?;
        let value = decode(value).map_err(|fault| fault.of(&format!("`{}`", shorten(&name))))?;
        Ok((name, value))
    })
}

/// A name as an error message may show it.
pub(crate) fn shorten(name: &str) -> &str {
    &name[..name.floor_char_boundary(64)]
}

#[derive(Clone, Copy)]
enum Fault {
    Escape,
    Utf8,
}

impl Fault {
    fn of(self, what: &str) -> ApiError {
        ApiError::invalid(match self {
            Fault::Escape => format!(
                "{what} has a `%` that two hexadecimal digits do not follow; a percent sign is `%25`"
            ),
            Fault::Utf8 => format!("{what} is not UTF-8"),
        })
    }
}

fn decode(text: &[u8]) -> Result<Cow<'_, str>, Fault> {
    if !text.iter().any(|byte| matches!(byte, b'%' | b'+')) {
        return std::str::from_utf8(text).map(Cow::Borrowed).map_err(|_| Fault::Utf8);
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        match byte {
            b'+' => decoded.push(b' '),
            b'%' => {
                let (&[high, low], tail) = tail.split_first_chunk().ok_or(Fault::Escape)?;
                decoded.push(digit(high)? << 4 | digit(low)?);
                rest = tail;
            }
            _ => decoded.push(byte),
        }
    }
    String::from_utf8(decoded).map(Cow::Owned).map_err(|_| Fault::Utf8)
}

fn digit(byte: u8) -> Result<u8, Fault> {
    match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        b'A'..=b'F' => Ok(byte - b'A' + 10),
        _ => Err(Fault::Escape),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<(String, String)> {
        let owned =
            |(name, value): (Cow<'_, str>, Cow<'_, str>)| (name.into_owned(), value.into_owned());
        fields(text.as_bytes()).map(|field| owned(field.unwrap())).collect()
    }

    fn fault(text: &[u8]) -> String {
        fields(text).find_map(Result::err).expect("a fault").message().to_owned()
    }

    #[test]
    fn fields_are_decoded() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            all("a=1&b=x+y%2Bz%3d&&c&d="),
            [pair("a", "1"), pair("b", "x y+z="), pair("c", ""), pair("d", ""),]
        );
        assert_eq!(all("k%65y=%c3%A4=b"), [pair("key", "ä=b")]);
        assert_eq!(all(""), []);
    }

    #[test]
    fn faults_name_the_field() {
        assert_eq!(fault(b"value=%ff"), "`value` is not UTF-8");
        assert_eq!(fault(b"value=\xc3"), "`value` is not UTF-8");
        assert_eq!(fault(b"%80=1"), "a field name is not UTF-8");
        for text in [&b"v=%"[..], b"v=%4", b"v=%4g", b"v=%zz"] {
            assert!(fault(text).starts_with("`v` has a `%`"), "{text:?}");
        }
    }
}
