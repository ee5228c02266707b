//! Parsing what a client sends: arrays of bulk strings and inline commands.
//!
//! The parser works on the connection's input buffer and copies nothing: a command is a list of places
//! in that buffer. It remembers how far it came in a command that has not fully arrived, so that a large
//! one costs no more in many pieces than in one, and how the input was split never shows in what is
//! parsed.

use std::fmt;

use super::{inline, parse_integer};

/// The longest line `*…` or `$…` that is waited for; the longest valid one has 21 bytes.
const MAX_HEAD_BYTES: usize = 64;

/// Places kept for the next command; what a larger command needed is given back.
const KEPT_ARGS: usize = 1024;

/// What one command may take. A command past a limit is a [`ProtocolError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Arguments, the command's name included.
    pub args: usize,
    /// Bytes of one argument.
    pub bulk_bytes: usize,
    /// Bytes of an inline command.
    pub inline_bytes: usize,
    /// Bytes of a whole command, as sent. At most `u32::MAX` counts.
    pub command_bytes: usize,
}

impl Default for Limits {
    /// Redis's limits, but for bulk strings: somewhat over the largest value, so that a value that is
    /// just too large is answered without closing the connection.
    fn default() -> Limits {
        Limits {
            args: 1024 * 1024,
            bulk_bytes: 17 * 1024 * 1024,
            inline_bytes: 64 * 1024,
            command_bytes: 64 * 1024 * 1024,
        }
    }
}

/// How far a call of [`RequestParser::parse`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A command: [`RequestParser::args`] gives it, as long as the same input is there. The next one
    /// starts `consumed` bytes further. It has no arguments if it was an empty line or array, which
    /// asks for no reply.
    Command {
        /// Bytes of the command.
        consumed: usize,
    },
    /// The command has not fully arrived. Call again with the same bytes and more behind them.
    Incomplete {
        /// The command has at least this many bytes, more than there were.
        need: usize,
    },
}

/// The input is not RESP, or over a limit. It cannot be known where the next command starts: answer
/// `ERR ` and this text, and close the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The count after `*` is no number or over the limit.
    #[error("Protocol error: invalid multibulk length")]
    InvalidArrayLength,
    /// The line that starts with `*` does not end.
    #[error("Protocol error: too big mbulk count string")]
    ArrayLengthTooLong,
    /// An argument does not start with `$`.
    #[error("Protocol error: expected '$', got '{}'", Printable(*.0))]
    ExpectedBulk(u8),
    /// The length after `$` is no number or negative.
    #[error("Protocol error: invalid bulk length")]
    InvalidBulkLength,
    /// The line that starts with `$` does not end.
    #[error("Protocol error: too big bulk count string")]
    BulkLengthTooLong,
    /// An argument is over the limit.
    #[error(
        "Protocol error: invalid bulk length: {length} bytes are over the limit of {limit} for one argument"
    )]
    BulkTooLarge {
        /// What the client announced.
        length: u64,
        /// What is allowed.
        limit: usize,
    },
    /// An argument is not followed by CR LF: its length was wrong.
    #[error("Protocol error: expected CRLF after bulk string")]
    ExpectedLineEnd,
    /// A whole command is over the limit.
    #[error("Protocol error: command is over the limit of {limit} bytes")]
    CommandTooLarge {
        /// What is allowed.
        limit: usize,
    },
    /// An inline command is over the limit.
    #[error("Protocol error: too big inline request")]
    InlineTooLarge,
    /// A quote of an inline command is not closed.
    #[error("Protocol error: unbalanced quotes in request")]
    UnbalancedQuotes,
}

/// A byte as a character where it is one, else as `\xHH`.
struct Printable(u8);

impl fmt::Display for Printable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            byte @ b' '..=b'~' => write!(f, "{}", char::from(byte)),
            byte => write!(f, "\\x{byte:02x}"),
        }
    }
}

/// A place in a command's bytes.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    end: u32,
}

/// A command's arguments, its name first, borrowed from where they were parsed.
#[derive(Clone, Copy)]
pub struct Args<'a> {
    bytes: &'a [u8],
    spans: &'a [Span],
}

impl<'a> Args<'a> {
    /// The number of arguments, the name included.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is not even a name.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The argument at `position`, if there is one.
    pub fn get(&self, position: usize) -> Option<&'a [u8]> {
        self.spans.get(position).map(|span| &self.bytes[span.start as usize..span.end as usize])
    }

    /// The argument at `position`; empty where there is none. For callers that checked the count.
    pub fn at(&self, position: usize) -> &'a [u8] {
        self.get(position).unwrap_or_default()
    }

    /// The arguments from `first` on.
    pub fn from(&self, first: usize) -> Args<'a> {
        Args { bytes: self.bytes, spans: self.spans.get(first..).unwrap_or_default() }
    }

    /// The arguments in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [u8]> + Clone + use<'a> {
        let bytes = self.bytes;
        self.spans.iter().map(move |span| &bytes[span.start as usize..span.end as usize])
    }

    /// The bytes of all arguments together.
    pub fn total_bytes(&self) -> usize {
        self.spans.iter().map(|span| (span.end - span.start) as usize).sum()
    }
}

