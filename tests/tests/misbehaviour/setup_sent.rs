//! Against the source, in set-up: its guest was not touched, and runs on.

use std::time::{Duration, Instant};

use multifd_tests::bounded::{GRACE, HELLO_DEADLINE, SETUP_DEADLINE, STALL, Source, tx_builder};
use multifd_tests::fake_destination::{FakeDestination, Taking, prepared, running};
use multifd_tests::fake_source::run;
use multifd_tests::peer::Craft;
use multifd_transport::ChannelError;
use multifd_wire::frame::{
    Abort, Acks, Commit, Credit, Credits, Grant, LaneDown, LaneMark, Outcome, OutcomeState,
    RawCredit, RawLaneMark, RoundClosed,
};
use multifd_wire::{
    ChannelRef, DeviceId, Digest, Frame, HelloReply, Incarnation, Kind, LaneId, Phase, Reason,
    Round, Token,
};

/// What the destination does, how the source ends, what it says.
type Case = (&'static str, fn(&mut Taking), &'static str, Reason);

fn check(reach: fn(FakeDestination) -> Taking, cases: &[Case]) {
    for (name, act, code, reason) in cases {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut taking = reach(fake);
        let began = Instant::now();
        act(&mut taking);
        let told = taking.control.hear_abort();
        assert_eq!(
            (told.reason, told.phase),
            (*reason, Phase::Setup),
            "{name}: {}",
            told.text
        );
        source.fails(GRACE, code, name);
        assert!(began.elapsed() < GRACE, "{name}: {:?}", began.elapsed());
    }
}

const MISBEHAVED: Reason = Reason::Misbehaved;
const OUT_OF_TURN: &str = "sender.misbehaved.out-of-turn";
const DIRECTION: &str = "wire.misbehaved.direction";
const LANE: &str = "wire.misbehaved.lane";
const FEATURE: &str = "wire.misbehaved.feature";

fn grant() -> Grant {
    Grant {
        ticket: Token::new([7; 16]),
        resume_secret: Token::new([8; 16]),
        lanes_max: 4,
        suspend_ms: 0,
        device_window_bytes: 0,
    }
}

fn lane_down(lane: u32, incarnation: u32) -> LaneDown {
    LaneDown {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        reason: Reason::ChannelsLost,
    }
}

#[test]
fn frames_at_the_wrong_moment_are_refused_before_the_grant() {
    check(
        FakeDestination::welcome,
        &[
            ("READY", |t| t.ready(1), "wire.misbehaved.order", MISBEHAVED),
            (
                "PREPARED",
                |t| t.control.send(prepared(Digest::EMPTY)),
                OUT_OF_TURN,
                MISBEHAVED,
            ),
            (
                "RUNNING",
                |t| t.control.send(running()),
                OUT_OF_TURN,
                MISBEHAVED,
            ),
            (
                "COMMIT",
                |t| {
                    t.control.send(Commit {
                        digest: Digest::EMPTY,
                    })
                },
                DIRECTION,
                MISBEHAVED,
            ),
            (
                "LANE_DOWN",
                |t| t.control.send(lane_down(0, 0)),
                LANE,
                MISBEHAVED,
            ),
            (
                "OUTCOME",
                |t| {
                    t.control.send(Outcome {
                        state: OutcomeState::Running,
                    })
                },
                FEATURE,
                MISBEHAVED,
            ),
            (
                "random bytes",
                |t| t.control.raw(&[0x5A; 99]),
                "wire.malformed.header-crc",
                Reason::Corruption,
            ),
            (
                "an unknown kind",
                |t| {
                    t.control
                        .instead(|number| Craft::new(0x7F01, number, &[]).octets())
                },
                "wire.malformed.unknown-kind",
                Reason::Incompatible,
            ),
            (
                "a frame that was left out",
                |t| {
                    t.control.skip(1);
                    t.grant();
                },
                "wire.misbehaved.sequence",
                MISBEHAVED,
            ),
            (
                "a grant of no lanes",
                |t| {
                    t.control.instead(|number| {
                        let table = [[7; 16], [8; 16], [0; 16], [0; 16]].concat();
                        Craft::new(Kind::Grant.code(), number, &table).octets()
                    });
                },
                "wire.malformed.value",
                Reason::Malformed,
            ),
        ],
    );
}

