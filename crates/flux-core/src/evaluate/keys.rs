//! Commands that remove keys, change when they expire, or give their values to other keys.

use super::{
    check_key, check_keys, count, expiry_time, holds, positive_expiry_time, value_of, version_of,
};
use crate::command::ExpireCondition;
use crate::draft::{Draft, Piece};
use crate::effect::Reason;
use crate::{Condition, Error, Expiry, Reply, Revision, UnixMillis};

pub(super) fn delete(draft: &mut Draft<'_>, keys: &[&[u8]]) -> Result<Reply, Error> {
    check_keys(keys)?;
    let removed = keys.iter().filter(|key| delete_if_present(draft, key)).count();
    Ok(Reply::Integer(count(removed)))
}

fn delete_if_present(draft: &mut Draft<'_>, key: &[u8]) -> bool {
    let present = draft.read(key, |entry| entry.is_some());
    if present {
        draft.delete(key, Reason::Explicit);
    }
    present
}

pub(super) fn delete_if(
    draft: &mut Draft<'_>,
    key: &[u8],
    condition: Condition,
) -> Result<Reply, Error> {
    check_key(key)?;
    let version = draft.read(key, version_of);
    if !holds(condition, version) {
        return Ok(Reply::NotWritten { version });
    }
    if version != 0 {
        draft.delete(key, Reason::Explicit);
    }
    Ok(Reply::Integer(i64::from(version != 0)))
}

pub(super) fn read_and_delete(draft: &mut Draft<'_>, key: &[u8]) -> Result<Reply, Error> {
    check_key(key)?;
    let value = draft.read(key, value_of);
    if value.is_some() {
        draft.delete(key, Reason::Explicit);
    }
    Ok(Reply::Value(value))
}

/// The value in the reply has its new version and expiry, unless the key is removed because the new
/// expiry is in the past.
pub(super) fn read_and_expire(
    draft: &mut Draft<'_>,
    key: &[u8],
    expiry: Expiry,
) -> Result<Reply, Error> {
    check_key(key)?;
    let Some(mut value) = draft.read(key, value_of) else {
        return Ok(Reply::Value(None));
    };
    let expires_at_ms = match expiry {
        Expiry::Keep => value.expires_at_ms,
        Expiry::Never => None,
        Expiry::In(_) | Expiry::At(_) => Some(positive_expiry_time(expiry, draft.now_ms())?),
    };
    let old = Old { bytes: value.bytes.len(), expires_at_ms: value.expires_at_ms };
    match expires_at_ms {
        Some(at) if expiry != Expiry::Keep && at <= draft.now_ms() => {
            draft.delete(key, Reason::Explicit);
        }
        // PERSIST of what does not expire is no write; an expiry that is set again is one.
        None if old.expires_at_ms.is_none() => {}
        _ if expiry == Expiry::Keep => {}
        _ => {
            value.version = change_expiry(draft, key, old, expires_at_ms)?;
            value.expires_at_ms = expires_at_ms;
        }
    }
    Ok(Reply::Value(Some(value)))
}

pub(super) fn expire(
    draft: &mut Draft<'_>,
    key: &[u8],
    at: Expiry,
    condition: ExpireCondition,
) -> Result<Reply, Error> {
    check_key(key)?;
    let at = expiry_time(at, draft.now_ms())?;
    let Some(old) = old(draft, key) else {
        return Ok(Reply::Integer(0));
    };
    let refused = match old.expires_at_ms {
        None => condition.if_some || condition.if_later,
        Some(current) => {
            condition.if_none
                || (condition.if_later && at <= current)
                || (condition.if_earlier && at >= current)
        }
    };
    if refused {
        return Ok(Reply::Integer(0));
    }
    if at <= draft.now_ms() {
        draft.delete(key, Reason::Explicit);
    } else {
        change_expiry(draft, key, old, Some(at))?;
    }
    Ok(Reply::Integer(1))
}

pub(super) fn persist(draft: &mut Draft<'_>, key: &[u8]) -> Result<Reply, Error> {
    check_key(key)?;
    match old(draft, key) {
        Some(old) if old.expires_at_ms.is_some() => {
            change_expiry(draft, key, old, None)?;
            Ok(Reply::Integer(1))
        }
        _ => Ok(Reply::Integer(0)),
    }
}

pub(super) fn rename(
    draft: &mut Draft<'_>,
    from: &[u8],
    to: &[u8],
    if_absent: bool,
) -> Result<Reply, Error> {
    check_keys(&[from, to])?;
    let old = old(draft, from).ok_or(Error::NoSuchKey)?;
    if from == to {
        return Ok(Reply::Integer(i64::from(!if_absent)));
    }
    if if_absent && draft.read(to, |entry| entry.is_some()) {
        return Ok(Reply::Integer(0));
    }
    draft.check_room(from.len() + to.len() + old.bytes)?;
    draft.put_pieces(from, to, &[Piece::Old(0..old.bytes)], old.expires_at_ms);
    draft.delete(from, Reason::Explicit);
    Ok(Reply::Integer(1))
}

/// A key is not copied to itself; Redis refuses that before it looks at any key.
pub(super) fn copy(
    draft: &mut Draft<'_>,
    from: &[u8],
    to: &[u8],
    replace: bool,
) -> Result<Reply, Error> {
    check_keys(&[from, to])?;
    let Some(old) = old(draft, from).filter(|_| from != to) else {
        return Ok(Reply::Integer(0));
    };
    if !replace && draft.read(to, |entry| entry.is_some()) {
        return Ok(Reply::Integer(0));
    }
    draft.admit(to.len() + old.bytes)?;
    draft.put_pieces(from, to, &[Piece::Old(0..old.bytes)], old.expires_at_ms);
    Ok(Reply::Integer(1))
}

/// What there is to know of a key to write its value again.
#[derive(Clone, Copy)]
struct Old {
    bytes: usize,
    expires_at_ms: Option<UnixMillis>,
}

fn old(draft: &Draft<'_>, key: &[u8]) -> Option<Old> {
    draft.read(key, |entry| {
        entry.map(|entry| Old { bytes: entry.value.len(), expires_at_ms: entry.expires_at_ms })
    })
}

fn change_expiry(
    draft: &mut Draft<'_>,
    key: &[u8],
    old: Old,
    expires_at_ms: Option<UnixMillis>,
) -> Result<Revision, Error> {
    draft.check_room(key.len() + old.bytes)?;
    Ok(draft.put_pieces(key, key, &[Piece::Old(0..old.bytes)], expires_at_ms))
}
