//! What the command line knows of the server's commands: for `help` and completion only.
//!
//! The server decides what a command means; a command that is not listed here is sent all the same.

/// One command as `help` shows it.
pub struct Entry {
    /// In capitals; two words for a subcommand.
    pub name: &'static str,
    /// The arguments, in the notation of Redis.
    pub arguments: &'static str,
    /// One sentence.
    pub summary: &'static str,
}

/// Commands by what they are for.
pub const GROUPS: &[(&str, &[Entry])] = &[
    ("values", VALUES),
    ("keys", KEYS),
    ("expiry", EXPIRY),
    ("transactions", TRANSACTIONS),
    ("connection and server", SERVER),
];

/// Short rows for a long table.
const fn entry(name: &'static str, arguments: &'static str, summary: &'static str) -> Entry {
    Entry { name, arguments, summary }
}

const VALUES: &[Entry] = &[
    entry("GET", "key", "The value of a key."),
    entry(
        "SET",
        "key value [NX | XX] [GET] [EX s | PX ms | EXAT unix-s | PXAT unix-ms | KEEPTTL]",
        "Writes a value.",
    ),
    entry("SETNX", "key value", "Writes a value if there is none."),
    entry("SETEX", "key seconds value", "Writes a value that expires."),
    entry("PSETEX", "key milliseconds value", "Writes a value that expires."),
    entry("GETSET", "key value", "Writes a value and answers the one before."),
    entry("GETDEL", "key", "Answers a value and removes the key."),
    entry(
        "GETEX",
        "key [EX s | PX ms | EXAT unix-s | PXAT unix-ms | PERSIST]",
        "Answers a value and changes its expiry.",
    ),
    entry("MGET", "key [key ...]", "The values of several keys."),
    entry("MSET", "key value [key value ...]", "Writes several values."),
    entry(
        "MSETNX",
        "key value [key value ...]",
        "Writes several values if none of the keys exists.",
    ),
    entry("APPEND", "key value", "Appends to a value."),
    entry("STRLEN", "key", "The length of a value."),
    entry("GETRANGE", "key start end", "Part of a value; negative positions count from its end."),
    entry("SUBSTR", "key start end", "The same as GETRANGE."),
    entry("SETRANGE", "key offset value", "Overwrites part of a value."),
    entry("INCR", "key", "Adds 1 to a number."),
    entry("DECR", "key", "Takes 1 from a number."),
    entry("INCRBY", "key increment", "Adds to a number."),
    entry("DECRBY", "key decrement", "Takes from a number."),
    entry("INCRBYFLOAT", "key increment", "Adds to a floating point number."),
    entry(
        "LCS",
        "key1 key2 [LEN] [IDX] [MINMATCHLEN length] [WITHMATCHLEN]",
        "The longest common subsequence of two values.",
    ),
];

const KEYS: &[Entry] = &[
    entry("DEL", "key [key ...]", "Removes keys."),
    entry("UNLINK", "key [key ...]", "Removes keys."),
    entry("EXISTS", "key [key ...]", "How many of the keys exist."),
    entry("TYPE", "key", "The type of a value."),
    entry("TOUCH", "key [key ...]", "How many of the keys exist."),
    entry("KEYS", "pattern", "All keys that match. Slow where there are many: see SCAN."),
    entry("SCAN", "cursor [MATCH pattern] [COUNT count] [TYPE type]", "Keys, a page at a time."),
    entry("RANDOMKEY", "", "Some key."),
    entry("RENAME", "key newkey", "Renames a key."),
    entry("RENAMENX", "key newkey", "Renames a key if the new name is free."),
    entry("COPY", "source destination [REPLACE]", "Copies a key."),
    entry("OBJECT ENCODING", "key", "How a value is stored."),
    entry("OBJECT IDLETIME", "key", "Seconds since a key was last written."),
    entry("MEMORY USAGE", "key", "The bytes of memory that a key takes."),
];

const EXPIRY: &[Entry] = &[
    entry("EXPIRE", "key seconds [NX | XX | GT | LT]", "Lets a key expire after some seconds."),
    entry("PEXPIRE", "key milliseconds [NX | XX | GT | LT]", "Lets a key expire."),
    entry("EXPIREAT", "key unix-seconds [NX | XX | GT | LT]", "Lets a key expire at a time."),
    entry("PEXPIREAT", "key unix-milliseconds [NX | XX | GT | LT]", "Lets a key expire at a time."),
    entry("TTL", "key", "Seconds until a key expires; -1 never, -2 no such key."),
    entry("PTTL", "key", "Milliseconds until a key expires; -1 never, -2 no such key."),
    entry("EXPIRETIME", "key", "When a key expires, in Unix seconds."),
    entry("PEXPIRETIME", "key", "When a key expires, in Unix milliseconds."),
    entry("PERSIST", "key", "Lets a key live for ever."),
];

