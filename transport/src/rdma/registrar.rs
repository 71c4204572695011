//! Which of the guest's memory the device may read: all of it from the beginning, or chunks when they are first sent from.
//!
//! Rule: registered memory is pinned, and pinned memory counts against the limit on locked memory. By chunks, no more than a bound is kept;
//! the one that was not used for longest goes first, once nothing that was posted reads it any more. Nothing is registered for pages
//! that are not sent, zero pages first of all.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::sys::{Access, Id, Mr, Pd, Sge, locked_bytes_max};
use crate::memory::{GuestMemory, Place, Span};

/// When the guest's memory is registered with the RDMA device, which pins it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// All of it when the first channel connects. Takes about a second per few GiB, needs as much locked memory as the guest has, and
    /// costs nothing later.
    All,
    /// Chunks of 2 MiB when they are first sent from, of which at most this many bytes are kept.
    Chunks {
        /// At least [`CHUNK_BYTES`]; above that, some more for what is being sent.
        bytes_max: u64,
    },
}

impl Default for Registration {
    fn default() -> Self {
        Self::Chunks {
            bytes_max: 256 << 20,
        }
    }
}

/// The size of a chunk.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// The guest's memory as the channels of one migration register it; shared by them all.
pub(super) struct Registrar {
    memory: GuestMemory,
    policy: Registration,
    domain: Mutex<Option<Domain>>,
}

struct Domain {
    pd: Arc<Pd>,
    /// By region and number of the chunk; for [`Registration::All`] each region is one chunk.
    chunks: HashMap<(u32, u64), Chunk>,
    bytes: u64,
    clock: u64,
}

struct Chunk {
    mr: Arc<Mr>,
    bytes: u64,
    used: u64,
}

/// Pieces of registered memory, and what keeps them registered.
pub(super) struct Pieces {
    pub(super) pieces: Vec<Sge>,
    pub(super) held: Vec<Arc<Mr>>,
}

/// Why memory could not be registered.
pub(super) enum Refused {
    /// It may work when something that is being sent has left.
    Busy,
    Failed(io::Error),
}

impl Registrar {
    pub(super) fn new(memory: GuestMemory, policy: Registration) -> Self {
        Self {
            memory,
            policy,
            domain: Mutex::new(None),
        }
    }

    /// The domain of the device that serves this connection. Registered memory is shared by all channels on one device; a channel on
    /// another device gets a domain of its own, and sends the guest's memory through its own buffers.
    pub(super) fn domain(&self, id: &Id) -> io::Result<Arc<Pd>> {
        let mut domain = self.domain.lock().unwrap_or_else(PoisonError::into_inner);
        match &*domain {
            Some(domain) if domain.pd.serves(id) => return Ok(Arc::clone(&domain.pd)),
            Some(_) => return Pd::new(id).map(Arc::new),
            None => {}
        }
        let pd = Arc::new(Pd::new(id)?);
        let mut made = Domain {
            pd: Arc::clone(&pd),
            chunks: HashMap::new(),
            bytes: 0,
            clock: 0,
        };
        if self.policy == Registration::All {
            for (layout, region) in self.memory.layouts().zip(0..) {
                made.register(&self.memory, (region, 0), 0, layout.bytes)
                    .map_err(|error| explain(error, layout.bytes))?;
            }
        }
        *domain = Some(made);
        Ok(pd)
    }

    /// The pieces of a span with their keys, if it is of this memory and `pd` is the domain that it is registered in.
    pub(super) fn pieces(
        &self,
        pd: &Arc<Pd>,
        span: Span<'_>,
        to: &mut Pieces,
    ) -> Option<Result<(), Refused>> {
        let place = self.memory.locate(span)?;
        let mut domain = self.domain.lock().unwrap_or_else(PoisonError::into_inner);
        let domain = domain.as_mut().filter(|d| Arc::ptr_eq(&d.pd, pd))?;
        Some(self.pieces_at(domain, place, span, to))
    }

