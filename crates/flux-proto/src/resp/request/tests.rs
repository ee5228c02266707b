//! Requests whole, in pieces and malformed.

use proptest::prelude::*;

use super::*;

type Command = Vec<Vec<u8>>;

fn small_limits() -> Limits {
    Limits { args: 100, bulk_bytes: 1000, inline_bytes: 200, command_bytes: 4000 }
}

/// All commands of `input`, and the error that ended them or whether something was left.
fn parse_all(input: &[u8], limits: Limits) -> (Vec<Command>, Result<bool, ProtocolError>) {
    parse_pieces(input, limits, &[])
}

/// The same, with the input arriving in pieces that end at `cuts`.
fn parse_pieces(
    input: &[u8],
    limits: Limits,
    cuts: &[usize],
) -> (Vec<Command>, Result<bool, ProtocolError>) {
    let mut parser = RequestParser::new(limits);
    let mut commands = Vec::new();
    let mut start = 0;
    for &end in cuts.iter().chain([&input.len()]) {
        loop {
            let arrived = &input[start..end];
            match parser.parse(arrived) {
                Ok(Parsed::Command { consumed }) => {
                    assert!(0 < consumed && consumed <= arrived.len());
                    commands.push(parser.args(arrived).iter().map(<[u8]>::to_vec).collect());
                    start += consumed;
                }
                Ok(Parsed::Incomplete { need }) => {
                    assert!(need > arrived.len());
                    break;
                }
                Err(error) => return (commands, Err(error)),
            }
        }
    }
    (commands, Ok(start < input.len()))
}

fn commands(input: &[u8]) -> Vec<Command> {
    let (commands, end) = parse_all(input, Limits::default());
    assert_eq!(end, Ok(false), "{}", input.escape_ascii());
    commands
}

fn error(input: &[u8]) -> String {
    let (_, end) = parse_all(input, Limits::default());
    end.expect_err("the input is malformed").to_string()
}

#[test]
fn arrays_and_lines_are_commands() {
    assert_eq!(commands(b"*1\r\n$4\r\nPING\r\n"), [[b"PING"]]);
    assert_eq!(commands(b"PING\r\n"), [[b"PING"]]);
    assert_eq!(commands(b"PING\n"), [[b"PING"]]);
    assert_eq!(commands(b"*2\r\n$3\r\nGET\r\n$0\r\n\r\n"), [[&b"GET"[..], b""]]);
    assert_eq!(
        commands(b"*2\r\n$3\r\nGET\r\n$4\r\n\r\n\0\xff\r\n"),
        [[&b"GET"[..], b"\r\n\0\xff"]]
    );
    let pipeline = b"GET \"a b\"\r\n*1\r\n$4\r\nPING\r\nECHO 'x'\n";
    let expected: [&[&[u8]]; 3] = [&[b"GET", b"a b"], &[b"PING"], &[b"ECHO", b"x"]];
    assert_eq!(commands(pipeline), expected);
}

#[test]
fn empty_arrays_and_lines_are_commands_without_arguments() {
    for input in [&b"*0\r\n"[..], b"*-1\r\n", b"\r\n", b"\n", b"   \r\n", b"*-99999\r\n"] {
        assert_eq!(commands(input), [Command::new()], "{}", input.escape_ascii());
    }
}

