//! Where entries lie: slots of fixed sizes in pages, and an allocation of its own for a big entry.
//!
//! Size classes go in steps of 8 bytes to 128 bytes and of an eighth to 1 KiB, so that less than 12.5 %
//! is lost beyond 64 bytes. A page is one allocation of 8 to 16 KiB with a power of two of slots; its
//! free slots form a list in their own first bytes. A page without entries is given back, but for one
//! that its class keeps. Entries are not moved to fill holes: what a class once needed in partly filled
//! pages stays with it until they empty.

use super::entry::Entry;

/// Names an entry: below `LARGE` a class and a slot, from there on a number among the large entries.
/// It has 31 bits and is never all ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle(pub(super) u32);

const INDEX_BITS: u32 = 25;
const CLASSES: usize = 39;
const LARGE: u32 = (CLASSES as u32) << INDEX_BITS;
/// Where large handles end. The last class number stays free so that no handle is all ones.
const HANDLE_END: u32 = 63 << INDEX_BITS;

/// The longest entry that lies in a page.
const MAX_SLOT_BYTES: usize = 1024;
const PAGE_BYTES: usize = 16 * 1024;
/// What a large entry costs beside its bytes: its place in the list and the allocator's header.
const LARGE_OVERHEAD: usize = 32;

/// No slot: the end of a page's free list.
const NONE: u16 = u16::MAX;

/// The class of entries of `len` bytes, which are at most `MAX_SLOT_BYTES`.
fn class_of(len: usize) -> usize {
    if len <= 128 {
        len.max(16).div_ceil(8) - 2
    } else {
        let octave = (len - 1).ilog2();
        let eighth = (len - 1) >> (octave - 3);
        15 + (octave as usize - 7) * 8 + eighth - 8
    }
}

/// The slot size of a class.
const fn class_size(class: usize) -> usize {
    if class < 15 {
        (class + 2) * 8
    } else {
        let (octave, eighth) = ((class - 15) / 8, (class - 15) % 8);
        (eighth + 9) << (octave + 4)
    }
}

/// The bytes taken for an entry of `len` bytes.
pub(super) fn allocated(len: usize) -> usize {
    if len <= MAX_SLOT_BYTES { class_size(class_of(len)) } else { len + LARGE_OVERHEAD }
}

/// The entries of one shard.
pub(super) struct Slab {
    classes: Box<[Class; CLASSES]>,
    large: Vec<Option<Box<[u8]>>>,
    free_large: Vec<u32>,
    /// How many slots a class may have.
    class_limit: u32,
    used_bytes: u64,
}

impl Slab {
    pub(super) fn new() -> Slab {
        Slab {
            classes: Box::new(std::array::from_fn(|class| Class::new(class_size(class)))),
            large: Vec::new(),
            free_large: Vec::new(),
            class_limit: 1 << INDEX_BITS,
            used_bytes: 0,
        }
    }

    /// A slab whose classes overflow early.
    #[cfg(test)]
    pub(super) fn with_class_limit(class_limit: u32) -> Slab {
        Slab { class_limit, ..Slab::new() }
    }

    /// The bytes of slots and allocations that hold an entry.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// The entry's bytes, and what else its slot has.
    #[inline]
    pub(super) fn bytes(&self, handle: Handle) -> &[u8] {
        match handle.0.checked_sub(LARGE) {
            None => {
                let index = handle.0 & ((1 << INDEX_BITS) - 1);
                self.classes[(handle.0 >> INDEX_BITS) as usize].slot(index)
            }
            Some(index) => self.large[index as usize].as_deref().expect("a handle is in use"),
        }
    }

