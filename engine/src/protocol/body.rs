//! Numbers in a body: little-endian, one after the other, no padding.

use super::Malformed;

/// Reads a body from its begin.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'b> {
    what: &'static str,
    left: &'b [u8],
    bytes: usize,
}

impl<'b> Reader<'b> {
    /// Of `what`.
    #[must_use]
    pub const fn new(what: &'static str, body: &'b [u8]) -> Self {
        Self {
            what,
            left: body,
            bytes: body.len(),
        }
    }

    /// The next bytes.
    ///
    /// # Errors
    /// [`Malformed::Short`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let Some((array, left)) = self.left.split_first_chunk::<N>() else {
            return Err(Malformed::Short {
                what: self.what,
                bytes: self.bytes,
                needed: self.bytes - self.left.len() + N,
            });
        };
        self.left = left;
        Ok(*array)
    }

    /// The next number.
    ///
    /// # Errors
    /// [`Malformed::Short`].
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next number.
    ///
    /// # Errors
    /// [`Malformed::Short`].
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// Four bytes that are zero, so that a later version can use them.
    ///
    /// # Errors
    /// [`Malformed::Value`].
    pub fn zero(&mut self) -> Result<(), Malformed> {
        match self.u32()? {
            0 => Ok(()),
            value => Err(Malformed::Value {
                what: "a reserved word",
                value: value.into(),
            }),
        }
    }

    /// A count of things, and a zero.
    ///
    /// # Errors
    /// [`Malformed::Count`] if there may not be so many.
    pub fn count(&mut self, what: &'static str, max: usize) -> Result<usize, Malformed> {
        let count = self.u32()?;
        self.zero()?;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= max)
            .ok_or(Malformed::Count {
                what,
                count: count.into(),
                max: max as u64,
            })
    }

    /// Everything that was not read.
    #[must_use]
    pub const fn rest(self) -> &'b [u8] {
        self.left
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// [`Malformed::Trailing`].
    pub fn end(self) -> Result<(), Malformed> {
        match self.left.len() {
            0 => Ok(()),
            bytes => Err(Malformed::Trailing {
                what: self.what,
                bytes,
            }),
        }
    }
}

/// Writes a body.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// A number.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// A number.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// How many things follow.
    pub fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
        self.u32(0);
    }

    /// Bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The body.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}
