//! CRC-32 over guest memory, read through raw pointers.
//!
//! The library that this project uses, `crc32fast`, takes a slice, and a slice over guest memory must not exist. To copy each
//! page to private memory first costs more than the checksum itself (docs/decisions/0003). So the bulk is folded here with
//! carry-less multiplication straight from guest memory into registers, and reduced there. Without the instructions, or for odd
//! lengths, a private copy is taken and given to the library; the tests hold every way to the library's result.
//!
//! Folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009): in the reflected domain
//! 128 bits `a`, `distance` bits ahead of `d`, may be replaced by `lo(a)·k_lo ⊕ hi(a)·k_hi ⊕ d` with
//! `k_lo = x^(distance+32) mod P`, `k_hi = x^(distance−32) mod P`. The constants are computed below, at compile time.
//! A guest that writes meanwhile changes which bytes are summed, nothing else.

use super::Span;

/// The folding below goes in steps of this many bytes.
const STEP_BYTES: usize = 256;

/// How far ahead of the bytes being summed the next ones are fetched into the cache: a page less the step that is loaded
/// before the loop, so that the whole of the next page comes in while this one is summed.
const AHEAD_BYTES: usize = 4096 - STEP_BYTES;

impl Span<'_> {
    /// CRC-32 (IEEE 802.3, reflected: the one of zlib and `crc32fast`) of the span's bytes.
    ///
    /// If they are written meanwhile, the sum is that of some mixture of old and new bytes.
    #[must_use]
    pub fn crc32(&self) -> u32 {
        #[cfg(target_arch = "x86_64")]
        if self.len() >= STEP_BYTES && self.len().is_multiple_of(STEP_BYTES) {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq") {
                // SAFETY: the features were just detected; the span is mapped and readable and its length is a multiple of
                // STEP_BYTES, at least one.
                return unsafe { x86::fold_512(self.as_ptr(), self.len()) };
            }
            if is_x86_feature_detected!("pclmulqdq") && is_x86_feature_detected!("sse4.1") {
                // SAFETY: as above.
                return unsafe { x86::fold_128(self.as_ptr(), self.len()) };
            }
        }
        self.crc32_by_copy()
    }

    /// The same, by a private copy in small pieces.
    fn crc32_by_copy(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        let mut piece = [0u8; 4096];
        let mut done = 0;
        while let Some(part) = piece.get_mut(..(self.len() - done).min(4096))
            && !part.is_empty()
            && let Ok(span) = self.subspan(done, part.len())
        {
            span.copy_to(part);
            hasher.update(part);
            done += part.len();
        }
        hasher.finalize()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m512i, _MM_HINT_T0, _mm_and_si128, _mm_clmulepi64_si128, _mm_cvtsi32_si128,
        _mm_extract_epi32, _mm_loadu_si128, _mm_prefetch, _mm_set_epi32, _mm_set_epi64x,
        _mm_srli_si128, _mm_xor_si128, _mm512_broadcast_i32x4, _mm512_clmulepi64_epi128,
        _mm512_extracti32x4_epi32, _mm512_loadu_si512, _mm512_ternarylogic_epi64, _mm512_xor_si512,
        _mm512_zextsi128_si512,
    };

    use super::{AHEAD_BYTES, STEP_BYTES};

    /// x^bits mod P, reflected, in the form that a reflected carry-less product wants (shifted left by one).
    const fn power(bits: u32) -> i64 {
        let mut remainder: u32 = 1;
        let mut done = 0;
        while done < bits {
            let carry = remainder >> 31;
            remainder = (remainder << 1) ^ (carry * 0x04C1_1DB7);
            done += 1;
        }
        (remainder.reverse_bits() as i64) << 1
    }

    /// `(k_lo, k_hi)` for a distance in bits.
    const fn keys(distance: u32) -> (i64, i64) {
        (power(distance + 32), power(distance - 32))
    }

    // Constants in name and in fact: computed at every call they would cost a hundred times the checksum.
    const FAR: (i64, i64) = keys(STEP_BYTES as u32 * 8);
    const NEAR: (i64, i64) = keys(512);

    const NEXT: (i64, i64) = keys(128);
    const HALF: i64 = power(64);
    /// P itself and the quotient x^64 / P, reflected: for Barrett's reduction.
    const BARRETT: (i64, i64) = (0x1_db71_0641, 0x1_f701_1641);

    // The published constants, as a check of `power`.
    const _: () = assert!(NEAR.0 == 0x1_5444_2bd4 && NEAR.1 == 0x1_c6e4_1596);
    const _: () =
        assert!(NEXT.0 == 0x1_7519_97d0 && NEXT.1 == 0x0_ccaa_009e && HALF == 0x1_63cd_6124);

    /// Replaces 128 bits by their remainder at a distance.
    #[target_feature(enable = "pclmulqdq,sse4.1")]
    fn fold(ahead: __m128i, onto: __m128i, (low, high): (i64, i64)) -> __m128i {
        let keys = _mm_set_epi64x(high, low);
        let low = _mm_clmulepi64_si128::<0x00>(ahead, keys);
        let high = _mm_clmulepi64_si128::<0x11>(ahead, keys);
        _mm_xor_si128(_mm_xor_si128(low, high), onto)
    }

    /// The checksum of 512 folded bits: 512 → 128 → 96 → 64 → 32 bits. The register's start value was folded in with the first
    /// bytes; its complement at the end is left to do.
    #[target_feature(enable = "pclmulqdq,sse4.1")]
    fn reduce([a, b, c, d]: [__m128i; 4]) -> u32 {
        let last = fold(fold(fold(a, b, NEXT), c, NEXT), d, NEXT);
        let low_half = _mm_set_epi32(0, 0, 0, -1);
        let keys = _mm_set_epi64x(HALF, NEXT.1);
        let rest = _mm_xor_si128(
            _mm_srli_si128::<8>(last),
            _mm_clmulepi64_si128::<0x00>(last, keys),
        );
        let product = _mm_clmulepi64_si128::<0x10>(_mm_and_si128(rest, low_half), keys);
        let rest = _mm_xor_si128(_mm_srli_si128::<4>(rest), product);
        let keys = _mm_set_epi64x(BARRETT.1, BARRETT.0);
        let quotient = _mm_clmulepi64_si128::<0x10>(_mm_and_si128(rest, low_half), keys);
        let product = _mm_clmulepi64_si128::<0x00>(_mm_and_si128(quotient, low_half), keys);
        !_mm_extract_epi32::<1>(_mm_xor_si128(rest, product)).cast_unsigned()
    }

    /// # Safety
    /// `len` bytes at `start` are mapped and readable; `len` is a multiple of `STEP_BYTES` and not 0; the features exist.
    #[target_feature(enable = "avx512f,vpclmulqdq")]
    pub(super) unsafe fn fold_512(start: *const u8, len: usize) -> u32 {
        let pair = |(low, high): (i64, i64)| _mm512_broadcast_i32x4(_mm_set_epi64x(high, low));
        let (far, near) = (pair(FAR), pair(NEAR));
        let fold = |ahead: __m512i, onto: __m512i, keys: __m512i| {
            let low = _mm512_clmulepi64_epi128::<0x00>(ahead, keys);
            let high = _mm512_clmulepi64_epi128::<0x11>(ahead, keys);
            _mm512_ternarylogic_epi64::<0x96>(low, high, onto)
        };
        let load = |offset: usize| {
            // SAFETY: every caller below passes offset + 64 ≤ len.
            let at = unsafe { start.add(offset) };
            // SAFETY: 64 mapped, readable bytes; an unaligned load.
            unsafe { _mm512_loadu_si512(at.cast()) }
        };
        let mut lanes = [load(0), load(64), load(128), load(192)];
        lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1)));
        let mut offset = STEP_BYTES;
        while offset < len {
            // The hardware's prefetchers stop at the end of a page, and pages are summed one after the other.
            for line in 0..STEP_BYTES / 64 {
                let ahead = start.wrapping_add(offset + AHEAD_BYTES + line * 64);
                // A hint: an address that is not mapped is ignored.
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            }
            lanes[0] = fold(lanes[0], load(offset), far);
            lanes[1] = fold(lanes[1], load(offset + 64), far);
            lanes[2] = fold(lanes[2], load(offset + 128), far);
            lanes[3] = fold(lanes[3], load(offset + 192), far);
            offset += STEP_BYTES;
        }
        let [a, b, c, d] = lanes;
        let last = fold(fold(fold(a, b, near), c, near), d, near);
        reduce([
            _mm512_extracti32x4_epi32::<0>(last),
            _mm512_extracti32x4_epi32::<1>(last),
            _mm512_extracti32x4_epi32::<2>(last),
            _mm512_extracti32x4_epi32::<3>(last),
        ])
    }

    /// # Safety
    /// As [`fold_512`].
    #[target_feature(enable = "pclmulqdq,sse4.1")]
    pub(super) unsafe fn fold_128(start: *const u8, len: usize) -> u32 {
        let load = |offset: usize| {
            // SAFETY: every caller below passes offset + 16 ≤ len.
            let at = unsafe { start.add(offset) };
            // SAFETY: 16 mapped, readable bytes; an unaligned load.
            unsafe { _mm_loadu_si128(at.cast()) }
        };
        let mut lanes = [load(0), load(16), load(32), load(48)];
        lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(-1));
        let mut offset = 64;
        while offset < len {
            for (index, lane) in lanes.iter_mut().enumerate() {
                *lane = fold(*lane, load(offset + 16 * index), NEAR);
            }
            offset += 64;
        }
        reduce(lanes)
    }
}

