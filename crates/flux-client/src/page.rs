//! Scans: of all partitions by one node, or in a cluster of one partition after another, each by its
//! leader.
//!
//! A cursor that the client gives starts with what kind of scan it is of, and the partition.

use bytes::{BufMut, Bytes};
use flux_proto::Code;
use flux_proto::native::{Request, Response};
use tokio::time::Instant;

use crate::route::Target;
use crate::types::{Page, ScanOptions};
use crate::{Client, Error};

const ALL_PARTITIONS: u8 = 0;
const ONE_PARTITION: u8 = 1;

/// Where a scan goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor<'a> {
    /// None: wherever the node's cursor says.
    partition: Option<u16>,
    /// The node's cursor; empty at the start.
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn decode(bytes: &'a [u8]) -> Option<Cursor<'a>> {
        let (&kind, rest) = bytes.split_first()?;
        match kind {
            ALL_PARTITIONS => Some(Cursor { partition: None, rest }),
            ONE_PARTITION => {
                let (&partition, rest) = rest.split_first_chunk::<2>()?;
                Some(Cursor { partition: Some(u16::from_le_bytes(partition)), rest })
            }
            _ => None,
        }
    }

    fn encode(self) -> Bytes {
        let mut out = Vec::with_capacity(3 + self.rest.len());
        match self.partition {
            None => out.put_u8(ALL_PARTITIONS),
            Some(partition) => {
                out.put_u8(ONE_PARTITION);
                out.put_u16_le(partition);
            }
        }
        out.extend_from_slice(self.rest);
        out.into()
    }
}

impl Client {
    pub(crate) async fn page(
        &self,
        options: &ScanOptions,
        cursor: Option<&[u8]>,
    ) -> Result<Page, Error> {
        let deadline = Instant::now() + self.timeout;
        let topology = self.shared.directory.first(deadline).await?.topology;
        let all = Cursor { partition: None, rest: b"" };
        let Some(bytes) = cursor else {
            if !topology.is_clustered() {
                return self.page_at(options, all, None).await;
            }
            let first = Cursor { partition: Some(0), rest: b"" };
            return match self.page_at(options, first, topology.partitions()).await {
                Err(Error::Refused { code: Code::Unsupported, .. }) => {
                    self.page_at(options, all, None).await
                }
                decided => decided,
            };
        };
        let Some(cursor) = Cursor::decode(bytes) else {
            let message = "the cursor is not one that a page gave".to_owned();
            return Err(Error::Refused { code: Code::InvalidArgument, message });
        };
        self.page_at(options, cursor, topology.partitions()).await
    }

    async fn page_at(
        &self,
        options: &ScanOptions,
        cursor: Cursor<'_>,
        partitions: Option<u16>,
    ) -> Result<Page, Error> {
        let Cursor { partition, rest } = cursor;
        let request = Request::Scan {
            prefix: &options.prefix,
            cursor: rest,
            limit: options.limit,
            keys_only: options.keys_only,
            partition,
        };
        let target = partition.map_or(Target::Any, Target::Partition);
        let answer = self.call(target, &request, |frame, response| match response {
            Response::Page(page) => Some(Page::new(frame, &page)),
            _ => None,
        });
        let (page, _) = answer.await?;
        let next = match (&page.cursor, partition) {
            (Some(rest), partition) => Some(Cursor { partition, rest }),
            // The partition's end: the next one, if there is one.
            (None, Some(partition)) => {
                let next = partition.checked_add(1);
                let next = next.filter(|&next| partitions.is_some_and(|count| next < count));
                next.map(|next| Cursor { partition: Some(next), rest: b"" })
            }
            (None, None) => None,
        };
        let cursor = next.map(Cursor::encode);
        Ok(Page { cursor, ..page })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_tell_what_they_are_of() {
        for partition in [None, Some(0), Some(16383)] {
            for rest in [&b""[..], b"x"] {
                let cursor = Cursor { partition, rest };
                assert_eq!(Cursor::decode(&cursor.encode()), Some(cursor));
            }
        }
        for strange in [&b""[..], b"\x01", b"\x01\0", b"\x02\0\0"] {
            assert_eq!(Cursor::decode(strange), None);
        }
    }
}
