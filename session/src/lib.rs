//! The protocol of a migration: both roles as machines without I/O.
//!
//! Events and the time go in, effects come out. Nothing here knows a clock, a thread, a lock, a queue, a socket or a file (`clippy.toml`
//! lists them, and this file denies them), so all of the protocol can be tested in one thread on made-up time. The drivers are in
//! `multifd-sender` and `multifd-receiver`; they carry the effects out and decide nothing.
//!
//! ```text
//!   source/        session    the control plane     lane, pacer, stream    one data channel, its rate, one device's state
//!                  forecast   when will it end
//!   destination/   session    the control plane     lane, assembler        one data channel, one device's state
//!                  blobs      configuration and VM state, put together
//!   common/        what both roles are made of: blobs, the embedder's errors, a channel's failure
//! ```
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

pub mod common;
pub mod destination;
#[cfg(any(test, feature = "exercise"))]
pub mod exercise;
pub mod source;
