//! Fuzz target: any bytes as one frame. The body, and what it holds to, is in `wire/src/exercise/bodies.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| multifd_wire::exercise::frame(data));
