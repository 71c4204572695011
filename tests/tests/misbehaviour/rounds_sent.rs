//! Against the source, while its guest runs and is sent: it runs on, whatever the destination does.

use std::time::{Duration, Instant};

use multifd_sender as tx;
use multifd_tests::bounded::{GRACE, STALL, Source, tx_builder};
use multifd_tests::fake_destination::{FakeDestination, Taking, prepared, running};
use multifd_tests::fake_source::run;
use multifd_transport::TcpOptions;
use multifd_wire::frame::{
    Abort, Acks, Credit, Credits, Grant, LaneDown, LaneMark, RawCredit, RawLaneMark, RoundClosed,
};
use multifd_wire::{
    ChannelRef, DeviceId, Digest, Frame, Incarnation, Kind, LaneId, Phase, Reason, Round, Token,
};

/// A source that is slow enough to be caught in round 0.
fn slow_source(fake: &FakeDestination) -> Source {
    let config = tx_builder().bandwidth(Some(2 << 20)).build().unwrap();
    Source::to(&fake.address, config)
}

fn acked(lane: u32, incarnation: u32, frames: u64) -> RawLaneMark {
    RawLaneMark::from(LaneMark {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        frames,
    })
}

fn lane_down(lane: u32) -> LaneDown {
    LaneDown {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(0),
        reason: Reason::ChannelsLost,
    }
}

/// What the destination does, how the source ends, what it says.
type Case = (&'static str, fn(&mut Taking), &'static str, Reason);

const MISBEHAVED: Reason = Reason::Misbehaved;
const OUT_OF_TURN: &str = "sender.misbehaved.out-of-turn";
const AMOUNT: &str = "wire.misbehaved.amount";
const LANE: &str = "wire.misbehaved.lane";

#[test]
fn lies_about_the_rounds_end_it_and_the_guest_runs_on() {
    let cases: [Case; 16] = [
        (
            "ROUND_CLOSED of a round that was never opened",
            |t| {
                t.control.send(RoundClosed {
                    round: Round::new(9),
                    pages: 0,
                    zero_pages: 0,
                    digest: Digest::EMPTY,
                    elapsed_us: 0,
                    damaged_pages: 0,
                });
            },
            "wire.misbehaved.round",
            MISBEHAVED,
        ),
        (
            "ACK of more than was sent",
            |t| {
                t.control.send(Acks {
                    lanes: &[acked(0, 0, 1 << 40)],
                })
            },
            AMOUNT,
            MISBEHAVED,
        ),
        (
            "ACK that goes back",
            |t| {
                std::thread::sleep(Duration::from_millis(300));
                t.control.send(Acks {
                    lanes: &[acked(0, 0, 1)],
                });
                t.control.send(Acks {
                    lanes: &[acked(0, 0, 0)],
                });
            },
            AMOUNT,
            MISBEHAVED,
        ),
        (
            "ACK of a lane that never was",
            |t| {
                t.control.send(Acks {
                    lanes: &[acked(1, 0, 0)],
                })
            },
            LANE,
            MISBEHAVED,
        ),
        (
            "ACK of an incarnation that never was",
            |t| {
                t.control.send(Acks {
                    lanes: &[acked(0, 1, 0)],
                })
            },
            LANE,
            MISBEHAVED,
        ),
        (
            "GIVE_BACK past the end of a region",
            |t| t.give_back(0, run(0, 1 << 30, 1)),
            "wire.misbehaved.run-past-region",
            MISBEHAVED,
        ),
        (
            "GIVE_BACK in a region that is not there",
            |t| t.give_back(0, run(9, 0, 1)),
            "wire.misbehaved.unknown-region",
            MISBEHAVED,
        ),
        (
            "GIVE_BACK from a lane that never was",
            |t| t.give_back(2, run(0, 0, 1)),
            LANE,
            MISBEHAVED,
        ),
        (
            "LANE_DOWN of a lane that never was",
            |t| t.control.send(lane_down(4)),
            LANE,
            MISBEHAVED,
        ),
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
            "READY twice",
            |t| t.ready(1),
            "wire.misbehaved.order",
            MISBEHAVED,
        ),
        (
            "GRANT twice",
            |t| {
                t.control.send(Grant {
                    ticket: Token::new([7; 16]),
                    resume_secret: Token::new([8; 16]),
                    lanes_max: 4,
                    suspend_ms: 0,
                    device_window_bytes: 0,
                });
            },
            OUT_OF_TURN,
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
            "wire.misbehaved.feature",
            MISBEHAVED,
        ),
        (
            "random bytes",
            |t| t.control.raw(&[0x77; 40]),
            "wire.malformed.header-crc",
            Reason::Corruption,
        ),
        (
            "LANE_DOWN of the only lane",
            |t| t.control.send(lane_down(0)),
            "sender.channel.all-lanes-lost",
            Reason::ChannelsLost,
        ),
    ];
    for (name, act, code, reason) in cases {
        let fake = FakeDestination::listen();
        let source = slow_source(&fake);
        let mut taking = fake.in_rounds();
        let began = Instant::now();
        act(&mut taking);
        let told = taking.control.hear_abort();
        assert_eq!(
            (told.reason, told.phase),
            (reason, Phase::Rounds),
            "{name}: {}",
            told.text
        );
        source.fails(GRACE, code, name);
        assert!(began.elapsed() < GRACE, "{name}: {:?}", began.elapsed());
    }
}

