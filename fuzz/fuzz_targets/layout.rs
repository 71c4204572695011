//! Fuzz target: any bytes as a region table and runs. The body, and what it holds to, is in `wire/src/exercise/bodies.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| multifd_wire::exercise::layout(data));
