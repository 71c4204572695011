//! What the two ends of an RDMA channel say to each other, as bytes. Little-endian, reserved bytes are zero.
//!
//! ```text
//!   greeting, 64 bytes, the first message each way; the dialling side's first (an iWARP listener may not speak first)
//!     0 magic "MFDRDMA1"   8 version   12 message_bytes   16 messages   20 slots   24 slot_bytes (u64)
//!    32 landing_address (u64)   40 credit_address (u64)   48 landing_key   52 credit_key   56 reserved   60 CRC-32 of 0..60
//!   message, 16 bytes and the inline bytes
//!     0 kind (1 data, 2 end)   1 reserved   2 inline_bytes (u16)   4 landed_bytes   8 slot   12 number (from 0)
//!   credit, 16 bytes, written into the peer's memory
//!     0 messages (u32) and slots (u32) that were used up, counted from 0 and wrapping   8 the same bytes inverted
//! ```
//! Rule: nothing of the peer's is used before it was compared with its limit.

/// The version of this agreement.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"MFDRDMA1";

/// What the connection request carries: enough to turn away what is no multifd.
pub(super) const PRIVATE: &[u8; 8] = MAGIC;

/// A message's buffer, header included.
pub(super) const MESSAGE_BYTES: usize = 4096;
/// A message's header.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes that a message carries itself.
pub(super) const INLINE_BYTES_MAX: usize = MESSAGE_BYTES - HEADER_BYTES;
/// The greeting.
pub(super) const GREETING_BYTES: usize = 64;
/// A credit.
pub(super) const CREDIT_BYTES: usize = 16;

/// The least and the most messages that a peer may have room for. Two: one is kept for the end.
const MESSAGES: std::ops::RangeInclusive<u32> = 2..=4096;
/// The least and the most landing slots of a peer.
const SLOTS: std::ops::RangeInclusive<u32> = 1..=4096;
/// The least and the most bytes of a peer's slot.
const SLOT_BYTES: std::ops::RangeInclusive<u64> = 4096..=4 << 20;

/// What one end offers the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// Messages that may be sent without credit.
    pub(super) messages: u32,
    /// Slots of the landing, used one after the other.
    pub(super) slots: u32,
    pub(super) slot_bytes: u64,
    pub(super) landing_address: u64,
    pub(super) landing_key: u32,
    /// Where the other end leaves credit.
    pub(super) credit_address: u64,
    pub(super) credit_key: u32,
}

/// What is wrong with a peer's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Wrong {
    #[error("its greeting is not of this kind of channel")]
    Magic,
    #[error("its greeting was damaged")]
    Checksum,
    #[error("it speaks version {0} of this kind of channel, and this side version {VERSION}")]
    Version(u32),
    #[error("it offers {what} of {value}, which is out of bounds")]
    Bounds { what: &'static str, value: u64 },
    #[error("a message of {0} bytes has no whole header, or other bytes than it says")]
    Length(usize),
    #[error("a message of the unknown kind {0}, or with reserved bytes set")]
    Kind(u8),
    #[error("message {got} came where {expected} was expected")]
    Number { got: u32, expected: u32 },
    #[error("it says that {bytes} bytes landed in slot {slot}, out of turn or more than fit")]
    Slot { slot: u32, bytes: u32 },
    #[error("it gave credit for what was not sent")]
    Credit,
    #[error("bytes after the end of its stream")]
    AfterEnd,
}

impl Greeting {
    pub(super) fn encode(&self) -> [u8; GREETING_BYTES] {
        let mut to = [0; GREETING_BYTES];
        to[..8].copy_from_slice(MAGIC);
        put(&mut to, 8, VERSION);
        put(&mut to, 12, MESSAGE_BYTES as u32);
        put(&mut to, 16, self.messages);
        put(&mut to, 20, self.slots);
        to[24..32].copy_from_slice(&self.slot_bytes.to_le_bytes());
        to[32..40].copy_from_slice(&self.landing_address.to_le_bytes());
        to[40..48].copy_from_slice(&self.credit_address.to_le_bytes());
        put(&mut to, 48, self.landing_key);
        put(&mut to, 52, self.credit_key);
        let crc = crc32fast::hash(&to[..60]);
        put(&mut to, 60, crc);
        to
    }