    #[inline]
    pub(super) fn entry(&self, handle: Handle) -> Entry<'_> {
        Entry::view(self.bytes(handle))
    }

    /// Stores an entry: in a slot of its class, or where its class has no room of a bigger one.
    ///
    /// # Panics
    ///
    /// If there are 800 million large entries: a shard ends there.
    pub(super) fn insert(&mut self, entry: &Entry<'_>) -> Handle {
        let len = entry.encoded_len();
        if len <= MAX_SLOT_BYTES {
            for class in class_of(len)..CLASSES {
                if let Some(index) = self.classes[class].allocate(self.class_limit) {
                    self.used_bytes += class_size(class) as u64;
                    entry.write_to(self.classes[class].slot_mut(index));
                    return Handle((class as u32) << INDEX_BITS | index);
                }
            }
        }
        let mut bytes = Vec::with_capacity(len);
        super::entry::encode_entry(entry, &mut bytes);
        self.used_bytes += (len + LARGE_OVERHEAD) as u64;
        let bytes = Some(bytes.into_boxed_slice());
        let index = match self.free_large.pop() {
            Some(index) => {
                self.large[index as usize] = bytes;
                index
            }
            None => {
                assert!(self.large.len() < (HANDLE_END - LARGE) as usize, "a shard is full");
                self.large.push(bytes);
                self.large.len() as u32 - 1
            }
        };
        Handle(LARGE + index)
    }

    /// Stores an entry in the place of another, in the same slot if it has the same class.
    pub(super) fn replace(&mut self, handle: Handle, entry: &Entry<'_>) -> Handle {
        let len = entry.encoded_len();
        match handle.0.checked_sub(LARGE) {
            None => {
                let class = (handle.0 >> INDEX_BITS) as usize;
                if len <= MAX_SLOT_BYTES && class_of(len) == class {
                    let index = handle.0 & ((1 << INDEX_BITS) - 1);
                    entry.write_to(self.classes[class].slot_mut(index));
                    return handle;
                }
            }
            Some(index) => {
                if let Some(bytes) = &mut self.large[index as usize]
                    && bytes.len() == len
                {
                    entry.write_to(bytes);
                    return handle;
                }
            }
        }
        self.remove(handle);
        self.insert(entry)
    }

    /// Frees an entry's place.
    pub(super) fn remove(&mut self, handle: Handle) {
        if handle.0 >= LARGE {
            self.take_large(handle);
        } else {
            let class = (handle.0 >> INDEX_BITS) as usize;
            self.classes[class].free(handle.0 & ((1 << INDEX_BITS) - 1));
            self.used_bytes -= class_size(class) as u64;
        }
    }

    /// Frees a large entry's place and gives its bytes; `None`, and nothing done, if it is not large.
    pub(super) fn take_large(&mut self, handle: Handle) -> Option<Box<[u8]>> {
        let index = handle.0.checked_sub(LARGE)?;
        let bytes = self.large[index as usize].take().expect("a handle is in use");
        self.used_bytes -= (bytes.len() + LARGE_OVERHEAD) as u64;
        self.free_large.push(index);
        if self.free_large.len() == self.large.len() {
            self.free_large = Vec::new();
            self.large = Vec::new();
        }
        Some(bytes)
    }
}

/// The pages of one slot size.
struct Class {
    size: usize,
    /// A page has `1 << page_bits` slots.
    page_bits: u32,
    pages: Vec<Page>,
    /// Pages that may have a free slot, each at most once; the last one is used next.
    open: Vec<u32>,
    /// Pages that were given back.
    absent: Vec<u32>,
    /// How many pages hold memory but no entry.
    empty: u32,
}

struct Page {
    /// Empty if the page was given back.
    bytes: Box<[u8]>,
    used: u16,
    /// The slots from here on were never used.
    fresh: u16,
    first_free: u16,
    /// Whether the page is among the open ones.
    is_open: bool,
}

impl Class {
    fn new(size: usize) -> Class {
        let page_bits = (PAGE_BYTES / size).ilog2();
        let (pages, open, absent) = (Vec::new(), Vec::new(), Vec::new());
        Class { size, page_bits, pages, open, absent, empty: 0 }
    }

    #[inline]
    fn place(&self, index: u32) -> (usize, usize) {
        let slot = index & ((1 << self.page_bits) - 1);
        ((index >> self.page_bits) as usize, slot as usize * self.size)
    }

    #[inline]
    fn slot(&self, index: u32) -> &[u8] {
        let (page, start) = self.place(index);
        &self.pages[page].bytes[start..start + self.size]
    }

    #[inline]
    fn slot_mut(&mut self, index: u32) -> &mut [u8] {
        let (page, start) = self.place(index);
        &mut self.pages[page].bytes[start..start + self.size]
    }

