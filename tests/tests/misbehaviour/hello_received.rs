//! Against the destination: whatever a stranger says instead of a hello, it is answered, forgotten, and the next source served.

use std::time::Instant;

use multifd_receiver as rx;
use multifd_tests::bounded::{Destination, GRACE, HELLO_DEADLINE, STALL, destination_config};
use multifd_tests::fake_source::FakeSource;
use multifd_tests::model::{DestinationMachine, Random};
use multifd_tests::peer::Peer;
use multifd_transport::ChannelError;
use multifd_transport::memory::pair;
use multifd_wire::{
    Features, HELLO_BYTES, Hello, HelloReply, Incarnation, LaneId, Reason, SessionId, Token,
};

fn hello() -> Hello {
    Hello::start(SessionId::new([9; 16]), Features::NONE, Features::NONE)
}

/// Changes bytes of a hello and makes its checksum right again.
fn altered(offset: usize, octets: &[u8]) -> [u8; HELLO_BYTES] {
    let mut hello = hello().encode();
    hello[offset..][..octets.len()].copy_from_slice(octets);
    let crc = crc32fast::hash(&hello[..124]).to_le_bytes();
    hello[124..].copy_from_slice(&crc);
    hello
}

/// The destination still serves a source that keeps to the rules.
fn still_serves(destination: Destination, refused: u64, case: &str) {
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    source.round_zero();
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none(), "{case}");
    assert!(end.running, "{case}: the guest runs");
    assert_eq!(end.finished.report.refused, refused, "{case}");
}

fn reason_of(reply: Result<HelloReply, ChannelError>, case: &str) -> Reason {
    match reply {
        Ok(HelloReply::Refused { reason, .. }) => reason,
        other => panic!("{case}: {other:?}"),
    }
}

#[test]
fn octets_that_are_no_hello_are_refused_with_the_reason_and_harm_nobody() {
    let mut random = Random::new(3);
    let mut octets = [0u8; HELLO_BYTES];
    octets.fill_with(|| random.below(256) as u8);
    let mut flipped = hello().encode();
    flipped[40] ^= 4;
    let cases = [
        ("random bytes", octets, Reason::Malformed),
        ("another magic", altered(0, b"HTTP/1.1"), Reason::Malformed),
        ("a flipped bit", flipped, Reason::Corruption),
        (
            "a later version",
            altered(8, &[2, 0, 9, 0]),
            Reason::Version,
        ),
        (
            "an impossible version range",
            altered(8, &[2, 0, 1, 0]),
            Reason::Malformed,
        ),
        (
            "a mandatory feature of a later version",
            altered(16, &(1u64 << 40).to_le_bytes()),
            Reason::Feature,
        ),
        (
            "a destination that dials",
            altered(12, &[2]),
            Reason::Malformed,
        ),
        (
            "a start on a data channel",
            altered(13, &[1]),
            Reason::Malformed,
        ),
        ("an unknown intent", altered(14, &[5, 0]), Reason::Malformed),
        ("a reserved byte", altered(80, &[1]), Reason::Malformed),
        ("no session", altered(32, &[0; 16]), Reason::Malformed),
        (
            "a join to nothing",
            Hello::join(
                SessionId::new([9; 16]),
                Token::new([1; 16]),
                Features::NONE,
                LaneId::new(0),
                Incarnation::new(0),
            )
            .encode(),
            Reason::WrongSession,
        ),
        (
            "a resume of nothing",
            Hello::resume(SessionId::new([9; 16]), Token::new([1; 16]), Features::NONE).encode(),
            Reason::WrongSession,
        ),
        (
            "a question about nothing",
            Hello::ask(SessionId::new([9; 16]), Token::new([1; 16])).encode(),
            Reason::WrongSession,
        ),
    ];
    let destination = Destination::start();
    let refused = cases.len() as u64;
    for (case, octets, expected) in cases {
        let began = Instant::now();
        let mut peer = Peer::new(destination.connect());
        peer.raw(&octets);
        assert_eq!(reason_of(peer.hear_reply(), case), expected, "{case}");
        let (more, end) = peer.hear_the_end();
        assert!(
            more.is_empty() && matches!(end, ChannelError::Closed),
            "{case}: {end}"
        );
        assert!(began.elapsed() < HELLO_DEADLINE + GRACE, "{case}");
    }
    still_serves(destination, refused, "after all of them");
}

#[test]
fn a_hello_cut_off_at_any_length_is_forgotten() {
    let destination = Destination::start();
    let octets = hello().encode();
    for bytes in 0..HELLO_BYTES {
        let mut peer = Peer::new(destination.connect());
        peer.raw(&octets[..bytes]);
        peer.finish();
        let (heard, end) = peer.hear_the_end();
        assert!(heard.is_empty(), "{bytes} bytes");
        assert!(
            matches!(end, ChannelError::Closed | ChannelError::Reset { .. }),
            "{bytes} bytes: {end}"
        );
    }
    // One that closes without a word was no hello, and so is none that was refused.
    still_serves(destination, HELLO_BYTES as u64 - 1, "after all of them");
}

