//! Writing RESP: functions that append one value, or the head of one, to a buffer.
//!
//! Types that RESP2 lacks take the form that Redis gives them there: a map becomes a flat array, a
//! double and a verbatim string a bulk string, a boolean an integer.

use super::Version;

/// `+text`. A line break in `text` becomes a space.
pub fn simple(out: &mut Vec<u8>, text: &str) {
    line(out, b'+', text.as_bytes());
}

/// `-text`. A line break in `text` becomes a space; the first word is the error's code.
pub fn error(out: &mut Vec<u8>, text: &str) {
    line(out, b'-', text.as_bytes());
}

/// `-text` from bytes that a client sent and that need not be UTF-8.
pub fn error_bytes(out: &mut Vec<u8>, text: &[u8]) {
    line(out, b'-', text);
}

/// `:value`.
pub fn integer(out: &mut Vec<u8>, value: i64) {
    out.push(b':');
    decimal(out, value);
    out.extend_from_slice(b"\r\n");
}

/// `$length`, then the bytes.
pub fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    out.reserve(bytes.len() + 16);
    head(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// A bulk string that holds a number.
pub fn bulk_integer(out: &mut Vec<u8>, value: i64) {
    let mut digits = [0; 20];
    bulk(out, format_integer(value, &mut digits));
}

/// No value: `$-1` or `_`.
pub fn null(out: &mut Vec<u8>, version: Version) {
    out.extend_from_slice(match version {
        Version::V2 => b"$-1\r\n",
        Version::V3 => b"_\r\n",
    });
}

/// No value where an array was expected: `*-1` or `_`.
pub fn null_array(out: &mut Vec<u8>, version: Version) {
    out.extend_from_slice(match version {
        Version::V2 => b"*-1\r\n",
        Version::V3 => b"_\r\n",
    });
}

/// The head of an array; its `length` values follow.
pub fn array(out: &mut Vec<u8>, length: usize) {
    head(out, b'*', length);
}

/// The head of a map; `pairs` keys and values follow.
pub fn map(out: &mut Vec<u8>, pairs: usize, version: Version) {
    match version {
        Version::V2 => head(out, b'*', pairs * 2),
        Version::V3 => head(out, b'%', pairs),
    }
}

/// The head of a set; its `length` values follow.
pub fn set(out: &mut Vec<u8>, length: usize, version: Version) {
    match version {
        Version::V2 => head(out, b'*', length),
        Version::V3 => head(out, b'~', length),
    }
}

/// A floating point number.
pub fn double(out: &mut Vec<u8>, value: f64, version: Version) {
    let text = if value.is_nan() {
        "nan".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "inf" } else { "-inf" }.to_owned()
    } else {
        value.to_string()
    };
    match version {
        Version::V2 => bulk(out, text.as_bytes()),
        Version::V3 => line(out, b',', text.as_bytes()),
    }
}

/// A truth value.
pub fn boolean(out: &mut Vec<u8>, value: bool, version: Version) {
    out.extend_from_slice(match (version, value) {
        (Version::V2, true) => b":1\r\n",
        (Version::V2, false) => b":0\r\n",
        (Version::V3, true) => b"#t\r\n",
        (Version::V3, false) => b"#f\r\n",
    });
}

