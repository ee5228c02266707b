//! Parsing replies, on the client's side.
//!
//! For tools that talk to a node or to Redis: not for a node's hot path. Attributes of RESP3 are
//! skipped.

use super::parse_integer;

/// How deep values may be nested.
const MAX_DEPTH: usize = 32;

/// The longest bulk string that is believed; Redis's own limit.
const MAX_BULK_BYTES: i64 = 512 * 1024 * 1024;

/// A value that a server sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// `+`: a short text such as `OK`.
    Simple(Vec<u8>),
    /// `-` or `!`: an error; its first word is a code.
    Error(Vec<u8>),
    /// `:`
    Integer(i64),
    /// `$`: a string of bytes.
    Bulk(Vec<u8>),
    /// `_`, or a length of -1.
    Null,
    /// `*`
    Array(Vec<Reply>),
    /// `%`
    Map(Vec<(Reply, Reply)>),
    /// `~`
    Set(Vec<Reply>),
    /// `>`: sent without being asked for.
    Push(Vec<Reply>),
    /// `,`
    Double(f64),
    /// `#`
    Boolean(bool),
    /// `(`: an integer of any size, in decimal text.
    BigNumber(Vec<u8>),
    /// `=`: text with its format, `txt` or `mkd`.
    Verbatim {
        /// Three characters.
        format: Vec<u8>,
        /// The text without the format.
        text: Vec<u8>,
    },
}

/// The input is no reply. The connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// A value starts with a byte that is no type.
    #[error("reply starts with byte 0x{0:02x}, which is no RESP type")]
    UnknownType(u8),
    /// A length or number is malformed or out of its range.
    #[error("a length or number in the reply is malformed")]
    BadNumber,
    /// A string is not followed by CR LF.
    #[error("a string in the reply is not followed by CR LF")]
    ExpectedLineEnd,
    /// Values are nested too deep.
    #[error("the reply is nested over {MAX_DEPTH} levels deep")]
    TooDeep,
}

/// The reply at the start of `input` and its length in bytes; `None` if it has not fully arrived.
pub fn parse_reply(input: &[u8]) -> Result<Option<(Reply, usize)>, ReplyError> {
    let mut cursor = Cursor { input, position: 0 };
    Ok(cursor.value(0)?.map(|reply| (reply, cursor.position)))
}

/// The length of the reply at the start of `input` and whether it is an error; `None` if it has not
/// fully arrived. Builds nothing: for a load generator.
pub fn skip_reply(input: &[u8]) -> Result<Option<(usize, bool)>, ReplyError> {
    let mut cursor = Cursor { input, position: 0 };
    let is_error = matches!(input.first(), Some(b'-' | b'!'));
    let mut missing = 1usize;
    while missing > 0 {
        let Some((kind, line)) = cursor.head()? else {
            return Ok(None);
        };
        missing -= 1;
        let more = match shape(kind)? {
            Shape::Line => 0,
            Shape::Bytes => match length(line)? {
                Some(length) if cursor.bytes(length)?.is_none() => return Ok(None),
                _ => 0,
            },
            Shape::Values(each) => length(line)?.unwrap_or(0).saturating_mul(each),
            Shape::Attribute => length(line)?.unwrap_or(0).saturating_mul(2).saturating_add(1),
        };
        missing = missing.saturating_add(more);
    }
    Ok(Some((cursor.position, is_error)))
}

/// What follows the first line of a value.
enum Shape {
    Line,
    Bytes,
    /// So many values for each that the line counts.
    Values(usize),
    /// Pairs, and then the value that they describe.
    Attribute,
}

fn shape(kind: u8) -> Result<Shape, ReplyError> {
    Ok(match kind {
        b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => Shape::Line,
        b'$' | b'!' | b'=' => Shape::Bytes,
        b'*' | b'~' | b'>' => Shape::Values(1),
        b'%' => Shape::Values(2),
        b'|' => Shape::Attribute,
        other => return Err(ReplyError::UnknownType(other)),
    })
}

/// A length; `None` for -1, which stands for no value.
fn length(line: &[u8]) -> Result<Option<usize>, ReplyError> {
    match parse_integer(line) {
        Some(-1) => Ok(None),
        Some(length @ 0..=MAX_BULK_BYTES) => Ok(Some(length as usize)),
        _ => Err(ReplyError::BadNumber),
    }
}

