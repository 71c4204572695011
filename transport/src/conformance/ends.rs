//! Checks of how channels end: by either side, at any point, with the right reason, leaving nothing behind.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::{End, Kind, guest, read, span};
use crate::channel::IoSource;
use crate::error::ChannelError;

/// How late a shutdown may be noticed on a machine that is busy with other things.
const LATE_MAX: Duration = Duration::from_secs(5);

/// Time for another thread to begin to wait.
const SETTLE: Duration = Duration::from_millis(100);

/// More than any channel holds on the way.
const FRAMES_MAX: usize = 1 << 14;

/// Runs `operation` in a thread, shuts the channel down while it waits, and checks how it ends.
fn wakes<T: Send>(end: End, operation: impl FnOnce(&mut End) -> Result<T, ChannelError> + Send) {
    let closer = end.closer.clone();
    let mut end = end;
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let error = operation(&mut end).err();
            (error, Instant::now())
        });
        thread::sleep(SETTLE);
        let start = Instant::now();
        closer.shutdown();
        let (error, woken) = waiting.join().expect("no panic");
        assert!(matches!(error, Some(ChannelError::ShutDown)), "{error:?}");
        let late = woken.saturating_duration_since(start);
        assert!(late < LATE_MAX, "woken only after {late:?}");
    });
    is_shut_down(&mut end);
}

/// Every operation on this end fails at once.
fn is_shut_down(end: &mut End) {
    let memory = guest(64);
    let errors = [
        end.send.send(&[0; 8], &[]).err(),
        end.send.finish().err(),
        end.receive.receive(&mut [0; 8]).err(),
        end.receive.receive_into(&[span(&memory, 0, 64)]).err(),
        end.receive.drain(1).err(),
    ];
    for error in errors {
        assert!(matches!(error, Some(ChannelError::ShutDown)), "{error:?}");
    }
}

/// Sends until it fails.
fn flood(end: &mut End) -> Result<(), ChannelError> {
    let frame = vec![0; 64 << 10];
    (0..FRAMES_MAX).try_for_each(|_| end.send.send(&frame, &[]))
}

pub(super) fn shutdown_wakes_a_small_receive(kind: Kind) {
    let (left, _right) = kind.ends();
    wakes(left, |end| end.receive.receive(&mut [0; 32]));
}

pub(super) fn shutdown_wakes_a_body_receive(kind: Kind) {
    let (left, mut right) = kind.ends();
    right.send.send(&[0; 500], &[]).expect("send");
    let memory = guest(100_000);
    wakes(left, |end| {
        end.receive.receive_into(&[span(&memory, 0, 100_000)])
    });
}

pub(super) fn shutdown_wakes_a_drain(kind: Kind) {
    let (left, _right) = kind.ends();
    wakes(left, |end| end.receive.drain(u64::MAX));
}

pub(super) fn shutdown_wakes_a_send(kind: Kind) {
    let (left, _right) = kind.ends();
    wakes(left, flood);
}

pub(super) fn shutdown_wakes_a_wait_with_limits(kind: Kind) {
    let soon = Duration::from_secs(30);
    let (left, _right) = kind.ends();
    wakes(left, |end| {
        end.receive.set_deadline(Some(Instant::now() + soon));
        end.receive.set_stall(Some(soon));
        end.receive.receive(&mut [0; 32])
    });
    let (left, _right) = kind.ends();
    wakes(left, |end| {
        end.send.set_deadline(Some(Instant::now() + soon));
        end.send.set_stall(Some(soon));
        flood(end)
    });
}

pub(super) fn shutdown_wins_over_octets_read_ahead(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    left.send.send(&[1; 100], &[]).expect("send");
    right.receive.receive(&mut [0; 10]).expect("receive");
    right.closer.shutdown();
    is_shut_down(&mut right);
}

pub(super) fn shutdown_is_an_end_for_the_peer(kind: Kind) {
    let (left, mut right) = kind.ends();
    thread::scope(|scope| {
        let reading = scope.spawn(|| right.receive.receive(&mut [0; 32]));
        thread::sleep(SETTLE);
        left.closer.shutdown();
        let error = reading
            .join()
            .expect("no panic")
            .expect_err("nothing was sent");
        assert!(
            matches!(error, ChannelError::Closed | ChannelError::Reset { .. }),
            "{error}"
        );
    });
    let error = flood(&mut right).expect_err("nobody reads");
    assert!(is_gone(&error), "{error}");
}

