//! Replies as text: for people as redis-cli shows them on a terminal, or raw for pipes.

use flux_proto::resp::Reply;

use super::words::quote;

/// How replies are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// With types, quotes and numbers.
    Pretty,
    /// Only the bytes.
    Raw,
}

/// A reply with a line end behind it.
pub fn show(reply: &Reply, style: Style) -> Vec<u8> {
    let mut out = Vec::new();
    match style {
        Style::Pretty => pretty(&mut out, reply, 0),
        Style::Raw => {
            raw(&mut out, reply);
            out.push(b'\n');
        }
    }
    out
}

/// Appends a reply whose lines after the first begin at column `indent`.
fn pretty(out: &mut Vec<u8>, reply: &Reply, indent: usize) {
    match reply {
        Reply::Simple(text) | Reply::Verbatim { text, .. } => line(out, &[text]),
        Reply::Error(text) => line(out, &[b"(error) ", text]),
        Reply::Integer(value) => line(out, &[b"(integer) ", value.to_string().as_bytes()]),
        Reply::Double(value) => line(out, &[b"(double) ", value.to_string().as_bytes()]),
        Reply::BigNumber(digits) => line(out, &[digits]),
        Reply::Boolean(value) => line(out, &[if *value { b"(true)" } else { b"(false)" }]),
        Reply::Bulk(bytes) => line(out, &[quote(bytes).as_bytes()]),
        Reply::Null => line(out, &[b"(nil)"]),
        Reply::Array(values) => sequence(out, values, "(empty array)", ')', indent),
        Reply::Set(values) => sequence(out, values, "(empty set)", '~', indent),
        Reply::Push(values) => sequence(out, values, "(empty push)", '>', indent),
        Reply::Map(pairs) => {
            numbered(out, pairs.len(), "(empty hash)", '#', indent, |out, at, indent| {
                pretty(out, &pairs[at].0, indent);
                out.pop();
                out.extend_from_slice(b" => ");
                pretty(out, &pairs[at].1, indent);
            });
        }
    }
}

fn line(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
    out.push(b'\n');
}

fn sequence(out: &mut Vec<u8>, values: &[Reply], empty: &str, mark: char, indent: usize) {
    numbered(out, values.len(), empty, mark, indent, |out, at, indent| {
        pretty(out, &values[at], indent);
    });
}

/// Appends elements behind their numbers, all numbers being of one width.
fn numbered(
    out: &mut Vec<u8>,
    count: usize,
    empty: &str,
    mark: char,
    indent: usize,
    mut element: impl FnMut(&mut Vec<u8>, usize, usize),
) {
    if count == 0 {
        return line(out, &[empty.as_bytes()]);
    }
    let width = count.to_string().len();
    for at in 0..count {
        // The first element stands on its parent's line.
        let margin = if at == 0 { 0 } else { indent };
        let number = at + 1;
        out.extend_from_slice(format!("{:margin$}{number:>width$}{mark} ", "").as_bytes());
        element(out, at, indent + width + 2);
    }
}

fn raw(out: &mut Vec<u8>, reply: &Reply) {
    match reply {
        Reply::Simple(bytes)
        | Reply::Error(bytes)
        | Reply::Bulk(bytes)
        | Reply::BigNumber(bytes)
        | Reply::Verbatim { text: bytes, .. } => out.extend_from_slice(bytes),
        Reply::Integer(value) => out.extend_from_slice(value.to_string().as_bytes()),
        Reply::Double(value) => out.extend_from_slice(value.to_string().as_bytes()),
        Reply::Boolean(value) => {
            out.extend_from_slice(if *value { b"(true)" } else { b"(false)" });
        }
        Reply::Null => {}
        Reply::Array(values) | Reply::Set(values) | Reply::Push(values) => {
            for (at, value) in values.iter().enumerate() {
                if at > 0 {
                    out.push(b'\n');
                }
                raw(out, value);
            }
        }
        Reply::Map(pairs) => {
            for (at, (key, value)) in pairs.iter().enumerate() {
                if at > 0 {
                    out.push(b'\n');
                }
                raw(out, key);
                out.push(b' ');
                raw(out, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(reply: &Reply, style: Style) -> String {
        String::from_utf8(show(reply, style)).expect("the tests show text")
    }

    fn bulk(text: &str) -> Reply {
        Reply::Bulk(text.into())
    }

    #[test]
    fn scalars_look_as_in_redis_cli() {
        let cases = [
            (Reply::Simple(b"OK".into()), "OK\n", "OK\n"),
            (Reply::Error(b"ERR no".into()), "(error) ERR no\n", "ERR no\n"),
            (Reply::Integer(-1), "(integer) -1\n", "-1\n"),
            (Reply::Null, "(nil)\n", "\n"),
            (bulk("a\"b\n"), "\"a\\\"b\\n\"\n", "a\"b\n\n"),
            (Reply::Double(1.5), "(double) 1.5\n", "1.5\n"),
            (Reply::Boolean(true), "(true)\n", "(true)\n"),
            (Reply::Array(vec![]), "(empty array)\n", "\n"),
            (Reply::Map(vec![]), "(empty hash)\n", "\n"),
            (Reply::Verbatim { format: b"txt".into(), text: b"a b".into() }, "a b\n", "a b\n"),
        ];
        for (reply, pretty, raw) in cases {
            assert_eq!(shown(&reply, Style::Pretty), pretty);
            assert_eq!(shown(&reply, Style::Raw), raw);
        }
    }

    #[test]
    fn nested_arrays_are_numbered_and_indented() {
        let mut values = vec![
            bulk("a"),
            Reply::Array(vec![Reply::Integer(1), Reply::Array(vec![bulk("x"), Reply::Null])]),
        ];
        values.extend((3..=10).map(Reply::Integer));
        let expected = r#" 1) "a"
 2) 1) (integer) 1
    2) 1) "x"
       2) (nil)
 3) (integer) 3
 4) (integer) 4
 5) (integer) 5
 6) (integer) 6
 7) (integer) 7
 8) (integer) 8
 9) (integer) 9
10) (integer) 10
"#;
        assert_eq!(shown(&Reply::Array(values), Style::Pretty), expected);
    }

    #[test]
    fn maps_and_sets_have_their_own_marks() {
        let set = Reply::Set(vec![bulk("x"), bulk("y")]);
        let map = Reply::Map(vec![(bulk("k"), Reply::Integer(1)), (bulk("s"), set)]);
        let expected = "1# \"k\" => (integer) 1\n2# \"s\" => 1~ \"x\"\n   2~ \"y\"\n";
        assert_eq!(shown(&map, Style::Pretty), expected);
        assert_eq!(shown(&map, Style::Raw), "k 1\ns x\ny\n");
    }
}
