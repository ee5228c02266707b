//! The options of SET and GETEX, and times of expiry.

use flux_core::{Condition, Expiry};

use super::request::{Refusal, Request, integer};

/// The options of SET and GETEX.
#[derive(Default)]
pub(super) struct SetOptions<'a> {
    pub(super) expiry: Option<ExpiryOption<'a>>,
    pub(super) condition: Condition,
    pub(super) return_previous: bool,
}

pub(super) enum ExpiryOption<'a> {
    Time(Time<'a>),
    Keep,
    Persist,
}

/// A time of expiry as it was given.
pub(super) struct Time<'a> {
    pub(super) text: &'a [u8],
    pub(super) seconds: bool,
    pub(super) absolute: bool,
}

/// What an option says.
#[derive(Clone, Copy)]
enum Word {
    If(Condition),
    Get,
    Keep,
    Persist,
    Time { seconds: bool, absolute: bool },
}

const WORDS: [(&str, Word); 9] = [
    ("NX", Word::If(Condition::IfAbsent)),
    ("XX", Word::If(Condition::IfPresent)),
    ("GET", Word::Get),
    ("KEEPTTL", Word::Keep),
    ("PERSIST", Word::Persist),
    ("EX", Word::Time { seconds: true, absolute: false }),
    ("PX", Word::Time { seconds: false, absolute: false }),
    ("EXAT", Word::Time { seconds: true, absolute: true }),
    ("PXAT", Word::Time { seconds: false, absolute: true }),
];

impl Word {
    /// The option of this name, if the command has it.
    fn of(name: &[u8], is_set: bool) -> Option<Word> {
        let mut words = WORDS.iter();
        let (_, word) = words.find(|(word, _)| name.eq_ignore_ascii_case(word.as_bytes()))?;
        let belongs = match word {
            Word::Time { .. } => true,
            Word::Persist => !is_set,
            Word::If(_) | Word::Get | Word::Keep => is_set,
        };
        belongs.then_some(*word)
    }
}

impl<'a> SetOptions<'a> {
    /// The options of a request. One that is repeated is no error; those that exclude each other are.
    pub(super) fn parse(
        request: &Request<'a, '_>,
        is_set: bool,
    ) -> Result<SetOptions<'a>, Refusal> {
        let mut options = SetOptions::default();
        let mut arguments = request.args.from(if is_set { 3 } else { 2 }).iter();
        while let Some(option) = arguments.next() {
            match (Word::of(option, is_set).ok_or(Refusal::SYNTAX)?, &options.expiry) {
                (Word::Get, _) => options.return_previous = true,
                (Word::If(condition), _)
                    if [Condition::Always, condition].contains(&options.condition) =>
                {
                    options.condition = condition;
                }
                (Word::Keep, None | Some(ExpiryOption::Keep)) => {
                    options.expiry = Some(ExpiryOption::Keep);
                }
                (Word::Persist, None | Some(ExpiryOption::Persist)) => {
                    options.expiry = Some(ExpiryOption::Persist);
                }
                (Word::Time { seconds, absolute }, before)
                    if may_follow(before, seconds, absolute) =>
                {
                    let text = arguments.next().ok_or(Refusal::SYNTAX)?;
                    options.expiry = Some(ExpiryOption::Time(Time { text, seconds, absolute }));
                }
                _ => return Err(Refusal::SYNTAX),
            }
        }
        Ok(options)
    }
}

/// Whether a time of this kind may be given after what was given before.
fn may_follow(before: &Option<ExpiryOption<'_>>, seconds: bool, absolute: bool) -> bool {
    match before {
        None => true,
        Some(ExpiryOption::Time(time)) => (time.seconds, time.absolute) == (seconds, absolute),
        Some(ExpiryOption::Keep | ExpiryOption::Persist) => false,
    }
}

impl Time<'_> {
    /// The expiry, which must be in the range that Redis takes.
    pub(super) fn expiry(&self, request: &Request<'_, '_>) -> Result<Expiry, Refusal> {
        let number = integer(self.text)?;
        let factor = if self.seconds { 1000 } else { 1 };
        let base = if self.absolute { 0 } else { request.node.now_ms() as i64 };
        let milliseconds = number.checked_mul(factor).filter(|milliseconds| *milliseconds > 0);
        let in_range = milliseconds.filter(|milliseconds| milliseconds.checked_add(base).is_some());
        let milliseconds =
            in_range.ok_or_else(|| Refusal::expire_time(request.spec))?.unsigned_abs();
        Ok(if self.absolute { Expiry::At(milliseconds) } else { Expiry::In(milliseconds) })
    }
}
