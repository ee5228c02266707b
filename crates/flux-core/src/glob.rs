//! Glob patterns over bytes, as Redis matches them for KEYS, SCAN MATCH and CONFIG GET.
//!
//! `*` is any run of bytes, `?` any one byte, `[a-c]` and `[^a-c]` one byte in or out of a class, and a
//! backslash takes the next byte as it is. There is no syntax error: a class that is not closed ends
//! with the pattern. Bytes are unsigned, so that ranges over 0x7f do not depend on the platform.

/// Whether the whole of `text` matches. Takes at most about `pattern.len() * text.len()` steps.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern_at, mut text_at) = (0, 0);
    // Where to go on when the bytes after the latest `*` do not match: that `*` swallows one byte
    // more. Earlier ones need no second try: the latest can swallow whatever they would.
    let mut retry: Option<(usize, usize)> = None;
    while text_at < text.len() {
        if pattern.get(pattern_at) == Some(&b'*') {
            pattern_at += 1;
            retry = Some((pattern_at, text_at));
            if pattern_at == pattern.len() {
                return true;
            }
            continue;
        }
        if let Some(after) = match_one(pattern, pattern_at, text[text_at]) {
            pattern_at = after;
            text_at += 1;
        } else if let Some((after_star, start)) = retry {
            pattern_at = after_star;
            text_at = start + 1;
            retry = Some((after_star, text_at));
        } else {
            return false;
        }
    }
    pattern[pattern_at..].iter().all(|&byte| byte == b'*')
}

/// Matches one byte against what stands at `at`; returns where the pattern goes on.
fn match_one(pattern: &[u8], at: usize, byte: u8) -> Option<usize> {
    let matched = |matched: bool, after: usize| matched.then_some(after);
    match *pattern.get(at)? {
        b'?' => Some(at + 1),
        b'[' => {
            let (found, after) = match_class(pattern, at + 1, byte);
            matched(found, after)
        }
        b'\\' if at + 1 < pattern.len() => matched(pattern[at + 1] == byte, at + 2),
        literal => matched(literal == byte, at + 1),
    }
}

/// Matches one byte against the class whose first byte after the `[` is at `at`; returns whether it
/// is in it, and where the pattern goes on.
fn match_class(pattern: &[u8], mut at: usize, byte: u8) -> (bool, usize) {
    let negated = pattern.get(at) == Some(&b'^');
    if negated {
        at += 1;
    }
    let mut found = false;
    loop {
        match pattern[at..] {
            [] => return (found != negated, at),
            [b'\\', literal, ..] => {
                found |= literal == byte;
                at += 2;
            }
            [b']', ..] => return (found != negated, at + 1),
            [one, b'-', other, ..] => {
                found |= (one.min(other)..=one.max(other)).contains(&byte);
                at += 3;
            }
            [literal, ..] => {
                found |= literal == byte;
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_match_as_in_redis() {
        let table: &[(&str, &[&str], &[&str])] = &[
            ("", &[""], &["a"]),
            ("abc", &["abc"], &["ab", "abcd", "abd", ""]),
            ("*", &["", "a", "anything"], &[]),
            ("a**", &["a", "ab"], &["", "ba"]),
            ("h?llo", &["hello", "h*llo"], &["hllo", "heello"]),
            ("h*llo", &["hllo", "heeeello", "hllollo"], &["hell", "hllox"]),
            ("*a*b*c", &["abc", "xxaxbxc", "abcc"], &["acb", "abcx"]),
            ("h[ae]llo", &["hallo", "hello"], &["hillo", "hllo"]),
            ("h[^e]llo", &["hallo", "h^llo"], &["hello", "hllo"]),
            ("h[a-c]llo", &["hallo", "hbllo", "hcllo"], &["hdllo", "h-llo"]),
            ("h[c-a]llo", &["hallo", "hbllo", "hcllo"], &["hdllo"]),
            ("[a-]", &["]", "a", "_"], &["-", "b"]),
            ("[]a]", &[], &["]a]", "a", "a]"]),
            ("[^]x", &["ax"], &["x"]),
            ("[a\\]b]", &["a", "]", "b"], &["\\", "c"]),
            ("[\\", &["\\"], &["a"]),
            ("[", &[], &["[", "a", ""]),
            ("[abc", &["a", "c"], &["d", "ab"]),
            ("\\*", &["*"], &["a", "\\*"]),
            ("a\\", &["a\\"], &["a"]),
            ("\\a", &["a"], &["\\a"]),
            ("*[0-9]?", &["k1x", "22"], &["k1", "kx"]),
        ];
        for (pattern, yes, no) in table {
            for text in *yes {
                assert!(matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
            }
            for text in *no {
                assert!(!matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
            }
        }
        assert!(matches(b"[\x80-\xff]\0", b"\x90\0"));
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        let pattern = b"*a".repeat(2_000);
        let text = b"a".repeat(1_999);
        assert!(!matches(&pattern, &text));
        assert!(!matches(&[b"*a".repeat(30), b"b".to_vec()].concat(), &b"a".repeat(10_000)));
    }

    /// The definition of a match, with all its backtracking.
    fn by_definition(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|from| by_definition(rest, &text[from..])),
            Some(_) => text.split_first().is_some_and(|(&byte, rest)| {
                match_one(pattern, 0, byte)
                    .is_some_and(|after| by_definition(&pattern[after..], rest))
            }),
        }
    }

    proptest! {
        #[test]
        fn one_retry_is_as_good_as_all(pattern in "[ab*?\\[\\]^\\\\-]{0,8}", text in "[ab\\]-]{0,8}") {
            let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(matches(pattern, text), by_definition(pattern, text));
        }
    }
}