    fn pieces_at(
        &self,
        domain: &mut Domain,
        place: Place,
        span: Span<'_>,
        to: &mut Pieces,
    ) -> Result<(), Refused> {
        let mut at = 0;
        while at < span.len() as u64 {
            let offset = place.offset + at;
            let (chunk, until) = match self.policy {
                Registration::All => (0, u64::MAX),
                Registration::Chunks { .. } => {
                    let chunk = offset / CHUNK_BYTES;
                    (chunk, (chunk + 1) * CHUNK_BYTES)
                }
            };
            let mr = domain.chunk(&self.memory, (place.region_index, chunk), self.policy)?;
            let length = (span.len() as u64 - at).min(until - offset);
            to.pieces.push(Sge {
                address: span.as_ptr() as u64 + at,
                // At most a slot.
                length: length as u32,
                lkey: mr.lkey(),
            });
            to.held.push(mr);
            at += length;
        }
        Ok(())
    }
}

impl Domain {
    fn chunk(
        &mut self,
        memory: &GuestMemory,
        key: (u32, u64),
        policy: Registration,
    ) -> Result<Arc<Mr>, Refused> {
        self.clock += 1;
        if let Some(chunk) = self.chunks.get_mut(&key) {
            chunk.used = self.clock;
            return Ok(Arc::clone(&chunk.mr));
        }
        let Registration::Chunks { bytes_max } = policy else {
            return Err(Refused::Failed(io::Error::other(
                "a region that was not registered",
            )));
        };
        let region_bytes = memory
            .layouts()
            .nth(key.0 as usize)
            .map_or(0, |layout| layout.bytes);
        let offset = key.1 * CHUNK_BYTES;
        let bytes = CHUNK_BYTES.min(region_bytes.saturating_sub(offset));
        while self.bytes + bytes > bytes_max.max(CHUNK_BYTES) && self.evict() {}
        loop {
            match self.register(memory, key, offset, bytes) {
                Ok(mr) => return Ok(mr),
                Err(error) if error.raw_os_error() != Some(libc::ENOMEM) => {
                    return Err(Refused::Failed(error));
                }
                // The limit on locked memory is below ours: with fewer chunks it may do.
                Err(_) if self.evict() => {}
                Err(_) if !self.chunks.is_empty() => return Err(Refused::Busy),
                Err(error) => return Err(Refused::Failed(explain(error, bytes))),
            }
        }
    }

    fn register(
        &mut self,
        memory: &GuestMemory,
        key: (u32, u64),
        offset: u64,
        bytes: u64,
    ) -> io::Result<Arc<Mr>> {
        let mr = Mr::new(&self.pd, memory, key.0, offset, bytes, Access::ReadHere)?;
        let mr = Arc::new(mr);
        let chunk = Chunk {
            mr: Arc::clone(&mr),
            bytes,
            used: self.clock,
        };
        self.bytes += bytes;
        self.chunks.insert(key, chunk);
        Ok(mr)
    }

    /// Forgets the chunk that was not used for longest and that nothing posted reads; says whether there was one.
    fn evict(&mut self) -> bool {
        let idle = self
            .chunks
            .iter()
            .filter(|(_, chunk)| Arc::strong_count(&chunk.mr) == 1)
            .min_by_key(|(_, chunk)| chunk.used)
            .map(|(key, _)| *key);
        match idle.and_then(|key| self.chunks.remove(&key)) {
            Some(chunk) => {
                self.bytes -= chunk.bytes;
                true
            }
            None => false,
        }
    }
}

/// Says what to do about a limit; keeps the number of the error.
pub(super) fn explain(error: io::Error, bytes: u64) -> io::Error {
    let Some(libc::ENOMEM) = error.raw_os_error() else {
        return error;
    };
    match locked_bytes_max() {
        Some(limit) if limit < 1 << 40 => io::Error::other(Locked { bytes, limit }),
        _ => error,
    }
}

/// Memory could not be pinned within the process's limit.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} KiB could not be registered with the RDMA device: the process may lock {} KiB (RLIMIT_MEMLOCK, `ulimit -l`, LimitMEMLOCK of \
     systemd). Raise it, or register by smaller chunks",
    bytes >> 10,
    limit >> 10
)]
struct Locked {
    bytes: u64,
    limit: u64,
}