#[test]
fn a_connection_that_says_nothing_is_closed_at_its_deadline_and_keeps_nobody_waiting() {
    let destination = Destination::start();
    let began = Instant::now();
    let mut silent: Vec<Peer> = (0..20).map(|_| Peer::new(destination.connect())).collect();
    silent[0].raw(&hello().encode()[..100]);
    for peer in &mut silent {
        let (heard, end) = peer.hear_the_end();
        assert!(heard.is_empty());
        assert!(
            matches!(end, ChannelError::Closed | ChannelError::Reset { .. }),
            "{end}"
        );
    }
    assert!(
        began.elapsed() >= HELLO_DEADLINE - STALL / 10,
        "{:?}",
        began.elapsed()
    );
    assert!(
        began.elapsed() < HELLO_DEADLINE + GRACE,
        "{:?}",
        began.elapsed()
    );
    still_serves(destination, 20, "after all of them");
}

// SPEC: HELLO-11
#[test]
fn connections_that_say_nothing_are_few_and_those_beyond_are_told_at_once() {
    let destination = Destination::start();
    let handle = destination.handle();
    let offer = || {
        let (ours, theirs) = pair(512);
        handle.offer(theirs).map(|()| ours)
    };
    let mut silent = Vec::new();
    let busy = loop {
        match offer() {
            Ok(ours) => silent.push(ours),
            Err(error) => break error,
        }
        assert!(silent.len() <= 400, "there is no bound");
    };
    assert_eq!(busy, rx::OfferError::Busy);
    assert!(
        silent.len() >= multifd_wire::limits::LANES_MAX,
        "every lane may come at once"
    );
    let since = Instant::now();
    while offer().is_err() {
        assert!(
            since.elapsed() < HELLO_DEADLINE + GRACE,
            "their places are never free again"
        );
        std::thread::sleep(STALL / 20);
    }
    drop(silent);
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    source.round_zero();
    source.complete(1);
    assert!(destination.end(GRACE).running);
}

// SPEC: CHAN-1
#[test]
fn a_second_migration_is_told_that_it_is_busy_and_the_first_goes_on() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut first = FakeSource::in_rounds(&connect, 1);
    let mut second = Peer::new(destination.connect());
    let other = Hello::start(SessionId::new([1; 16]), Features::NONE, Features::NONE);
    assert_eq!(
        reason_of(second.greet(&other), "another session"),
        Reason::Busy
    );
    let mut again = Peer::new(destination.connect());
    let same = Hello::start(first.session, Features::NONE, Features::NONE);
    assert_eq!(
        reason_of(again.greet(&same), "the same session"),
        Reason::Busy
    );
    first.round_zero();
    first.complete(1);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
    assert_eq!(end.finished.report.refused, 2);
}

#[test]
fn a_data_channel_that_does_not_belong_is_refused_with_the_reason_and_the_session_goes_on() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    let right = source.join_hello(2);
    let cases = [
        (
            "another session",
            Hello {
                session: SessionId::new([3; 16]),
                ..right
            },
            Reason::WrongSession,
        ),
        (
            "another ticket",
            Hello {
                token: source.other_ticket(),
                ..right
            },
            Reason::BadTicket,
        ),
        (
            "the resume secret as ticket",
            Hello {
                token: source.grant.resume_secret,
                ..right
            },
            Reason::BadTicket,
        ),
        (
            "a lane more than granted",
            Hello {
                lane: LaneId::new(4),
                ..right
            },
            Reason::TooManyLanes,
        ),
        (
            "the highest lane of the format",
            Hello {
                lane: LaneId::new(255),
                ..right
            },
            Reason::TooManyLanes,
        ),
        (
            "a lane that is here",
            source.join_hello(0),
            Reason::Misbehaved,
        ),
        (
            "a later incarnation of a lane that never was",
            Hello {
                incarnation: Incarnation::new(1),
                ..right
            },
            Reason::Misbehaved,
        ),
        (
            "a feature that was not agreed",
            Hello {
                features_mandatory: Features::DEVICE_STATE,
                ..right
            },
            Reason::Feature,
        ),
    ];
    let refused = cases.len() as u64;
    for (case, hello, expected) in cases {
        let (_peer, reply) = source.try_join(&hello);
        assert_eq!(reason_of(Ok(reply), case), expected, "{case}");
    }
    source.round_zero();
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
    assert_eq!(end.finished.report.refused, refused);
}

#[test]
fn a_lane_that_was_not_announced_ends_the_session_that_opened_it() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 1);
    source.join(2);
    assert_eq!(source.control.hear_abort().reason, Reason::Misbehaved);
    destination.fails(GRACE, "receiver.misbehaved.out-of-turn", "a lane too many");
}

#[test]
fn a_source_that_says_hello_and_then_nothing_is_given_up() {
    let destination = Destination::with(destination_config(), DestinationMachine::default());
    let began = Instant::now();
    let mut peer = Peer::new(destination.connect());
    assert!(matches!(
        peer.greet(&hello()),
        Ok(HelloReply::Accepted { .. })
    ));
    let told = peer.hear_abort();
    assert_eq!(told.reason, Reason::Timeout);
    destination.fails(GRACE, "receiver.timeout", "silence after hello");
    assert!(
        began.elapsed() >= STALL && began.elapsed() < STALL + GRACE,
        "{:?}",
        began.elapsed()
    );
}