struct Cursor<'a> {
    input: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    /// The type and the rest of the line at the cursor, which moves behind it.
    fn head(&mut self) -> Result<Option<(u8, &'a [u8])>, ReplyError> {
        let Some((&kind, rest)) = self.input.get(self.position..).and_then(<[u8]>::split_first)
        else {
            return Ok(None);
        };
        shape(kind)?;
        let Some(end) = rest.iter().position(|&byte| byte == b'\n') else {
            return Ok(None);
        };
        self.position += end + 2;
        let line = rest[..end].strip_suffix(b"\r").ok_or(ReplyError::ExpectedLineEnd)?;
        Ok(Some((kind, line)))
    }

    fn bytes(&mut self, length: usize) -> Result<Option<&'a [u8]>, ReplyError> {
        let end = self.position + length;
        match self.input.get(end..end + 2) {
            None => Ok(None),
            Some(b"\r\n") => {
                let bytes = &self.input[self.position..end];
                self.position = end + 2;
                Ok(Some(bytes))
            }
            Some(_) => Err(ReplyError::ExpectedLineEnd),
        }
    }

    fn value(&mut self, depth: usize) -> Result<Option<Reply>, ReplyError> {
        if depth > MAX_DEPTH {
            return Err(ReplyError::TooDeep);
        }
        let Some((kind, line)) = self.head()? else {
            return Ok(None);
        };
        match shape(kind)? {
            Shape::Line => scalar(kind, line).map(Some),
            Shape::Bytes => {
                let Some(length) = length(line)? else {
                    return Ok(Some(Reply::Null));
                };
                let Some(bytes) = self.bytes(length)? else {
                    return Ok(None);
                };
                string(kind, bytes).map(Some)
            }
            Shape::Values(each) => {
                let Some(length) = length(line)? else {
                    return Ok(Some(Reply::Null));
                };
                let Some(values) = self.values(length * each, depth)? else {
                    return Ok(None);
                };
                Ok(Some(match kind {
                    b'*' => Reply::Array(values),
                    b'~' => Reply::Set(values),
                    b'>' => Reply::Push(values),
                    _ => Reply::Map(pairs(values)),
                }))
            }
            Shape::Attribute => {
                let length = length(line)?.unwrap_or(0);
                match self.values(length * 2, depth)? {
                    Some(_) => self.value(depth + 1),
                    None => Ok(None),
                }
            }
        }
    }

    fn values(&mut self, count: usize, depth: usize) -> Result<Option<Vec<Reply>>, ReplyError> {
        // What has not arrived is not believed: a value takes at least 3 bytes.
        let left = self.input.len().saturating_sub(self.position);
        if count > left / 3 {
            return self.incomplete_values(count, depth);
        }
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            let Some(value) = self.value(depth + 1)? else {
                return Ok(None);
            };
            values.push(value);
        }
        Ok(Some(values))
    }

    /// Checks the values that are there of some that cannot be all there.
    fn incomplete_values(
        &mut self,
        count: usize,
        depth: usize,
    ) -> Result<Option<Vec<Reply>>, ReplyError> {
        for _ in 0..count {
            if self.value(depth + 1)?.is_none() {
                break;
            }
        }
        Ok(None)
    }
}

fn scalar(kind: u8, line: &[u8]) -> Result<Reply, ReplyError> {
    Ok(match kind {
        b'+' => Reply::Simple(line.to_vec()),
        b'-' => Reply::Error(line.to_vec()),
        b':' => {
            let digits = line.strip_prefix(b"+").unwrap_or(line);
            Reply::Integer(parse_integer(digits).ok_or(ReplyError::BadNumber)?)
        }
        b'#' => match line {
            b"t" => Reply::Boolean(true),
            b"f" => Reply::Boolean(false),
            _ => return Err(ReplyError::BadNumber),
        },
        b',' => {
            let text = str::from_utf8(line).map_err(|_| ReplyError::BadNumber)?;
            Reply::Double(text.parse().map_err(|_| ReplyError::BadNumber)?)
        }
        b'(' => Reply::BigNumber(line.to_vec()),
        _ => Reply::Null,
    })
}

fn string(kind: u8, bytes: &[u8]) -> Result<Reply, ReplyError> {
    Ok(match kind {
        b'!' => Reply::Error(bytes.to_vec()),
        b'=' => match bytes {
            [a, b, c, b':', text @ ..] => {
                Reply::Verbatim { format: vec![*a, *b, *c], text: text.to_vec() }
            }
            _ => return Err(ReplyError::BadNumber),
        },
        _ => Reply::Bulk(bytes.to_vec()),
    })
}

