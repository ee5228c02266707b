//! RESP from the network: requests give the same commands however they are split, replies are skipped
//! as they are parsed, and nothing panics.

#![no_main]

use flux_proto::resp::{Limits, Parsed, ProtocolError, RequestParser, parse_reply, skip_reply};
use libfuzzer_sys::fuzz_target;

/// Small, so that short inputs reach them.
const LIMITS: Limits = Limits {
    args: 64,
    bulk_bytes: 256,
    inline_bytes: 128,
    command_bytes: 1024,
};

#[derive(Debug, PartialEq)]
struct Outcome {
    commands: Vec<Vec<Vec<u8>>>,
    error: Option<ProtocolError>,
}

/// Parses `input` as it arrives in pieces that end at `cuts`, which grow.
fn parse(input: &[u8], cuts: impl Iterator<Item = usize>) -> Outcome {
    let mut parser = RequestParser::new(LIMITS);
    let mut outcome = Outcome {
        commands: Vec::new(),
        error: None,
    };
    let mut start = 0;
    for end in cuts.chain([input.len()]) {
        loop {
            let arrived = &input[start..end];
            match parser.parse(arrived) {
                Ok(Parsed::Command { consumed }) => {
                    assert!(0 < consumed && consumed <= arrived.len());
                    let args = parser.args(arrived);
                    outcome
                        .commands
                        .push(args.iter().map(<[u8]>::to_vec).collect());
                    start += consumed;
                }
                Ok(Parsed::Incomplete { need }) => {
                    assert!(need > arrived.len());
                    break;
                }
                Err(error) => {
                    outcome.error = Some(error);
                    return outcome;
                }
            }
        }
    }
    outcome
}

fuzz_target!(|data: &[u8]| {
    let (seeds, input) = data.split_at(data.len().min(4));
    let whole = parse(input, [].into_iter());
    assert_eq!(parse(input, 0..input.len()), whole, "a byte at a time");
    let mut cuts: Vec<usize> = seeds
        .iter()
        .map(|&seed| usize::from(seed) * input.len() / 255)
        .collect();
    cuts.sort_unstable();
    assert_eq!(parse(input, cuts.into_iter()), whole, "in pieces");

    if let Ok(Some((_, length))) = parse_reply(input) {
        let skipped = skip_reply(input).expect("what is parsed is well formed");
        assert_eq!(skipped.map(|(skipped, _)| skipped), Some(length));
    }
});