pub(super) fn shutdown_twice_or_too_late_is_harmless(kind: Kind) {
    let (mut left, right) = kind.ends();
    left.closer.clone().shutdown();
    left.closer.shutdown();
    is_shut_down(&mut left);
    let (first, second) = (left.closer.clone(), right.closer.clone());
    drop((left, right));
    first.shutdown();
    second.shutdown();
}

pub(super) fn close_between_frames_is_clean(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    left.send.send(&[2; 1_000], &[]).expect("send");
    drop(left);
    let memory = guest(1_000);
    right
        .receive
        .receive(&mut [0; 32])
        .expect("what was sent before the close");
    right
        .receive
        .receive_into(&[span(&memory, 0, 968)])
        .expect("what was sent before the close");
    assert_eq!(read(&memory, 0, 968), [2; 968]);
    for _ in 0..3 {
        let error = right.receive.receive(&mut [0; 32]).expect_err("the end");
        assert!(matches!(error, ChannelError::Closed), "{error}");
        let error = right
            .receive
            .receive_into(&[span(&memory, 0, 9)])
            .expect_err("the end");
        assert!(matches!(error, ChannelError::Closed), "{error}");
    }
}

pub(super) fn close_in_a_frame_says_how_much_came(kind: Kind) {
    let midway = |error: ChannelError, done: u64, wanted: u64| {
        let right = matches!(error, ChannelError::ClosedMidway { bytes_done, bytes_wanted }
            if bytes_done == done && bytes_wanted == wanted);
        assert!(right, "{error}; expected {done} of {wanted}");
    };
    let memory = guest(100_000);
    for sent in [1_usize, 31, 8_000, 20_000] {
        let (mut left, mut right) = kind.ends();
        thread::scope(|scope| {
            scope.spawn(move || left.send.send(&vec![3; sent], &[]).expect("send"));
            let wanted = sent + 1;
            let mut octets = vec![0; wanted];
            midway(
                right.receive.receive(&mut octets).expect_err("the end"),
                sent as u64,
                wanted as u64,
            );
            // A half that failed goes on failing the same way.
            midway(
                right.receive.receive(&mut [0; 1]).expect_err("the end"),
                sent as u64,
                wanted as u64,
            );
        });
        let (mut left, mut right) = kind.ends();
        thread::scope(|scope| {
            scope.spawn(move || {
                left.send
                    .send(b"head", &[IoSource::Bytes(&vec![4; sent])])
                    .expect("send")
            });
            right.receive.receive(&mut [0; 4]).expect("the head");
            let error = right
                .receive
                .receive_into(&[span(&memory, 0, 100_000)])
                .expect_err("the end");
            midway(error, sent as u64, 100_000);
        });
        assert!(read(&memory, 0, sent) == vec![4; sent], "what landed");
    }
}

pub(super) fn send_to_a_closed_peer_fails_and_goes_on_failing(kind: Kind) {
    let (mut left, right) = kind.ends();
    drop(right);
    let error = flood(&mut left).expect_err("nobody is there");
    assert!(is_gone(&error), "{error}");
    let again = left.send.send(&[0; 8], &[]).expect_err("nobody is there");
    assert_eq!(
        (again.code(), again.bytes_done()),
        (error.code(), error.bytes_done())
    );
    // The same in the middle of one send.
    let (left, mut right) = kind.ends();
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut left = left;
            flood(&mut left)
        });
        right.receive.receive(&mut [0; 100]).expect("receive");
        thread::sleep(SETTLE);
        drop(right);
        let error = sending.join().expect("no panic").expect_err("nobody reads");
        assert!(is_gone(&error), "{error}");
    });
}

fn is_gone(error: &ChannelError) -> bool {
    matches!(
        error,
        ChannelError::Closed | ChannelError::ClosedMidway { .. } | ChannelError::Reset { .. }
    )
}

pub(super) fn finish_ends_one_direction_only(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    left.send.send(b"last words", &[]).expect("send");
    left.send.finish().expect("finish");
    let error = left.send.send(b"more", &[]).expect_err("finished");
    assert!(matches!(error, ChannelError::ShutDown), "{error}");
    let mut words = [0; 10];
    right.receive.receive(&mut words).expect("receive");
    assert_eq!(&words, b"last words");
    let error = right.receive.receive(&mut words).expect_err("the end");
    assert!(matches!(error, ChannelError::Closed), "{error}");
    right
        .send
        .send(b"an answer!", &[])
        .expect("the other direction works");
    left.receive
        .receive(&mut words)
        .expect("the other direction works");
    assert_eq!(&words, b"an answer!");
}

