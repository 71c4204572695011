use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const REGIONS: [RegionLayout; 2] = [
    RegionLayout {
        guest_address: 0,
        bytes: 3 << 20,
    },
    RegionLayout {
        guest_address: 1 << 32,
        bytes: 10_000,
    },
];

fn memory() -> GuestMemory {
    GuestMemory::anonymous(&REGIONS).unwrap()
}

fn read(span: Span<'_>) -> Vec<u8> {
    let mut octets = vec![0xEE; span.len()];
    span.copy_to(&mut octets);
    octets
}

#[test]
fn fresh_memory_has_the_layout_asked_for_and_is_zero() {
    let memory = memory();
    assert_eq!(memory.region_count(), 2);
    assert!(memory.layouts().eq(REGIONS));
    assert_eq!(
        (memory.layout(1), memory.layout(2)),
        (Some(REGIONS[1]), None)
    );
    assert_eq!(memory.bytes(), (3 << 20) + 10_000);
    for (index, layout) in (0..).zip(REGIONS) {
        let whole = memory.span(index, 0, layout.bytes).unwrap();
        assert!(whole.is_zero());
        assert!(read(whole).iter().all(|octet| *octet == 0));
        assert_eq!(
            whole.as_ptr() as usize % (2 << 20),
            0,
            "aligned for huge pages"
        );
    }
}

#[test]
fn accepts_spans_up_to_the_end_and_refuses_one_octet_more() {
    let memory = memory();
    let bytes = REGIONS[1].bytes;
    for (offset, len) in [
        (0, 0),
        (0, bytes),
        (bytes, 0),
        (bytes - 1, 1),
        (17, bytes - 17),
    ] {
        assert_eq!(memory.span(1, offset, len).unwrap().len() as u64, len);
    }
    let refused = [
        (0, bytes + 1),
        (bytes, 1),
        (bytes + 1, 0),
        (1, bytes),
        (u64::MAX, 1),
        (1, u64::MAX),
        (u64::MAX, u64::MAX),
    ];
    for (offset, len) in refused {
        let error = memory.span(1, offset, len).unwrap_err();
        let expected = SpanError::OutOfRange {
            region_index: 1,
            offset,
            bytes: len,
            region_bytes: bytes,
        };
        assert_eq!(error, expected);
    }
    for region_index in [2, 3, u32::MAX] {
        let error = memory.span(region_index, 0, 0).unwrap_err();
        assert_eq!(
            error,
            SpanError::RegionUnknown {
                region_index,
                region_count: 2
            }
        );
    }
}

