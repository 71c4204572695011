//! Nothing is left of a guest that was dropped. Alone in its binary: it counts what the whole process has.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::*;
use multifd_guest::{Guest, Tracking};
use multifd_tracking::DirtySet;

/// Threads, descriptors and mappings of this process.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    threads: usize,
    descriptors: usize,
    mappings: usize,
}

fn held() -> Held {
    let count = |folder: &str| fs::read_dir(folder).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let names_a_guest = |line: &&str| line.contains("kvm") || large_and_nameless(line);
    Held {
        threads: count("/proc/self/task"),
        descriptors: count("/proc/self/fd"),
        mappings: maps.lines().filter(names_a_guest).count(),
    }
}

/// Whether a line of the maps is anonymous memory of at least 32 MiB that is accessible, as a guest's memory is. The
/// allocator's arenas are that large too, but mostly inaccessible.
fn large_and_nameless(line: &str) -> bool {
    let mut fields = line.split_whitespace();
    let (range, access) = (fields.next().unwrap(), fields.next().unwrap());
    let (start, end) = range.split_once('-').unwrap();
    let bytes = u64::from_str_radix(end, 16).unwrap() - u64::from_str_radix(start, 16).unwrap();
    bytes >= 32 << 20 && access.starts_with("rw") && fields.count() == 3
}

/// One life of a guest, cut short in one of several ways.
fn live(tracking: Tracking, way: usize) {
    let guest = Guest::create(&fast(tracking)).unwrap();
    assert!(held().mappings > 0);
    let way = way % 5;
    if way == 0 {
        return; // never ran
    }
    guest.run().unwrap();
    if way == 1 {
        return; // running
    }
    let set = DirtySet::new(&[guest.memory().bytes() / 4096]);
    let mut source = guest.tracking_source().unwrap();
    source.start(&set).unwrap();
    if way == 2 {
        drop(guest); // the source outlives its guest
        return;
    }
    guest.pause().unwrap();
    let arrived = moved(&guest);
    if way == 3 {
        return; // paused, tracked, moved
    }
    arrived.run().unwrap();
    wait_beats(&arrived, 1);
}

#[test]
fn fifty_lives_leave_no_thread_descriptor_or_mapping() {
    let kinds = kinds("fifty_lives_leave_no_thread_descriptor_or_mapping");
    // The first life makes what is made once for the process (the signal handler, the allocator's arenas).
    kinds.iter().for_each(|kind| live(*kind, 4));
    let before = held();
    for way in 0..50 {
        live(kinds[way % kinds.len()], way / kinds.len());
        // A thread that was joined may be in the kernel's list for a moment longer.
        let until = Instant::now() + Duration::from_secs(5);
        let mut after = held();
        while after != before && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
            after = held();
        }
        assert_eq!(after, before, "life {way}");
    }
}
