//! The digest does not depend on order and sees every difference.

use std::collections::HashMap;

use multifd_wire::digest::{page_value, term};
use multifd_wire::{Digest, PAGE_BYTES, PageIndex, RegionId};
use proptest::prelude::*;

use crate::support::vectors;

fn place(region: u32, page: u64) -> (RegionId, PageIndex) {
    (RegionId::new(region), PageIndex::new(page))
}

// SPEC: GEN-5, DIGEST-1, DIGEST-2, DIGEST-3, DIGEST-5
#[test]
fn terms_are_those_of_the_vectors() {
    let vector = vectors()
        .into_iter()
        .find(|vector| vector.name == "digest")
        .unwrap();
    assert!(vector.lines.len() >= 8);
    let mut digest = Digest::EMPTY;
    for line in &vector.lines {
        let mut fields = line.split(' ');
        let mut hex = |radix| u64::from_str_radix(fields.next().unwrap(), radix).unwrap();
        let (fill, region, page) = (hex(16), hex(10), hex(10));
        let (crc, value, one, sum) = (hex(16), hex(16), hex(16), hex(16));
        let (region, page) = place(u32::try_from(region).unwrap(), page);
        let content = [u8::try_from(fill).unwrap(); PAGE_BYTES];
        let seen = crc32fast::hash(&content);
        assert_eq!(u64::from(seen), crc, "{line}");
        assert_eq!(u64::from(page_value(seen)), value, "{line}");
        assert_eq!(term(region, page, page_value(seen)), one, "{line}");
        digest.replace(region, page, 0, page_value(seen));
        assert_eq!(digest.value(), sum, "{line}");
    }
}

#[test]
fn memory_of_zeros_has_an_empty_digest() {
    let zero = page_value(crc32fast::hash(&[0; PAGE_BYTES]));
    let mut digest = Digest::EMPTY;
    for page in 0..1000 {
        let (region, page) = place(0, page);
        digest.replace(region, page, zero, zero);
        assert_eq!(term(region, page, zero), 0);
    }
    assert_eq!((zero, digest), (0, Digest::EMPTY));
}

#[test]
fn pages_that_change_places_change_the_digest() {
    let (a, b) = (place(0, 1), place(0, 2));
    let straight = term(a.0, a.1, 5).wrapping_add(term(b.0, b.1, 6));
    let crossed = term(a.0, a.1, 6).wrapping_add(term(b.0, b.1, 5));
    assert_ne!(straight, crossed);
}

proptest! {
    // SPEC: DIGEST-3, DIGEST-4
    #[test]
    fn digest_depends_only_on_the_last_version_of_each_page(
        moves in prop::collection::vec((0_u32..4, 0_u64..16, any::<u32>(), 0_usize..3), 0..200),
    ) {
        let mut memory: HashMap<(u32, u64), u32> = HashMap::new();
        let mut lanes = [Digest::EMPTY; 3];
        for (region, page, new, lane) in moves {
            let old = memory.insert((region, page), new).unwrap_or(0);
            let (region, page) = place(region, page);
            lanes[lane].replace(region, page, old, new);
        }
        let mut merged = Digest::EMPTY;
        lanes.iter().for_each(|lane| merged.merge(*lane));
        let mut fresh = Digest::EMPTY;
        for ((region, page), value) in memory {
            let (region, page) = place(region, page);
            fresh.replace(region, page, 0, value);
        }
        prop_assert_eq!(merged, fresh);
    }

    #[test]
    fn digest_sees_one_page_that_differs(region in 0_u32..1024, page in 0_u64..1 << 40, a: u32, b: u32) {
        let (region, page) = place(region, page);
        prop_assume!(a != b);
        prop_assert_ne!(term(region, page, a), term(region, page, b));
    }
}
