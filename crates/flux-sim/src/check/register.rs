//! One key as a sequential object: which answers may follow which.
//!
//! A write whose outcome is unknown gives its key a version that nobody was told. The state then says
//! how much is known, and the next answer that shows the version fixes it.

use super::history::{Answer, Call};

/// What is known of a key's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Contents {
    /// Nothing: before the first operation of a history that begins in the middle.
    Anything,
    /// There is no such key.
    Absent,
    /// There is.
    Present {
        /// Its value, where it is known.
        value: Option<i64>,
        /// Its version, where it is known.
        version: Option<u64>,
    },
}

/// The state of a key between two operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Register {
    contents: Contents,
    /// The contents' version if it is known; else, it is above this. So is that of the next write.
    floor: u64,
}

impl Register {
    /// A key that never was.
    pub const ABSENT: Register = Register { contents: Contents::Absent, floor: 0 };
    /// A key of which nothing is known.
    pub const ANYTHING: Register = Register { contents: Contents::Anything, floor: 0 };

    /// What is known of the contents, and above what the versions to come are: the lower that is, the more
    /// can follow.
    pub fn parts(self) -> (Contents, u64) {
        (self.contents, self.floor)
    }

    /// The state after an operation that took effect, or `None` if it cannot with this answer. Without
    /// an answer, `None` means that it has no effect from here.
    pub fn step(self, call: Call, answer: Option<Answer>) -> Option<Register> {
        match (call, answer) {
            (Call::Get, Some(Answer::Value(None))) => self.seen_absent(),
            (Call::Get, Some(Answer::Value(Some((value, version))))) => {
                self.seen(Some(value), version)
            }
            (Call::Set(value), Some(Answer::Written(version))) => {
                self.written(Some(value), Some(version))
            }
            (Call::Set(value), None) => self.written(Some(value), None),
            (Call::SetIfAbsent(value), answer) => self.set_if(0, value, answer),
            (Call::SetIfVersion(version, value), answer) => self.set_if(version, value, answer),
            (Call::Delete, Some(Answer::Deleted(true)) | None) => self.deleted(),
            (Call::Delete, Some(Answer::Deleted(false))) => self.seen_absent(),
            (Call::Increment(by), answer) => self.incremented(by, answer),
            _ => None,
        }
    }

    fn set_if(self, version: u64, value: i64, answer: Option<Answer>) -> Option<Register> {
        match answer {
            Some(Answer::Written(written)) => {
                self.has_version(version)?.written(Some(value), Some(written))
            }
            Some(Answer::NotWritten(found)) if found != version => self.has_version(found),
            Some(_) => None,
            None => self.has_version(version)?.written(Some(value), None),
        }
    }

    fn incremented(self, by: i64, answer: Option<Answer>) -> Option<Register> {
        let sum = match self.contents {
            Contents::Absent => Some(by),
            Contents::Present { value, .. } => value.map(|value| value.wrapping_add(by)),
            Contents::Anything => None,
        };
        match answer {
            Some(Answer::Counter(told, version)) if sum.is_none_or(|sum| sum == told) => {
                self.written(Some(told), Some(version))
            }
            None => self.written(sum, None),
            Some(_) => None,
        }
    }

    /// 0 stands for absent.
    fn has_version(self, version: u64) -> Option<Register> {
        if version == 0 { self.seen_absent() } else { self.seen(None, version) }
    }

    fn seen_absent(self) -> Option<Register> {
        let contents = Contents::Absent;
        let possible = matches!(self.contents, Contents::Absent | Contents::Anything);
        possible.then_some(Register { contents, ..self })
    }

    fn seen(self, value: Option<i64>, version: u64) -> Option<Register> {
        let before = match self.contents {
            Contents::Absent => return None,
            Contents::Anything => (None, None),
            Contents::Present { value, version } => (value, version),
        };
        let fits = match before.1 {
            Some(known) => known == version,
            None => version > self.floor,
        };
        let value = match (before.0, value) {
            (Some(known), Some(seen)) if known != seen => return None,
            (known, seen) => seen.or(known),
        };
        let contents = Contents::Present { value, version: Some(version) };
        fits.then_some(Register { contents, floor: version })
    }

