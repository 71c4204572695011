//! Errors, sorted by who is at fault.
//!
//! | type | fault | example |
//! |---|---|---|
//! | [`Malformed`] | octets that no correct peer sends, or that the link changed | a reserved bit is set |
//! | [`Misbehaved`] | a legal frame at the wrong moment or about the wrong thing | a run past its region's end |
//! | [`Incompatible`] | nobody's: no protocol version or feature set in common | no version in common |
//! | [`Misuse`] | our own caller | a frame with too many runs |
//!
//! Each has a stable `code()` for logs and reports and a `reason()` that the peer is told. Which phase and which channel
//! an error belongs to is known to the session, which adds it.

mod incompatible;
mod layout;
mod malformed;
mod misbehaved;
mod misuse;

pub use incompatible::Incompatible;
pub use layout::LayoutError;
pub use malformed::Malformed;
pub use misbehaved::Misbehaved;
pub use misuse::Misuse;
