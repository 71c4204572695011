//! What the tests of the guest share: the skip by name, small configurations, and memory as words.
#![allow(dead_code)] // each test binary uses its own part of it
#![allow(unreachable_pub)] // the module is private to each test binary

use std::time::{Duration, Instant};

use multifd_guest::{Config, Fill, Guest, Memory, Tracking};

/// Longest wait for something that takes milliseconds on a quiet host.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The kinds of guest that this host can run. Without KVM the KVM half of `test` is skipped by name, or fails if
/// `MULTIFD_REQUIRE_KVM` is 1.
pub fn kinds(test: &str) -> Vec<Tracking> {
    if kvm_or_skip(&format!("{test} (its KVM half)")) {
        vec![Tracking::Kvm, Tracking::Userfault, Tracking::Marks]
    } else {
        vec![Tracking::Userfault, Tracking::Marks]
    }
}

/// Whether this host has KVM; if not, `test` is skipped by name, or fails if `MULTIFD_REQUIRE_KVM` is 1.
#[allow(clippy::print_stderr)] // a skipped test says so
pub fn kvm_or_skip(test: &str) -> bool {
    if std::path::Path::new("/dev/kvm").exists() {
        return true;
    }
    assert!(
        std::env::var("MULTIFD_REQUIRE_KVM").as_deref() != Ok("1"),
        "{test}: /dev/kvm missing, and MULTIFD_REQUIRE_KVM=1"
    );
    eprintln!("SKIPPED {test}: /dev/kvm missing");
    false
}

/// 64 MiB, two virtual CPUs writing 20 MB/s over 16 MiB, a third of the pages zero.
pub fn small(tracking: Tracking) -> Config {
    Config {
        memory_bytes: 64 << 20,
        vcpus: 2,
        working_set_bytes: 16 << 20,
        dirty_rate_bytes_per_s: 20_000_000,
        tracking,
        seed: 7,
        fill: Fill {
            filled_percent: 100,
            zero_percent: 33,
        },
        ..Config::default()
    }
}

/// As [`small`], as fast as it goes: a pause then mostly hits a virtual CPU in the middle of a store.
pub fn fast(tracking: Tracking) -> Config {
    Config {
        dirty_rate_bytes_per_s: u64::MAX,
        ..small(tracking)
    }
}

/// The counters of all virtual CPUs.
pub fn counters(guest: &Guest) -> Vec<u64> {
    guest.heartbeats().iter().map(|beat| beat.counter).collect()
}

/// Waits until every virtual CPU has reported `beats` more heart-beats than now.
pub fn wait_beats(guest: &Guest, beats: u64) {
    let before = guest.heartbeats();
    let begun = Instant::now();
    while guest
        .heartbeats()
        .iter()
        .zip(&before)
        .any(|(now, then)| now.beats < then.beats + beats)
    {
        if let Some(failure) = guest.failure() {
            panic!("{failure}");
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "no {beats} heart-beats: {:?}",
            guest.heartbeats()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a paused guest for a few heart-beats and pauses it again.
pub fn run_a_while(guest: &Guest) {
    guest.run().unwrap();
    wait_beats(guest, 4);
    guest.pause().unwrap();
}

/// Fails unless the guest's own check passes.
pub fn assert_whole(guest: &Guest) {
    let report = guest.check().unwrap();
    assert!(report.passed(), "{report}");
    assert_eq!(report.pages_checked, guest.memory().bytes() / 4096);
}

/// The guest-physical addresses of all pages.
pub fn pages(memory: &Memory) -> impl Iterator<Item = u64> {
    let regions = memory.regions().to_vec();
    regions.into_iter().flat_map(|region| {
        (0..region.bytes)
            .step_by(4096)
            .map(move |at| region.guest_address + at)
    })
}

/// The page at `address`.
pub fn read_page(memory: &Memory, address: u64) -> [u64; 512] {
    let mut words = [0; 512];
    memory.read_words(address, &mut words).unwrap();
    words
}

/// Copies everything.
pub fn copy_memory(from: &Memory, to: &Memory) {
    for address in pages(from) {
        copy_page(from, to, address);
    }
}

/// Copies one page, as a receiver does: a zero page is not written.
pub fn copy_page(from: &Memory, to: &Memory, address: u64) {
    let words = read_page(from, address);
    if words != [0; 512] || read_page(to, address) != [0; 512] {
        to.write_words(address, &words).unwrap();
    }
}

/// The address of the first page that differs, if any.
pub fn first_difference(one: &Memory, other: &Memory) -> Option<u64> {
    pages(one).find(|address| read_page(one, *address) != read_page(other, *address))
}

/// A number that differs if any word of the memory does, but for chance.
pub fn fingerprint(memory: &Memory) -> u64 {
    pages(memory).fold(0, |sum, address| {
        read_page(memory, address)
            .iter()
            .fold(sum, |sum: u64, word| {
                (sum ^ word)
                    .wrapping_mul(0x0000_0100_0000_01B3)
                    .rotate_left(23)
            })
    })
}

/// An empty guest of the same configuration, as a destination builds it.
pub fn destination(source: &Guest) -> Guest {
    Guest::create_empty(&Config::from_blob(&source.config_blob()).unwrap()).unwrap()
}

/// Moves a paused guest by copying: the destination has everything and is paused.
pub fn moved(source: &Guest) -> Guest {
    let destination = destination(source);
    copy_memory(&source.memory(), &destination.memory());
    destination
        .load_state(&source.save_state().unwrap())
        .unwrap();
    destination
}