#[test]
fn silence_an_abort_and_a_closed_channel_end_it() {
    let fake = FakeDestination::listen();
    let source = slow_source(&fake);
    let mut taking = fake.in_rounds();
    taking.control.fall_silent();
    let began = Instant::now();
    assert_eq!(taking.control.hear_abort().reason, Reason::Timeout);
    source.fails(GRACE, "sender.timeout", "silence");
    assert!(began.elapsed() < STALL + GRACE);

    let fake = FakeDestination::listen();
    let source = slow_source(&fake);
    let mut taking = fake.in_rounds();
    taking.control.send(Abort {
        reason: Reason::ShuttingDown,
        phase: Phase::Rounds,
        channel: ChannelRef::None,
        text: "maintenance",
    });
    let (heard, _) = taking.control.hear_the_end();
    assert!(!heard.contains(&Kind::Abort));
    taking.control.cut();
    source.fails(GRACE, "sender.peer.aborted", "ABORT");

    let fake = FakeDestination::listen();
    let source = slow_source(&fake);
    let mut taking = fake.in_rounds();
    taking.control.finish();
    assert_eq!(taking.control.hear_abort().reason, Reason::ChannelsLost);
    source.fails(GRACE, "channel-closed", "half closed");
}

#[test]
fn a_source_that_is_cancelled_tells_the_destination_in_every_phase_and_runs_on() {
    type Reach = fn(FakeDestination) -> Taking;
    let reaches: [(Reach, Phase); 4] = [
        (FakeDestination::welcome, Phase::Setup),
        (FakeDestination::set_up, Phase::Setup),
        (FakeDestination::in_rounds, Phase::Rounds),
        (|fake| fake.at_final().0, Phase::Switchover),
    ];
    for (reach, phase) in reaches {
        let fake = FakeDestination::listen();
        // At full speed where the rounds have to end.
        let source = if phase == Phase::Switchover {
            Source::to(&fake.address, tx_builder().build().unwrap())
        } else {
            slow_source(&fake)
        };
        let mut taking = reach(fake);
        source.handle().cancel();
        let told = taking.control.hear_abort();
        assert_eq!((told.reason, told.phase), (Reason::Cancelled, phase));
        let end = source.end(GRACE);
        assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Cancelled);
        end.runs_on(phase.text());
    }
}

#[test]
fn lanes_that_nobody_reads_are_given_up() {
    let fake = FakeDestination::listen();
    let dialer = tx::Dialer {
        address: fake.address.clone(),
        options: TcpOptions::default().into(),
    };
    let source = Source::sized(64 << 20, Box::new(dialer), tx_builder().build().unwrap());
    let mut taking = fake.set_up();
    let began = Instant::now();
    taking.ready(1);
    let told = taking.control.hear_abort();
    assert_eq!(told.reason, Reason::ChannelsLost, "{}", told.text);
    source.fails(GRACE, "sender.channel.all-lanes-lost", "nobody reads");
    assert!(
        began.elapsed() >= STALL && began.elapsed() < STALL + GRACE,
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn the_loss_of_every_lane_ends_it() {
    let fake = FakeDestination::listen();
    let source = slow_source(&fake);
    let mut taking = fake.in_rounds();
    taking.cut_lanes();
    assert_eq!(taking.control.hear_abort().reason, Reason::ChannelsLost);
    source.fails(GRACE, "sender.channel.all-lanes-lost", "every lane is cut");
}

/// A destination with two lanes in round 0, of which the second is cut.
fn two_lanes(config: tx::ConfigBuilder) -> (Source, Taking) {
    let fake = FakeDestination::listen();
    let source = Source::to(&fake.address, config.channels(2).build().unwrap());
    let mut taking = fake.welcome();
    taking.grant();
    taking.control.keep_alive();
    taking.hear_tables();
    taking.accept_lane();
    taking.accept_lane();
    taking.ready(2);
    (source, taking)
}

#[test]
fn a_destination_that_never_says_what_it_has_of_a_lost_lane_is_given_up() {
    let (source, mut taking) = two_lanes(tx_builder().bandwidth(Some(2 << 20)));
    let began = Instant::now();
    let (_, mut lost) = taking.lanes.pop_last().unwrap();
    lost.cut();
    taking.read_lanes();
    // It goes on reading the other lane and says that it lives.
    taking.keep_acknowledging();
    taking.hear_pages();
    taking.control.hear_kind(Kind::LaneDown);
    assert_eq!(taking.control.hear_abort().reason, Reason::Timeout);
    source.fails(GRACE, "sender.timeout", "a lane that is never settled");
    assert!(
        began.elapsed() < 3 * STALL + 2 * GRACE,
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_lane_that_the_destination_gives_up_does_not_hold_up_the_control_channel() {
    // The lane's thread waits for its turn under the cap for much longer than the lane lives.
    let config = tx_builder().bandwidth(Some(1 << 20)).body_bytes(1 << 20);
    let (source, mut taking) = two_lanes(config);
    taking.read_lanes();
    std::thread::sleep(STALL / 2);
    let (began, host) = (Instant::now(), multifd_tests::host::Host::watch());
    taking.control.send(lane_down(1));
    let heard = taking.control.hear_kind(Kind::LaneDown);
    let Frame::LaneDown(down) = heard.frame() else {
        unreachable!()
    };
    assert_eq!(down.lane, LaneId::new(1));
    assert!(
        began.elapsed() < STALL + host.delayed(),
        "{:?}",
        began.elapsed()
    );
    taking.control.cut();
    let end = source.end(GRACE);
    end.runs_on("after a cut");
}