    pub(super) fn decode(octets: &[u8; GREETING_BYTES]) -> Result<Self, Wrong> {
        if &octets[..8] != MAGIC {
            return Err(Wrong::Magic);
        }
        if crc32fast::hash(&octets[..60]) != get(octets, 60) {
            return Err(Wrong::Checksum);
        }
        if get(octets, 8) != VERSION {
            return Err(Wrong::Version(get(octets, 8)));
        }
        let found = Self {
            messages: get(octets, 16),
            slots: get(octets, 20),
            slot_bytes: get_u64(octets, 24),
            landing_address: get_u64(octets, 32),
            credit_address: get_u64(octets, 40),
            landing_key: get(octets, 48),
            credit_key: get(octets, 52),
        };
        let out = |what, value| Err(Wrong::Bounds { what, value });
        if get(octets, 12) != MESSAGE_BYTES as u32 {
            return out("messages", u64::from(get(octets, 12)));
        }
        if get(octets, 56) != 0 {
            return out("reserved bytes", u64::from(get(octets, 56)));
        }
        if !MESSAGES.contains(&found.messages) {
            return out("a number of messages", u64::from(found.messages));
        }
        if !SLOTS.contains(&found.slots) {
            return out("a number of slots", u64::from(found.slots));
        }
        if !SLOT_BYTES.contains(&found.slot_bytes) {
            return out("slots", found.slot_bytes);
        }
        let bytes = found.slot_bytes * u64::from(found.slots);
        if found.landing_address.checked_add(bytes).is_none() {
            return out("a landing", found.landing_address);
        }
        if found
            .credit_address
            .checked_add(CREDIT_BYTES as u64)
            .is_none()
        {
            return out("a place for credit", found.credit_address);
        }
        Ok(found)
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data,
    End,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) inline_bytes: u16,
    /// Bytes in the slot, which follow the inline ones in the stream; none if no slot is used.
    pub(super) landed_bytes: u32,
    pub(super) slot: u32,
    pub(super) number: u32,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut to = [0; HEADER_BYTES];
        to[0] = match self.kind {
            Kind::Data => 1,
            Kind::End => 2,
        };
        to[2..4].copy_from_slice(&self.inline_bytes.to_le_bytes());
        put(&mut to, 4, self.landed_bytes);
        put(&mut to, 8, self.slot);
        put(&mut to, 12, self.number);
        to
    }

    /// `message_bytes` is how long the message was, as the device says.
    pub(super) fn decode(octets: &[u8; HEADER_BYTES], message_bytes: usize) -> Result<Self, Wrong> {
        let kind = match (octets[0], octets[1]) {
            (1, 0) => Kind::Data,
            (2, 0) => Kind::End,
            (kind, _) => return Err(Wrong::Kind(kind)),
        };
        let found = Self {
            kind,
            inline_bytes: u16::from_le_bytes([octets[2], octets[3]]),
            landed_bytes: get(octets, 4),
            slot: get(octets, 8),
            number: get(octets, 12),
        };
        if message_bytes != HEADER_BYTES + usize::from(found.inline_bytes) {
            return Err(Wrong::Length(message_bytes));
        }
        if kind == Kind::End && (found.inline_bytes != 0 || found.landed_bytes != 0) {
            return Err(Wrong::Length(message_bytes));
        }
        Ok(found)
    }
}

/// What one end has used up of what the other sent, counted from the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    pub(super) messages: u32,
    pub(super) slots: u32,
}

impl Credit {
    pub(super) fn encode(self) -> [u8; CREDIT_BYTES] {
        let mut to = [0; CREDIT_BYTES];
        put(&mut to, 0, self.messages);
        put(&mut to, 4, self.slots);
        put(&mut to, 8, !self.messages);
        put(&mut to, 12, !self.slots);
        to
    }

    /// `None` if the bytes were read while they were written.
    pub(super) fn decode(octets: &[u8; CREDIT_BYTES]) -> Option<Self> {
        let found = Self {
            messages: get(octets, 0),
            slots: get(octets, 4),
        };
        (get(octets, 8) == !found.messages && get(octets, 12) == !found.slots).then_some(found)
    }
}