/// Text for people. `format` is of three characters: `txt` or `mkd`.
pub fn verbatim(out: &mut Vec<u8>, format: [u8; 3], text: &[u8], version: Version) {
    match version {
        Version::V2 => bulk(out, text),
        Version::V3 => {
            head(out, b'=', text.len() + 4);
            out.extend_from_slice(&format);
            out.push(b':');
            out.extend_from_slice(text);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// Appends a number in decimal text, without a type or line end.
pub fn decimal(out: &mut Vec<u8>, value: i64) {
    let mut digits = [0; 20];
    out.extend_from_slice(format_integer(value, &mut digits));
}

/// A request, as a client sends it: an array of bulk strings.
pub fn request<B: AsRef<[u8]>>(out: &mut Vec<u8>, args: &[B]) {
    array(out, args.len());
    for arg in args {
        bulk(out, arg.as_ref());
    }
}

fn head(out: &mut Vec<u8>, kind: u8, length: usize) {
    out.push(kind);
    // A length of a buffer or of a collection in memory always fits.
    decimal(out, i64::try_from(length).unwrap_or(i64::MAX));
    out.extend_from_slice(b"\r\n");
}

fn line(out: &mut Vec<u8>, kind: u8, text: &[u8]) {
    out.push(kind);
    let start = out.len();
    out.extend_from_slice(text);
    for byte in &mut out[start..] {
        if matches!(byte, b'\r' | b'\n') {
            *byte = b' ';
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// `value` in decimal text at the end of `digits`.
pub fn format_integer(value: i64, digits: &mut [u8; 20]) -> &[u8] {
    const PAIRS: &[u8; 200] = b"0001020304050607080910111213141516171819\
        2021222324252627282930313233343536373839\
        4041424344454647484950515253545556575859\
        6061626364656667686970717273747576777879\
        8081828384858687888990919293949596979899";
    let mut magnitude = value.unsigned_abs();
    let mut start = digits.len();
    while magnitude >= 10 {
        let pair = (magnitude % 100) as usize * 2;
        magnitude /= 100;
        start -= 2;
        digits[start..start + 2].copy_from_slice(&PAIRS[pair..pair + 2]);
    }
    // A single digit is left over, unless the last pair took all (and is not the number itself).
    if magnitude > 0 || start == digits.len() {
        start -= 1;
        digits[start] = b'0' + magnitude as u8;
    }
    if value < 0 {
        start -= 1;
        digits[start] = b'-';
    }
    &digits[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).expect("tests write text")
    }

    #[test]
    fn integers_are_written_as_rust_formats_them() {
        let mut numbers = vec![0, i64::MAX, i64::MIN, -1];
        for power in 0..19 {
            let round = 10i64.pow(power);
            numbers.extend([round - 1, round, round + 1, -round, 1 - round, round * 9]);
        }
        for number in numbers {
            assert_eq!(written(|out| decimal(out, number)), number.to_string());
        }
    }

    #[test]
    fn values_take_the_form_of_their_version() {
        use Version::{V2, V3};
        assert_eq!(written(|out| simple(out, "OK")), "+OK\r\n");
        assert_eq!(written(|out| error(out, "ERR a\r\nb")), "-ERR a  b\r\n");
        assert_eq!(written(|out| integer(out, -7)), ":-7\r\n");
        assert_eq!(written(|out| bulk(out, b"")), "$0\r\n\r\n");
        assert_eq!(written(|out| bulk(out, b"a\r\nb")), "$4\r\na\r\nb\r\n");
        assert_eq!(written(|out| bulk_integer(out, 10)), "$2\r\n10\r\n");
        assert_eq!(written(|out| null(out, V2)) + &written(|out| null(out, V3)), "$-1\r\n_\r\n");
        assert_eq!(written(|out| null_array(out, V2)), "*-1\r\n");
        assert_eq!(written(|out| null_array(out, V3)), "_\r\n");
        assert_eq!(
            written(|out| map(out, 2, V2)) + &written(|out| map(out, 2, V3)),
            "*4\r\n%2\r\n"
        );
        assert_eq!(
            written(|out| set(out, 2, V2)) + &written(|out| set(out, 2, V3)),
            "*2\r\n~2\r\n"
        );
        assert_eq!(written(|out| double(out, 1.5, V2)), "$3\r\n1.5\r\n");
        assert_eq!(written(|out| double(out, f64::NEG_INFINITY, V3)), ",-inf\r\n");
        assert_eq!(written(|out| boolean(out, true, V2)), ":1\r\n");
        assert_eq!(written(|out| boolean(out, false, V3)), "#f\r\n");
        assert_eq!(written(|out| verbatim(out, *b"txt", b"hi", V2)), "$2\r\nhi\r\n");
        assert_eq!(written(|out| verbatim(out, *b"txt", b"hi", V3)), "=6\r\ntxt:hi\r\n");
        assert_eq!(written(|out| request(out, &["get", "k"])), "*2\r\n$3\r\nget\r\n$1\r\nk\r\n");
    }
}
