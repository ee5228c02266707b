//! The peer protocol from the network: no decoder panics, and what decodes is encoded the same.

#![no_main]

use flux_proto::peer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| peer::exercise(data));
