//! Fuzz target: any bytes as all that a channel carried. The body, and what it holds to, is in `wire/src/exercise/bodies.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| multifd_wire::exercise::stream(data));
