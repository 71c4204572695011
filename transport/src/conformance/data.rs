//! Checks of what arrives: everything, in order, where it belongs and nowhere else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{CANARY, Kind, Noise, guest, read, span};
use crate::channel::{IoSource, ReceiveHalf, SendHalf};
use crate::memory::Span;

pub(super) fn octets_arrive_in_order(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let mut noise = Noise::new(1);
    let frames: Vec<_> = (0..64)
        .map(|_| {
            let len = noise.below(40_000);
            noise.octets(len)
        })
        .collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            frames
                .iter()
                .for_each(|frame| left.send.send(frame, &[]).expect("send"))
        });
        for (index, frame) in frames.iter().enumerate() {
            let mut octets = vec![0; frame.len()];
            right.receive.receive(&mut octets).expect("receive");
            assert!(
                octets == *frame,
                "frame {index} of {} bytes differs",
                frame.len()
            );
        }
    });
}

pub(super) fn bodies_land_where_they_belong(kind: Kind) {
    const PAGE: usize = 4096;
    const PAGES: usize = 64;
    let (mut left, mut right) = kind.ends();
    let source = guest(PAGE * PAGES);
    let content = Noise::new(2).octets(PAGE * PAGES);
    span(&source, 0, content.len()).copy_from(&content);
    let target = guest(PAGE * PAGES);
    // Pages in an order in which no two neighbours follow each other, in frames of 1 to 16 pages.
    let order: Vec<usize> = (0..PAGES).map(|page| page * 37 % PAGES).collect();
    let frames: Vec<&[usize]> = order
        .chunks(16)
        .chain(order.chunks(1))
        .chain(order.chunks(7))
        .collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            for (index, frame) in frames.iter().enumerate() {
                let body: Vec<_> = frame
                    .iter()
                    .map(|page| IoSource::Guest(span(&source, page * PAGE, PAGE)))
                    .collect();
                left.send.send(&[index as u8; 40], &body).expect("send");
            }
        });
        for (index, frame) in frames.iter().enumerate() {
            let mut head = [0; 40];
            right.receive.receive(&mut head[..32]).expect("receive");
            right.receive.receive(&mut head[32..]).expect("receive");
            assert_eq!(head, [index as u8; 40], "the head of frame {index}");
            let body: Vec<_> = frame
                .iter()
                .map(|page| span(&target, page * PAGE, PAGE))
                .collect();
            body.iter().for_each(Span::fill_zero);
            right.receive.receive_into(&body).expect("receive_into");
            for page in *frame {
                let landed = read(&target, page * PAGE, PAGE) == content[page * PAGE..][..PAGE];
                assert!(landed, "page {page} of frame {index}");
            }
        }
    });
}

pub(super) fn more_pieces_than_one_call_takes_arrive(kind: Kind) {
    // The kernel takes 1,024 pieces in a call. Strides differ from lengths, so that no two pieces are neighbours.
    const PIECES: usize = 3 * 1024 + 7;
    let (mut left, mut right) = kind.ends();
    let source = guest(PIECES * 5);
    let content = Noise::new(3).octets(PIECES * 5);
    span(&source, 0, content.len()).copy_from(&content);
    let private = Noise::new(4).octets(PIECES);
    let target = guest(PIECES * 7);
    thread::scope(|scope| {
        scope.spawn(|| {
            let body: Vec<_> = (0..PIECES)
                .flat_map(|piece| {
                    [
                        IoSource::Guest(span(&source, piece * 5, 3)),
                        IoSource::Bytes(&private[piece..=piece]),
                    ]
                })
                .collect();
            left.send.send(b"head", &body).expect("send");
        });
        let mut head = [0; 4];
        right.receive.receive(&mut head).expect("receive");
        assert_eq!(&head, b"head");
        let spans: Vec<_> = (0..PIECES)
            .map(|piece| span(&target, piece * 7, 4))
            .collect();
        right.receive.receive_into(&spans).expect("receive_into");
    });
    for piece in 0..PIECES {
        let landed = read(&target, piece * 7, 7);
        assert_eq!(
            landed[..3],
            content[piece * 5..][..3],
            "piece {piece}, from guest memory"
        );
        assert_eq!(
            landed[3], private[piece],
            "piece {piece}, from private memory"
        );
        assert_eq!(landed[4..], [CANARY; 3], "the gap behind piece {piece}");
    }
}

