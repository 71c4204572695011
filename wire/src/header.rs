//! A frame's header: 32 octets that say what follows and how much of it.
//!
//! ```text
//!        0       2       4               8                              16
//!       +-------+-------+---------------+-------------------------------+
//!     0 | kind  | rsvd  | table_bytes   | sequence                      |
//!       +-------+-------+---------------+---------------+---------------+
//!    16 | body_bytes    | table_crc     | body_crc      | header_crc    |
//!       +---------------+---------------+---------------+---------------+
//! ```
//!
//! The rule it keeps: no field is looked at before the header's own checksum is right, and no length leaves this file that
//! is not within the bounds of its kind. It must never read a table or a body itself.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::{Malformed, Misbehaved};
use crate::id::Sequence;
use crate::kind::{BodyShape, Kind};

/// The size of a header in octets. SPEC: HEAD-1
pub const HEADER_BYTES: usize = 32;

/// The octets of a header that its checksum covers.
const COVERED_BYTES: usize = 28;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    kind: U16,
    reserved: U16,
    table_bytes: U32,
    sequence: U64,
    body_bytes: U32,
    table_crc: U32,
    body_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    table_bytes: u32,
    sequence: Sequence,
    body_bytes: u32,
    table_crc: u32,
    body_crc: u32,
}

impl Header {
    /// Checks a header: its checksum first, then reserved bits, its kind, and the sizes that its kind allows.
    ///
    /// # Errors
    /// [`Malformed`]: `HeaderCrc`, `Reserved`, `UnknownKind`, `TableBytes`, `BodyBytes`, or `Value` for a checksum of
    /// something that is not there.
    // SPEC: HEAD-2, HEAD-3, HEAD-4, HEAD-5
    pub fn decode(octets: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let raw: Raw = zerocopy::transmute!(*octets);
        let computed = raw.crc();
        let found = raw.header_crc.get();
        if found != computed {
            return Err(Malformed::HeaderCrc { found, computed });
        }
        codec::reserved("header.reserved", u64::from(raw.reserved.get()))?;
        let header = Self {
            kind: Kind::from_code(raw.kind.get())?,
            table_bytes: raw.table_bytes.get(),
            sequence: Sequence::new(raw.sequence.get()),
            body_bytes: raw.body_bytes.get(),
            table_crc: raw.table_crc.get(),
            body_crc: raw.body_crc.get(),
        };
        header.check()?;
        Ok(header)
    }

    /// Makes the header of a table and a body that were measured.
    ///
    /// # Errors
    /// As for [`decode`](Self::decode): what the peer would refuse is not made.
    pub(crate) fn new(
        kind: Kind,
        sequence: Sequence,
        table: &[u8],
        body_bytes: u32,
        body_crc: u32,
    ) -> Result<Self, Malformed> {
        let table_crc = crc32fast::hash(table);
        let table_bytes = codec::narrow(table.len());
        let header = Self {
            kind,
            table_bytes,
            sequence,
            body_bytes,
            table_crc,
            body_crc,
        };
        header.check()?;
        Ok(header)
    }

    /// The octets as they travel.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = Raw {
            kind: U16::new(self.kind.code()),
            reserved: U16::ZERO,
            table_bytes: U32::new(self.table_bytes),
            sequence: U64::new(self.sequence.value()),
            body_bytes: U32::new(self.body_bytes),
            table_crc: U32::new(self.table_crc),
            body_crc: U32::new(self.body_crc),
            header_crc: U32::ZERO,
        };
        raw.header_crc = U32::new(raw.crc());
        zerocopy::transmute!(raw)
    }

    /// Refuses sizes that the kind does not have and a checksum of nothing that is not 0.
    // SPEC: HEAD-5, HEAD-7, PAGES-5
    fn check(&self) -> Result<(), Malformed> {
        self.kind
            .check_sizes(self.table_bytes(), self.body_bytes())?;
        let unsummed = self.body_bytes == 0 || self.kind.shape().body == BodyShape::Pages;
        if unsummed && self.body_crc != 0 {
            return Err(Malformed::Value {
                field: "header.body_crc",
                value: u64::from(self.body_crc),
            });
        }
        Ok(())
    }

    /// The size of the whole frame: header, table and body.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        HEADER_BYTES
            .saturating_add(self.table_bytes())
            .saturating_add(self.body_bytes())
    }

    /// The frame's kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The size of the table that follows, at most [`TABLE_BYTES_MAX`](crate::limits::TABLE_BYTES_MAX).
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        codec::size(self.table_bytes)
    }

    /// The size of the body after the table, at most [`BODY_BYTES_MAX`](crate::limits::BODY_BYTES_MAX).
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        codec::size(self.body_bytes)
    }

    /// The frame's number on its channel and in its direction.
    #[must_use]
    pub const fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// The CRC-32 of the body; 0 without a body and for PAGES, whose table has one per page.
    #[must_use]
    pub const fn body_crc(&self) -> u32 {
        self.body_crc
    }

    /// Refuses a frame that is missing, doubled or out of order on its channel.
    ///
    /// # Errors
    /// [`Misbehaved::Sequence`].
    // SPEC: HEAD-8
    pub const fn check_sequence(&self, expected: Sequence) -> Result<(), Misbehaved> {
        let (expected, found) = (expected.value(), self.sequence.value());
        if expected == found {
            Ok(())
        } else {
            Err(Misbehaved::Sequence { expected, found })
        }
    }

    /// Refuses a table of another length or with another checksum than this header says.
    ///
    /// # Errors
    /// [`Malformed::TableBytes`] or [`Malformed::TableCrc`].
    // SPEC: HEAD-6
    pub fn check_table(&self, table: &[u8]) -> Result<(), Malformed> {
        if table.len() != self.table_bytes() {
            return Err(self.kind.table_error(table.len()));
        }
        let computed = crc32fast::hash(table);
        if computed == self.table_crc {
            Ok(())
        } else {
            Err(Malformed::TableCrc {
                kind: self.kind,
                found: self.table_crc,
                computed,
            })
        }
    }

    /// Refuses a body of another length or with another checksum than this header says. The checksum of PAGES is
    /// not here but in the table, one per page: for PAGES only the length is compared.
    ///
    /// # Errors
    /// [`Malformed::BodyBytes`] or [`Malformed::BodyCrc`].
    pub fn check_body(&self, body: &[u8]) -> Result<(), Malformed> {
        let bytes = self.body_bytes();
        if body.len() != bytes {
            return Err(self.kind.body_error(body.len(), bytes, bytes));
        }
        if self.kind.shape().body == BodyShape::Pages {
            return Ok(());
        }
        self.check_body_crc(crc32fast::hash(body))
    }

    /// Refuses a body whose checksum, computed by the caller as the octets came in, is not what this header says.
    ///
    /// # Errors
    /// [`Malformed::BodyCrc`].
    // SPEC: HEAD-7
    pub const fn check_body_crc(&self, computed: u32) -> Result<(), Malformed> {
        if computed == self.body_crc {
            Ok(())
        } else {
            Err(Malformed::BodyCrc {
                kind: self.kind,
                found: self.body_crc,
                computed,
            })
        }
    }
}

impl Raw {
    /// The checksum of everything before the checksum itself.
    fn crc(&self) -> u32 {
        let (covered, _) = self
            .as_bytes()
            .split_at_checked(COVERED_BYTES)
            .unwrap_or_default();
        crc32fast::hash(covered)
    }
}
