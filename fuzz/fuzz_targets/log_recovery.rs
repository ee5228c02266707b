//! The log and snapshots from a disk that holds anything: recovery does not panic, and finds the same
//! a second time.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flux_log::fuzzing::recover(data));