fn pairs(values: Vec<Reply>) -> Vec<(Reply, Reply)> {
    let mut values = values.into_iter();
    let mut pairs = Vec::with_capacity(values.len() / 2);
    while let (Some(key), Some(value)) = (values.next(), values.next()) {
        pairs.push((key, value));
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Reply {
        Reply::Bulk(text.into())
    }

    /// Parses the whole input, and checks that every prefix is incomplete.
    fn parsed(input: &[u8]) -> Reply {
        for end in 0..input.len() {
            assert_eq!(parse_reply(&input[..end]), Ok(None), "{}", input[..end].escape_ascii());
            assert_eq!(skip_reply(&input[..end]), Ok(None), "{}", input[..end].escape_ascii());
        }
        let mut more = input.to_vec();
        more.push(b'+');
        let (reply, length) = parse_reply(&more).unwrap().expect("the whole reply is there");
        assert_eq!(length, input.len());
        let is_error = matches!(reply, Reply::Error(_));
        assert_eq!(skip_reply(&more), Ok(Some((length, is_error))));
        reply
    }

    #[test]
    fn every_type_is_parsed() {
        assert_eq!(parsed(b"+OK\r\n"), Reply::Simple(b"OK".into()));
        assert_eq!(parsed(b"-ERR no\r\n"), Reply::Error(b"ERR no".into()));
        assert_eq!(parsed(b"!6\r\nERR no\r\n"), Reply::Error(b"ERR no".into()));
        assert_eq!(parsed(b":-5\r\n"), Reply::Integer(-5));
        assert_eq!(parsed(b"$3\r\na\r\n\r\n"), bulk("a\r\n"));
        assert_eq!(parsed(b"$-1\r\n"), Reply::Null);
        assert_eq!(parsed(b"*-1\r\n"), Reply::Null);
        assert_eq!(parsed(b"_\r\n"), Reply::Null);
        assert_eq!(parsed(b"*0\r\n"), Reply::Array(vec![]));
        let nested = Reply::Array(vec![Reply::Integer(1), Reply::Array(vec![bulk("a")])]);
        assert_eq!(parsed(b"*2\r\n:1\r\n*1\r\n$1\r\na\r\n"), nested);
        assert_eq!(parsed(b"%1\r\n+k\r\n:1\r\n"), {
            Reply::Map(vec![(Reply::Simple(b"k".into()), Reply::Integer(1))])
        });
        assert_eq!(parsed(b"~1\r\n#t\r\n"), Reply::Set(vec![Reply::Boolean(true)]));
        assert_eq!(parsed(b">1\r\n#f\r\n"), Reply::Push(vec![Reply::Boolean(false)]));
        assert_eq!(parsed(b",1.5\r\n"), Reply::Double(1.5));
        assert_eq!(parsed(b",-inf\r\n"), Reply::Double(f64::NEG_INFINITY));
        assert_eq!(parsed(b"(123\r\n"), Reply::BigNumber(b"123".into()));
        assert_eq!(parsed(b"=6\r\ntxt:hi\r\n"), {
            Reply::Verbatim { format: b"txt".into(), text: b"hi".into() }
        });
        assert_eq!(parsed(b"|1\r\n+ttl\r\n:1\r\n:7\r\n"), Reply::Integer(7));
    }

    #[test]
    fn malformed_replies_are_refused() {
        let cases: &[(&[u8], ReplyError)] = &[
            (b"x", ReplyError::UnknownType(b'x')),
            (b":a\r\n", ReplyError::BadNumber),
            (b":\r\n", ReplyError::BadNumber),
            (b"$-2\r\n", ReplyError::BadNumber),
            (b"$9223372036854775807\r\n", ReplyError::BadNumber),
            (b"*9223372036854775807\r\n", ReplyError::BadNumber),
            (b"#x\r\n", ReplyError::BadNumber),
            (b"=1\r\nx\r\n", ReplyError::BadNumber),
            (b"+OK\n", ReplyError::ExpectedLineEnd),
            (b"$1\r\nabc", ReplyError::ExpectedLineEnd),
            (b"*2\r\nx", ReplyError::UnknownType(b'x')),
            (&b"*1\r\n".repeat(40), ReplyError::TooDeep),
            (&b"|0\r\n".repeat(40), ReplyError::TooDeep),
        ];
        for (input, expected) in cases {
            assert_eq!(parse_reply(input), Err(*expected), "{}", input.escape_ascii());
        }
        // A count that is not backed by bytes allocates nothing.
        assert_eq!(parse_reply(b"*500000000\r\n:1\r\n"), Ok(None));
        assert_eq!(skip_reply(b"%500000000\r\n:1\r\n"), Ok(None));
    }
}