#[test]
fn frames_at_the_wrong_moment_are_refused_after_the_grant() {
    check(
        FakeDestination::set_up,
        &[
            (
                "GRANT twice",
                |t| t.control.send(grant()),
                OUT_OF_TURN,
                MISBEHAVED,
            ),
            (
                "READY for no lanes",
                |t| {
                    t.control
                        .instead(|number| Craft::new(Kind::Ready.code(), number, &[0; 16]).octets())
                },
                "wire.malformed.value",
                Reason::Malformed,
            ),
            (
                "READY for more lanes",
                |t| t.ready(2),
                "wire.misbehaved.amount",
                MISBEHAVED,
            ),
            (
                "PREPARED",
                |t| t.control.send(prepared(Digest::EMPTY)),
                OUT_OF_TURN,
                MISBEHAVED,
            ),
            (
                "ROUND_CLOSED",
                |t| {
                    t.control.send(RoundClosed {
                        round: Round::new(0),
                        pages: 0,
                        zero_pages: 0,
                        digest: Digest::EMPTY,
                        elapsed_us: 0,
                        damaged_pages: 0,
                    });
                },
                OUT_OF_TURN,
                MISBEHAVED,
            ),
            (
                "ACK of a lane that never was",
                |t| {
                    let mark = LaneMark {
                        lane: LaneId::new(3),
                        incarnation: Incarnation::new(0),
                        frames: 0,
                    };
                    t.control.send(Acks {
                        lanes: &[RawLaneMark::from(mark)],
                    });
                },
                LANE,
                MISBEHAVED,
            ),
            (
                "GIVE_BACK, though nothing was sent",
                |t| t.give_back(0, run(0, 0, 1)),
                "wire.misbehaved.order",
                MISBEHAVED,
            ),
            (
                "CREDIT, though no devices were agreed on",
                |t| {
                    let credit = Credit {
                        device: DeviceId::new(0),
                        offset_max: 1,
                    };
                    t.control.send(Credits {
                        credits: &[RawCredit::from(credit)],
                    });
                },
                FEATURE,
                MISBEHAVED,
            ),
            (
                "LANE_DOWN of an incarnation that never was",
                |t| t.control.send(lane_down(0, 5)),
                LANE,
                MISBEHAVED,
            ),
        ],
    );
}

