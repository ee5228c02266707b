//! A change event in JSON, as a consumer gets it, and the token of a watch: nothing panics, and what
//! decodes comes out the same after it is encoded again.

#![no_main]

use flux_proto::event;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| event::exercise(data));
