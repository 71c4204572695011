//! The taps over streams that are put together here from what docs and files say of the format, whole, cut anywhere, and hostile.

use proptest::prelude::*;

use super::*;

/// A main stream as it goes by: header, configuration, commands, sizes, two passes over memory, and a first device.
fn main_stream(return_path: bool) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x03pc0".to_vec();
    if return_path {
        out.extend([8, 0, 1, 0, 0]);
        out.extend([8, 0, 2, 0, 4, 0, 0, 0, 1]);
    }
    out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    let record = |out: &mut Vec<u8>, address: u64, flags: u64| {
        out.extend((address | flags).to_be_bytes());
    };
    record(&mut out, 0x3000, 0x04);
    out.extend(b"\x03mem");
    out.extend(0x2000_u64.to_be_bytes());
    out.extend(b"\x03rom");
    out.extend(0x1000_u64.to_be_bytes());
    record(&mut out, 0, 0x10);
    out.extend([0x7e, 0, 0, 0, 2]);
    for part in [0x02, 0x03] {
        out.extend([part, 0, 0, 0, 2]);
        record(&mut out, 0, 0x08);
        out.extend(b"\x03mem");
        out.extend([0x5a; 4096]);
        record(&mut out, 0x1000, 0x02 | 0x20);
        out.push(0);
        record(&mut out, 0, 0x08);
        out.extend(b"\x03rom");
        out.extend([0; 4096]);
        record(&mut out, 0, 0x10);
        out.extend([0x7e, 0, 0, 0, 2]);
    }
    out.extend(b"\x04\0\0\0\x05\x03cpu\0\0\0\0\0\0\0\x0c state that nobody can walk");
    out
}

#[test]
fn reads_memory_up_to_the_first_device() {
    let octets = main_stream(true);
    let mut tap = MainStream::new();
    tap.feed(&octets);
    let seen = Seen {
        memory_bytes: 0x3000,
        pages: 4,
        zero_pages: 2,
        iterations: 2,
    };
    assert_eq!(tap.seen(), seen);
    assert_eq!(tap.stopped(), Some("the devices' state"));
    assert_eq!(tap.stage(), Stage::Device);
    assert!(!tap.lacks_return_path());
}

#[test]
fn misses_a_return_path_as_soon_as_memory_begins() {
    let octets = main_stream(false);
    let memory = octets.windows(3).position(|name| name == b"ram").unwrap();
    let mut tap = MainStream::new();
    tap.feed(&octets[..memory]);
    assert!(!tap.lacks_return_path());
    tap.feed(&octets[memory..memory + 11]);
    assert!(tap.lacks_return_path());
    assert_eq!(tap.stage(), Stage::Memory);
}

#[test]
fn knows_that_the_guest_was_stopped_before_a_device_is_sent() {
    let octets = main_stream(true);
    let last = octets
        .windows(5)
        .position(|section| section == [3, 0, 0, 0, 2])
        .unwrap();
    let mut tap = MainStream::new();
    tap.feed(&octets[..last]);
    assert_eq!(tap.stage(), Stage::Memory);
    tap.feed(&octets[last..last + 5]);
    assert_eq!(tap.stage(), Stage::Device);
}

#[test]
fn a_package_is_post_copy() {
    let mut tap = MainStream::new();
    tap.feed(b"QEVM\0\0\0\x03\x08\0\x07\0\x04\0\0\0\x02..\x08\0\x01\0\0");
    assert_eq!((tap.stage(), tap.stopped()), (Stage::PostCopy, None));
}

#[test]
fn what_it_can_t_read_may_be_the_end() {
    for octets in [
        &b"QEVM\0\0\0\x04"[..],
        b"\x16\x03\x01\x02\0\x01\0\x01",
        b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff",
    ] {
        let mut tap = MainStream::new();
        tap.feed(octets);
        assert!(tap.stopped().is_some());
        assert_eq!(tap.stage(), Stage::Device);
    }
}

#[test]
fn hears_the_last_word_of_the_destination() {
    let mut path = ReturnPath::new();
    path.feed(&[0, 2, 0, 4, 0, 0, 0, 1]);
    assert!(path.is_between_messages() && path.shut().is_none());
    path.feed(&SHUT[..3]);
    assert!(!path.is_between_messages());
    path.feed(&SHUT[3..]);
    assert!(path.is_between_messages());
    assert_eq!(path.shut(), Some(0));
    let mut failed = ReturnPath::new();
    failed.feed(&[0, 1, 0, 4, 0, 0, 0, 1]);
    assert_eq!(failed.shut(), Some(1));
}

#[test]
fn the_bitmap_of_a_recovery_is_skipped() {
    let mut path = ReturnPath::new();
    path.feed(&[0, 5, 0, 4, 3, b'm', b'e', b'm']);
    path.feed(&16_u64.to_be_bytes());
    path.feed(&[0xff; 16 + 8]);
    path.feed(&SHUT);
    assert_eq!(path.shut(), Some(0));
}

#[test]
fn counts_the_pages_of_a_multifd_channel() {
    let mut octets = vec![0; 64];
    // The second as 9.0 and later mark the end of a pass.
    for (alloc, normal, zero) in [(128_u32, 2_u32, 1_u32), (0, 0, 0), (128, 128, 0)] {
        let mut head = vec![0; 320 + 8 * 128];
        for (at, word) in [
            (0, 0x1122_3344),
            (4, 1),
            (12, alloc),
            (16, normal),
            (20, normal * 4096),
            (32, zero),
        ] {
            head[at..at + 4].copy_from_slice(&word.to_be_bytes());
        }
        octets.extend(head);
        octets.extend(vec![7; normal as usize * 4096]);
    }
    let mut tap = Pages::new();
    octets.chunks(1000).for_each(|piece| tap.feed(piece));
    assert_eq!((tap.seen().pages, tap.seen().zero_pages), (130, 1));
}

proptest! {
    #[test]
    fn it_does_not_matter_where_a_stream_is_cut(cuts in prop::collection::vec(1_usize..6000, 1..40)) {
        let octets = main_stream(true);
        let mut whole = MainStream::new();
        whole.feed(&octets);
        let mut tap = MainStream::new();
        let mut rest = octets.as_slice();
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            tap.feed(piece);
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(tap.seen(), whole.seen());
        prop_assert_eq!(tap.stage(), whole.stage());
        prop_assert_eq!(tap.stopped(), whole.stopped());
    }

    #[test]
    fn no_octets_make_a_tap_panic(
        start in 0_usize..100,
        noise in prop::collection::vec(any::<u8>(), 0..3000),
        cut in 1_usize..700,
    ) {
        let mut octets = main_stream(true)[..start].to_vec();
        octets.extend(&noise);
        let (mut main, mut path, mut pages) = (MainStream::new(), ReturnPath::new(), Pages::new());
        for piece in octets.chunks(cut) {
            main.feed(piece);
            path.feed(piece);
            pages.feed(piece);
        }
        pages = Pages::new();
        pages.feed(&[0; 64]);
        pages.feed(&noise);
    }
}