fn put(to: &mut [u8], at: usize, value: u32) {
    to[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The four bytes at a place inside `from`.
fn get(from: &[u8], at: usize) -> u32 {
    let mut octets = [0; 4];
    octets.copy_from_slice(&from[at..at + 4]);
    u32::from_le_bytes(octets)
}

fn get_u64(from: &[u8], at: usize) -> u64 {
    u64::from(get(from, at)) | u64::from(get(from, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: Greeting = Greeting {
        messages: 64,
        slots: 16,
        slot_bytes: 256 << 10,
        landing_address: 0x7f00_1234_5000,
        landing_key: 0x1234,
        credit_address: 0x7f00_0000_1000,
        credit_key: 0x5678,
    };

    fn resealed(change: impl FnOnce(&mut [u8; GREETING_BYTES])) -> Result<Greeting, Wrong> {
        let mut octets = GREETING.encode();
        change(&mut octets);
        let crc = crc32fast::hash(&octets[..60]);
        put(&mut octets, 60, crc);
        Greeting::decode(&octets)
    }

    #[test]
    fn a_greeting_reads_as_it_was_written() {
        assert_eq!(Greeting::decode(&GREETING.encode()), Ok(GREETING));
        for bit in 0..GREETING_BYTES * 8 {
            let mut octets = GREETING.encode();
            octets[bit / 8] ^= 1 << (bit % 8);
            assert!(Greeting::decode(&octets).is_err(), "bit {bit}");
        }
    }

    // SPEC: BELOW-5
    #[test]
    fn a_greeting_out_of_bounds_is_refused_by_name() {
        for (at, value) in [
            (12, 4095),
            (16, 1),
            (16, 4097),
            (20, 0),
            (20, 4097),
            (24, 4095),
            (24, (4 << 20) + 1),
            (28, 1),
            (56, 1),
        ] {
            let result = resealed(|octets| put(octets, at, value));
            assert!(
                matches!(result, Err(Wrong::Bounds { .. })),
                "{at}: {result:?}"
            );
        }
        let far =
            resealed(|octets| octets[32..40].copy_from_slice(&(u64::MAX - 4096).to_le_bytes()));
        assert!(matches!(far, Err(Wrong::Bounds { .. })));
        let far = resealed(|octets| octets[40..48].copy_from_slice(&(u64::MAX - 8).to_le_bytes()));
        assert!(matches!(far, Err(Wrong::Bounds { .. })));
        assert_eq!(resealed(|octets| put(octets, 8, 2)), Err(Wrong::Version(2)));
        for (at, value) in [
            (16, 2),
            (16, 4096),
            (20, 1),
            (20, 4096),
            (24, 4096),
            (24, 4 << 20),
        ] {
            assert!(
                resealed(|octets| put(octets, at, value)).is_ok(),
                "{at}: {value}"
            );
        }
    }

    // SPEC: BELOW-6
    #[test]
    fn a_header_reads_as_it_was_written_and_its_length_must_be_the_message_s() {
        let header = Header {
            kind: Kind::Data,
            inline_bytes: 40,
            landed_bytes: 4096,
            slot: 3,
            number: 7,
        };
        assert_eq!(Header::decode(&header.encode(), 56), Ok(header));
        for bytes in [16, 55, 57, 4096] {
            assert_eq!(
                Header::decode(&header.encode(), bytes),
                Err(Wrong::Length(bytes))
            );
        }
        for (at, value) in [(0, 0), (0, 3), (1, 1)] {
            let mut octets = header.encode();
            octets[at] = value;
            assert!(matches!(Header::decode(&octets, 56), Err(Wrong::Kind(_))));
        }
        let end = Header {
            kind: Kind::End,
            ..header
        };
        assert!(
            Header::decode(&end.encode(), 56).is_err(),
            "an end carries nothing"
        );
    }

    // SPEC: BELOW-8
    #[test]
    fn credit_that_is_half_written_is_no_credit() {
        let credit = Credit {
            messages: 0x0102_0304,
            slots: 0xfffe_fdfc,
        };
        assert_eq!(Credit::decode(&credit.encode()), Some(credit));
        for bit in 0..CREDIT_BYTES * 8 {
            let mut octets = credit.encode();
            octets[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Credit::decode(&octets), None, "bit {bit}");
        }
        assert_eq!(Credit::decode(&[0; CREDIT_BYTES]), None);
    }
}