#[test]
fn what_does_not_come_in_set_up_is_waited_for_no_longer_than_its_deadline() {
    type Act = fn(&mut Taking);
    type Reach = fn(FakeDestination) -> Taking;
    let cases: [(&str, Reach, Act, Duration); 3] = [
        (
            "no grant, but signs of life",
            FakeDestination::welcome,
            |t| t.control.keep_alive(),
            SETUP_DEADLINE,
        ),
        (
            "no READY, but signs of life",
            FakeDestination::set_up,
            |_| {},
            SETUP_DEADLINE,
        ),
        (
            "silence",
            FakeDestination::set_up,
            |t| t.control.fall_silent(),
            STALL,
        ),
    ];
    for (name, reach, act, deadline) in cases {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut taking = reach(fake);
        let began = Instant::now();
        act(&mut taking);
        assert_eq!(
            taking.control.hear_abort().reason,
            Reason::Timeout,
            "{name}"
        );
        source.fails(GRACE, "sender.timeout", name);
        assert!(
            began.elapsed() < deadline + GRACE,
            "{name}: {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn a_destination_that_leaves_is_not_waited_for() {
    let reaches: [fn(FakeDestination) -> Taking; 3] = [
        FakeDestination::welcome,
        FakeDestination::set_up,
        FakeDestination::in_rounds,
    ];
    for (step, reach) in reaches.into_iter().enumerate() {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut taking = reach(fake);
        taking.control.cut();
        let end = source.end(GRACE);
        let error = end.finished.error.as_ref().unwrap();
        assert!(
            ["channel-closed", "channel-reset"].contains(&error.code()),
            "step {step}: {error}"
        );
        end.runs_on(&format!("step {step}"));
    }
}

#[test]
fn a_lane_that_is_refused_or_never_answered_ends_it_in_set_up() {
    let mut answers: Vec<Option<Reason>> = Reason::ALL.iter().copied().map(Some).collect();
    answers.push(None);
    for answer in answers {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut control = multifd_tests::peer::Peer::new(fake.accept());
        let hello = control.hear_hello();
        control.raw(&multifd_tests::fake_destination::accepted(hello.session).encode());
        control.send(grant());
        control.keep_alive();
        control.hear_kind(Kind::SetupEnd);
        let mut lane = multifd_tests::peer::Peer::new(fake.accept());
        let join = lane.hear_hello();
        assert_eq!(join.token, grant().ticket);
        let began = Instant::now();
        if let Some(reason) = answer {
            lane.raw(&HelloReply::refused(reason, "no", join.session).encode());
        }
        let told = control.hear_abort();
        assert_eq!(told.channel, ChannelRef::Lane(LaneId::new(0)), "{answer:?}");
        assert_eq!(told.reason, answer.unwrap_or(Reason::ChannelsLost));
        let code = if answer.is_some() {
            "sender.peer.refused"
        } else {
            "channel-deadline"
        };
        source.fails(GRACE, code, &format!("{answer:?}"));
        assert!(began.elapsed() < HELLO_DEADLINE + GRACE, "{answer:?}");
    }
}

#[test]
fn an_abort_is_believed_and_not_answered() {
    for reason in [
        Reason::VmmRefused,
        Reason::MemoryMismatch,
        Reason::ResourceLimit,
    ] {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut taking = FakeDestination::set_up(fake);
        taking.control.send(Abort {
            reason,
            phase: Phase::Setup,
            channel: ChannelRef::None,
            text: "no room for this machine",
        });
        let (heard, _) = taking.control.hear_the_end();
        assert!(!heard.contains(&Kind::Abort), "{heard:?}");
        taking.control.cut();
        let end = source.end(GRACE);
        end.failed("sender.peer.aborted", reason.text());
        let error = end.finished.error.as_ref().unwrap();
        assert_eq!(error.reason(), reason);
        assert!(
            error.to_string().contains("no room for this machine"),
            "{error}"
        );
    }
}

#[test]
fn no_more_lanes_are_opened_than_granted() {
    let fake = FakeDestination::listen();
    let source = Source::to(&fake.address, tx_builder().channels(8).build().unwrap());
    let mut taking = FakeDestination::welcome(fake);
    taking.grant();
    let heard = taking.control.hear_kind(Kind::SetupEnd);
    let Frame::SetupEnd(end) = heard.frame() else {
        unreachable!()
    };
    assert_eq!(end.lanes, 4);
    for _ in 0..4 {
        taking.accept_lane();
    }
    taking.control.cut();
    let _ = source.end(GRACE);
}

/// SPEC: JOIN-6
#[test]
fn nothing_is_said_on_a_lane_before_ready() {
    for is_ready in [false, true] {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut taking = fake.welcome();
        taking.grant();
        taking.control.keep_alive();
        taking.hear_tables();
        taking.accept_lane();
        if is_ready {
            taking.ready(1);
        }
        let lane = taking.lanes.values_mut().next().expect("it joined");
        let wait = if is_ready {
            GRACE
        } else {
            Duration::from_millis(300)
        };
        let heard = lane.hear(wait).map(|heard| heard.kind());
        if is_ready {
            assert!(heard.is_ok(), "{heard:?}");
        } else {
            assert!(
                matches!(heard, Err(ChannelError::Deadline { .. })),
                "{heard:?}"
            );
        }
        source.handle().cancel();
        drop(taking);
        source.end(GRACE).runs_on("cancelled");
    }
}
