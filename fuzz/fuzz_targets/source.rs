//! Fuzz target: the source's session, driven by a sequence of frames and events. The body, and what it holds to, is in
//! `session/src/exercise/source.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| multifd_session::exercise::source(script));