pub(super) fn empty_pieces_and_spans_are_nothing(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let memory = guest(64);
    left.send.send(&[], &[]).expect("nothing at all");
    let nothing = [IoSource::Bytes(&[]), IoSource::Guest(span(&memory, 64, 0))];
    left.send.send(&[], &nothing).expect("empty pieces");
    let many = vec![IoSource::Bytes(&[]); 5000];
    left.send.send(&[], &many).expect("many empty pieces");
    let something = [
        nothing[0],
        IoSource::Bytes(b"a"),
        nothing[1],
        IoSource::Bytes(b"bcd"),
        nothing[0],
    ];
    left.send
        .send(&[], &something)
        .expect("something in between");
    right.receive.receive(&mut []).expect("nothing");
    right.receive.receive_into(&[]).expect("no spans");
    right
        .receive
        .receive_into(&vec![span(&memory, 3, 0); 5000])
        .expect("empty spans");
    let spans = [
        span(&memory, 10, 0),
        span(&memory, 20, 1),
        span(&memory, 0, 0),
        span(&memory, 30, 2),
        span(&memory, 64, 0),
    ];
    right.receive.receive_into(&spans).expect("receive_into");
    let mut last = [0];
    right.receive.receive(&mut last).expect("receive");
    assert_eq!(
        (read(&memory, 20, 1), read(&memory, 30, 2), last),
        (b"a".to_vec(), b"bc".to_vec(), *b"d")
    );
    assert_eq!(read(&memory, 0, 20), [CANARY; 20]);
}

pub(super) fn nothing_outside_the_spans_is_written(kind: Kind) {
    const BYTES: usize = 300_000;
    let (mut left, mut right) = kind.ends();
    let content = Noise::new(5).octets(BYTES);
    let memory = guest(BYTES);
    let mut noise = Noise::new(6);
    thread::scope(|scope| {
        // More is always on its way than the spans of one call take.
        scope.spawn(|| left.send.send(&content, &[]).expect("send"));
        let mut place = 0;
        let mut expected = vec![CANARY; BYTES];
        let mut taken = 0;
        while place + 9_000 < BYTES {
            let mut spans = Vec::new();
            for _ in 0..3 {
                place += 1 + noise.below(500);
                let len = noise.below(2_500);
                spans.push(span(&memory, place, len));
                expected[place..place + len].copy_from_slice(&content[taken..taken + len]);
                place += len;
                taken += len;
            }
            right.receive.receive_into(&spans).expect("receive_into");
        }
        assert!(
            read(&memory, 0, BYTES) == expected,
            "the spans and the gaps between them"
        );
        let mut rest = vec![0; BYTES - taken];
        right.receive.receive(&mut rest).expect("the rest");
        assert!(rest == content[taken..], "what follows the spans");
    });
}

pub(super) fn large_private_receives_are_filled(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let content = Noise::new(7).octets(1_000_001);
    thread::scope(|scope| {
        scope.spawn(|| {
            left.send
                .send(b"one", &[IoSource::Bytes(&content)])
                .expect("send");
            left.send.send(b"two", &[]).expect("send");
        });
        let mut head = [0; 3];
        right.receive.receive(&mut head).expect("head");
        assert_eq!(&head, b"one");
        let mut octets = vec![0; content.len()];
        right.receive.receive(&mut octets).expect("receive");
        assert!(octets == content, "a large private receive");
        right.receive.receive(&mut head).expect("head");
        assert_eq!(&head, b"two");
    });
}

pub(super) fn both_directions_work_at_once(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let pump = |send: &mut dyn SendHalf, seed| {
        let mut noise = Noise::new(seed);
        for _ in 0..200 {
            let len = noise.below(20_000);
            send.send(&noise.octets(len), &[]).expect("send");
        }
    };
    let drink = |receive: &mut dyn ReceiveHalf, seed| {
        let mut noise = Noise::new(seed);
        for frame in 0..200 {
            let len = noise.below(20_000);
            let mut octets = vec![0; len];
            receive.receive(&mut octets).expect("receive");
            assert!(
                octets == noise.octets(len),
                "frame {frame} of direction {seed}"
            );
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| pump(&mut *left.send, 8));
        scope.spawn(|| pump(&mut *right.send, 9));
        scope.spawn(|| drink(&mut *left.receive, 9));
        drink(&mut *right.receive, 8);
    });
}

pub(super) fn frames_stay_framed_while_the_guest_writes(kind: Kind) {
    const BYTES: usize = 64 << 10;
    let (mut left, mut right) = kind.ends();
    let (source, target) = (guest(BYTES), guest(BYTES));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut noise, mut octets) = (Noise::new(10), vec![0; 4096]);
            while !over.load(Ordering::Relaxed) {
                octets.fill(noise.next() as u8);
                span(&source, noise.below(BYTES - 4096), 4096).copy_from(&octets);
            }
        });
        scope.spawn(|| {
            for frame in 0..100_u8 {
                left.send
                    .send(&[frame; 32], &[IoSource::Guest(span(&source, 0, BYTES))])
                    .expect("send");
            }
        });
        for frame in 0..100 {
            let mut head = [0; 32];
            right.receive.receive(&mut head).expect("receive");
            assert_eq!(head, [frame; 32], "the head of frame {frame}");
            right
                .receive
                .receive_into(&[span(&target, 0, BYTES)])
                .expect("receive_into");
        }
        over.store(true, Ordering::Relaxed);
    });
}
