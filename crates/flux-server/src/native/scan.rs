//! SCAN: a walk of one page, over all partitions or over one.

use flux_core::command::{KeyFilter, PageLimits};
use flux_core::{Error, PartitionId};
use flux_proto::Code;
use flux_proto::native as wire;
use flux_proto::native::{Opcode, Response, StalePosition};

use super::render::{fail, respond, value_of};
use crate::mailbox::Ask;
use crate::scan::{self, PAGE_BYTES, PAGE_LOOKED_AT, Scope, Walk};

/// A request for a page of keys.
pub(super) struct Request<'a> {
    pub(super) prefix: &'a [u8],
    pub(super) cursor: &'a [u8],
    pub(super) limit: u32,
    pub(super) keys_only: bool,
    /// Keys of this one only.
    pub(super) partition: Option<PartitionId>,
}

/// How a page is put into a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageForm {
    pub(super) id: u64,
    /// Whether to tell how old it is.
    pub(super) wants_position: bool,
}

/// The walk of a request. An error is answered in `out`.
pub(super) fn walk(
    id: u64,
    request: &Request<'_>,
    partitions: u16,
    ask: Ask,
    out: &mut Vec<u8>,
) -> Option<Walk> {
    let mut refuse = |message: &str| {
        wire::encode_error(out, id, Opcode::Scan as u8, Code::InvalidArgument, message);
        None
    };
    let Some(mut from) = scan::cursor_from_bytes(request.cursor, partitions) else {
        return refuse("the cursor is not one that a page gave");
    };
    let scope = match request.partition {
        None => Scope::All(partitions),
        Some(partition) if partition.0 >= partitions => {
            return refuse("there is no such partition");
        }
        Some(partition) => {
            if request.cursor.is_empty() {
                from.partition = partition;
            }
            if from.partition != partition {
                return refuse("the cursor is one of another partition");
            }
            Scope::Only([partition].into())
        }
    };
    let limits =
        PageLimits { matches: request.limit, looked_at: PAGE_LOOKED_AT, bytes: PAGE_BYTES };
    let filter = KeyFilter::Prefix(request.prefix.to_vec());
    let mut walk = Walk::new(scope, from, filter, request.keys_only, limits);
    walk.ask = ask;
    Some(walk)
}

/// Appends the page that a walk has found, or why it has found none.
pub(crate) fn render_page(
    form: &PageForm,
    walk: &Walk,
    outcome: Result<(), &Error>,
    out: &mut Vec<u8>,
) {
    if let Err(error) = outcome {
        return fail(out, form.id, Opcode::Scan, error);
    }
    let cursor = scan::cursor_to_bytes(walk.next());
    let items = walk.items.iter();
    let items = items.map(|one| wire::Item { key: &one.key, value: value_of(&one.value) });
    let items = items.collect();
    let page = Response::Page(wire::Page { cursor: &cursor, items });
    let position = walk.age.map(StalePosition::from).filter(|_| form.wants_position);
    respond(out, form.id, Opcode::Scan, &page, position);
}
