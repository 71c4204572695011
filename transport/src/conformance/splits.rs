//! A property: however a stream is cut into sends on one side and receives on the other, it is the same stream.

use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::{Kind, Noise, guest, read, span};
use crate::channel::IoSource;
use crate::error::ChannelError;

/// One piece of a send.
#[derive(Clone, Copy, Debug)]
enum Piece {
    Octets(usize),
    Guest(usize),
}

/// One call on the receiving side.
#[derive(Clone, Debug)]
enum Take {
    Octets(usize),
    /// Lengths of spans, each with a gap of this many bytes before it.
    Spans(Vec<(usize, usize)>),
}

/// Cases per kind: with the sizes below some dozens of megabytes, which takes a second or two.
const CASES: u32 = 48;

pub(super) fn any_split_reads_the_same_stream(kind: Kind) {
    let len = prop_oneof![4 => 0..64_usize, 2 => 0..9_000_usize, 1 => 0..70_000_usize];
    let piece = prop_oneof![
        len.clone().prop_map(Piece::Octets),
        len.clone().prop_map(Piece::Guest)
    ];
    let sends = prop::collection::vec((0..5_000_usize, prop::collection::vec(piece, 0..8)), 1..12);
    let spans = prop::collection::vec((0..100_usize, len.clone()), 0..8);
    let take = prop_oneof![len.prop_map(Take::Octets), spans.prop_map(Take::Spans)];
    let takes = prop::collection::vec(take, 1..60);
    // No file of past failures: the suite may run where its source is not.
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&(sends, takes), |(sends, takes)| {
            check(kind, &sends, &takes)
        })
        .unwrap_or_else(|failure| panic!("{}: {failure}", kind.name));
}

fn check(kind: Kind, sends: &[(usize, Vec<Piece>)], takes: &[Take]) -> Result<(), TestCaseError> {
    let lens = |pieces: &[Piece]| -> usize {
        pieces
            .iter()
            .map(|piece| match piece {
                Piece::Octets(len) | Piece::Guest(len) => *len,
            })
            .sum()
    };
    let total = sends
        .iter()
        .map(|(head, pieces)| head + lens(pieces))
        .sum::<usize>();
    let stream = Noise::new(total as u64 + 1).octets(total);
    // The stream lies in both kinds of memory; each piece is taken from where it says.
    let source = guest(total + 1);
    span(&source, 0, total).copy_from(&stream);
    let (mut left, mut right) = kind.ends();
    let received = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut at = 0;
            for (head, pieces) in sends {
                let head = &stream[at..at + head];
                at += head.len();
                let mut body = Vec::new();
                for piece in pieces {
                    match *piece {
                        Piece::Octets(len) => body.push(IoSource::Bytes(&stream[at..at + len])),
                        Piece::Guest(len) => body.push(IoSource::Guest(span(&source, at, len))),
                    }
                    at += lens(&[*piece]);
                }
                left.send.send(head, &body)?;
            }
            left.send.finish()
        });
        let mut received = Vec::new();
        for take in takes {
            receive(
                &mut *right.receive,
                take,
                total - received.len(),
                &mut received,
            )?;
        }
        let mut rest = vec![0; total - received.len()];
        right.receive.receive(&mut rest).map_err(fail)?;
        received.extend(rest);
        sender
            .join()
            .map_err(|_| TestCaseError::fail("the sender panicked"))?
            .map_err(fail)?;
        Ok::<_, TestCaseError>(received)
    })?;
    prop_assert!(
        received == stream,
        "what was received differs from what was sent"
    );
    let mut more = [0];
    let end = right
        .receive
        .receive(&mut more)
        .map_err(|error| error.code());
    prop_assert_eq!(end, Err("channel-closed"), "behind the last byte");
    Ok(())
}

/// Makes one call, for no more than the `left` bytes that there still are, and appends what it gave.
fn receive(
    half: &mut dyn crate::ReceiveHalf,
    take: &Take,
    mut left: usize,
    received: &mut Vec<u8>,
) -> Result<(), TestCaseError> {
    match take {
        Take::Octets(len) => {
            let mut octets = vec![0; (*len).min(left)];
            half.receive(&mut octets).map_err(fail)?;
            received.extend(octets);
        }
        Take::Spans(spans) => {
            let target = guest(spans.iter().map(|(gap, len)| gap + len).sum::<usize>() + 1);
            let (mut list, mut places, mut at) = (Vec::new(), Vec::new(), 0);
            for &(gap, len) in spans {
                let len = len.min(left);
                list.push(span(&target, at + gap, len));
                places.push((at, gap, len));
                at += gap + len;
                left -= len;
            }
            half.receive_into(&list).map_err(fail)?;
            for (at, gap, len) in places {
                prop_assert!(
                    read(&target, at, gap)
                        .iter()
                        .all(|octet| *octet == super::CANARY),
                    "a gap was written"
                );
                received.extend(read(&target, at + gap, len));
            }
        }
    }
    Ok(())
}

fn fail(error: crate::ChannelError) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

/// [`ReceiveHalf::peek`](crate::ReceiveHalf::peek): a banner that is shorter than what was expected.
pub(super) fn what_came_can_be_looked_at_after_an_error(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let banner = b"SSH-2.0-something";
    left.send.send(banner, &[]).expect("send");
    let soon = Instant::now() + Duration::from_millis(300);
    right.receive.set_deadline(Some(soon));
    let error = right.receive.receive(&mut [0; 128]).expect_err("too short");
    assert!(
        matches!(error, ChannelError::Deadline { bytes_done: 0 }),
        "{error}"
    );
    let mut seen = [0; 64];
    assert_eq!(right.receive.peek(&mut seen), banner.len());
    assert_eq!(&seen[..banner.len()], banner);
    assert_eq!(
        right.receive.peek(&mut seen[..4]),
        4,
        "as much as there is room for"
    );
    // It was looked at and not taken; after an end it is still there.
    drop(left);
    right
        .receive
        .set_deadline(Some(Instant::now() + Duration::from_secs(30)));
    right.receive.receive(&mut [0; 128]).expect_err("the end");
    assert_eq!(right.receive.peek(&mut seen), banner.len());
}
