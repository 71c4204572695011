//! What tests and fuzz targets share: one body per decoder, samples of every structure, a map of reserved bits, and the form of the vectors.
//!
//! Only behind the feature `exercise`, and never part of a product: these bodies panic when the crate breaks a promise.
//! Each body takes any octets. The octets are read as they are, and once more with their checksums put right, because
//! a fuzzer cannot guess a CRC and would otherwise never get past it.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

mod bodies;
mod reserved;
mod samples;
mod seal;
mod vectors;

pub use bodies::{frame, header, hello, hello_reply, layout, stream};
pub use reserved::reserved_bits;
pub use samples::{Sample, samples};
pub use seal::{check, reseal, reseal_hello};
pub use vectors::{Block, Vector};
