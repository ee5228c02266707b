//! Commands that write values as strings of bytes.

use super::{
    check_key, check_value_bytes, count, holds, positive_expiry_time, value_of, version_of,
};
use crate::draft::{Draft, Piece};
use crate::{Condition, Error, Expiry, Reply};

pub(super) fn set(
    draft: &mut Draft<'_>,
    key: &[u8],
    value: &[u8],
    expiry: Expiry,
    condition: Condition,
    return_previous: bool,
) -> Result<Reply, Error> {
    check_key(key)?;
    check_value_bytes(value.len())?;
    let mut expires_at_ms = match expiry {
        Expiry::Never | Expiry::Keep => None,
        Expiry::In(_) | Expiry::At(_) => Some(positive_expiry_time(expiry, draft.now_ms())?),
    };
    let mut previous = None;
    // A plain write needs no look at what is there.
    if return_previous || condition != Condition::Always || expiry == Expiry::Keep {
        let version;
        (version, previous) = draft.read(key, |entry| {
            if expiry == Expiry::Keep {
                expires_at_ms = entry.and_then(|entry| entry.expires_at_ms);
            }
            (version_of(entry), if return_previous { value_of(entry) } else { None })
        });
        if !holds(condition, version) {
            return Ok(if return_previous {
                Reply::Previous { previous, written: false }
            } else {
                Reply::NotWritten { version }
            });
        }
    }
    draft.admit(key.len() + value.len())?;
    let version = draft.put(key, value, expires_at_ms);
    Ok(if return_previous {
        Reply::Previous { previous, written: true }
    } else {
        Reply::Written { version }
    })
}

pub(super) fn set_many(
    draft: &mut Draft<'_>,
    pairs: &[(&[u8], &[u8])],
    if_none_exists: bool,
) -> Result<Reply, Error> {
    let mut bytes = 0;
    for (key, value) in pairs {
        check_key(key)?;
        check_value_bytes(value.len())?;
        bytes += key.len() + value.len();
    }
    if if_none_exists {
        for (key, _) in pairs {
            let version = draft.read(key, version_of);
            if version != 0 {
                return Ok(Reply::NotWritten { version });
            }
        }
    }
    draft.admit(bytes)?;
    let mut version = 0;
    for (key, value) in pairs {
        version = draft.put(key, value, None);
    }
    Ok(Reply::Written { version })
}

pub(super) fn append(draft: &mut Draft<'_>, key: &[u8], suffix: &[u8]) -> Result<Reply, Error> {
    check_key(key)?;
    let old = draft.read(key, |entry| entry.map(|entry| (entry.value.len(), entry.expires_at_ms)));
    let (length, expires_at_ms) = old.unwrap_or_default();
    let new_length = length + suffix.len();
    check_value_bytes(new_length)?;
    draft.admit(key.len() + new_length)?;
    match old {
        Some(_) => {
            let pieces = [Piece::Old(0..length), Piece::New(suffix)];
            draft.put_pieces(key, key, &pieces, expires_at_ms)
        }
        None => draft.put(key, suffix, None),
    };
    Ok(Reply::Integer(count(new_length)))
}

pub(super) fn set_range(
    draft: &mut Draft<'_>,
    key: &[u8],
    offset: i64,
    value: &[u8],
) -> Result<Reply, Error> {
    check_key(key)?;
    let offset = usize::try_from(offset).map_err(|_| Error::OffsetOutOfRange)?;
    let old = draft.read(key, |entry| entry.map(|entry| (entry.value.len(), entry.expires_at_ms)));
    let (length, expires_at_ms) = old.unwrap_or_default();
    if value.is_empty() {
        return Ok(Reply::Integer(count(length)));
    }
    let end = offset.saturating_add(value.len());
    check_value_bytes(end)?;
    let new_length = end.max(length);
    draft.admit(key.len() + new_length)?;
    let mut pieces = [
        Piece::Old(0..offset.min(length)),
        Piece::Zeros(offset.saturating_sub(length)),
        Piece::New(value),
        Piece::Old(end.min(length)..length),
    ];
    if old.is_none() {
        pieces[0] = Piece::Zeros(0);
        pieces[3] = Piece::Zeros(0);
    }
    draft.put_pieces(key, key, &pieces, expires_at_ms);
    Ok(Reply::Integer(count(new_length)))
}