const TRANSACTIONS: &[Entry] = &[
    entry("MULTI", "", "Begins to collect commands."),
    entry("EXEC", "", "Carries out the collected commands as one."),
    entry("DISCARD", "", "Forgets the collected commands."),
    entry(
        "WATCH",
        "key [key ...]",
        "Lets the next EXEC fail if one of the keys changes before it.",
    ),
    entry("UNWATCH", "", "Forgets the watched keys."),
];

const SERVER: &[Entry] = &[
    entry("PING", "[message]", "Answers PONG, or the message."),
    entry("ECHO", "message", "Answers the message."),
    entry("HELLO", "[protover]", "What the server is; chooses RESP2 or RESP3."),
    entry("AUTH", "[username] password", "Logs in."),
    entry("SELECT", "index", "Chooses a database; there is only 0."),
    entry("CLIENT ID", "", "The number of this connection."),
    entry("CLIENT INFO", "", "About this connection."),
    entry("CLIENT LIST", "", "About all connections."),
    entry("CLIENT SETNAME", "name", "Names this connection."),
    entry("CLIENT GETNAME", "", "The name of this connection."),
    entry("CLIENT KILL", "ip:port | ID id", "Closes a connection."),
    entry("COMMAND", "", "What the server can do."),
    entry("COMMAND COUNT", "", "How many commands the server knows."),
    entry("INFO", "[section ...]", "About the server."),
    entry("CONFIG GET", "pattern [pattern ...]", "The settings."),
    entry("CONFIG SET", "name value [name value ...]", "Changes settings."),
    entry("CONFIG RESETSTAT", "", "Sets the counters of INFO to zero."),
    entry("DBSIZE", "", "How many keys there are."),
    entry("FLUSHDB", "", "Removes all keys."),
    entry("FLUSHALL", "", "Removes all keys."),
    entry("TIME", "", "The server's clock."),
    entry("WAIT", "numreplicas timeout", "Waits until replicas have this connection's writes."),
    entry("DEBUG SLEEP", "seconds", "Stops the server for a while."),
    entry("RESET", "", "Makes the connection as new."),
    entry("QUIT", "", "Closes the connection."),
];

/// All commands.
pub fn all() -> impl Iterator<Item = &'static Entry> {
    GROUPS.iter().flat_map(|(_, entries)| entries.iter())
}

/// The text of `help`, or of `help NAME`.
pub fn help(topic: &str) -> String {
    let topic = topic.trim().to_uppercase();
    if topic.is_empty() {
        return overview();
    }
    let prefix = format!("{topic} ");
    let mut text = String::new();
    for Entry { name, arguments, summary } in all() {
        if *name == topic || name.starts_with(&prefix) {
            let usage = format!("{name} {arguments}");
            text += &format!("{}\n    {summary}\n", usage.trim_end());
        }
    }
    if text.is_empty() {
        text =
            format!("No help for {topic}; `help` lists the commands. It is sent all the same.\n");
    }
    text
}

fn overview() -> String {
    let mut text = String::from(
        "Type a command and its arguments; \"…\" quotes bytes (\\n, \\x00), '…' quotes literally.\n\
         help COMMAND tells about one, exit or Ctrl-D leaves, Tab completes.\n",
    );
    for (group, entries) in GROUPS {
        text += &format!("\n{group}:\n");
        let mut line = String::new();
        for Entry { name, .. } in *entries {
            if line.len() + name.len() > 74 {
                text += &format!("  {}\n", line.trim_end());
                line.clear();
            }
            line += &format!("{name}  ");
        }
        text += &format!("  {}\n", line.trim_end());
    }
    text
}

/// The hint that stands behind a command without arguments yet.
pub fn arguments(line: &str) -> Option<&'static str> {
    let typed = line.strip_suffix(' ')?.to_uppercase();
    all().find(|entry| entry.name == typed).map(|entry| entry.arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_finds_commands_and_their_subcommands() {
        assert!(help("get").starts_with("GET key\n    The value of a key.\n"));
        assert!(help(" client ").contains("CLIENT KILL ip:port | ID id\n"));
        assert!(help("frobnicate").starts_with("No help for FROBNICATE"));
        for Entry { name, .. } in all() {
            assert!(help("").contains(name), "{name}");
            assert!(help(name).starts_with(name), "{name}");
        }
    }

    #[test]
    fn arguments_are_shown_behind_a_whole_command() {
        assert_eq!(arguments("get "), Some("key"));
        assert_eq!(arguments("client kill "), Some("ip:port | ID id"));
        assert_eq!(arguments("get"), None);
        assert_eq!(arguments("get k "), None);
    }
}
