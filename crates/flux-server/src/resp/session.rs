//! What a RESP connection is in: its protocol version, its name, its transaction.

use flux_core::{Revision, UnixMillis};
use flux_proto::resp::{OwnedArgs, Version};

/// The state of one RESP connection.
#[derive(Debug)]
pub struct Session {
    /// The number of the connection, as `CLIENT ID` answers it.
    pub id: u64,
    /// The client's address.
    pub peer: String,
    /// The address that the client connected to.
    pub local: String,
    /// What replies are written in.
    pub version: Version,
    pub(super) name: Vec<u8>,
    pub(super) library_name: Vec<u8>,
    pub(super) library_version: Vec<u8>,
    created_at_ms: UnixMillis,
    pub(super) last_active_ms: UnixMillis,
    pub(super) last_command: &'static str,
    /// Set by READONLY.
    pub(super) readonly: bool,
    pub(super) transaction: Option<Transaction>,
    pub(super) watched: Vec<Watched>,
    /// What `NodeCommand::KeysInSlot` has found, while it is not done.
    pub slot_walk: Option<SlotWalk>,
    /// WATCH commands whose replies have not been rendered: their versions are not known yet.
    pub(super) unanswered_watches: usize,
}

/// How far a walk over the keys of a slot has come. It goes on when its command is planned again.
#[derive(Debug, Default)]
pub struct SlotWalk {
    /// Where it goes on in the partition's table.
    pub position: u32,
    /// Keys so far.
    pub count: usize,
    /// Those that are listed.
    pub keys: Vec<Vec<u8>>,
    /// Their bytes.
    pub key_bytes: usize,
}

/// A key that must not change until EXEC.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) key: Box<[u8]>,
    /// 0 where the key was absent.
    pub(super) version: Revision,
}

/// Commands that wait for EXEC.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    pub(super) queue: Vec<OwnedArgs>,
    pub(super) queued_bytes: usize,
    /// A command was refused, so EXEC will be, too.
    pub(super) failed: bool,
}

impl Session {
    /// The state of a connection that was just opened.
    pub fn new(id: u64, peer: String, local: String, now_ms: UnixMillis) -> Session {
        Session {
            id,
            peer,
            local,
            version: Version::V2,
            name: Vec::new(),
            library_name: Vec::new(),
            library_version: Vec::new(),
            created_at_ms: now_ms,
            last_active_ms: now_ms,
            last_command: "NULL",
            readonly: false,
            transaction: None,
            watched: Vec::new(),
            slot_walk: None,
            unanswered_watches: 0,
        }
    }

    /// The connection's line in `CLIENT LIST` and `CLIENT INFO`, with its line end. `buffers` are the
    /// bytes that wait to be parsed and to be sent.
    pub fn line(&self, now_ms: UnixMillis, buffers: (usize, usize)) -> String {
        let seconds_since = |then: UnixMillis| now_ms.saturating_sub(then) / 1000;
        let (multi, multi_bytes) = match &self.transaction {
            Some(transaction) => (transaction.queue.len().to_string(), transaction.queued_bytes),
            None => ("-1".to_owned(), 0),
        };
        let flags = match (self.transaction.is_some(), self.readonly) {
            (true, true) => "xr",
            (true, false) => "x",
            (false, true) => "r",
            (false, false) => "N",
        };
        let (input, output) = buffers;
        format!(
            "id={} addr={} laddr={} fd=-1 name={} age={} idle={} flags={flags} db=0 sub=0 psub=0 \
             ssub=0 multi={multi} qbuf={input} qbuf-free=0 argv-mem=0 multi-mem={multi_bytes} rbs=0 \
             rbp=0 obl={output} oll=0 omem=0 tot-mem={} events=r cmd={} user=default redir=-1 \
             resp={} lib-name={} lib-ver={}\n",
            self.id,
            self.peer,
            self.local,
            String::from_utf8_lossy(&self.name),
            seconds_since(self.created_at_ms),
            seconds_since(self.last_active_ms),
            input + output + multi_bytes + size_of::<Session>(),
            self.last_command,
            self.version_number(),
            String::from_utf8_lossy(&self.library_name),
            String::from_utf8_lossy(&self.library_version),
        )
    }

    /// Whether reads of the connection may be answered from any replica, however old: it said READONLY.
    pub fn reads_stale(&self) -> bool {
        self.readonly
    }

    pub(super) fn version_number(&self) -> i64 {
        match self.version {
            Version::V2 => 2,
            Version::V3 => 3,
        }
    }

    /// Makes the session as it was when the connection was opened.
    pub(super) fn reset(&mut self) {
        self.version = Version::V2;
        self.name.clear();
        self.transaction = None;
        self.watched.clear();
        self.readonly = false;
    }

    /// Takes the versions that a WATCH was answered with. The first version of a key counts.
    pub(super) fn watch(&mut self, key: &[u8], version: Revision) {
        if !self.watched.iter().any(|watched| *watched.key == *key) {
            self.watched.push(Watched { key: key.into(), version });
        }
    }
}
