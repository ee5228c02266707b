//! Values that are numbers in decimal text.

use super::long_double::LongDouble;
use super::{check_key, value_of};
use crate::draft::Draft;
use crate::{Error, Reply};

pub(super) fn increment(draft: &mut Draft<'_>, key: &[u8], delta: i64) -> Result<Reply, Error> {
    check_key(key)?;
    let (old, expires_at_ms) = draft.read(key, |entry| match entry {
        Some(entry) => Ok((integer(entry.value).ok_or(Error::NotInteger)?, entry.expires_at_ms)),
        None => Ok((0, None)),
    })?;
    let value = old.checked_add(delta).ok_or(Error::Overflow)?;
    let mut buffer = [0; MAX_INTEGER_BYTES];
    let text = integer_text(value, &mut buffer);
    draft.admit(key.len() + text.len())?;
    let version = draft.put(key, text, expires_at_ms);
    Ok(Reply::Counter { value, version })
}

pub(super) fn increment_float(
    draft: &mut Draft<'_>,
    key: &[u8],
    delta: &[u8],
) -> Result<Reply, Error> {
    check_key(key)?;
    let old = draft.read(key, value_of);
    let text = old.as_ref().map_or(&b"0"[..], |value| &value.bytes);
    let number = LongDouble::parse(text).ok_or(Error::NotFloat)?;
    let delta = LongDouble::parse(delta).ok_or(Error::NotFloat)?;
    let sum = number.add(delta).ok_or(Error::NotFinite)?;
    let text = sum.to_string().into_bytes();
    draft.admit(key.len() + text.len())?;
    draft.put(key, &text, old.and_then(|value| value.expires_at_ms));
    Ok(Reply::Bytes(text))
}

/// The longest text of an `i64`, that of its minimum.
const MAX_INTEGER_BYTES: usize = 20;

/// The number that a text is, in the one form that Redis takes: no sign but `-`, no space, no leading
/// zero.
fn integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let negative = digits.len() != text.len();
    if text == b"0" {
        return Some(0);
    }
    if digits.len() > MAX_INTEGER_BYTES - 1 || !matches!(digits.first(), Some(b'1'..=b'9')) {
        return None;
    }
    digits.iter().try_fold(0i64, |number, &byte| {
        let digit = i64::from(byte.is_ascii_digit().then(|| byte - b'0')?);
        let shifted = number.checked_mul(10)?;
        if negative { shifted.checked_sub(digit) } else { shifted.checked_add(digit) }
    })
}

fn integer_text(number: i64, buffer: &mut [u8; MAX_INTEGER_BYTES]) -> &[u8] {
    let mut rest = number.unsigned_abs();
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if number < 0 {
        at -= 1;
        buffer[at] = b'-';
    }
    &buffer[at..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_have_one_form() {
        for number in [0, 1, -1, 9, 10, -10, 1234567890, i64::MAX, i64::MIN, i64::MIN + 1] {
            let mut buffer = [0; MAX_INTEGER_BYTES];
            assert_eq!(integer_text(number, &mut buffer), number.to_string().as_bytes());
            assert_eq!(integer(number.to_string().as_bytes()), Some(number));
        }
        let wrong = [
            "",
            "-",
            "-0",
            "00",
            "01",
            "-01",
            "+1",
            " 1",
            "1 ",
            "1.0",
            "1e3",
            "0x10",
            "a",
            "--1",
            "9223372036854775808",
            "-9223372036854775809",
            "100000000000000000000",
        ];
        for text in wrong {
            assert_eq!(integer(text.as_bytes()), None, "{text}");
        }
    }
}
