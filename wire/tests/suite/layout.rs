//! Region tables and runs.

use multifd_wire::error::{LayoutError, Misbehaved, Misuse};
use multifd_wire::frame::RawRun;
use multifd_wire::limits::MEMORY_PAGES_MAX;
use multifd_wire::{Layout, PAGE_BYTES_U64, PageCount, PageIndex, Region, RegionId};
use proptest::prelude::*;
use zerocopy::byteorder::little_endian::{U32, U64};

fn region(id: u32, guest_address: u64, bytes: u64) -> Region {
    Region {
        id: RegionId::new(id),
        guest_address,
        bytes,
    }
}

fn raw(region: u32, first: u64, count: u32) -> RawRun {
    RawRun {
        region: U32::new(region),
        count: U32::new(count),
        first: U64::new(first),
    }
}

/// Low memory, memory above 4 GiB, and a small region between, out of address order.
fn layout() -> Layout {
    Layout::new([
        region(0, 0, 0x10_0000),
        region(1, 0x1_0000_0000, 0x20_0000),
        region(2, 0xfff0_0000, PAGE_BYTES_U64),
    ])
    .unwrap()
}

// SPEC: REGION-1, REGION-2, REGION-3, LIMIT-15
#[test]
fn table_that_is_not_memory_is_refused() {
    let top = u64::MAX - PAGE_BYTES_U64 + 1;
    for (regions, error) in [
        (vec![], LayoutError::Regions { count: 0 }),
        (
            vec![region(1, 0, 4096)],
            LayoutError::Order {
                expected: 0,
                found: 1,
            },
        ),
        (
            vec![region(0, 0, 4096), region(0, 4096, 4096)],
            LayoutError::Order {
                expected: 1,
                found: 0,
            },
        ),
        (vec![region(0, 0, 0)], LayoutError::Alignment { region: 0 }),
        (
            vec![region(0, 0, 4095)],
            LayoutError::Alignment { region: 0 },
        ),
        (
            vec![region(0, 1, 4096)],
            LayoutError::Alignment { region: 0 },
        ),
        (vec![region(0, top, 4096)], LayoutError::Wraps { region: 0 }),
        (vec![region(0, 4096, top)], LayoutError::Wraps { region: 0 }),
        (
            vec![region(0, 0, 8192), region(1, 4096, 4096)],
            LayoutError::Overlap { region: 1 },
        ),
        (
            vec![region(0, 4096, 8192), region(1, 0, 8192)],
            LayoutError::Overlap { region: 0 },
        ),
        (
            vec![region(0, 0, 4096), region(1, 0, 4096)],
            LayoutError::Overlap { region: 1 },
        ),
        (
            vec![region(0, 0, (MEMORY_PAGES_MAX + 1) * 4096)],
            LayoutError::Pages,
        ),
    ] {
        assert_eq!(
            Layout::new(regions.clone()).map(drop),
            Err(error),
            "{regions:?}"
        );
    }
}

// SPEC: LIMIT-15
#[test]
fn largest_memory_is_taken() {
    let layout = Layout::new([region(0, 0, MEMORY_PAGES_MAX * 4096)]).unwrap();
    assert_eq!(layout.pages_total(), PageCount::new(MEMORY_PAGES_MAX));
}

#[test]
fn regions_that_touch_are_taken_in_any_address_order() {
    assert!(
        Layout::new([
            region(0, 4096, 4096),
            region(1, 0, 4096),
            region(2, 8192, 4096)
        ])
        .is_ok()
    );
}

// SPEC: RUN-1
#[test]
fn rejects_run_of_unknown_region() {
    for id in [3, 4, 1023, u32::MAX] {
        let seen = layout().admit(&raw(id, 0, 1));
        assert_eq!(seen, Err(Misbehaved::UnknownRegion { region: id }));
    }
}

// SPEC: RUN-2
#[test]
fn rejects_empty_run() {
    assert_eq!(
        layout().admit(&raw(0, 0, 0)),
        Err(Misbehaved::EmptyRun { region: 0 })
    );
    let seen = layout().run(RegionId::new(0), PageIndex::new(0), 0);
    assert_eq!(
        seen,
        Err(Misuse::Run {
            region: 0,
            first: 0,
            count: 0
        })
    );
}

// SPEC: RUN-3
#[test]
fn rejects_run_past_region_end() {
    let layout = layout();
    for (first, count) in [(0, 256), (255, 1), (128, 128)] {
        let run = layout.admit(&raw(0, first, count)).unwrap();
        assert_eq!((run.first().value(), run.count()), (first, count));
    }
    for (first, count) in [
        (0, 257),
        (255, 2),
        (256, 1),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (1, u32::MAX),
    ] {
        let error = Misbehaved::RunPastRegion {
            region: 0,
            first,
            count,
        };
        assert_eq!(layout.admit(&raw(0, first, count)), Err(error));
        let seen = layout.run(RegionId::new(0), PageIndex::new(first), count);
        assert_eq!(
            seen,
            Err(Misuse::Run {
                region: 0,
                first,
                count
            })
        );
    }
}

#[test]
fn pages_are_counted_through_in_the_order_of_the_table() {
    let layout = layout();
    assert_eq!(layout.pages_total(), PageCount::new(256 + 512 + 1));
    let index = |id, first, count| {
        layout.global_index(
            layout
                .run(RegionId::new(id), PageIndex::new(first), count)
                .unwrap(),
        )
    };
    assert_eq!(index(0, 0, 256), 0..256);
    assert_eq!(index(1, 0, 1), 256..257);
    assert_eq!(index(1, 511, 1), 767..768);
    assert_eq!(index(2, 0, 1), 768..769);
    assert_eq!(
        layout.locate(768),
        Some((RegionId::new(2), PageIndex::new(0)))
    );
    assert_eq!(layout.locate(769), None);
    assert_eq!(layout.locate(u64::MAX), None);
}

#[test]
fn run_of_another_layout_gets_no_index_past_the_end() {
    let other = Layout::new([region(0, 0, 4096)]).unwrap();
    let run = layout()
        .run(RegionId::new(1), PageIndex::new(500), 12)
        .unwrap();
    let index = other.global_index(run);
    assert!(index.start <= index.end && index.end <= other.pages_total().value());
}

#[test]
fn regions_are_looked_up_by_number() {
    let layout = layout();
    assert_eq!(
        layout.region(RegionId::new(2)),
        Some(region(2, 0xfff0_0000, 4096))
    );
    assert_eq!(layout.region(RegionId::new(3)), None);
    assert_eq!(
        layout.region_pages(RegionId::new(1)),
        Some(PageCount::new(512))
    );
    assert_eq!(layout.regions().len(), 3);
}

proptest! {
    #[test]
    fn splitting_a_run_loses_no_page(first in 0_u64..400, count in 1_u32..112, at in 0_u32..130) {
        let run = layout().run(RegionId::new(1), PageIndex::new(first), count).unwrap();
        let (head, rest) = run.split_at(at);
        let pages: Vec<_> = head.page_indices().chain(rest.into_iter().flat_map(|r| r.page_indices())).collect();
        prop_assert_eq!(&pages, &run.page_indices().collect::<Vec<_>>());
        prop_assert_eq!(head.count(), count.min(at.max(1)));
        prop_assert_eq!(rest.is_none(), at.max(1) >= count);
        prop_assert_eq!(head.bytes(), u64::from(head.count()) * 4096);
        prop_assert_eq!(head.offset_bytes(), first * 4096);
        prop_assert_eq!(head.pages() as u64, u64::from(head.count()));
    }
}
