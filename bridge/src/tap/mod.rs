//! The tap: what is carried, read on the way past. It slows nothing, holds a few bytes, and never trusts a length.
//!
//! Where it meets what it can't read (devices' state, TLS or compression inside, a version that it does not know) it stops, says where, and the
//! bytes are carried all the same. Facts about QEMU's stream are stated where they are used.

mod main_stream;
mod pages;
mod return_path;
#[cfg(test)]
mod tests;

pub use main_stream::{MainStream, Stage};
pub use pages::Pages;
pub use return_path::{ReturnPath, SHUT};

/// What a stream's first bytes say that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// QEMU's main stream begins with `QEVM`.
    QemuMain,
    /// A main stream that takes a paused post-copy up again begins with a command.
    QemuRecovery,
    /// A multifd channel begins with its magic.
    QemuPages,
    /// Something else: another monitor, TLS inside, post-copy's own channel.
    Other,
}

/// Bytes that are needed to tell.
pub const KIND_BYTES: usize = 4;

impl Kind {
    /// What begins with these bytes; fewer than [`KIND_BYTES`] are something else.
    #[must_use]
    pub fn of(first: &[u8]) -> Self {
        match first {
            [b'Q', b'E', b'V', b'M', ..] => Self::QemuMain,
            [0x11, 0x22, 0x33, 0x44, ..] => Self::QemuPages,
            // A command whose number and length fit into one byte each.
            [0x08, 0, 1..=11, 0, ..] => Self::QemuRecovery,
            _ => Self::Other,
        }
    }
}

/// What one stream's tap has seen, for the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Seen {
    /// Bytes of the guest's memory, as the source said at first; 0 if it was not seen.
    pub memory_bytes: u64,
    /// Pages that went over with their contents.
    pub pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Passes over memory that have begun.
    pub iterations: u64,
}

impl Seen {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
            pages: self.pages.saturating_add(other.pages),
            zero_pages: self.zero_pages.saturating_add(other.zero_pages),
            iterations: self.iterations.max(other.iterations),
        }
    }
}