#[test]
fn subspans_stay_inside_their_span() {
    let memory = memory();
    let span = memory.span(0, 100, 50).unwrap();
    let inner = span.subspan(10, 40).unwrap();
    assert_eq!(inner.as_ptr() as usize - span.as_ptr() as usize, 10);
    assert_eq!((inner.len(), span.subspan(50, 0).unwrap().len()), (40, 0));
    for (offset, len) in [
        (0, 51),
        (50, 1),
        (51, 0),
        (11, 40),
        (usize::MAX, 1),
        (1, usize::MAX),
    ] {
        let error = span.subspan(offset, len).unwrap_err();
        let expected = SpanError::OutsideSpan {
            offset,
            bytes: len,
            span_bytes: 50,
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn copies_touch_their_span_and_nothing_else() {
    let memory = memory();
    let whole = memory.span(1, 0, 10_000).unwrap();
    whole.copy_from(&[0xA5; 10_000]);
    for (offset, len) in [(0, 1), (1, 4_096), (4_095, 2), (9_999, 1), (5_000, 0)] {
        let octets: Vec<u8> = (0..len).map(|index| index as u8 ^ 0x3C).collect();
        let span = memory.span(1, offset as u64, len as u64).unwrap();
        span.copy_from(&octets);
        assert_eq!(read(span), octets);
        let mut expected = vec![0xA5; 10_000];
        expected[offset..offset + len].copy_from_slice(&octets);
        assert!(read(whole) == expected, "copy_from at {offset}, {len}");
        span.fill_zero();
        expected[offset..offset + len].fill(0);
        assert!(read(whole) == expected, "fill_zero at {offset}, {len}");
        whole.copy_from(&[0xA5; 10_000]);
    }
}

#[test]
#[should_panic(expected = "the span's length")]
fn copy_from_of_another_length_panics() {
    memory().span(0, 0, 4).unwrap().copy_from(&[0; 5]);
}

#[test]
#[should_panic(expected = "the span's length")]
fn copy_to_of_another_length_panics() {
    memory().span(0, 0, 4).unwrap().copy_to(&mut [0; 3]);
}

#[test]
fn zero_test_sees_each_octet_of_its_span_and_none_outside() {
    let memory = memory();
    let whole = memory.span(1, 0, 10_000).unwrap();
    // All lengths around the size of a block and around a page, at all alignments of a word.
    for start in 64..72_u64 {
        for len in (0..40).chain(250..520).chain(4_090..4_100) {
            whole.copy_from(&[0xFF; 10_000]);
            let span = memory.span(1, start, len).unwrap();
            span.fill_zero();
            assert!(
                span.is_zero(),
                "{start}, {len}: only what is around is not zero"
            );
            for at in [0, 1, len / 2, len.saturating_sub(2), len.saturating_sub(1)] {
                let Ok(octet) = span.subspan(at as usize, 1) else {
                    continue;
                };
                octet.copy_from(&[0x80]);
                assert!(!span.is_zero(), "{start}, {len}: byte {at} is not zero");
                octet.fill_zero();
            }
        }
    }
}

#[test]
fn a_span_is_located_where_it_was_made() {
    let (memory, other) = (memory(), memory());
    for (region_index, offset, len) in [(0, 0, 1), (0, 4_096, 4_096), (1, 9_999, 1), (1, 3, 0)] {
        let span = memory.span(region_index, offset, len).unwrap();
        assert_eq!(
            memory.locate(span),
            Some(Place {
                region_index,
                offset
            })
        );
        assert_eq!(other.locate(span), None);
    }
}

#[test]
fn populate_backs_the_range_and_changes_nothing() {
    let memory = memory();
    memory.span(0, 4_096, 3).unwrap().copy_from(b"abc");
    memory.populate(0, 4_000..8_200).unwrap();
    memory.populate(0, 0..REGIONS[0].bytes).unwrap();
    memory.populate(0, 77..77).unwrap();
    assert!(memory.span(0, 0, 4_096).unwrap().is_zero());
    assert_eq!(read(memory.span(0, 4_096, 4).unwrap()), b"abc\0");
    let resident = resident_bytes(memory.span(0, 0, REGIONS[0].bytes).unwrap());
    assert_eq!(resident, REGIONS[0].bytes as usize);
}

/// How much of a span is backed by pages, as the kernel sees it.
fn resident_bytes(span: Span<'_>) -> usize {
    let mut pages = vec![0_u8; span.len().div_ceil(4_096)];
    // SAFETY: mincore writes one byte per page of the range to `pages`, which has room for them.
    let result =
        unsafe { libc::mincore(span.as_ptr().cast(), span.len(), pages.as_mut_ptr().cast()) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 == 1).count() * 4_096
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "what is tested")]
fn populate_outside_a_region_is_refused() {
    let memory = memory();
    for range in [0..10_001, 10_001..10_001, u64::MAX - 1..u64::MAX] {
        let error = memory.populate(1, range).unwrap_err();
        assert!(
            matches!(error, MapError::Span(SpanError::OutOfRange { .. })),
            "{error}"
        );
    }
    memory
        .populate(1, 5..3)
        .expect("an empty range is nothing to do");
    let error = memory.populate(2, 0..1).unwrap_err();
    assert!(
        matches!(error, MapError::Span(SpanError::RegionUnknown { .. })),
        "{error}"
    );
}

#[test]
fn regions_of_no_size_or_too_large_a_size_are_refused() {
    for bytes in [0, u64::MAX, u64::MAX - 4_096] {
        let error = GuestMemory::anonymous(&[
            REGIONS[0],
            RegionLayout {
                guest_address: 0,
                bytes,
            },
        ])
        .unwrap_err();
        assert!(
            matches!(
                error,
                MapError::Size {
                    region_index: 1,
                    ..
                }
            ),
            "{error}"
        );
    }
    let error = GuestMemory::anonymous(&[RegionLayout {
        guest_address: 0,
        bytes: 1 << 50,
    }])
    .unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Map {
                region_index: 0,
                ..
            }
        ),
        "{error}"
    );
}

