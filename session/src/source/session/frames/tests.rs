//! Frames of the destination into the session: the set-up in order and out of order, what speaks of lanes, signs of life.

use multifd_wire::frame::{
    Acks, Asks, GiveBack, GiveBackReason, Grant, KeepAlive, Landed, LaneDown, LaneMark,
    RawLaneMark, RawRun, Ready,
};
use multifd_wire::{Features, Incarnation, LaneId, Phase, Reason, Sequence, Token};

use super::*;
use crate::source::config::Config;
use crate::source::event::Outcome;

const MS: Duration = Duration::from_millis(1);

fn session() -> Session {
    let config = Config::builder().channels(2).build().unwrap();
    let mut session = Session::new(config, 1024, Duration::ZERO);
    let _ = session.handle(connected(), Duration::ZERO);
    session
}

fn connected() -> Event {
    Event::Connected {
        agreed: Features::RESUME,
        round_trip: 100 * MS,
    }
}

fn grant() -> Frame<'static> {
    Frame::Grant(Grant {
        ticket: Token::new([1; 16]),
        resume_secret: Token::new([2; 16]),
        lanes_max: 256,
        suspend_ms: 60_000,
        device_window_bytes: 1 << 20,
    })
}

fn ready(lanes: u32) -> Frame<'static> {
    Frame::Ready(Ready {
        lanes,
        prepare_us: 5,
    })
}

fn take(session: &mut Session, frame: &Frame<'_>) -> Vec<Effect> {
    session.frame(ChannelRef::Control, frame, MS)
}

fn up(session: &mut Session, lane: u32, incarnation: u32) -> Vec<Effect> {
    let event = Event::LaneUp {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
    };
    session.handle(event, MS)
}

/// In round 0, with two lanes.
fn in_rounds() -> Session {
    let mut session = session();
    let _ = take(&mut session, &grant());
    let _ = up(&mut session, 0, 0);
    let _ = up(&mut session, 1, 0);
    let _ = take(&mut session, &ready(2));
    let _ = session.handle(Event::Begun, MS);
    assert_eq!(session.phase(), Phase::Rounds);
    session
}

fn code(effects: &[Effect]) -> &'static str {
    let finished = effects.iter().find_map(|effect| match effect {
        Effect::Finish(Outcome::Failed(error)) => Some(error.code()),
        _ => None,
    });
    finished.unwrap_or("goes on")
}

#[test]
fn the_rounds_begin_when_the_destination_is_ready_and_all_lanes_are_open() {
    let mut session = session();
    let effects = take(&mut session, &grant());
    assert!(matches!(
        effects[..],
        [
            Effect::Granted {
                ticket: Some(_),
                ..
            },
            Effect::SendSetup { lanes: 2 },
            Effect::DialLane { .. },
            Effect::DialLane { .. },
        ]
    ));
    assert!(up(&mut session, 0, 0).is_empty());
    assert!(
        take(&mut session, &ready(2)).is_empty(),
        "a lane is missing"
    );
    let effects = up(&mut session, 1, 0);
    assert!(matches!(effects[..], [Effect::Begin { prepare_us: 5 }]));
    let effects = session.handle(Event::Begun, MS);
    assert!(matches!(
        effects[..],
        [Effect::OpenRound { last: false, .. }]
    ));
}

#[test]
fn ready_before_grant_with_other_lanes_or_twice_is_misbehaviour() {
    assert_eq!(
        code(&take(&mut session(), &ready(2))),
        "wire.misbehaved.order"
    );
    let mut other = session();
    let _ = take(&mut other, &grant());
    assert_eq!(code(&take(&mut other, &ready(1))), "wire.misbehaved.amount");
    let mut rounds = in_rounds();
    assert_eq!(code(&take(&mut rounds, &ready(2))), "wire.misbehaved.order");
}

#[test]
fn what_speaks_of_a_lane_that_is_not_there_ends_the_session() {
    let mark = [RawLaneMark::from(LaneMark {
        lane: LaneId::new(7),
        incarnation: Incarnation::new(0),
        frames: 1,
    })];
    let acks = Frame::Ack(Acks { lanes: &mark });
    let down = Frame::LaneDown(LaneDown {
        lane: LaneId::new(7),
        incarnation: Incarnation::new(0),
        reason: Reason::ChannelsLost,
    });
    for frame in [acks, down] {
        assert_eq!(
            code(&take(&mut in_rounds(), &frame)),
            "wire.misbehaved.lane"
        );
    }
}

