//! Against the destination, on the control channel once the rounds have begun: frames at the wrong moment, and silence.

use std::time::Instant;

use multifd_tests::bounded::{Destination, GRACE, STALL};
use multifd_tests::fake_source::{Connect, FakeSource};
use multifd_tests::peer::encode;
use multifd_wire::frame::{BlobPart, Commit, Final, GuestState, LaneDown, Switchover, VmState};
use multifd_wire::{Body, Digest, Incarnation, Kind, LaneId, Phase, Reason, Round};

const OUT_OF_TURN: &str = "receiver.misbehaved.out-of-turn";
const PHASE: &str = "wire.misbehaved.phase";

/// What is done at which step, how the destination ends and in which phase.
type Case = (&'static str, fn(&mut FakeSource<'_>), &'static str);

fn check(phase: Phase, reach: impl Fn(&Destination, &dyn Fn(&mut FakeSource<'_>)), cases: &[Case]) {
    for (name, act, code) in cases {
        let destination = Destination::start();
        let began = Instant::now();
        reach(&destination, &|source| {
            act(source);
            let told = source.control.hear_abort();
            assert_eq!(told.reason, Reason::Misbehaved, "{name}: {}", told.text);
            assert_eq!(told.phase, phase, "{name}: {}", told.text);
        });
        destination.fails(GRACE, code, name);
        assert!(began.elapsed() < GRACE, "{name}: {:?}", began.elapsed());
    }
}

fn state(index: u32) -> VmState {
    VmState {
        blob: BlobPart {
            kind: 1,
            version: 1,
            index,
            part: 0,
            blob_bytes: 0,
        },
    }
}

#[test]
fn frames_of_set_up_and_of_later_phases_are_refused_while_the_guest_runs() {
    let reach = |destination: &Destination, act: &dyn Fn(&mut FakeSource<'_>)| {
        let connect = || destination.connect();
        act(&mut FakeSource::in_rounds(&connect, 1));
    };
    check(
        Phase::Rounds,
        reach,
        &[
            ("CONFIG", |s| s.send_config(), PHASE),
            ("REGIONS", |s| s.send_regions(), PHASE),
            ("DEVICES", |s| s.send_devices(), PHASE),
            ("SETUP_END", |s| s.control.send(s.setup_end(1)), PHASE),
            ("VM_STATE", |s| s.control.send(state(0)), PHASE),
            (
                "FINAL before SWITCHOVER",
                |s| s.control.send(s.final_of(0)),
                OUT_OF_TURN,
            ),
            ("COMMIT", |s| s.commit(), OUT_OF_TURN),
            (
                "SWITCHOVER of a round that is closed",
                |s| {
                    s.round_zero();
                    s.switchover(0);
                },
                OUT_OF_TURN,
            ),
            (
                "LANE_DOWN of a lane that never was",
                |s| {
                    s.control.send(LaneDown {
                        lane: LaneId::new(7),
                        incarnation: Incarnation::new(0),
                        reason: Reason::ChannelsLost,
                    });
                },
                "wire.misbehaved.lane",
            ),
            (
                "LANE_DOWN of an incarnation that never was",
                |s| {
                    s.control.send(LaneDown {
                        lane: LaneId::new(0),
                        incarnation: Incarnation::new(1),
                        reason: Reason::ChannelsLost,
                    });
                },
                "wire.misbehaved.lane",
            ),
        ],
    );
}

#[test]
fn frames_at_the_wrong_moment_are_refused_while_the_guest_is_paused() {
    let reach = |destination: &Destination, act: &dyn Fn(&mut FakeSource<'_>)| {
        let connect = || destination.connect();
        act(&mut FakeSource::in_switchover(&connect));
    };
    check(
        Phase::Switchover,
        reach,
        &[
            ("CONFIG", |s| s.send_config(), PHASE),
            ("COMMIT before PREPARED", |s| s.commit(), OUT_OF_TURN),
            ("SWITCHOVER twice", |s| s.switchover(1), OUT_OF_TURN),
            (
                "SWITCHOVER that leaves a round out",
                |s| s.switchover(3),
                OUT_OF_TURN,
            ),
            (
                "FINAL of the round before",
                |s| s.control.send(s.final_of(0)),
                OUT_OF_TURN,
            ),
            (
                "FINAL of the round after",
                |s| s.control.send(s.final_of(2)),
                OUT_OF_TURN,
            ),
            (
                "VM_STATE whose first blob is missing",
                |s| s.control.send(state(1)),
                "wire.misbehaved.order",
            ),
            (
                "FINAL with another size of memory",
                |s| {
                    let last = Final {
                        memory_pages: 5,
                        ..s.final_of(1)
                    };
                    s.control.send(last);
                },
                "wire.misbehaved.amount",
            ),
            // SPEC: FINAL-6
            (
                "FINAL of a paused guest in a session without PAUSED",
                |s| {
                    let last = Final {
                        guest: GuestState::Paused,
                        ..s.final_of(1)
                    };
                    s.control.send(last);
                },
                OUT_OF_TURN,
            ),
            (
                "FINAL with more blobs than came",
                |s| {
                    s.end_round(0, 1, true);
                    s.send_state();
                    let last = Final {
                        states: 2,
                        ..s.final_of(1)
                    };
                    s.control.send(last);
                },
                "wire.misbehaved.amount",
            ),
            (
                "FINAL with half a blob",
                |s| {
                    s.end_round(0, 1, true);
                    let body = vec![1; 1 << 20];
                    let half = BlobPart {
                        blob_bytes: (1 << 20) + 1,
                        ..state(0).blob
                    };
                    s.control
                        .send_with(VmState { blob: half }, Body::Octets(&body), &body);
                    let last = Final {
                        states: 0,
                        ..s.final_of(1)
                    };
                    s.control.send(last);
                },
                "wire.misbehaved.order",
            ),
            (
                "an end mark that says that the guest runs",
                |s| s.end_round(0, 1, false),
                OUT_OF_TURN,
            ),
        ],
    );
}

#[test]
fn a_source_that_falls_silent_is_given_up_in_every_phase() {
    type Reach = fn(&mut FakeSource<'_>);
    let steps: [(&str, Reach); 4] = [
        ("in round 0", |s| s.page(0, 0, 1, 1)),
        ("between rounds", |s| s.round_zero()),
        ("after SWITCHOVER", |s| {
            s.round_zero();
            s.switchover(1);
        }),
        ("after FINAL", |s| {
            s.round_zero();
            s.switchover(1);
            s.last_round(1);
            s.control.hear_kind(Kind::Prepared);
        }),
    ];
    for (name, step) in steps {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::in_rounds(&connect, 1);
        step(&mut source);
        source.control.fall_silent();
        let began = Instant::now();
        assert_eq!(
            source.control.hear_abort().reason,
            Reason::Timeout,
            "{name}"
        );
        assert!(began.elapsed() < STALL + GRACE, "{name}");
        destination.fails(GRACE, "receiver.timeout", name);
    }
}

#[test]
fn a_source_that_leaves_ends_it_in_every_phase() {
    for (name, paused) in [
        ("while the guest runs", false),
        ("while the guest is paused", true),
    ] {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::in_rounds(&connect, 2);
        source.round_zero();
        if paused {
            source.switchover(1);
            source.last_round(1);
        }
        source.control.cut();
        let end = destination.end(GRACE);
        let error = end.finished.error.unwrap();
        assert!(
            ["channel-closed", "channel-reset"].contains(&error.code()),
            "{name}: {error}"
        );
        assert!(!end.running && end.discarded, "{name}");
    }
}

#[test]
fn a_frame_cut_off_at_any_place_ends_it_while_the_guest_is_paused() {
    type Make = fn(&FakeSource<'_>, u64) -> Vec<u8>;
    let frames: [(&str, Make); 3] = [
        ("SWITCHOVER", |_, number| {
            encode(
                number,
                Switchover {
                    final_round: Round::new(2),
                },
                Body::None,
            )
        }),
        ("VM_STATE", |_, number| {
            let blob = BlobPart {
                blob_bytes: 9,
                ..state(0).blob
            };
            let head = encode(number, VmState { blob }, Body::Octets(&[4; 9]));
            [&head[..], &[4; 9]].concat()
        }),
        ("FINAL", |s, number| {
            encode(number, s.final_of(1), Body::None)
        }),
    ];
    for (name, make) in frames {
        for bytes in [1, 31, 32, 33, usize::MAX] {
            let destination = Destination::start();
            let connect = || destination.connect();
            let mut source = FakeSource::in_switchover(&connect);
            source.control.fall_silent();
            source.control.instead(|number| {
                let mut whole = make(&source, number);
                whole.truncate(bytes.min(whole.len() - 1));
                whole
            });
            source.control.finish();
            assert_eq!(
                source.control.hear_abort().reason,
                Reason::ChannelsLost,
                "{name}"
            );
            let end = destination.end(GRACE);
            let error = end.finished.error.unwrap();
            assert!(
                error.code().starts_with("channel-closed"),
                "{name}, {bytes} bytes: {error}"
            );
            assert!(!end.running && end.discarded);
        }
    }
}

#[test]
fn a_destination_that_is_cancelled_tells_the_source_in_every_phase() {
    type Reach = fn(Connect<'_>) -> FakeSource<'_>;
    let reaches: [(Reach, Phase); 4] = [
        (|connect| FakeSource::open(connect), Phase::Setup),
        (|connect| FakeSource::in_rounds(connect, 2), Phase::Rounds),
        (
            |connect| FakeSource::in_switchover(connect),
            Phase::Switchover,
        ),
        (|connect| FakeSource::prepared(connect), Phase::Commit),
    ];
    for (reach, phase) in reaches {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = reach(&connect);
        destination.handle().cancel();
        let told = source.control.hear_abort();
        assert_eq!((told.reason, told.phase), (Reason::Cancelled, phase));
        destination.fails(GRACE, "receiver.cancelled", phase.text());
    }
}

#[test]
fn an_abort_is_believed_and_not_answered() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 1);
    source.control.send(multifd_wire::frame::Abort {
        reason: Reason::CannotConverge,
        phase: Phase::Rounds,
        channel: multifd_wire::ChannelRef::None,
        text: "too busy",
    });
    let (heard, _) = source.control.hear_the_end();
    assert!(!heard.contains(&Kind::Abort), "{heard:?}");
    source.control.cut();
    destination.fails(GRACE, "receiver.peer.aborted", "ABORT");
}

#[test]
fn missing_pages_that_never_come_end_it_although_the_source_says_that_it_lives() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_switchover(&connect);
    let other = FakeSource::content(0xEE);
    source.page_as(0, 1, 20, 0x20, &other);
    source.end_round(0, 1, true);
    source.send_state();
    source.control.send(source.final_of(1));
    let began = Instant::now();
    assert_eq!(source.control.hear_abort().reason, Reason::Timeout);
    assert!(began.elapsed() < STALL + GRACE);
    destination.fails(
        GRACE,
        "receiver.timeout",
        "a damaged page that is never repaired",
    );
}

#[test]
fn final_before_the_end_marks_takes_effect_when_its_round_is_closed() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_switchover(&connect);
    source.page(0, 1, 9, 0x99);
    source.send_state();
    source.control.send(Final {
        final_round: Round::new(1),
        ..source.final_of(1)
    });
    source.end_round(0, 1, true);
    source.control.hear_kind(Kind::Prepared);
    source.control.send(Commit {
        digest: source.digest(),
    });
    source.control.hear_kind(Kind::Running);
    source.control.finish();
    assert_ne!(source.digest(), Digest::EMPTY);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
}