/// An owner of memory that says when it is dropped.
struct Owner {
    memory: GuestMemory,
    dropped: Arc<AtomicBool>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

#[test]
fn owner_lives_as_long_as_the_last_clone() {
    let dropped = Arc::new(AtomicBool::new(false));
    let owner = Arc::new(Owner {
        memory: memory(),
        dropped: Arc::clone(&dropped),
    });
    let base = NonNull::new(owner.memory.span(1, 0, 0).unwrap().as_ptr()).unwrap();
    let raw = RawRegion {
        layout: REGIONS[1],
        base,
        owner,
    };
    // SAFETY: the region is one of `owner.memory`, which `owner` keeps mapped; nobody has references to it.
    let wrapped = unsafe { GuestMemory::from_raw(vec![raw]) };
    wrapped.span(0, 9_997, 3).unwrap().copy_from(b"end");
    let clone = wrapped.clone();
    drop(wrapped);
    assert!(!dropped.load(Ordering::SeqCst));
    assert_eq!(read(clone.span(0, 9_997, 3).unwrap()), b"end");
    drop(clone);
    assert!(dropped.load(Ordering::SeqCst));
}

#[cfg(feature = "vm-memory")]
#[test]
fn rust_vmm_memory_keeps_its_regions_and_its_contents() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let ranges = [(GuestAddress(0), 8_192), (GuestAddress(1 << 20), 4_096)];
    let theirs = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let ours = GuestMemory::from_vm_memory(Arc::clone(&theirs)).unwrap();
    let layout = |guest_address, bytes| RegionLayout {
        guest_address,
        bytes,
    };
    assert!(
        ours.layouts()
            .eq([layout(0, 8_192), layout(1 << 20, 4_096)])
    );
    theirs
        .write_slice(b"theirs", GuestAddress((1 << 20) + 100))
        .unwrap();
    assert_eq!(read(ours.span(1, 100, 6).unwrap()), b"theirs");
    ours.span(0, 8_188, 4).unwrap().copy_from(b"ours");
    let mut octets = [0; 4];
    theirs.read_slice(&mut octets, GuestAddress(8_188)).unwrap();
    assert_eq!(&octets, b"ours");
    drop(theirs);
    assert_eq!(
        read(ours.span(1, 100, 6).unwrap()),
        b"theirs",
        "our clone keeps the mapping alive"
    );
}

/// A region that is none of vm-memory's own, as embedders have: it wraps one and adds what the VMM wants to know of it.
#[derive(Debug)]
struct Slot {
    inner: vm_memory::GuestRegionMmap<()>,
    _plugged: bool,
}

impl vm_memory::GuestMemoryRegion for Slot {
    type B = ();

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn start_addr(&self) -> vm_memory::GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: vm_memory::MemoryRegionAddress,
        count: usize,
    ) -> vm_memory::guest_memory::Result<vm_memory::VolatileSlice<'_, ()>> {
        self.inner.get_slice(offset, count)
    }
}

impl vm_memory::GuestMemoryRegionBytes for Slot {}

#[test]
fn regions_of_any_type_are_taken() {
    use vm_memory::Bytes;
    let slot = |address, bytes| Slot {
        inner: vm_memory::GuestRegionMmap::from_range(
            vm_memory::GuestAddress(address),
            bytes,
            None,
        )
        .unwrap(),
        _plugged: true,
    };
    let regions = vec![slot(0, 8_192), slot(1 << 30, 4_096)];
    let theirs = Arc::new(vm_memory::GuestRegionCollection::from_regions(regions).unwrap());
    let ours = GuestMemory::from_vm_memory(Arc::clone(&theirs)).unwrap();
    assert_eq!(ours.layout(1).unwrap().guest_address, 1 << 30);
    ours.span(1, 7, 4).unwrap().copy_from(b"ours");
    let mut octets = [0; 4];
    theirs
        .read_slice(&mut octets, vm_memory::GuestAddress((1 << 30) + 7))
        .unwrap();
    assert_eq!(&octets, b"ours");
}

fn file(bytes: u64) -> std::fs::File {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("multifd-memory-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn part(file: &std::fs::File, bytes: u64, offset: u64) -> FileRegion<'_> {
    FileRegion {
        layout: RegionLayout {
            guest_address: 0,
            bytes,
        },
        file: std::os::fd::AsFd::as_fd(file),
        offset,
    }
}

#[test]
fn parts_of_files_are_shared_with_the_file() {
    use std::os::unix::fs::FileExt;
    let file = file(3 * 4_096);
    let memory =
        GuestMemory::from_files(&[part(&file, 4_096, 8_192), part(&file, 8_192, 0)]).unwrap();
    memory.span(0, 5, 4).unwrap().copy_from(b"ours");
    file.write_all_at(b"theirs", 4_096).unwrap();
    let mut octets = [0; 4];
    file.read_exact_at(&mut octets, 8_192 + 5).unwrap();
    assert_eq!(&octets, b"ours");
    drop(file);
    assert_eq!(read(memory.span(1, 4_096, 6).unwrap()), b"theirs");
}

#[test]
fn a_file_that_is_too_short_is_refused_instead_of_killing_later() {
    let file = file(8_192);
    for (bytes, offset) in [
        (8_193, 0),
        (4_096, 8_192),
        (1, u64::MAX - 1),
        (u64::MAX, 4_096),
    ] {
        let error = GuestMemory::from_files(&[part(&file, bytes, offset)]).unwrap_err();
        assert!(
            matches!(error, MapError::File { .. } | MapError::Size { .. }),
            "{bytes} at {offset}: {error}"
        );
    }
    let error = GuestMemory::from_files(&[part(&file, 4_096, 4_096), part(&file, 8_192, 4_096)]);
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("region 1") && text.contains("has 8192"),
        "{text}"
    );
    assert!(matches!(
        GuestMemory::from_files(&[part(&file, 4_096, 100)]),
        Err(MapError::Map { .. })
    ));
}