#[test]
fn malformed_input_is_refused_in_the_words_of_redis() {
    let cases: &[(&[u8], &str)] = &[
        (b"*abc\r\n", "invalid multibulk length"),
        (b"*\r\n", "invalid multibulk length"),
        (b"*1048577\r\n", "invalid multibulk length"),
        (b"*2147483648\r\n", "invalid multibulk length"),
        (b"*9223372036854775808\r\n", "invalid multibulk length"),
        (b"*1\r$", "invalid multibulk length"),
        (b"*1\r\nPING\r\n", "expected '$', got 'P'"),
        (b"*1\r\n*1\r\n", "expected '$', got '*'"),
        (b"*1\r\n\0", r"expected '$', got '\x00'"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"),
        (b"*1\r\n$abc\r\n", "invalid bulk length"),
        (b"*1\r\n$9223372036854775808\r\n", "invalid bulk length"),
        (b"*1\r\n$1\r\nab\r\n", "expected CRLF after bulk string"),
        (b"get \"a\r\n", "unbalanced quotes in request"),
        (&[b'*'; 65], "too big mbulk count string"),
        (&[b"*1\r\n$".as_slice(), &[b'1'; 64]].concat(), "too big bulk count string"),
        (&[b'a'; 65_537], "too big inline request"),
        (
            b"*1\r\n$2147483648\r\n",
            "invalid bulk length: 2147483648 bytes are over the limit of 17825792 for one argument",
        ),
    ];
    for (input, expected) in cases {
        assert_eq!(error(input), format!("Protocol error: {expected}"), "{}", input.escape_ascii());
    }
}

#[test]
fn a_command_is_limited_as_a_whole() {
    let limits = small_limits();
    let bulk = [b"$1000\r\n".as_slice(), &[b'x'; 1000], b"\r\n"].concat();
    let fits = [b"*3\r\n".as_slice(), &bulk, &bulk, &bulk].concat();
    assert_eq!(parse_all(&fits, limits).1, Ok(false));
    let too_large = [b"*4\r\n".as_slice(), &bulk, &bulk, &bulk, b"$1000\r\n"].concat();
    let expected = Err(ProtocolError::CommandTooLarge { limit: 4000 });
    assert_eq!(parse_all(&too_large, limits).1, expected);
    // That the rest cannot fit is seen as soon as the count is known.
    let tight = Limits { args: 1000, ..limits };
    assert_eq!(parse_all(b"*700\r\n", tight).1, expected);
}

#[test]
fn what_is_needed_is_known_from_the_lengths() {
    let need = |input: &[u8]| match RequestParser::new(Limits::default()).parse(input) {
        Ok(Parsed::Incomplete { need }) => need,
        other => panic!("{other:?}"),
    };
    assert_eq!(need(b""), 1);
    assert_eq!(need(b"*2"), 3);
    assert_eq!(need(b"*2\r\n"), 4 + 6 + 6);
    assert_eq!(need(b"*2\r\n$5"), 4 + 6 + 6);
    assert_eq!(need(b"*2\r\n$10000\r\nabc"), 4 + 8 + 10_000 + 2 + 6);
}

/// A client that sends a large command in small pieces costs no more than one that sends it at once:
/// every argument is looked at once.
#[test]
fn progress_in_a_command_is_kept() {
    let mut input = b"*1000\r\n".to_vec();
    for _ in 0..1000 {
        input.extend_from_slice(b"$1\r\nx\r\n");
    }
    let mut parser = RequestParser::new(Limits::default());
    let half = input.len() / 2;
    assert!(matches!(parser.parse(&input[..half]), Ok(Parsed::Incomplete { .. })));
    assert!(parser.position > half - 10);
    assert_eq!(parser.spans.len(), (half - 7) / 7);
    assert_eq!(parser.parse(&input), Ok(Parsed::Command { consumed: input.len() }));
    assert_eq!(parser.args(&input).len(), 1000);
}

#[test]
fn arguments_can_be_kept() {
    let mut parser = RequestParser::new(Limits::default());
    let input = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n";
    parser.parse(input).unwrap();
    let args = parser.args(input);
    let owned: OwnedArgs = args.iter().collect();
    assert!(owned.borrowed().iter().eq(args.iter()));
    assert_eq!(args.from(1).iter().collect::<Vec<_>>(), [&b"k"[..], b""]);
    assert_eq!((args.get(3), args.at(3), args.from(7).len()), (None, &b""[..], 0));
    assert_eq!(args.total_bytes(), 4);
}

/// Input that often is nearly right.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        8 => proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..5)
            .prop_map(|args| {
                let mut out = Vec::new();
                crate::resp::write::request(&mut out, &args);
                out
            }),
        3 => "[ a-z\"'\\\\]{0,12}\r?\n".prop_map(String::into_bytes),
        1 => proptest::collection::vec(any::<u8>(), 0..6),
        1 => "[*$][0-9-]{0,3}\r\n".prop_map(String::into_bytes),
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn how_the_input_is_split_does_not_matter(
        input in stream(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let limits = small_limits();
        let whole = parse_all(&input, limits);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
        cuts.sort_unstable();
        prop_assert_eq!(&parse_pieces(&input, limits, &cuts), &whole);
        let bytewise: Vec<usize> = (0..input.len()).collect();
        prop_assert_eq!(&parse_pieces(&input, limits, &bytewise), &whole);
    }

    #[test]
    fn what_a_client_writes_is_what_is_parsed(
        requests in proptest::collection::vec(
            proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..10), 0..10),
    ) {
        let mut input = Vec::new();
        for request in &requests {
            crate::resp::write::request(&mut input, request);
        }
        prop_assert_eq!(parse_all(&input, Limits::default()), (requests, Ok(false)));
    }
}
