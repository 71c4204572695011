//! The check itself is tested: each kind of loss that a migration could cause makes it fail, and by the right name.

mod common;

use common::*;
use multifd_guest::{Config, Guest, Memory, Tracking};

/// The last 16 MiB of 64 MiB; the first half belongs to virtual CPU 0, whose stamp is word 8.
const WORKING_SET: u64 = 48 << 20;
const STAMP_WORD: usize = 8;

/// A paused guest that passes, and its memory.
fn subject(tracking: Tracking) -> (Guest, Memory) {
    let guest = Guest::create(&Config {
        working_set_bytes: 16 << 20,
        ..fast(tracking)
    })
    .unwrap();
    run_a_while(&guest);
    assert_whole(&guest);
    let memory = guest.memory();
    (guest, memory)
}

/// Fails unless the check of `guest` fails for exactly one page, with a text that contains `says`.
fn assert_caught(guest: &Guest, says: &str) {
    let report = guest.check().unwrap();
    assert!(!report.passed());
    assert_eq!(report.failures_total, 1, "{report}");
    assert!(report.failures[0].contains(says), "{report}");
}

fn change_word(memory: &Memory, address: u64, change: impl FnOnce(u64) -> u64) {
    let mut word = [0];
    memory.read_words(address, &mut word).unwrap();
    word[0] = change(word[0]);
    memory.write_words(address, &word).unwrap();
}

fn stamp(memory: &Memory, page: u64) -> u64 {
    read_page(memory, page)[STAMP_WORD]
}

/// The first page of virtual CPU 0's share that holds a stamp.
fn stamped_page(memory: &Memory) -> u64 {
    (WORKING_SET..WORKING_SET + (8 << 20))
        .step_by(4096)
        .find(|page| stamp(memory, *page) != 0)
        .unwrap()
}

#[test]
fn a_page_reverted_to_an_older_content_fails() {
    for tracking in kinds("a_page_reverted_to_an_older_content_fails") {
        let (guest, memory) = subject(tracking);
        let page = stamped_page(&memory);
        let older = read_page(&memory, page);
        // Runs until the page was written again, which every page is before long.
        while stamp(&memory, page) == older[STAMP_WORD] {
            run_a_while(&guest);
        }
        assert_whole(&guest);
        memory.write_words(page, &older).unwrap();
        assert_caught(&guest, "last stamp there was");
    }
}

#[test]
fn a_lost_stamp_fails() {
    for tracking in kinds("a_lost_stamp_fails") {
        let (guest, memory) = subject(tracking);
        change_word(
            &memory,
            stamped_page(&memory) + STAMP_WORD as u64 * 8,
            |_| 0,
        );
        assert_caught(&guest, "and the page holds 0");
    }
}

#[test]
fn a_stamp_from_the_future_fails() {
    for tracking in kinds("a_stamp_from_the_future_fails") {
        let (guest, memory) = subject(tracking);
        change_word(
            &memory,
            stamped_page(&memory) + STAMP_WORD as u64 * 8,
            |stamp| stamp + 1,
        );
        assert_caught(&guest, "last stamp there was");
    }
}

#[test]
fn a_changed_bit_in_any_kind_of_page_fails() {
    for tracking in kinds("a_changed_bit_in_any_kind_of_page_fails") {
        let (guest, memory) = subject(tracking);
        let places = [
            (0, "program and page tables"),             // the page that stays zero
            (4096 + 8, "program and page tables"),      // the program
            (2 * 4096, "program and page tables"),      // the root of the page tables
            (4 * 4096 + 24, "program and page tables"), // a page directory
            (5 * 4096 + 16, "header"),                  // the header of vcpu0
            (5 * 4096 + 64, "header must count"),       // its counter
            (7 * 4096 + 8 * 100, "log must say"),       // its log, page 100 of the share
            (32 << 20, "never written"),                // a plain page
            ((32 << 20) + 4096 - 8, "never written"),   // its last word
            (WORKING_SET - 8, "never written"),         // the last plain page
            (WORKING_SET + 8 * 9, "working set"),       // the stamp word of another vCPU
            ((64 << 20) - 8, "working set"),            // the last word of all
        ];
        for (address, says) in places {
            change_word(&memory, address, |word| word ^ 1 << 40);
            assert_caught(&guest, says);
            change_word(&memory, address, |word| word ^ 1 << 40);
        }
        assert_whole(&guest);
    }
}

#[test]
fn a_zero_page_that_is_not_zero_and_a_filled_page_that_is_zero_fail() {
    for tracking in kinds("a_zero_page_that_is_not_zero_and_a_filled_page_that_is_zero_fail") {
        let (guest, memory) = subject(tracking);
        let plain = || (16 << 20..WORKING_SET).step_by(4096);
        let zero = plain()
            .find(|page| read_page(&memory, *page) == [0; 512])
            .unwrap();
        change_word(&memory, zero + 2048, |_| 1);
        assert_caught(&guest, "never written");
        change_word(&memory, zero + 2048, |_| 0);
        let filled = plain()
            .find(|page| read_page(&memory, *page) != [0; 512])
            .unwrap();
        memory.write_words(filled, &[0; 512]).unwrap();
        assert_caught(&guest, "never written");
    }
}

#[test]
fn two_pages_in_each_others_place_fail() {
    for tracking in kinds("two_pages_in_each_others_place_fail") {
        let (guest, memory) = subject(tracking);
        let filled: Vec<u64> = (16 << 20..WORKING_SET)
            .step_by(4096)
            .filter(|page| read_page(&memory, *page) != [0; 512])
            .take(2)
            .collect();
        let (one, other) = (read_page(&memory, filled[0]), read_page(&memory, filled[1]));
        memory.write_words(filled[0], &other).unwrap();
        memory.write_words(filled[1], &one).unwrap();
        assert_eq!(guest.check().unwrap().failures_total, 2);
    }
}

/// The hardest one: everything in memory is consistent with itself, as of some time ago.
#[test]
fn memory_that_is_old_as_a_whole_fails() {
    for tracking in kinds("memory_that_is_old_as_a_whole_fails") {
        let (guest, memory) = subject(tracking);
        let older = destination(&guest);
        copy_memory(&memory, &older.memory());
        run_a_while(&guest);
        assert_whole(&guest);
        copy_memory(&older.memory(), &memory);
        let report = guest.check().unwrap();
        assert!(!report.passed());
        assert!(report.failures_total > 10, "{report}");
    }
}

#[test]
fn a_state_without_its_memory_fails() {
    for tracking in kinds("a_state_without_its_memory_fails") {
        let (guest, _) = subject(tracking);
        let destination = destination(&guest);
        destination
            .load_state(&guest.save_state().unwrap())
            .unwrap();
        assert!(!destination.check().unwrap().passed());
    }
}