pub(super) fn dropped_send_half_ends_one_direction_only(kind: Kind) {
    let (left, mut right) = kind.ends();
    let End {
        send,
        mut receive,
        closer: _closer,
    } = left;
    drop(send);
    let error = right.receive.receive(&mut [0; 4]).expect_err("the end");
    assert!(matches!(error, ChannelError::Closed), "{error}");
    right
        .send
        .send(b"more", &[])
        .expect("the other direction works");
    let mut words = [0; 4];
    receive
        .receive(&mut words)
        .expect("the other direction works");
    assert_eq!(&words, b"more");
}

pub(super) fn drain_counts_and_stops(kind: Kind) {
    let (left, mut right) = kind.ends();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut left = left;
            left.send.send(&[6; 100_000], &[]).expect("send");
        });
        right.receive.receive(&mut [0; 1_000]).expect("receive");
        let some = right.receive.drain(20_000).expect("drain");
        assert!(
            (20_000..20_000 + 2 * crate::READ_AHEAD_BYTES as u64).contains(&some),
            "{some} bytes"
        );
        let rest = right.receive.drain(u64::MAX).expect("drain");
        assert_eq!(1_000 + some + rest, 100_000);
        assert_eq!(right.receive.drain(u64::MAX).expect("the end again"), 0);
    });
}

pub(super) fn farewell_is_read_though_octets_were_unread(kind: Kind) {
    let (mut left, mut right) = kind.ends();
    // Left goes on sending what right never reads.
    left.send.send(&[7; 3_000], &[]).expect("send");
    thread::scope(|scope| {
        scope.spawn(move || {
            right.send.send(b"farewell", &[]).expect("send");
            right.send.finish().expect("finish");
            right.receive.set_deadline(Some(Instant::now() + LATE_MAX));
            right.receive.drain(1 << 20).expect("until left closes");
        });
        thread::sleep(SETTLE);
        let mut words = [0; 8];
        left.receive.receive(&mut words).expect("the farewell");
        assert_eq!(&words, b"farewell");
        drop(left);
    });
}

pub(super) fn both_halves_have_the_name_of_the_channel(kind: Kind) {
    let (left, right) = (kind.pair)();
    for channel in [left, right] {
        let name = channel.describe();
        assert!(name.len() > 5, "{name:?} describes nothing");
        let (send, receive, _) = channel.split();
        assert_eq!((send.describe(), receive.describe()), (name.clone(), name));
    }
}

/// Makes and ends channels in many ways, closers kept, and counts this process's descriptors. To be called in a process in
/// which nothing else opens or closes descriptors meanwhile.
///
/// # Panics
/// If there are more descriptors than before.
pub fn no_descriptor_stays_open(kind: Kind) {
    let count = || {
        fs::read_dir("/proc/self/fd")
            .expect("the list of descriptors")
            .count()
    };
    // Whatever the kind opens once and for all.
    drop(kind.ends());
    let before = count();
    let mut closers = Vec::new();
    for way in 0..40 {
        let (mut left, right) = kind.ends();
        closers.extend([left.closer.clone(), right.closer.clone()]);
        left.send.send(&[0; 100], &[]).expect("send");
        match way % 5 {
            0 => left.closer.shutdown(),
            1 => drop(right.receive),
            2 => drop(left.send),
            3 => left.send.finish().expect("finish"),
            _ => drop((kind.pair)()),
        }
    }
    assert_eq!(count(), before, "{}: descriptors", kind.name);
    closers.iter().for_each(crate::Closer::shutdown);
    assert_eq!(
        count(),
        before,
        "{}: descriptors after closing what is closed",
        kind.name
    );
}

/// [`Channel::binding`](crate::Channel::binding).
pub(super) fn a_binding_is_that_of_one_connection_and_the_same_at_both_ends(kind: Kind) {
    let ((left, right), (other, _peer)) = ((kind.pair)(), (kind.pair)());
    assert_eq!(left.binding(), right.binding(), "one connection");
    assert_eq!(left.binding(), left.binding(), "asked twice");
    if let (Some(one), Some(other)) = (left.binding(), other.binding()) {
        assert_ne!(one, other, "two connections");
        assert_ne!(one, [0; crate::BINDING_BYTES]);
    }
}
