//! The native protocol from the network: no decoder panics, and what decodes is encoded the same.

#![no_main]

use flux_proto::native;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| native::exercise(data));
