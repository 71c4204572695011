//! CONFIG: one part of a blob with the configuration of the machine, sent before anything is prepared.
//!
//! The table is that of every blob part; see [`BlobPart`]. The body is the part's octets.

use super::blob::{self, BlobPart};
use super::table::Fixed;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;

/// One part of a blob with the configuration of the machine, sent before anything is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Which part of which blob the body is.
    pub blob: BlobPart,
}

impl Fixed for Config {
    type Raw = blob::Raw;
    const KIND: Kind = Kind::Config;

    fn from_raw(raw: &blob::Raw, header: &Header) -> Result<Self, Malformed> {
        BlobPart::from_raw(raw, header).map(|blob| Self { blob })
    }

    fn to_raw(&self) -> blob::Raw {
        self.blob.to_raw()
    }
}
