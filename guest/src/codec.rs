//! A reader that cannot run past its bytes, and the values it reads: fixed little-endian structures.
//!
//! Both encodings of this crate (configuration and state) come from a peer. Nothing in them reaches an allocation or a
//! loop before it is bounded, and bytes left over are an error.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::{Error, Result};

/// The bytes of one encoding, taken from the front.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `octets`; `what` names the encoding in errors.
    pub(crate) fn new(what: &'static str, octets: &'a [u8]) -> Self {
        Self { what, rest: octets }
    }

    /// The next value.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the bytes end before it does.
    pub(crate) fn take<T: FromBytes>(&mut self) -> Result<T> {
        let bytes = size_of::<T>();
        let Some((octets, rest)) = self.rest.split_at_checked(bytes) else {
            return Err(self.malformed(format!(
                "{} bytes are left where {bytes} are needed",
                self.rest.len()
            )));
        };
        self.rest = rest;
        T::read_from_bytes(octets)
            .map_err(|_| self.malformed("a value has the wrong size".to_owned()))
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`Error::Malformed`] if bytes are left over.
    pub(crate) fn finish(self) -> Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(self.malformed(format!("{left} bytes follow its end"))),
        }
    }

    /// Refuses anything but `wanted` for the field `field`.
    ///
    /// # Errors
    /// [`Error::Malformed`] if they differ.
    pub(crate) fn expect<T: PartialEq + std::fmt::Debug>(
        &self,
        field: &str,
        found: T,
        wanted: T,
    ) -> Result<()> {
        if found == wanted {
            return Ok(());
        }
        Err(self.malformed(format!("{field} is {found:?} and must be {wanted:?}")))
    }

    /// An error about this encoding.
    pub(crate) fn malformed(&self, detail: String) -> Error {
        Error::Malformed {
            what: self.what,
            detail,
        }
    }
}

/// Appends the bytes of `value`.
pub(crate) fn put<T: IntoBytes + Immutable>(octets: &mut Vec<u8>, value: &T) {
    octets.extend_from_slice(value.as_bytes());
}