#[cfg(test)]
mod tests {
    use crate::memory::{GuestMemory, RegionLayout};

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    #[test]
    fn every_way_gives_the_sum_of_the_library() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 1 << 20,
        }])
        .unwrap();
        let content = noise(1 << 20);
        memory.span(0, 0, 1 << 20).unwrap().copy_from(&content);
        for (offset, len) in [
            (0, 256),
            (0, 512),
            (4096, 4096),
            (3, 4096),
            (0, 65536),
            (0, 1 << 20),
            (7, 1),
            (0, 0),
            (5, 255),
            (1, 257),
            (64, 768),
        ] {
            let span = memory.span(0, offset as u64, len as u64).unwrap();
            let want = crc32fast::hash(&content[offset..offset + len]);
            assert_eq!(span.crc32(), want, "{offset} {len}");
            assert_eq!(span.crc32_by_copy(), want, "{offset} {len}");
            #[cfg(target_arch = "x86_64")]
            if len >= 256 && len % 256 == 0 && is_x86_feature_detected!("pclmulqdq") {
                // SAFETY: the feature is there, the span is mapped, its length is a multiple of 256.
                let folded = unsafe { super::x86::fold_128(span.as_ptr(), len) };
                assert_eq!(folded, want, "{offset} {len}");
            }
        }
    }

    #[test]
    fn a_page_of_zeros_has_the_known_sum() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 4096,
        }])
        .unwrap();
        assert_eq!(memory.span(0, 0, 4096).unwrap().crc32(), 0xc71c_0011);
    }
}