impl fmt::Debug for Args<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = self.iter().map(|arg| arg.escape_ascii().to_string());
        f.debug_list().entries(texts).finish()
    }
}

/// A command's arguments in memory of their own, as a queued command of MULTI needs them.
#[derive(Clone, Debug, Default)]
pub struct OwnedArgs {
    bytes: Vec<u8>,
    spans: Vec<Span>,
}

impl OwnedArgs {
    /// The arguments, borrowed.
    pub fn borrowed(&self) -> Args<'_> {
        Args { bytes: &self.bytes, spans: &self.spans }
    }

    /// What the arguments take in memory.
    pub fn memory_bytes(&self) -> usize {
        size_of::<OwnedArgs>() + self.bytes.len() + self.spans.len() * size_of::<Span>()
    }
}

impl<B: AsRef<[u8]>> FromIterator<B> for OwnedArgs {
    /// # Panics
    /// If the arguments are over 4 GiB together.
    fn from_iter<I: IntoIterator<Item = B>>(args: I) -> OwnedArgs {
        let mut owned = OwnedArgs::default();
        for arg in args {
            let start = owned.bytes.len();
            owned.bytes.extend_from_slice(arg.as_ref());
            owned.spans.push(span(start, owned.bytes.len()));
        }
        owned.bytes.shrink_to_fit();
        owned.spans.shrink_to_fit();
        owned
    }
}

/// The parser of one connection, with its place in the command that is arriving.
#[derive(Debug)]
pub struct RequestParser {
    limits: Limits,
    spans: Vec<Span>,
    /// The unescaped words of an inline command; its spans point here instead of into the input.
    words: Vec<u8>,
    progress: Progress,
    /// Where parsing goes on, from the start of the command.
    position: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// At the start of a command.
    Start,
    /// In an array of which `missing` arguments have not arrived.
    Array { missing: usize },
    /// In an inline command; no line end before `position`.
    Inline,
    /// After a command, an inline one or an array.
    Done { inline: bool },
}

impl RequestParser {
    /// A parser at the start of a command.
    pub fn new(limits: Limits) -> RequestParser {
        let command_bytes = limits.command_bytes.min(u32::MAX as usize);
        RequestParser {
            limits: Limits { command_bytes, ..limits },
            spans: Vec::new(),
            words: Vec::new(),
            progress: Progress::Start,
            position: 0,
        }
    }

    /// Parses the command at the start of `input`.
    ///
    /// After `Incomplete`, `input` must start with the same bytes again. After an error the parser is
    /// of no more use.
    pub fn parse(&mut self, input: &[u8]) -> Result<Parsed, ProtocolError> {
        if let Progress::Done { .. } = self.progress {
            self.reset();
        }
        let consumed = match self.progress {
            Progress::Array { missing } => self.bulks(input, missing)?,
            Progress::Inline => self.inline(input)?,
            Progress::Start | Progress::Done { .. } => match input.first() {
                None => Err(1),
                Some(b'*') => self.array(input)?,
                Some(_) => self.inline(input)?,
            },
        };
        Ok(match consumed {
            Ok(consumed) => Parsed::Command { consumed },
            Err(need) => Parsed::Incomplete { need },
        })
    }

    /// The arguments of the command that `parse` found at the start of `input`.
    pub fn args<'a>(&'a self, input: &'a [u8]) -> Args<'a> {
        let (bytes, spans): (_, &[Span]) = match self.progress {
            Progress::Done { inline: false } => (input, &self.spans),
            Progress::Done { inline: true } => (&self.words[..], &self.spans),
            _ => (input, &[]),
        };
        Args { bytes, spans }
    }

    fn reset(&mut self) {
        self.spans.clear();
        self.words.clear();
        if self.spans.capacity() > KEPT_ARGS {
            self.spans = Vec::new();
        }
        if self.words.capacity() > KEPT_ARGS {
            self.words = Vec::new();
        }
        self.progress = Progress::Start;
        self.position = 0;
    }

    fn array(&mut self, input: &[u8]) -> Result<Result<usize, usize>, ProtocolError> {
        let line = match head(&input[1..]) {
            Head::Line(line) => line,
            Head::Incomplete => return Ok(Err(input.len() + 1)),
            Head::TooLong => return Err(ProtocolError::ArrayLengthTooLong),
            Head::BadEnd => return Err(ProtocolError::InvalidArrayLength),
        };
        let count = parse_integer(line).ok_or(ProtocolError::InvalidArrayLength)?;
        self.position = 1 + line.len() + 2;
        // A count of 0 or less is a command without arguments.
        let count = usize::try_from(count).unwrap_or(0);
        if count > self.limits.args {
            return Err(ProtocolError::InvalidArrayLength);
        }
        // What has not arrived is not believed: an argument takes at least 6 bytes.
        self.spans.reserve(count.min(input.len() / 6 + 1));
        self.bulks(input, count)
    }

