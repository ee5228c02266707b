//! Splits a line into arguments by redis-cli's rules, so that what people have in their fingers
//! works.
//!
//! Words are separated by white space. Within double quotes `\n \r \t \b \a`, `\xHH` and a
//! backslash before any other character stand for what they do in C; within single quotes only `\'`
//! does. A closing quote ends its word and must be followed by white space or the end.

/// Why a line is no list of arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    /// A quote is not closed.
    #[error("a quote is not closed")]
    Unclosed,
    /// Something stands directly behind a closing quote.
    #[error("a closing quote must be followed by a space")]
    AfterQuote,
}

/// The arguments on a line; none for a blank one.
pub fn split(line: &str) -> Result<Vec<Vec<u8>>, WordsError> {
    let mut words = Vec::new();
    let mut rest = line.as_bytes();
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return Ok(words);
        }
        let (word, behind) = first_word(rest)?;
        words.push(word);
        rest = behind;
    }
}

fn first_word(mut rest: &[u8]) -> Result<(Vec<u8>, &[u8]), WordsError> {
    let mut word = Vec::new();
    loop {
        rest = match rest {
            [] => return Ok((word, rest)),
            [space, ..] if space.is_ascii_whitespace() => return Ok((word, rest)),
            [quote @ (b'"' | b'\''), inner @ ..] => {
                let behind = quoted(*quote, inner, &mut word)?;
                return match behind.first() {
                    Some(next) if !next.is_ascii_whitespace() => Err(WordsError::AfterQuote),
                    _ => Ok((word, behind)),
                };
            }
            [byte, behind @ ..] => {
                word.push(*byte);
                behind
            }
        };
    }
}

/// Appends what is within the quotes; what stands behind the closing one is left over.
fn quoted<'a>(quote: u8, mut rest: &'a [u8], word: &mut Vec<u8>) -> Result<&'a [u8], WordsError> {
    loop {
        let (byte, behind) = match (quote, rest) {
            (_, []) => return Err(WordsError::Unclosed),
            (_, [byte, behind @ ..]) if *byte == quote => return Ok(behind),
            (b'\'', [b'\\', b'\'', behind @ ..]) => (b'\'', behind),
            (b'"', [b'\\', b'x', high, low, behind @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                (hex_digit(*high) << 4 | hex_digit(*low), behind)
            }
            (b'"', [b'\\', escaped, behind @ ..]) => (unescaped(*escaped), behind),
            (_, [byte, behind @ ..]) => (*byte, behind),
        };
        word.push(byte);
        rest = behind;
    }
}

fn unescaped(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    }
}

fn hex_digit(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => digit.to_ascii_lowercase() - b'a' + 10,
    }
}

/// Bytes in double quotes, such that `split` reads them back.
pub fn quote(bytes: &[u8]) -> String {
    let mut out = String::from("\"");
    for &byte in bytes {
        match byte {
            b'"' => out += "\\\"",
            b'\\' => out += "\\\\",
            b'\n' => out += "\\n",
            b'\r' => out += "\\r",
            b'\t' => out += "\\t",
            8 => out += "\\b",
            7 => out += "\\a",
            b' '..=b'~' => out.push(char::from(byte)),
            _ => out += &format!("\\x{byte:02x}"),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<Vec<u8>> {
        split(line).expect("the line is well formed")
    }

    #[test]
    fn words_are_split_as_redis_cli_splits_them() {
        assert_eq!(words(""), Vec::<Vec<u8>>::new());
        assert_eq!(words("  get\t k  "), [&b"get"[..], b"k"]);
        assert_eq!(words(r#"set k "a b""#), [&b"set"[..], b"k", b"a b"]);
        assert_eq!(words(r#""\x00\xfF\n\r\t\b\a\"\\\q""#), [b"\x00\xff\n\r\t\x08\x07\"\\q"]);
        assert_eq!(words(r#""\xg1""#), [b"xg1"]);
        assert_eq!(words(r"'it\'s \n'"), [br"it's \n"]);
        assert_eq!(words(r#"'' """#), [b"", b""]);
        assert_eq!(words(r#"a"b c""#), [b"ab c"]);
        assert_eq!(words("é"), ["é".as_bytes()]);
    }

    #[test]
    fn broken_quotes_are_refused() {
        for line in ["\"a", "'a", "set k \"", r#""a\""#, r"'a\'", "\"\\"] {
            assert_eq!(split(line), Err(WordsError::Unclosed), "{line}");
        }
        assert_eq!(split(r#""a"b"#), Err(WordsError::AfterQuote));
        assert_eq!(split("''''"), Err(WordsError::AfterQuote));
    }

    #[test]
    fn quoted_bytes_are_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(words(&quote(&all)), [all]);
        assert_eq!(quote(b"a\x00\"b\n"), r#""a\x00\"b\n""#);
    }
}
