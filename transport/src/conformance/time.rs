//! Checks of deadlines and stalls: they end every wait, on time and not before, and say exactly what was done.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::{End, Kind, Noise, guest, read, span};
use crate::channel::{IoSource, SendHalf};
use crate::error::ChannelError;

/// A limit that is shorter than the socket kinds' longest sleep, and one that is longer.
const LIMITS: [Duration; 2] = [Duration::from_millis(60), Duration::from_millis(400)];

/// How late a limit may be noticed on a machine that is busy with other things.
const LATE_MAX: Duration = Duration::from_secs(5);

/// More than any channel holds on the way, to find the point at which it holds no more.
const SENT_MAX: u64 = 1 << 30;

/// Runs `operation`, which must fail, no sooner than after `limit` and not much later.
fn timed<T>(limit: Duration, operation: impl FnOnce() -> Result<T, ChannelError>) -> ChannelError {
    timed_since(Instant::now(), limit, operation)
}

/// As [`timed`], with a limit that counts from `start`: on a busy machine the operation may begin a while later.
fn timed_since<T>(
    start: Instant,
    limit: Duration,
    operation: impl FnOnce() -> Result<T, ChannelError>,
) -> ChannelError {
    let error = operation()
        .err()
        .expect("an operation that cannot finish fails");
    let took = start.elapsed();
    assert!(
        took >= limit,
        "{error}: after {took:?}, which is before {limit:?}"
    );
    assert!(took < limit + LATE_MAX, "{error}: only after {took:?}");
    error
}

/// Sends until it fails; returns what was sent in whole frames, and the error.
fn fill(send: &mut dyn SendHalf) -> (u64, ChannelError) {
    let frame = vec![0x5A; 64 << 10];
    let mut sent = 0;
    while sent < SENT_MAX {
        match send.send(&frame, &[]) {
            Ok(()) => sent += frame.len() as u64,
            Err(error) => return (sent, error),
        }
    }
    panic!("a channel that nobody reads took {SENT_MAX} bytes");
}

pub(super) fn deadline_ends_a_receive_from_a_silent_peer(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let memory = guest(100_000);
    for limit in LIMITS {
        let mut head = [0; 32];
        let start = Instant::now();
        right.receive.set_deadline(Some(start + limit));
        let error = timed_since(start, limit, || right.receive.receive(&mut head));
        assert!(
            matches!(error, ChannelError::Deadline { bytes_done: 0 }),
            "{error}"
        );
        let start = Instant::now();
        right.receive.set_deadline(Some(start + limit));
        let error = timed_since(start, limit, || {
            right.receive.receive_into(&[span(&memory, 0, 100_000)])
        });
        assert!(
            matches!(error, ChannelError::Deadline { bytes_done: 0 }),
            "{error}"
        );
        let start = Instant::now();
        right.receive.set_deadline(Some(start + limit));
        let error = timed_since(start, limit, || right.receive.drain(u64::MAX));
        assert!(
            matches!(error, ChannelError::Deadline { bytes_done: 0 }),
            "{error}"
        );
        // Nothing was done, so nothing is lost.
        left.send.send(&[7; 32], &[]).expect("send");
        right.receive.set_deadline(None);
        right
            .receive
            .receive(&mut head)
            .expect("the half goes on working");
        assert_eq!(head, [7; 32]);
    }
}

pub(super) fn deadline_takes_nothing_of_a_small_receive(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    for limit in LIMITS {
        left.send.send(&[1; 10], &[]).expect("send");
        let mut head = [0; 32];
        let start = Instant::now();
        right.receive.set_deadline(Some(start + limit));
        let error = timed_since(start, limit, || right.receive.receive(&mut head));
        assert!(
            matches!(error, ChannelError::Deadline { bytes_done: 0 }),
            "{error}"
        );
        left.send.send(&[2; 22], &[]).expect("send");
        right.receive.set_deadline(None);
        right
            .receive
            .receive(&mut head)
            .expect("the half goes on working");
        assert_eq!((&head[..10], &head[10..]), (&[1; 10][..], &[2; 22][..]));
    }
}

