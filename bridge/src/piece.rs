//! Bytes of a carried stream, read once and shared from then on: kept for sending again while a lane sends them.
//!
//! The rule it keeps: a buffer is allocated once and comes back to its pool, since fresh memory of this size costs a page fault for
//! every 4 KiB, more than the copy into it.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The size of a pool's buffers: the longest piece that is made here. Half of what a Unix socket holds by default, and small enough
/// that what goes first waits less than 2 ms for one at 100 MB/s.
pub const PIECE_BYTES: usize = 128 * 1024;

/// Free buffers that a pool keeps; what is over is freed. 32 MiB.
const FREE_MAX: usize = 256;

/// Buffers of [`PIECE_BYTES`] bytes, to be used again.
#[derive(Debug, Default)]
pub struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
}

impl Pool {
    /// A buffer of at least `bytes` bytes, whatever they are.
    #[must_use]
    pub fn buffer(self: &Arc<Self>, bytes: usize) -> Buffer {
        let free = || {
            self.free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop()
        };
        let octets = if bytes > PIECE_BYTES {
            vec![0; bytes]
        } else {
            free().unwrap_or_else(|| vec![0; PIECE_BYTES])
        };
        Buffer {
            octets,
            pool: Arc::downgrade(self),
        }
    }
}

/// A buffer on its way to become a [`Piece`].
#[derive(Debug)]
pub struct Buffer {
    octets: Vec<u8>,
    pool: Weak<Pool>,
}

impl Buffer {
    /// All of it, to be filled.
    pub fn octets(&mut self) -> &mut [u8] {
        &mut self.octets
    }

    /// The first `bytes` bytes as a piece.
    #[must_use]
    pub fn piece(self, bytes: usize) -> Piece {
        let crc = crc32fast::hash(&self.octets[..bytes]);
        self.summed(bytes, crc)
    }

    /// As [`piece`](Self::piece), with a checksum that was computed already.
    #[must_use]
    pub fn summed(self, bytes: usize, crc: u32) -> Piece {
        Piece(Arc::new(Inner {
            buffer: self,
            bytes,
            crc,
        }))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.octets.len() != PIECE_BYTES {
            return;
        }
        if let Some(pool) = self.pool.upgrade() {
            let mut free = pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.len() < FREE_MAX {
                free.push(std::mem::take(&mut self.octets));
            }
        }
    }
}

struct Inner {
    buffer: Buffer,
    bytes: usize,
    crc: u32,
}

/// Bytes of a stream, never empty in one. A clone shares them.
#[derive(Clone)]
pub struct Piece(Arc<Inner>);

impl Piece {
    /// Bytes that belong to no pool.
    #[must_use]
    pub fn new(octets: Vec<u8>) -> Self {
        let bytes = octets.len();
        let pool = Weak::new();
        Buffer { octets, pool }.piece(bytes)
    }

    /// Their CRC-32.
    #[must_use]
    pub fn crc(&self) -> u32 {
        self.0.crc
    }

    /// How many there are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes as u64
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.buffer.octets[..self.0.bytes]
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Piece({} bytes)", self.0.bytes)
    }
}
