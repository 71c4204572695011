//! What the model device's state holds: bytes that follow from seed, place and version, so that nobody has to remember them.
//!
//! Word `i` of a piece is a mix of the piece's base and `i`. A piece that is lost, doubled, shifted or of another version
//! differs in nearly every word.

/// Which piece: of which device, where in it, in which version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) seed: u64,
    pub(super) place: u64,
    pub(super) version: u64,
}

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Piece {
    fn base(self) -> u64 {
        let x = mix(self.seed ^ mix(self.place.wrapping_add(STEP)));
        mix(x ^ self.version.wrapping_mul(STEP))
    }

    /// Writes the piece's bytes from `offset` on.
    pub(super) fn fill(self, offset: usize, out: &mut [u8]) {
        let base = self.base();
        let (head, words) = out.split_at_mut(to_word(offset).min(out.len()));
        copy_partial(base, offset, head);
        let first = (offset + head.len()) / 8;
        let at = offset + head.len() + (words.len() - words.len() % 8);
        let mut chunks = words.chunks_exact_mut(8);
        for (chunk, i) in chunks.by_ref().zip(first as u64..) {
            chunk.copy_from_slice(&word(base, i).to_le_bytes());
        }
        copy_partial(base, at, chunks.into_remainder());
    }

    /// The first offset at which bytes that should be the piece's from `offset` on are not.
    pub(super) fn differs(self, offset: usize, octets: &[u8]) -> Option<usize> {
        let base = self.base();
        let (head, words) = octets.split_at(to_word(offset).min(octets.len()));
        if let Some(at) = partial_differs(base, offset, head) {
            return Some(at);
        }
        let first = (offset + head.len()) / 8;
        let chunks = words.chunks_exact(8);
        let tail = chunks.remainder();
        let mut wrong = 0;
        for (chunk, i) in chunks.clone().zip(first as u64..) {
            let found = chunk.try_into().map_or(0, u64::from_le_bytes);
            wrong |= found ^ word(base, i);
        }
        if wrong != 0 {
            let bad = chunks.zip(first as u64..).position(|(chunk, i)| {
                chunk.try_into().map_or(0, u64::from_le_bytes) != word(base, i)
            });
            return Some((first + bad.unwrap_or(0)) * 8);
        }
        let at = offset + head.len() + (words.len() - words.len() % 8);
        partial_differs(base, at, tail)
    }
}

/// Bytes from `offset` to the next border of a word.
fn to_word(offset: usize) -> usize {
    (8 - offset % 8) % 8
}

fn word(base: u64, i: u64) -> u64 {
    let x = base.wrapping_add(i.wrapping_mul(STEP));
    (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

fn octet(base: u64, at: usize) -> u8 {
    word(base, (at / 8) as u64).to_le_bytes()[at % 8]
}

fn copy_partial(base: u64, offset: usize, out: &mut [u8]) {
    for (at, to) in (offset..).zip(out) {
        *to = octet(base, at);
    }
}

fn partial_differs(base: u64, offset: usize, octets: &[u8]) -> Option<usize> {
    (offset..)
        .zip(octets)
        .find(|(at, found)| octet(base, *at) != **found)
        .map(|(at, _)| at)
}

fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIECE: Piece = Piece {
        seed: 7,
        place: 3,
        version: 9,
    };

    proptest! {
        #[test]
        fn a_piece_is_the_same_whatever_cuts_it_is_made_and_checked_in(cuts in proptest::collection::vec(0usize..200, 1..20)) {
            let mut whole = vec![0; cuts.iter().sum()];
            PIECE.fill(0, &mut whole);
            let mut at = 0;
            for cut in cuts {
                let mut part = vec![0; cut];
                PIECE.fill(at, &mut part);
                prop_assert_eq!(&part[..], &whole[at..at + cut]);
                prop_assert_eq!(PIECE.differs(at, &part), None);
                at += cut;
            }
        }

        #[test]
        fn a_changed_octet_is_found_where_it_is(offset in 0usize..50, len in 1usize..100, at in 0usize..100, flip in 1u8..=255) {
            let at = at % len;
            let mut part = vec![0; len];
            PIECE.fill(offset, &mut part);
            part[at] ^= flip;
            let found = PIECE.differs(offset, &part).unwrap();
            prop_assert!(found / 8 == (offset + at) / 8, "{} for {}", found, offset + at);
        }
    }

    #[test]
    fn another_place_version_or_seed_is_another_piece() {
        let mut octets = [0; 64];
        PIECE.fill(0, &mut octets);
        for other in [
            Piece { seed: 8, ..PIECE },
            Piece { place: 4, ..PIECE },
            Piece {
                version: 8,
                ..PIECE
            },
        ] {
            assert_eq!(other.differs(0, &octets), Some(0));
        }
    }
}