pub(super) fn deadline_in_a_body_says_how_much_landed(kind: Kind) {
    for limit in LIMITS {
        // What comes is read ahead with the head, or is more than that.
        for sent in [3_000, 30_000] {
            let (left, mut right) = kind.ends();
            let memory = guest(100_000);
            let content = Noise::new(11).octets(sent);
            let (over, done) = mpsc::channel::<()>();
            let landed = thread::scope(|scope| {
                let content = &content;
                scope.spawn(move || {
                    let mut left = left;
                    left.send
                        .send(b"head", &[IoSource::Bytes(content)])
                        .expect("send");
                    // Silent, but there, until the receiver has had its deadline.
                    let _ = done.recv();
                });
                let mut head = [0; 4];
                right.receive.receive(&mut head).expect("receive");
                let start = Instant::now();
                right.receive.set_deadline(Some(start + limit));
                let error = timed_since(start, limit, || {
                    right.receive.receive_into(&[span(&memory, 1, 99_999)])
                });
                drop(over);
                assert_eq!(error.code(), "channel-deadline");
                error.bytes_done() as usize
            });
            // On a busy machine the deadline may come before the sender has sent all.
            assert!(landed > 0 && landed <= sent, "{landed} of {sent}");
            assert!(read(&memory, 1, landed) == content[..landed], "what landed");
            // Part of a body is gone from the stream: nothing sensible could be read any more.
            right.receive.set_deadline(None);
            let error = right
                .receive
                .receive(&mut [0; 32])
                .expect_err("the half is finished");
            assert_eq!(
                (error.code(), error.bytes_done() as usize),
                ("channel-deadline", landed)
            );
        }
    }
}

pub(super) fn deadline_ends_a_send_to_a_stalled_reader(kind: Kind) {
    for limit in LIMITS {
        let (mut left, mut right) = kind.ends();
        let start = Instant::now();
        left.send.set_deadline(Some(start + limit));
        let (sent, error) = timed_fill(&mut left, start, limit);
        let ChannelError::Deadline { bytes_done } = error else {
            panic!("{error}")
        };
        assert!(
            bytes_done < 64 << 10,
            "{bytes_done} bytes are a whole frame"
        );
        left.send.set_deadline(Some(Instant::now() + limit));
        let again = left
            .send
            .send(&[0x5A; 64 << 10], &[])
            .expect_err("nobody reads");
        assert_eq!(again.code(), "channel-deadline");
        // What was said to be done is what arrives.
        let expected = sent
            + bytes_done
            + if bytes_done == 0 {
                again.bytes_done()
            } else {
                0
            };
        drop(left);
        right
            .receive
            .set_deadline(Some(Instant::now() + Duration::from_secs(30)));
        match right.receive.drain(u64::MAX) {
            Ok(count) => assert_eq!(count, expected, "bytes that arrived"),
            Err(error) => panic!("drain: {error}"),
        }
    }
}

fn timed_fill(end: &mut End, start: Instant, limit: Duration) -> (u64, ChannelError) {
    let result = fill(&mut *end.send);
    let took = start.elapsed();
    assert!(
        took >= limit && took < limit + LATE_MAX,
        "after {took:?} instead of {limit:?}"
    );
    result
}

pub(super) fn deadline_that_passed_is_one_try(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let past = Some(Instant::now());
    left.send.set_deadline(past);
    left.send
        .send(&[4; 4], &[])
        .expect("there is room, so there is no need to wait");
    let mut octets = [0; 4];
    // The bytes may be on their way still.
    right.receive.set_deadline(Some(Instant::now() + LATE_MAX));
    right.receive.receive(&mut octets[..1]).expect("receive");
    right.receive.set_deadline(past);
    right
        .receive
        .receive(&mut octets[1..])
        .expect("they are here, so there is no need to wait");
    assert_eq!(octets, [4; 4]);
    let error = timed(Duration::ZERO, || right.receive.receive(&mut octets));
    assert!(
        matches!(error, ChannelError::Deadline { bytes_done: 0 }),
        "{error}"
    );
}