#[test]
fn landed_comes_only_once_in_a_resume_and_after_ready() {
    let landed = Frame::Landed(Landed {
        rounds_closed: 0,
        lanes: &[],
    });
    assert_eq!(
        code(&take(&mut in_rounds(), &landed)),
        "wire.misbehaved.order"
    );
    let mut session = resumed();
    assert_eq!(
        code(&take(&mut session, &landed)),
        "wire.misbehaved.order",
        "before READY"
    );
    let mut session = resumed();
    let _ = take(&mut session, &ready(1));
    let effects = take(&mut session, &landed);
    assert!(matches!(
        effects[..],
        [
            Effect::SettleBefore { .. },
            Effect::Resumed { rounds_closed: 0 },
            Effect::Collect { last: false },
        ]
    ));
    assert_eq!(code(&take(&mut session, &landed)), "wire.misbehaved.order");
}

/// The control channel was lost in round 0, another one is granted, and lane 1 is open again.
fn resumed() -> Session {
    let mut session = in_rounds();
    let lost = Error::new(Phase::Rounds, Fault::Timeout { what: "anything" });
    let _ = session.handle(Event::Lost(lost), MS);
    let _ = session.handle(connected(), MS);
    let effects = take(&mut session, &grant());
    assert!(matches!(effects[0], Effect::Granted { ticket: None, .. }));
    let _ = up(&mut session, 1, 1);
    session
}

#[test]
fn landed_names_no_rounds_that_were_not_opened() {
    let mut session = resumed();
    let _ = take(&mut session, &ready(2));
    let landed = Frame::Landed(Landed {
        rounds_closed: 2,
        lanes: &[],
    });
    assert_eq!(code(&take(&mut session, &landed)), "wire.misbehaved.round");
}

#[test]
fn pages_come_back_in_the_rounds_and_between_ready_and_landed_and_not_in_a_first_set_up() {
    let runs = [RawRun {
        region: 0.into(),
        count: 1.into(),
        first: 0.into(),
    }];
    let back = Frame::GiveBack(GiveBack {
        lane: LaneId::new(1),
        incarnation: Incarnation::new(0),
        sequence: Sequence::new(0),
        reason: GiveBackReason::Checksum,
        runs: &runs,
    });
    let mut first = session();
    let _ = take(&mut first, &grant());
    assert_eq!(code(&take(&mut first, &back)), "wire.misbehaved.order");
    let mut before_ready = resumed();
    assert_eq!(
        code(&take(&mut before_ready, &back)),
        "wire.misbehaved.order"
    );
    let mut after_ready = resumed();
    let _ = take(&mut after_ready, &ready(2));
    for mut session in [in_rounds(), after_ready] {
        let effects = take(&mut session, &back);
        assert!(matches!(effects[..], [Effect::GiveBack { .. }]));
    }
}

#[test]
fn signs_of_life_are_answered_and_given_on_time() {
    let mut session = in_rounds();
    let asks = Frame::KeepAlive(KeepAlive {
        stamp_us: 9,
        echo_us: 0,
        held_us: 0,
        asks: Asks::Answer,
    });
    let answers = take(&mut session, &asks);
    let [Effect::Send(Frame::KeepAlive(answer))] = answers[..] else {
        panic!("{answers:?}");
    };
    assert_eq!((answer.echo_us, answer.asks), (9, Asks::Nothing));
    let asked = session.tick(session.config.keep_alive);
    let Effect::Send(Frame::KeepAlive(asked)) = asked[0] else {
        panic!("{asked:?}");
    };
    assert_eq!(asked.asks, Asks::Answer);
    let echo = Frame::KeepAlive(KeepAlive {
        stamp_us: 10,
        echo_us: asked.stamp_us,
        held_us: 0,
        asks: Asks::Nothing,
    });
    let now = session.config.keep_alive + 3 * MS;
    assert!(session.frame(ChannelRef::Control, &echo, now).is_empty());
    assert_eq!(session.round_trip(), Some(3 * MS));
}

#[test]
fn only_acknowledged_bytes_are_progress() {
    let mut session = in_rounds();
    let before = session.deadlines.progress;
    let _ = session.handle(Event::Acked { bytes: 0 }, 50 * MS);
    assert_eq!(session.deadlines.progress, before);
    let _ = session.handle(Event::Acked { bytes: 1 }, 50 * MS);
    assert_eq!(session.deadlines.progress, 50 * MS);
}

#[test]
fn an_event_that_nobody_asked_for_is_our_fault_and_a_frame_out_of_turn_is_the_destinations() {
    let ours = in_rounds().handle(Event::Saved, MS);
    assert_eq!(code(&ours), "sender.internal");
    let told = ours.iter().find_map(|effect| match effect {
        Effect::Abort { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(told, Some(Reason::Internal));
    let theirs = in_rounds().handle(Event::Running, MS);
    assert_eq!(code(&theirs), "sender.misbehaved.out-of-turn");
}
