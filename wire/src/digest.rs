//! The running digest: one number for all of guest memory, kept up to date as pages move, in any order.
//!
//! Each page has a 32-bit value: its CRC-32 exclusive-or the CRC-32 of a page of zeros, so that memory that is all zero
//! has the value 0 everywhere and costs nothing. A page's term mixes region, page and value into 64 bits; the digest
//! is the wrapping sum of all terms, so pages may land in any order and lanes may sum apart and merge.
//! Source: SPEC, section "Digest".
//!
//! It proves that both sides hold the same versions after accidents; it is no defence against a peer that forges pages.

use crate::id::{PageIndex, RegionId};

/// CRC-32 of a page of zeros. SPEC: DIGEST-1
pub const ZERO_PAGE_CRC: u32 = 0xc71c_0011;

/// The value of a page with this CRC-32; 0 for a page of zeros.
// SPEC: DIGEST-1
#[must_use]
pub const fn page_value(crc: u32) -> u32 {
    crc ^ ZERO_PAGE_CRC
}

/// The term that one page adds to the digest; 0 for a page of zeros.
// SPEC: DIGEST-2
#[must_use]
pub const fn term(region: RegionId, page: PageIndex, value: u32) -> u64 {
    if value == 0 {
        return 0;
    }
    let place = (widen(region.value()) << 40) | page.value();
    let mut mixed = place.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^= widen(value).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
    mixed ^= mixed >> 29;
    mixed = mixed.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 32)
}

/// A `u32` as `u64` in a `const fn`, where `From` cannot be called and `as` is not used in this crate.
const fn widen(value: u32) -> u64 {
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([a, b, c, d, 0, 0, 0, 0])
}

/// The digest of guest memory, or a change to it. The digest of memory that is all zero is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digest(u64);

impl Digest {
    /// The digest of memory that is all zero, and the change that changes nothing.
    pub const EMPTY: Self = Self(0);

    /// A digest as it travelled.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The number as it travels.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// Replaces one page's old value by its new one. Both are [`page_value`]s, not CRCs.
    // SPEC: DIGEST-3
    pub const fn replace(&mut self, region: RegionId, page: PageIndex, old: u32, new: u32) {
        self.0 = self
            .0
            .wrapping_sub(term(region, page, old))
            .wrapping_add(term(region, page, new));
    }

    /// Adds the change that another thread gathered in a digest of its own that began [`EMPTY`](Self::EMPTY).
    // SPEC: DIGEST-3
    pub const fn merge(&mut self, delta: Self) {
        self.0 = self.0.wrapping_add(delta.0);
    }
}

impl core::fmt::Display for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_page_constant_is_the_crc_of_a_page_of_zeros() {
        assert_eq!(ZERO_PAGE_CRC, crc32fast::hash(&[0; crate::PAGE_BYTES]));
    }
}