pub(super) fn near_limits_are_kept_closely(kind: Kind) {
    // The best of many, since a busy machine may delay some of them by anything; a kind that sleeps too long delays all.
    let (_left, mut right) = kind.ends();
    let limit = Duration::from_millis(20);
    let (mut deadline_late, mut stall_late) = (LATE_MAX, LATE_MAX);
    for _ in 0..15 {
        let start = Instant::now();
        right.receive.set_stall(None);
        right.receive.set_deadline(Some(start + limit));
        right
            .receive
            .receive(&mut [0; 32])
            .expect_err("a silent peer");
        deadline_late = deadline_late.min(start.elapsed() - limit);
        let start = Instant::now();
        right.receive.set_deadline(None);
        right.receive.set_stall(Some(limit));
        right
            .receive
            .receive(&mut [0; 32])
            .expect_err("a silent peer");
        stall_late = stall_late.min(start.elapsed() - limit);
    }
    let late_max = Duration::from_millis(50);
    assert!(
        deadline_late < late_max,
        "the deadline: always {deadline_late:?} late"
    );
    assert!(
        stall_late < late_max,
        "the stall: always {stall_late:?} late"
    );
}

pub(super) fn far_deadline_does_not_fire_early(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let memory = guest(10_000);
    right
        .receive
        .set_deadline(Some(Instant::now() + Duration::from_secs(30)));
    right.receive.set_stall(Some(Duration::from_secs(20)));
    thread::scope(|scope| {
        scope.spawn(|| {
            // Several times the longest sleep of the socket kinds.
            thread::sleep(Duration::from_millis(700));
            left.send.send(&[5; 32], &[]).expect("send");
            thread::sleep(Duration::from_millis(700));
            left.send.send(&[6; 10_000], &[]).expect("send");
        });
        right
            .receive
            .receive(&mut [0; 32])
            .expect("the deadline is far");
        right
            .receive
            .receive_into(&[span(&memory, 0, 10_000)])
            .expect("the deadline is far");
    });
    assert_eq!(read(&memory, 0, 10_000), [6; 10_000]);
}

pub(super) fn stall_ends_a_receive_and_a_send(kind: Kind) {
    for limit in LIMITS {
        let (mut left, mut right) = kind.ends();
        right.receive.set_stall(Some(limit));
        let error = timed(limit, || right.receive.receive(&mut [0; 32]));
        let silent =
            matches!(error, ChannelError::Stalled { bytes_done: 0, stall } if stall == limit);
        assert!(silent, "{error}");
        let memory = guest(100_000);
        left.send.send(&[8; 3_000], &[]).expect("send");
        let error = timed(limit, || {
            right.receive.receive_into(&[span(&memory, 0, 100_000)])
        });
        let midway =
            matches!(error, ChannelError::Stalled { bytes_done: 3_000, stall } if stall == limit);
        assert!(midway, "{error}");
        let (mut left, _right) = kind.ends();
        left.send.set_stall(Some(limit));
        let (_, error) = timed_fill(&mut left, Instant::now(), limit);
        assert_eq!(error.code(), "channel-stalled");
    }
}

pub(super) fn stall_spares_a_peer_that_is_slow(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    let limit = Duration::from_millis(1_500);
    right.receive.set_stall(Some(limit));
    let memory = guest(20_000);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..40 {
                thread::sleep(Duration::from_millis(50));
                left.send.send(&[9; 500], &[]).expect("send");
            }
        });
        let start = Instant::now();
        right
            .receive
            .receive_into(&[span(&memory, 0, 20_000)])
            .expect("slow is not stalled");
        assert!(
            start.elapsed() > limit,
            "the peer was not slow enough to try this"
        );
    });
}
