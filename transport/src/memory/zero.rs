//! Whether a stretch of guest memory is all zero: the first thing that is done with each page.
//!
//! Rule: every load is volatile and through a raw pointer, since others write the memory meanwhile, and no load leaves the
//! stretch. Speed: memory that is not in a cache arrives no faster than one core can ask for it, whichever loads are used; the wide
//! ones matter for what is cached, and leave the core time for other things.

use std::ptr;

/// How much is read between two looks at what was read: enough loads to keep the core busy, few enough to stop early on a page
/// that is not zero.
const BLOCK_BYTES: usize = 256;

/// Whether the `len` bytes at `start` are all zero.
///
/// # Safety
/// They must be mapped and readable.
pub(super) unsafe fn is_zero(start: *const u8, len: usize) -> bool {
    let blocks = len / BLOCK_BYTES;
    #[cfg(target_arch = "x86_64")]
    let wide = std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    let whole = if wide {
        // SAFETY: the processor has what `blocks_are_zero_wide` is compiled for, and the blocks lie inside the stretch.
        unsafe { blocks_are_zero_wide(start, blocks) }
    } else {
        // SAFETY: the blocks lie inside the stretch.
        unsafe { blocks_are_zero(start, blocks) }
    };
    whole
        && (blocks * BLOCK_BYTES..len).all(|offset| {
            // SAFETY: offset < len, inside the stretch.
            let at = unsafe { start.add(offset) };
            // SAFETY: mapped and readable; a byte has no alignment.
            unsafe { ptr::read_volatile(at) == 0 }
        })
}

/// A value at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Whether `blocks` blocks from `start` on are all zero.
///
/// # Safety
/// They must be mapped and readable.
unsafe fn blocks_are_zero(start: *const u8, blocks: usize) -> bool {
    const WORDS: usize = BLOCK_BYTES / size_of::<u64>();
    let words = start.cast::<Unaligned<u64>>();
    (0..blocks).all(|block| {
        let mut seen = 0;
        for word in 0..WORDS {
            // SAFETY: inside the blocks, by this function's contract.
            let at = unsafe { words.add(block * WORDS + word) };
            // SAFETY: mapped and readable, and the type has no alignment.
            seen |= unsafe { ptr::read_volatile(at) }.0;
        }
        seen == 0
    })
}

/// As [`blocks_are_zero`], for processors with AVX2.
///
/// # Safety
/// As [`blocks_are_zero`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn blocks_are_zero_wide(start: *const u8, blocks: usize) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256};
    const WORDS: usize = BLOCK_BYTES / size_of::<__m256i>();
    let words = start.cast::<Unaligned<__m256i>>();
    (0..blocks).all(|block| {
        let mut seen = _mm256_setzero_si256();
        for word in 0..WORDS {
            // SAFETY: inside the blocks, by this function's contract.
            let at = unsafe { words.add(block * WORDS + word) };
            // SAFETY: mapped and readable, and the type has no alignment.
            seen = _mm256_or_si256(seen, unsafe { ptr::read_volatile(at) }.0);
        }
        _mm256_testz_si256(seen, seen) == 1
    })
}

/// Stands in where there are no wider loads; never called.
#[cfg(not(target_arch = "x86_64"))]
use blocks_are_zero as blocks_are_zero_wide;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_find_a_single_octet_anywhere_and_nothing_beyond() {
        // One block before, three that are looked at, one behind.
        let mut octets = vec![0xFF_u8; 5 * BLOCK_BYTES];
        octets[BLOCK_BYTES..4 * BLOCK_BYTES].fill(0);
        let check = |octets: &[u8], claim: bool, at: usize| {
            let start = octets[BLOCK_BYTES..].as_ptr();
            // SAFETY: three blocks of `octets` lie behind `start`.
            let words = unsafe { blocks_are_zero(start, 3) };
            assert_eq!(words, claim, "words, byte {at}");
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: as above, and AVX2 is there.
                let wide = unsafe { blocks_are_zero_wide(start, 3) };
                assert_eq!(wide, claim, "AVX2, byte {at}");
            }
        };
        check(&octets, true, 0);
        for at in BLOCK_BYTES..4 * BLOCK_BYTES {
            octets[at] = 1;
            check(&octets, false, at);
            octets[at] = 0;
        }
    }
}
