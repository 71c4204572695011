//! How a frame's table is read and written: the trait behind [`Frame`](super::Frame), and its short form for tables of
//! fixed size.

use zerocopy::IntoBytes;

use crate::codec::{self, Octets};
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::kind::Kind;

/// A frame that is read from, and written as, a table.
pub(crate) trait Table<'a>: Sized {
    /// Reads a table whose length and checksum agree with the header.
    fn read(header: &Header, table: &'a [u8]) -> Result<Self, Malformed>;

    /// How long the table is that [`write`](Self::write) appends.
    fn bytes(&self) -> usize;

    /// Appends the table. Values are not checked here: the encoder reads back what was written.
    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse>;
}

/// A frame whose table is one raw structure.
pub(crate) trait Fixed: Sized {
    /// The octets.
    type Raw: Octets;
    /// The kind whose table this is.
    const KIND: Kind;

    /// Checks the values. The header is there for kinds whose body's size must agree with the table.
    fn from_raw(raw: &Self::Raw, header: &Header) -> Result<Self, Malformed>;

    /// The raw structure, reserved fields zero.
    fn to_raw(&self) -> Self::Raw;
}

impl<F: Fixed> Table<'_> for F {
    fn read(header: &Header, table: &[u8]) -> Result<Self, Malformed> {
        F::from_raw(codec::whole(F::KIND, table)?, header)
    }

    fn bytes(&self) -> usize {
        size_of::<F::Raw>()
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        out.extend_from_slice(self.to_raw().as_bytes());
        Ok(())
    }
}

/// The number of entries as a field, refused before anything is written when a frame of this kind cannot hold them.
pub(crate) fn count(kind: Kind, entries: usize, max: usize) -> Result<u32, Misuse> {
    if entries > max {
        return Err(Misuse::TooMany {
            kind,
            count: entries,
            max,
        });
    }
    Ok(codec::narrow(entries))
}
