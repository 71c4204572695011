//! The multifd stream format as types: hello, frame heads, tables, limits, negotiation, digest.
//!
//! This crate turns octets into checked values and back. It holds no socket, clock, thread or lock, and it allocates
//! nothing from a number that the peer sent: a decoded list borrows the buffer in which its table was read.
//! `SPEC.md` at the root of the repository is normative; the code cites its rules as `SPEC: PAGES-4`.
//!
//! How a reader uses it, once per frame:
//!
//! ```text
//!   read HEADER_BYTES ──> Header::decode ──> read table_bytes() ──> Frame::decode ──> read body_bytes() ──> check_body
//!                         crc, reserved,     (never more than        table crc, length,   straight to where     crc
//!                         bounds per kind    TABLE_BYTES_MAX)        counts, reserved     it belongs
//! ```
//!
//! A writer calls [`Frame::encode`], which appends the head (header and table) to a buffer, and sends the body after it
//! from wherever the body lies.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

pub mod code;
mod codec;
pub mod damage;
pub mod device_state;
pub mod digest;
pub mod error;
#[cfg(feature = "exercise")]
pub mod exercise;
pub mod feature;
pub mod frame;
pub mod header;
pub mod hello;
pub mod hello_reply;
pub mod id;
pub mod kind;
pub mod layout;
pub mod limits;
pub mod negotiate;
pub mod parameter;
pub mod pulse;
pub mod role;
pub mod text;
pub mod values;

pub use code::{Phase, Reason};
pub use damage::{DamageList, Damaged};
pub use device_state::DeviceState;
pub use digest::Digest;
pub use error::{Incompatible, Malformed, Misbehaved, Misuse};
pub use feature::Features;
pub use frame::{Body, Frame};
pub use header::{HEADER_BYTES, Header};
pub use hello::{HELLO_BYTES, Hello, Intent, VersionRange};
pub use hello_reply::{HELLO_REPLY_BYTES, HelloReply};
pub use id::{
    ChannelRef, DeviceId, Generation, Incarnation, LaneId, PageCount, PageIndex, RegionId, Round,
    Sequence, SessionId, StreamId, Token,
};
pub use kind::Kind;
pub use layout::{Layout, PageRun, Region};
pub use parameter::{Parameter, Parameters};
pub use pulse::Pulse;
pub use role::{ChannelKind, Role};
pub use text::Text;
pub use values::PageValues;

/// The version of the format that this crate speaks. Source: SPEC VER-1.
pub const VERSION: u16 = 1;

/// The size of a page on the wire, whatever the page size of either host. Source: SPEC PAGES-1.
pub const PAGE_BYTES: usize = 4096;

/// [`PAGE_BYTES`] for arithmetic in the width that addresses have.
pub const PAGE_BYTES_U64: u64 = 4096;
