//! A multifd channel of QEMU: an init of 64 bytes, then packets of a head and the pages that it names.
//!
//! ```text
//!   init: magic version uuid[16] id, 64 bytes in all
//!   head: magic version flags pages_alloc normal_pages next_packet_bytes packet[8] zero_pages ..., 320 + 8 × pages_alloc bytes
//! ```

use super::Seen;

const INIT_BYTES: u64 = 64;

/// The part of a head that is read.
const HEAD_BYTES: usize = 36;

/// Pages that a packet of 4 KiB pages has room for. From 9.0 on a packet that only marks the end of a pass says 0 and has the room all
/// the same.
const PACKET_PAGES: u32 = 128;

/// Pages that a packet may have: QEMU's have 128 of 4 KiB; more than this is not believed.
const PACKET_PAGES_MAX: u32 = 4096;

const MAGIC: u32 = 0x1122_3344;

/// Flags of which a packet may have one: how its pages are compressed.
const METHODS: u32 = 0x3e;

/// The packet carries a device's state.
const DEVICE_STATE: u32 = 0x40;

/// The tap of one multifd channel.
#[derive(Debug)]
pub struct Pages {
    skip: u64,
    held: Vec<u8>,
    seen: Seen,
    stopped: bool,
}

impl Pages {
    /// A channel of which nothing came yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            skip: INIT_BYTES,
            held: Vec::with_capacity(HEAD_BYTES),
            seen: Seen::default(),
            stopped: false,
        }
    }

    /// What was seen of memory.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.seen
    }

    /// Bytes on their way, in order.
    pub fn feed(&mut self, mut octets: &[u8]) {
        while !octets.is_empty() && !self.stopped {
            if self.skip > 0 {
                let bytes = usize::try_from(self.skip)
                    .unwrap_or(usize::MAX)
                    .min(octets.len());
                octets = &octets[bytes..];
                self.skip -= bytes as u64;
                continue;
            }
            let bytes = (HEAD_BYTES - self.held.len()).min(octets.len());
            self.held.extend_from_slice(&octets[..bytes]);
            octets = &octets[bytes..];
            if self.held.len() == HEAD_BYTES {
                self.head();
                self.held.clear();
            }
        }
    }

    fn head(&mut self) {
        let word = |at: usize| {
            let octets = self.held.get(at..).and_then(<[u8]>::first_chunk);
            octets.map_or(0, |octets| u32::from_be_bytes(*octets))
        };
        let (flags, alloc, normal, packet, zero) =
            (word(8), word(12), word(16), word(20), word(32));
        let sane =
            word(0) == MAGIC && alloc <= PACKET_PAGES_MAX && normal <= alloc && zero <= alloc;
        if !sane || flags & DEVICE_STATE != 0 {
            self.stopped = true;
            return;
        }
        self.seen.pages += u64::from(normal);
        self.seen.zero_pages += u64::from(zero);
        let body = if flags & METHODS == 0 {
            u64::from(normal) * 4096
        } else {
            u64::from(packet)
        };
        self.skip = 320 + 8 * u64::from(alloc.max(PACKET_PAGES)) - HEAD_BYTES as u64 + body;
    }
}

impl Default for Pages {
    fn default() -> Self {
        Self::new()
    }
}