    /// A free slot, unless the class has `limit` slots and all are in use.
    fn allocate(&mut self, limit: u32) -> Option<u32> {
        let slots = 1u16 << self.page_bits;
        let number = loop {
            let Some(&number) = self.open.last() else {
                break self.open_page(limit)?;
            };
            let page = &mut self.pages[number as usize];
            if !page.bytes.is_empty() && page.used < slots {
                break number;
            }
            page.is_open = false;
            self.open.pop();
        };
        let page = &mut self.pages[number as usize];
        if page.used == 0 {
            self.empty -= 1;
        }
        page.used += 1;
        let slot = page.first_free;
        if slot == NONE {
            page.fresh += 1;
            return Some(number << self.page_bits | u32::from(page.fresh - 1));
        }
        let start = usize::from(slot) * self.size;
        page.first_free = u16::from_le_bytes([page.bytes[start], page.bytes[start + 1]]);
        Some(number << self.page_bits | u32::from(slot))
    }

    /// Makes a page and opens it.
    fn open_page(&mut self, limit: u32) -> Option<u32> {
        let bytes = || vec![0; self.size << self.page_bits].into_boxed_slice();
        let number = if let Some(number) = self.absent.pop() {
            let page = &mut self.pages[number as usize];
            *page = Page { bytes: bytes(), used: 0, fresh: 0, first_free: NONE, is_open: true };
            number
        } else {
            let number = self.pages.len() as u32;
            if (number + 1) << self.page_bits > limit {
                return None;
            }
            let bytes = bytes();
            self.pages.push(Page { bytes, used: 0, fresh: 0, first_free: NONE, is_open: true });
            number
        };
        self.open.push(number);
        self.empty += 1;
        Some(number)
    }

    fn free(&mut self, index: u32) {
        let (number, start) = self.place(index);
        let page = &mut self.pages[number];
        let slot = (index & ((1 << self.page_bits) - 1)) as u16;
        page.bytes[start..start + 2].copy_from_slice(&page.first_free.to_le_bytes());
        page.first_free = slot;
        page.used -= 1;
        if !page.is_open {
            page.is_open = true;
            self.open.push(number as u32);
        }
        if page.used > 0 {
            return;
        }
        if self.empty == 0 {
            // Kept, so that one entry coming and going does not make and drop a page each time.
            self.empty = 1;
        } else {
            page.bytes = Box::default();
            self.absent.push(number as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_fit_tightly() {
        for len in 0..=MAX_SLOT_BYTES {
            let class = class_of(len);
            assert!(class < CLASSES, "{len}");
            assert!(class_size(class) >= len, "{len}");
            assert!(class == 0 || class_size(class - 1) < len, "{len}");
        }
        assert_eq!(class_of(MAX_SLOT_BYTES), CLASSES - 1);
        // 16 bytes of key and 64 of value: 14 bytes of header.
        assert_eq!(class_size(class_of(14 + 16 + 64)), 96);
    }

    fn entry<'a>(key: &'a [u8], value: &'a [u8]) -> Entry<'a> {
        Entry { key, value, version: 7, expires_at_ms: None, written_at_s: 9 }
    }

    #[test]
    fn a_full_class_overflows_into_the_next() {
        let mut slab = Slab::with_class_limit(2048);
        let keys: Vec<_> = (0..100_000u32).map(u32::to_le_bytes).collect();
        let handles: Vec<_> = keys.iter().map(|key| slab.insert(&entry(key, b"v"))).collect();
        assert!(handles.iter().any(|handle| handle.0 >= LARGE));
        for (key, &handle) in keys.iter().zip(&handles) {
            assert_eq!(slab.entry(handle), entry(key, b"v"));
        }
        for handle in handles {
            slab.remove(handle);
        }
        assert_eq!(slab.used_bytes(), 0);
    }

    #[test]
    fn empty_pages_are_given_back_but_one() {
        let mut slab = Slab::new();
        for round in 0..3 {
            let value = vec![round; 64];
            let handles: Vec<_> = (0..10_000u32)
                .map(|number| slab.insert(&entry(&number.to_le_bytes(), &value)))
                .collect();
            for handle in handles {
                slab.remove(handle);
            }
            let pages = slab.classes.iter().flat_map(|class| &class.pages);
            assert_eq!(pages.filter(|page| !page.bytes.is_empty()).count(), 1);
        }
    }
}
