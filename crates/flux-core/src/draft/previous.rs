//! What the keys of a batch had before, added when the batch is closed.
//!
//! It is looked up only then, all at once: one by one each look-up waits for its cache misses, in groups
//! they overlap, and the table's lines are near when the batch is applied a moment later. What is found is
//! what each effect will find when it is applied: the newest effect of its key in flight before it, else the
//! table, which shows all that is not in flight.
//!
//! What an effect does is not decided here.

use super::in_flight::{InFlight, Placed, SPARE_BYTES};
use super::{CACHED_BYTES, MAX_BATCH_BYTES, SMALL_BATCH_BYTES, TOUCHED_AHEAD};
use crate::Revision;
use crate::effect::{BatchWriter, Effect};
use crate::store::{KeyHash, Table};

/// The most that the length of a value takes.
const LENGTH_BYTES: usize = 4;

impl InFlight {
    /// Adds the version that each key of the open batch had before.
    pub(super) fn add_previous_versions(&mut self, table: &Table) {
        let is_small = self.open.writer.payload().len() <= SMALL_BATCH_BYTES;
        let is_far = !is_small && table.memory().used() > CACHED_BYTES;
        self.open.writer.begin_previous_versions();
        let mut versions = [0; TOUCHED_AHEAD];
        for start in (0..self.open.effects.len()).step_by(TOUCHED_AHEAD) {
            let left = &self.open.effects[start..];
            let count = left.len().min(TOUCHED_AHEAD);
            let first = self.open.first_revision + start as u64;
            self.previous_versions(table, is_far, first, &left[..count], &mut versions);
            for (revision, version) in (first..).zip(&versions[..count]) {
                self.open.writer.previous_version(revision, *version);
            }
        }
    }

    /// The versions that the keys of a few effects of the open batch had before, from this revision on.
    fn previous_versions(
        &self,
        table: &Table,
        is_far: bool,
        first: Revision,
        group: &[Placed],
        versions: &mut [Revision; TOUCHED_AHEAD],
    ) {
        let mut keys = [(KeyHash(0), [].as_slice()); TOUCHED_AHEAD];
        let mut places = [0; TOUCHED_AHEAD];
        let mut count = 0;
        for (place, &placed) in group.iter().enumerate() {
            if let Some(before) = self.before(first + place as u64, placed) {
                versions[place] = self.put_at(before).map_or(0, |_| before);
                continue;
            }
            let key = self.open.effect_at(placed).key();
            keys[count] = (table.hash(key), key);
            places[count] = place;
            count += 1;
        }
        let mut places = places.into_iter();
        let mut found = |version| {
            if let Some(place) = places.next() {
                versions[place] = version;
            }
        };
        if is_far {
            return table.versions(&keys[..count], found);
        }
        for (hash, key) in &keys[..count] {
            found(table.read(*hash, key, |entry| entry.map_or(0, |entry| entry.version)));
        }
    }

    /// Adds the value that each key of the open batch had before, as far as the batch has room.
    pub(super) fn add_previous_values(&mut self, table: &Table) {
        let room = MAX_BATCH_BYTES.saturating_sub(self.open.writer.payload().len() + 1);
        let count = self.open.effects.len();
        if room < count {
            return;
        }
        let mut values = BatchWriter::new(std::mem::take(&mut self.encoded));
        values.begin_previous_values();
        for (position, &placed) in self.open.effects.iter().enumerate() {
            // The others take a byte each at least.
            let room = room - (count - position - 1);
            self.previous_value(table, position, placed, |value| {
                let bytes = values.payload().len() + LENGTH_BYTES + value.map_or(0, <[u8]>::len);
                values.previous_value(value.filter(|_| bytes <= room));
            });
        }
        self.open.writer.append(values.payload());
        let buffer = values.into_inner();
        if buffer.capacity() <= SPARE_BYTES {
            self.encoded = buffer;
        }
    }

    /// What `add_previous_values` would add, at most.
    pub fn previous_bytes(&self, table: &Table) -> usize {
        let room = MAX_BATCH_BYTES.saturating_sub(self.open_bytes());
        let mut bytes = 1;
        for (position, &placed) in self.open.effects.iter().enumerate() {
            self.previous_value(table, position, placed, |value| {
                bytes += LENGTH_BYTES + value.map_or(0, <[u8]>::len);
            });
        }
        bytes.min(room)
    }

    /// Passes on what the key of an effect of the open batch had before.
    fn previous_value<R>(
        &self,
        table: &Table,
        position: usize,
        placed: Placed,
        f: impl FnOnce(Option<&[u8]>) -> R,
    ) -> R {
        match self.before(self.open.first_revision + position as u64, placed) {
            Some(before) => f(self.put_at(before)),
            None => {
                let key = self.open.effect_at(placed).key();
                table.read(table.hash(key), key, |entry| f(entry.map(|entry| entry.value)))
            }
        }
    }

    /// The effect in flight that comes before one of the open batch, and is of the same key.
    fn before(&self, revision: Revision, placed: Placed) -> Option<Revision> {
        let before = revision - u64::from(placed.back);
        (placed.back > 0 && before > self.applied).then_some(before)
    }

    /// The value that the effect of a revision in flight puts; `None` if it deletes.
    fn put_at(&self, revision: Revision) -> Option<&[u8]> {
        match self.at(revision).effect {
            Effect::Put { value, .. } => Some(value),
            Effect::Delete { .. } => None,
        }
    }
}