    /// Parses arguments until none is missing or the input ends.
    fn bulks(
        &mut self,
        input: &[u8],
        mut missing: usize,
    ) -> Result<Result<usize, usize>, ProtocolError> {
        while missing > 0 {
            match self.bulk(input)? {
                Ok((start, end)) => {
                    self.spans.push(span(start, end));
                    self.position = end + 2;
                    missing -= 1;
                }
                Err(need) => {
                    self.progress = Progress::Array { missing };
                    let need = need + (missing - 1) * 6;
                    if need > self.limits.command_bytes {
                        return Err(self.too_large());
                    }
                    return Ok(Err(need));
                }
            }
        }
        self.progress = Progress::Done { inline: false };
        Ok(Ok(self.position))
    }

    /// Where the argument at `position` starts and ends, or how many bytes of input it takes at least.
    fn bulk(&self, input: &[u8]) -> Result<Result<(usize, usize), usize>, ProtocolError> {
        let text = match input.get(self.position..) {
            None | Some([]) => return Ok(Err(self.position + 6)),
            Some([b'$', text @ ..]) => text,
            Some([byte, ..]) => return Err(ProtocolError::ExpectedBulk(*byte)),
        };
        let line = match head(text) {
            Head::Line(line) => line,
            Head::Incomplete => return Ok(Err((self.position + 6).max(input.len() + 1))),
            Head::TooLong => return Err(ProtocolError::BulkLengthTooLong),
            Head::BadEnd => return Err(ProtocolError::InvalidBulkLength),
        };
        let length = parse_integer(line)
            .and_then(|length| u64::try_from(length).ok())
            .ok_or(ProtocolError::InvalidBulkLength)?;
        let limit = self.limits.bulk_bytes;
        if length > limit as u64 {
            return Err(ProtocolError::BulkTooLarge { length, limit });
        }
        let start = self.position + 1 + line.len() + 2;
        let end = start + length as usize;
        if end + 2 > self.limits.command_bytes {
            return Err(self.too_large());
        }
        match input.get(end..end + 2) {
            None => Ok(Err(end + 2)),
            Some(b"\r\n") => Ok(Ok((start, end))),
            Some(_) => Err(ProtocolError::ExpectedLineEnd),
        }
    }

    fn inline(&mut self, input: &[u8]) -> Result<Result<usize, usize>, ProtocolError> {
        // A line is searched once: what was seen before `position` holds no end.
        let unseen = input.get(self.position..).unwrap_or_default();
        let Some(end) = unseen.iter().position(|&byte| byte == b'\n') else {
            if input.len() > self.limits.inline_bytes {
                return Err(ProtocolError::InlineTooLarge);
            }
            self.progress = Progress::Inline;
            self.position = input.len();
            return Ok(Err(input.len() + 1));
        };
        let end = self.position + end;
        if end > self.limits.inline_bytes {
            return Err(ProtocolError::InlineTooLarge);
        }
        let line = &input[..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let spans = &mut self.spans;
        inline::split(line, &mut self.words, |word| {
            spans.push(span(word.start, word.end));
        })
        .map_err(|inline::UnbalancedQuotes| ProtocolError::UnbalancedQuotes)?;
        self.progress = Progress::Done { inline: true };
        Ok(Ok(end + 1))
    }

    fn too_large(&self) -> ProtocolError {
        ProtocolError::CommandTooLarge { limit: self.limits.command_bytes }
    }
}

enum Head<'a> {
    Line(&'a [u8]),
    Incomplete,
    TooLong,
    /// The carriage return is not followed by a line feed.
    BadEnd,
}

/// The text up to CR LF.
#[inline]
fn head(text: &[u8]) -> Head<'_> {
    let seen = &text[..text.len().min(MAX_HEAD_BYTES)];
    match seen.iter().position(|&byte| byte == b'\r') {
        Some(end) => match text.get(end + 1) {
            Some(b'\n') => Head::Line(&text[..end]),
            Some(_) => Head::BadEnd,
            None => Head::Incomplete,
        },
        None if text.len() >= MAX_HEAD_BYTES => Head::TooLong,
        None => Head::Incomplete,
    }
}

fn span(start: usize, end: usize) -> Span {
    let narrow = |place| u32::try_from(place).expect("a command is limited to 4 GiB");
    Span { start: narrow(start), end: narrow(end) }
}

#[cfg(test)]
mod tests;
