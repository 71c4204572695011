//! The debug scan of the sender: what memory holds now, beside what was sent of it last.
//!
//! The sender keeps the value of each page as it was sent ([`multifd_wire::PageValues`]), so nothing has to be remembered for
//! the scan. It is made when the guest is paused, every source was collected and every page was sent: whatever differs
//! then was written without anybody's report.

use multifd_tracking::scan::{self, Unreported};
use multifd_transport::Pulse;
use multifd_wire::digest::page_value;
use multifd_wire::{PAGE_BYTES_U64, PageIndex, RegionId};

use super::Shared;
use super::first_round::{Readable, Unused};

/// Compares every page of memory with what was sent of it. Holes are not read: they are zero. Pages that nobody needs
/// may hold what they will, unless they were sent once.
pub(super) fn unreported(shared: &Shared, unused: &Unused, pulse: &Pulse) -> Unreported {
    let readable = Readable::new(shared, unused, pulse);
    let sent = |region: u32, page: u64| {
        let run = shared
            .layout
            .run(RegionId::new(region), PageIndex::new(page), 1);
        run.map_or(0, |run| u64::from(shared.values.first_of(run)))
    };
    let now = |region: u32, page: u64| {
        pulse.beat();
        let left_out = readable.is_unused(region, page) && sent(region, page) == 0;
        if left_out || !readable.is_readable(region, page) {
            return 0;
        }
        let span = shared
            .memory
            .span(region, page * PAGE_BYTES_U64, PAGE_BYTES_U64);
        match span {
            Ok(span) if !span.is_zero() => u64::from(page_value(span.crc32())),
            // The set, the layout and the memory have the same pages.
            Ok(_) | Err(_) => 0,
        }
    };
    scan::unreported(&shared.dirty, &sent, &now)
}
