//! Splitting an inline command (a line of text, as typed into telnet) into its arguments.
//!
//! The rules are those of Redis's `sdssplitargs`: words between white space; `"…"` with the escapes
//! `\n \r \t \b \a \xHH` and `\c` for any other character; `'…'` with `\'` only. A closing quote must
//! be followed by white space or the end.

use std::ops::Range;

/// A quote is not closed, or is closed in the middle of a word.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UnbalancedQuotes;

/// Splits `line`, appending the unescaped words to `words` and calling `found` with the place of each.
pub(super) fn split(
    line: &[u8],
    words: &mut Vec<u8>,
    mut found: impl FnMut(Range<usize>),
) -> Result<(), UnbalancedQuotes> {
    let mut rest = line;
    loop {
        rest = trim_start(rest);
        if rest.is_empty() {
            return Ok(());
        }
        let start = words.len();
        rest = take_word(rest, words)?;
        found(start..words.len());
    }
}

/// Appends the word at the start of `rest` to `words`; returns what follows it.
fn take_word<'a>(mut rest: &'a [u8], words: &mut Vec<u8>) -> Result<&'a [u8], UnbalancedQuotes> {
    loop {
        match rest {
            [] => return Ok(rest),
            [b' ' | b'\n' | b'\r' | b'\t', ..] => return Ok(rest),
            [b'"', quoted @ ..] => return ended(take_double_quoted(quoted, words)?),
            [b'\'', quoted @ ..] => return ended(take_single_quoted(quoted, words)?),
            [byte, tail @ ..] => {
                words.push(*byte);
                rest = tail;
            }
        }
    }
}

/// Checks that a closing quote ended its word.
fn ended(rest: &[u8]) -> Result<&[u8], UnbalancedQuotes> {
    match rest.first() {
        Some(&byte) if !is_space(byte) => Err(UnbalancedQuotes),
        _ => Ok(rest),
    }
}

fn take_double_quoted<'a>(
    mut rest: &'a [u8],
    words: &mut Vec<u8>,
) -> Result<&'a [u8], UnbalancedQuotes> {
    loop {
        rest = match rest {
            [] => return Err(UnbalancedQuotes),
            [b'"', tail @ ..] => return Ok(tail),
            [b'\\', b'x', high, low, tail @ ..]
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                words.push(hex_digit(*high) << 4 | hex_digit(*low));
                tail
            }
            [b'\\', escaped, tail @ ..] => {
                words.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 0x08,
                    b'a' => 0x07,
                    other => *other,
                });
                tail
            }
            [byte, tail @ ..] => {
                words.push(*byte);
                tail
            }
        };
    }
}

fn take_single_quoted<'a>(
    mut rest: &'a [u8],
    words: &mut Vec<u8>,
) -> Result<&'a [u8], UnbalancedQuotes> {
    loop {
        rest = match rest {
            [] => return Err(UnbalancedQuotes),
            [b'\'', tail @ ..] => return Ok(tail),
            [b'\\', b'\'', tail @ ..] => {
                words.push(b'\'');
                tail
            }
            [byte, tail @ ..] => {
                words.push(*byte);
                tail
            }
        };
    }
}

fn hex_digit(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

/// White space of C's `isspace`, which has the vertical tab where Rust's `is_ascii_whitespace` does not.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn trim_start(text: &[u8]) -> &[u8] {
    let start = text.iter().position(|&byte| !is_space(byte)).unwrap_or(text.len());
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &[u8]) -> Result<Vec<Vec<u8>>, UnbalancedQuotes> {
        let (mut bytes, mut places) = (Vec::new(), Vec::new());
        split(line, &mut bytes, |place| places.push(place))?;
        Ok(places.into_iter().map(|place| bytes[place].to_vec()).collect())
    }

    #[test]
    fn words_are_split_as_sdssplitargs_splits_them() {
        let cases: &[(&[u8], &[&[u8]])] = &[
            (b"", &[]),
            (b"  \t\x0b ", &[]),
            (b"a\x0bb \x0bc", &[b"a\x0bb", b"c"]),
            (b"set a b", &[b"set", b"a", b"b"]),
            (b"  set\ta   b  ", &[b"set", b"a", b"b"]),
            (b"set a \"b c\"", &[b"set", b"a", b"b c"]),
            (b"\"\" ''", &[b"", b""]),
            (br#""\x00\xfF\n\r\t\b\a\"\\\q""#, &[b"\x00\xff\n\r\t\x08\x07\"\\q"]),
            (br#""\xzz""#, &[b"xzz"]),
            (br"'a\'b\n'", &[br"a'b\n"]),
            (b"a\"b\"", &[b"ab"]),
            (b"\xff\x00", &[b"\xff\x00"]),
        ];
        for (line, expected) in cases {
            assert_eq!(words(line).unwrap(), *expected, "{line:?}");
        }
    }

    #[test]
    fn unbalanced_quotes_are_refused() {
        for line in [r#"""#, r#"set "a"#, r#"set "a"b"#, "'", "'a'b", r"'\'", r#""\"#, r#""a\""#] {
            assert_eq!(words(line.as_bytes()), Err(UnbalancedQuotes), "{line}");
        }
    }
}
