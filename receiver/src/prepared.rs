//! The memory that the VMM prepared, before the first page lands in it: it has room, and it is all zero.
//!
//! The rule it keeps: what nobody sends is zero (SPEC: REGION-6). A page of zeros is sent as a word or, if it is a hole at the source,
//! not at all, and neither side's digest has a term for it; so nothing later would find a page that was not zero to begin with: memory
//! that was used before, a file with content, firmware that was loaded early. Such pages are made zero here. Only pages that exist
//! are read: of fresh memory none, however large the guest is, and no hole becomes real.

use multifd_session::destination::{Fault, Overcommit};
use multifd_transport::GuestMemory;

/// The bytes of a page, of the wire and of this look.
const PAGE_BYTES: u64 = multifd_wire::PAGE_BYTES_U64;

/// Refuses memory for which there is no room.
pub(crate) fn check(memory: &GuestMemory, overcommit: Overcommit) -> Result<(), Fault> {
    match memory.check_backing() {
        Err(error) if overcommit == Overcommit::Allowed && !error.is_certain() => {
            tracing::warn!(%error, "memory is overcommitted");
            Ok(())
        }
        answer => answer.map_err(|error| Fault::NoRoom {
            text: error.to_string(),
        }),
    }
}

/// Makes memory all zero. Returns how many pages were not.
pub(crate) fn clear(memory: &GuestMemory) -> u64 {
    let mut cleared = 0;
    let unknown = memory.each_populated(&mut |region, octets| {
        let mut at = octets.start - octets.start % PAGE_BYTES;
        while at < octets.end {
            // The last page of a region may be short.
            let bytes = PAGE_BYTES.min(octets.end - at);
            if let Ok(page) = memory.span(region, at, bytes)
                && !page.is_zero()
            {
                page.fill_zero();
                cleared += 1;
            }
            at += bytes;
        }
    });
    for region in unknown {
        let (region, reason) = (region.region_index, region.reason);
        tracing::warn!(region, %reason, "which pages are populated is not known: all were read");
    }
    if cleared > 0 {
        tracing::warn!(
            pages = cleared,
            "the memory that was prepared was not all zero, and was made so"
        );
    }
    cleared
}

#[cfg(test)]
mod tests {
    use multifd_transport::memory::RegionLayout;

    use super::*;

    #[test]
    fn only_pages_that_are_not_zero_are_written() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 64 * PAGE_BYTES + 100,
        }])
        .unwrap();
        assert_eq!(clear(&memory), 0);
        for at in [3 * PAGE_BYTES + 4095, 64 * PAGE_BYTES + 99] {
            memory.span(0, at, 1).unwrap().copy_from(&[1]);
        }
        assert!(
            memory
                .span(0, 9 * PAGE_BYTES, PAGE_BYTES)
                .unwrap()
                .is_zero()
        );
        assert_eq!((clear(&memory), clear(&memory)), (2, 0));
        let mut pages = Vec::new();
        let _ = memory.each_populated(&mut |_, octets| pages.push(octets));
        let bytes: u64 = pages.iter().map(|octets| octets.end - octets.start).sum();
        assert!(bytes <= 3 * PAGE_BYTES, "no hole was filled: {pages:?}");
    }

    #[test]
    fn overcommit_passes_what_is_no_certain_death() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 1 << 44,
        }])
        .unwrap();
        check(&memory, Overcommit::Allowed).unwrap();
        check(&memory, Overcommit::Refused).unwrap_err();
    }
}