    fn written(self, value: Option<i64>, version: Option<u64>) -> Option<Register> {
        let least = self.least_next();
        if version.is_some_and(|version| version < least) {
            return None;
        }
        // Of a version that is not known it is known that it is above the floor.
        let floor = version.unwrap_or(least - 1);
        Some(Register { contents: Contents::Present { value, version }, floor })
    }

    /// A removal takes a version too.
    fn deleted(self) -> Option<Register> {
        let contents = Contents::Absent;
        let possible = !matches!(self.contents, Contents::Absent);
        possible.then_some(Register { contents, floor: self.least_next() })
    }

    /// The least version that the next write can have.
    fn least_next(self) -> u64 {
        match self.contents {
            // Its own version is above the floor, and so takes one place at least.
            Contents::Present { version: None, .. } => self.floor + 2,
            _ => self.floor + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(steps: &[(Call, Option<Answer>)]) -> Option<Register> {
        steps.iter().try_fold(Register::ABSENT, |state, (call, answer)| state.step(*call, *answer))
    }

    #[test]
    fn answers_follow_from_what_was_written() {
        let written = (Call::Set(5), Some(Answer::Written(3)));
        let read = |value, version| (Call::Get, Some(Answer::Value(Some((value, version)))));
        assert!(after(&[written, read(5, 3)]).is_some());
        assert!(after(&[written, read(6, 3)]).is_none());
        assert!(after(&[written, read(5, 4)]).is_none());
        assert!(after(&[read(5, 3)]).is_none());
        assert!(after(&[written, (Call::Get, Some(Answer::Value(None)))]).is_none());
        assert!(after(&[written, (Call::Set(6), Some(Answer::Written(3)))]).is_none());
        assert!(after(&[written, (Call::Increment(2), Some(Answer::Counter(7, 9)))]).is_some());
        assert!(after(&[written, (Call::Increment(2), Some(Answer::Counter(8, 9)))]).is_none());
    }

    #[test]
    fn conditions_are_judged_by_version() {
        let written = (Call::Set(5), Some(Answer::Written(3)));
        let set_if = |version, answer| (Call::SetIfVersion(version, 6), Some(answer));
        assert!(after(&[written, set_if(3, Answer::Written(4))]).is_some());
        assert!(after(&[written, set_if(2, Answer::Written(4))]).is_none());
        assert!(after(&[written, set_if(2, Answer::NotWritten(3))]).is_some());
        assert!(after(&[written, set_if(3, Answer::NotWritten(3))]).is_none());
        assert!(after(&[written, set_if(2, Answer::NotWritten(0))]).is_none());
        let if_absent = |answer| (Call::SetIfAbsent(6), Some(answer));
        assert!(after(&[if_absent(Answer::Written(1))]).is_some());
        assert!(after(&[written, if_absent(Answer::NotWritten(3))]).is_some());
        assert!(after(&[written, if_absent(Answer::Written(4))]).is_none());
    }

    #[test]
    fn a_version_that_nobody_was_told_is_fixed_by_the_first_who_sees_it() {
        let written = (Call::Set(5), Some(Answer::Written(3)));
        let unknown = (Call::Set(6), None);
        let read = |version| (Call::Get, Some(Answer::Value(Some((6, version)))));
        assert!(after(&[written, unknown, read(7), read(7)]).is_some());
        assert!(after(&[written, unknown, read(7), read(8)]).is_none());
        assert!(after(&[written, unknown, read(3)]).is_none());
        assert!(after(&[written, unknown, unknown, read(5)]).is_some());
        assert!(after(&[written, unknown, unknown, read(4)]).is_none());
        assert!(after(&[written, (Call::SetIfVersion(2, 6), None)]).is_none());
    }

    #[test]
    fn removals_take_a_version() {
        let written = (Call::Set(5), Some(Answer::Written(3)));
        let deleted = |there| (Call::Delete, Some(Answer::Deleted(there)));
        let again = |version| (Call::Set(5), Some(Answer::Written(version)));
        assert!(after(&[written, deleted(true), deleted(false), again(5)]).is_some());
        assert!(after(&[written, deleted(true), again(4)]).is_none());
        assert!(after(&[written, deleted(false)]).is_none());
        assert!(after(&[deleted(true)]).is_none());
    }
}
