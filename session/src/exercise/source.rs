//! The source, driven by a script: what the destination says, what becomes of the lanes and of the way back, and when this side's own
//! work is done.
//!
//! What must hold, whatever the destination says: the guest is taken back after COMMIT only if nothing of it left or the destination gave
//! its word; COMMIT follows only a PREPARED with the digest of FINAL; it ends once, with the guest where the outcome says; nothing that
//! the destination says is called a fault of this side.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use multifd_wire::frame::{
    Abort, Acks, Asks, Credit, Credits, DeviceLoaded, GiveBack, GiveBackReason, Grant, KeepAlive,
    Landed, LaneDown, LaneMark, Outcome as OutcomeFrame, OutcomeState, Prepared, Progress,
    RawCredit, RawLaneMark, RawRun, Ready, RoundClosed, Running, SwitchoverAck,
};
use multifd_wire::{
    Body, ChannelRef, DeviceId, Digest, Features, Frame, Generation, HEADER_BYTES, Header,
    Incarnation, Incompatible, LaneId, PageIndex, Phase, Reason, RegionId, Round, Sequence,
    SessionId, Token,
};

use super::Script;
use crate::common::ChannelFault;
use crate::source::config::{Config, WhenDestinationLost};
use crate::source::event::{DeviceOutlook, Effect, Event, Outcome};
use crate::source::{Error, Fault, Seen, Session};

const PAGES: u64 = 4;
const DIGEST: u64 = 1;

// What a byte of a script means, modulo their number.
const ANSWER: u8 = 0;
const GRANT: u8 = 1;
const READY: u8 = 2;
const LANE_UP: u8 = 3;
const LANE_ENDS: u8 = 4;
const ENCODED: u8 = 5;
const ACK: u8 = 6;
const CLOSED: u8 = 7;
const GIVE_BACK: u8 = 8;
const PREPARED: u8 = 9;
const RUNNING: u8 = 10;
const LOSE: u8 = 11;
const RECONNECT: u8 = 12;
const LANDED: u8 = 13;
const FORGOTTEN: u8 = 14;
const ANSWERED: u8 = 15;
const LANE_DOWN: u8 = 16;
const TIME: u8 = 17;
const ALIVE: u8 = 18;
const DEVICE_ACK: u8 = 19;
const DEVICE_SAYS: u8 = 20;
const ABORT: u8 = 21;
const CANCEL: u8 = 22;
const STRANGE: u8 = 23;
const KINDS: u8 = STRANGE + 1;

/// A set-up of two lanes without devices, up to the first round.
#[cfg(test)]
pub(super) const SET_UP: &[u8] = &[0, GRANT, 0, LANE_UP, 0, LANE_UP, 1, READY, 0];

/// The first round, and the guest paused in the second.
#[cfg(test)]
pub(super) const SWITCHOVER: &[u8] = &[ENCODED, 0, ENCODED, 1, ACK, 0, 3, CLOSED, 0, 0];

/// All channels are lost, and the set-up is made again.
#[cfg(test)]
pub(super) const RESUMED: &[u8] = &[
    LOSE, 0, RECONNECT, GRANT, 0, LANE_UP, 0, READY, 0, LANDED, 0, 0,
];

/// Drives a session of the source with a script made of any bytes. The first one says which settings it has.
pub fn source(script: &[u8]) {
    let _ = run(script);
}

/// The same; says how it ended.
pub(super) fn run(script: &[u8]) -> Option<&'static str> {
    let mut script = Script(script.iter());
    let mut driver = Driver::new(script.below(8));
    while let Some(step) = script.next() {
        driver.step(step % KINDS, &mut script);
    }
    if driver.ended.is_none() && driver.session.phase() == Phase::Done {
        // It is known how it ends, and what may still be said has had its time.
        driver.now = driver.session.due().max(driver.now);
        driver.dial();
    }
    driver.ended
}

/// A lane's connection, as its thread would know it.
#[derive(Debug, Clone, Copy)]
struct Lane {
    incarnation: Incarnation,
    up: bool,
    ended: bool,
    /// The round that it was given and has not said to have encoded.
    round: Option<Round>,
    frames: u64,
    acked: u64,
}

/// Where the way to the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    Resuming,
    Asking,
    Starting,
}

struct Driver {
    session: Session,
    devices: bool,
    now: Duration,
    /// What is answered before anything else happens, and what takes its time.
    at_once: VecDeque<Event>,
    answers: VecDeque<Event>,
    lanes: BTreeMap<LaneId, Lane>,
    way: Way,
    /// The newest attempt to connect.
    attempt: u32,
    generation: u32,
    /// FINAL was sent, PREPARED with its digest came, COMMIT was sent.
    final_sent: bool,
    prepared: bool,
    committed: bool,
    /// The destination's own word that it took no COMMIT, or the channel's that nothing left.
    denied: bool,
    paused: bool,
    ended: Option<&'static str>,
}

impl Driver {
    fn new(settings: u32) -> Self {
        let lost = if settings & 1 == 0 {
            WhenDestinationLost::Fail
        } else {
            WhenDestinationLost::StartAfresh
        };
        let config = Config::builder()
            .channels(2)
            .downtime_limit(Duration::from_secs(30))
            .when_destination_lost(lost)
            .ack_deadline(Some(Duration::from_secs(5)))
            .build()
            .unwrap();
        let mut session = Session::new(config, PAGES, Duration::ZERO);
        let devices = settings & 2 != 0;
        if devices {
            session.expect_devices();
        }
        let features = if settings & 4 == 0 {
            Features::DEVICE_STATE.union(Features::RESUME)
        } else {
            Features::DEVICE_STATE
        };
        let opened = Event::Connected {
            agreed: features,
            round_trip: Duration::MAX,
        };
        assert!(session.handle(opened, Duration::ZERO).is_empty());
        Self {
            session,
            devices,
            now: Duration::ZERO,
            at_once: VecDeque::new(),
            answers: VecDeque::new(),
            lanes: BTreeMap::new(),
            way: Way::Open,
            attempt: 0,
            generation: 0,
            final_sent: false,
            prepared: false,
            committed: false,
            denied: false,
            paused: false,
            ended: None,
        }
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        match step {
            ANSWER => {
                let fails = script.below(8) == 7;
                if let Some(answer) = self.answers.pop_front() {
                    self.happen(if fails { refusal() } else { answer });
                }
            }
            GRANT => {
                let wrong = script.below(8);
                let grant = Grant {
                    ticket: Token::new([1; 16]),
                    resume_secret: Token::new([2; 16]),
                    lanes_max: if wrong == 1 { 1 } else { 256 },
                    suspend_ms: if wrong == 2 { 0 } else { 20_000 },
                    device_window_bytes: 64 << 10,
                };
                self.say(grant);
            }
            READY => {
                let wrong = script.below(8);
                let there_are = self.lanes.len() as u32;
                let up = self.lanes.values().filter(|lane| lane.up).count() as u32;
                let lanes = [there_are, up.max(1), 0, there_are + 1][wrong.min(3) as usize];
                let prepare_us = 1;
                self.say(Ready { lanes, prepare_us });
            }
            LANE_UP => self.lane_up(script),
            LANE_ENDS => self.lane_ends(script),
            ENCODED => self.encoded(script),
            ACK => {
                let (lane, more) = (self.lane(script), u64::from(script.below(6)));
                let wrong = more == 5;
                let Some(state) = self.lanes.get_mut(&lane) else {
                    return;
                };
                state.acked = state.frames.min(state.acked + more);
                let frames = state.acked + u64::from(wrong) * 1000;
                let incarnation = state.incarnation;
                let lanes = &[RawLaneMark::from(LaneMark {
                    lane,
                    incarnation,
                    frames,
                })];
                self.say(Acks { lanes });
            }
            CLOSED => {
                let (round, damaged) = (self.round(script), u64::from(script.below(4) / 3));
                self.say(RoundClosed {
                    round,
                    pages: 1,
                    zero_pages: 1,
                    digest: Digest::new(DIGEST),
                    elapsed_us: 1,
                    damaged_pages: damaged,
                });
            }
            GIVE_BACK => {
                let lane = self.lane(script);
                let runs = [RawRun {
                    region: RegionId::new(0).value().into(),
                    count: 1.into(),
                    first: PageIndex::new(script.below(6).into()).value().into(),
                }];
                self.say(GiveBack {
                    lane,
                    incarnation: Incarnation::new(script.below(3)),
                    sequence: Sequence::new(script.below(4).into()),
                    reason: GiveBackReason::Checksum,
                    runs: &runs,
                });
            }
            PREPARED => {
                let wrong = script.below(4) == 3;
                self.prepared |= self.final_sent && !wrong;
                self.say(Prepared {
                    digest: Digest::new(DIGEST + u64::from(wrong)),
                    wait_us: 1,
                    load_us: 1,
                    verify_us: 1,
                });
            }
            RUNNING => self.say(Running {
                resume_us: 1,
                cpu_us: 1,
                landed_bytes: 4096,
            }),
            LOSE => {
                let damage = script.below(3) == 2;
                let fault = if damage {
                    Fault::Malformed(multifd_wire::Malformed::HeaderCrc {
                        found: 1,
                        computed: 2,
                    })
                } else {
                    closed_channel()
                };
                if self.way == Way::Open {
                    let error = Error::new(self.session.phase(), fault);
                    self.happen(Event::Lost(error.at(ChannelRef::Control)));
                }
            }
            RECONNECT => match self.way {
                Way::Resuming | Way::Starting => self.connected(),
                Way::Open | Way::Asking => {}
            },
            LANDED => self.landed(script),
            FORGOTTEN => {
                if matches!(self.way, Way::Resuming | Way::Asking) {
                    let text = "never heard of it".into();
                    let reason = Reason::WrongSession;
                    self.dial();
                    self.happen(Event::NotConnected {
                        number: self.attempt,
                        why: Incompatible::Refused { reason, text }.into(),
                    });
                }
            }
            ANSWERED => {
                let which = script.below(4) as usize;
                if let (Way::Asking, Some(state)) = (self.way, OutcomeState::ALL.get(which)) {
                    self.denied |= *state == OutcomeState::NotCommitted;
                    self.happen(Event::Answered(*state));
                }
            }
            LANE_DOWN => {
                let down = LaneDown {
                    lane: self.lane(script),
                    incarnation: Incarnation::new(script.below(4)),
                    reason: Reason::ChannelsLost,
                };
                self.say(down);
            }
            TIME => {
                let step = Duration::from_millis(10) * script.below(256) * script.below(64);
                self.now += step;
                let effects = self.session.tick(self.now);
                self.carry_out(effects);
            }
            ALIVE => {
                let asks = if script.below(2) == 0 {
                    Asks::Answer
                } else {
                    Asks::Nothing
                };
                let (stamp_us, echo_us) = (1 + u64::from(script.below(9)), script.below(3).into());
                self.say(KeepAlive {
                    stamp_us,
                    echo_us,
                    held_us: 0,
                    asks,
                });
            }
            DEVICE_ACK => {
                let generation = Generation::new(script.below(4));
                self.say(SwitchoverAck {
                    device: DeviceId::new(script.below(3)),
                    generation,
                    bytes: 1,
                    load_us: 1,
                });
            }
            DEVICE_SAYS => match script.below(3) {
                0 => self.say(DeviceLoaded {
                    device: DeviceId::new(script.below(3)),
                    bytes: 1,
                    load_us: 1,
                    config_us: 1,
                }),
                1 => {
                    let credits = &[RawCredit::from(Credit {
                        device: DeviceId::new(script.below(3)),
                        offset_max: 1 << 20,
                    })];
                    self.say(Credits { credits });
                }
                _ => {
                    // The first batch of initial bytes, or another one, is there to be loaded.
                    self.generation += 1;
                    let outlook = self.outlook();
                    if self.devices {
                        let effects = self.session.handle(Event::Devices(outlook), self.now);
                        self.carry_out(effects);
                    }
                }
            },
            ABORT => self.say(Abort {
                reason: Reason::Cancelled,
                phase: Phase::Rounds,
                channel: ChannelRef::None,
                text: "no",
            }),
            CANCEL => self.happen(Event::Cancel),
            // What does not travel from the destination, or only there.
            _ => match script.below(4) {
                0 => self.say(OutcomeFrame {
                    state: OutcomeState::Running,
                }),
                1 => self.say(Frame::Skipped(0x9999)),
                2 => self.say(multifd_wire::frame::Commit {
                    digest: Digest::new(DIGEST),
                }),
                _ => self.say(Progress {
                    landed_bytes: 1,
                    zero_pages: 1,
                    frames: 1,
                    cpu_us: 1,
                    round: Round::new(0),
                    lanes: 1,
                }),
            },
        }
    }

    // ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Seldom one that there is not.
    fn lane(&self, script: &mut Script<'_>) -> LaneId {
        LaneId::new(script.below(3))
    }

    /// The round that was opened last, or one near it.
    fn round(&self, script: &mut Script<'_>) -> Round {
        let given = self.lanes.values().filter_map(|lane| lane.round).max();
        let newest = given.map_or(0, Round::value);
        Round::new((newest + script.below(4)).saturating_sub(1))
    }

    fn lane_up(&mut self, script: &mut Script<'_>) {
        let lane = self.lane(script);
        if let Some(state) = self.lanes.get_mut(&lane)
            && !state.up
            && !state.ended
        {
            state.up = true;
            let incarnation = state.incarnation;
            self.happen(Event::LaneUp { lane, incarnation });
        }
    }

    fn lane_ends(&mut self, script: &mut Script<'_>) {
        let (lane, how) = (self.lane(script), script.below(4));
        if let Some(state) = self.lanes.get_mut(&lane)
            && !state.ended
        {
            (state.up, state.ended) = (false, true);
            let incarnation = state.incarnation;
            let refused = |reason| Fault::Refused {
                reason,
                text: "no".into(),
            };
            let fault = match how {
                0 => Some(closed_channel()),
                1 => None,
                2 => Some(refused(Reason::BadTicket)),
                _ => Some(refused(Reason::ShuttingDown)),
            };
            self.happen(Event::LaneEnded {
                lane,
                incarnation,
                fault,
            });
        }
    }

    fn encoded(&mut self, script: &mut Script<'_>) {
        let lane = self.lane(script);
        if let Some(state) = self.lanes.get_mut(&lane)
            && state.up
            && let Some(round) = state.round.take()
        {
            state.frames += 2;
            let incarnation = state.incarnation;
            self.happen(Event::LaneEncoded {
                lane,
                incarnation,
                round,
            });
        }
    }

    fn landed(&mut self, script: &mut Script<'_>) {
        let (rounds_closed, frames) = (script.below(4), u64::from(script.below(4)));
        let marks: Vec<RawLaneMark> = (0..script.below(3))
            .map(|lane| {
                RawLaneMark::from(LaneMark {
                    lane: LaneId::new(lane),
                    incarnation: Incarnation::new(script.below(3)),
                    frames: 1 + frames,
                })
            })
            .collect();
        self.say(Landed {
            rounds_closed,
            lanes: &marks,
        });
    }

    fn connected(&mut self) {
        self.way = Way::Open;
        self.happen(Event::Connected {
            agreed: Features::DEVICE_STATE.union(Features::RESUME),
            round_trip: Duration::MAX,
        });
    }

    /// Makes the attempt to connect that is due, if one is.
    fn dial(&mut self) {
        let effects = self.session.tick(self.now);
        self.carry_out(effects);
    }

    fn outlook(&self) -> DeviceOutlook {
        DeviceOutlook {
            stop_bytes: 4096,
            unacked: if self.generation % 2 == 1 {
                vec!["nic".into()]
            } else {
                Vec::new()
            },
            ..DeviceOutlook::default()
        }
    }

    // ── in and out ───────────────────────────────────────────────────────────────────────────────────────────────────

    /// The destination says something: by way of the bytes that it has on the channel.
    fn say<'a>(&mut self, frame: impl Into<Frame<'a>>) {
        if self.way != Way::Open {
            return;
        }
        let mut bytes = Vec::new();
        let encoded = frame.into().encode(Sequence::FIRST, Body::None, &mut bytes);
        if encoded.is_err() {
            // What can't be written can't come.
            return;
        }
        let (header, table) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header).unwrap();
        let frame = Frame::decode(&header, table).unwrap();
        let effects = self.session.frame(ChannelRef::Control, &frame, self.now);
        self.carry_out(effects);
    }

    fn happen(&mut self, event: Event) {
        let effects = self.session.handle(event, self.now);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, mut effects: Vec<Effect>) {
        loop {
            assert!(effects.len() < 1000, "what one frame asks for is bounded");
            for effect in effects {
                self.apply(effect);
            }
            let Some(event) = self.at_once.pop_front().filter(|_| self.ended.is_none()) else {
                break;
            };
            effects = self.session.handle(event, self.now);
        }
        let _ = (
            self.session.due(),
            self.session.phase(),
            self.session.bandwidth(),
        );
    }

    fn apply(&mut self, effect: Effect) {
        assert!(self.ended.is_none(), "{effect:?} after the end");
        match effect {
            Effect::DialLane {
                lane, incarnation, ..
            } => {
                let fresh = Lane {
                    incarnation,
                    up: false,
                    ended: false,
                    round: None,
                    frames: 0,
                    acked: 0,
                };
                let old = self.lanes.insert(lane, fresh);
                let rises = old.is_none_or(|old| old.incarnation < incarnation);
                assert!(
                    rises,
                    "incarnation {incarnation} of lane {lane} comes again"
                );
            }
            Effect::LaneBack { lane, behind, .. } => {
                let round = self.lanes.values().filter_map(|it| it.round).max();
                if let Some(state) = self.lanes.get_mut(&lane) {
                    state.frames += behind.len() as u64;
                    state.round = round;
                }
            }
            Effect::CloseLane { lane } | Effect::LaneGone { lane, .. } => {
                if let Some(state) = self.lanes.get_mut(&lane) {
                    state.up = false;
                }
            }
            Effect::SettleLane { lane } => {
                let state = self.lanes.get(&lane);
                let items = u64::from(self.devices && state.is_some_and(|it| it.frames > it.acked));
                self.at_once.push_back(Event::LaneLost { pages: 1, items });
            }
            Effect::LookAtLanes => {
                let up = self.lanes.iter().filter(|(_, it)| it.up);
                let seen = up.map(|(lane, it)| Seen {
                    lane: *lane,
                    acked: it.acked,
                    oldest: (it.frames > it.acked).then_some(Round::new(0)),
                    unacked_bytes: it.frames - it.acked,
                });
                self.at_once.push_back(Event::LanesSeen(seen.collect()));
            }
            Effect::Acknowledged(marks) => {
                let bytes = marks.iter().map(|mark| mark.frames).sum();
                self.at_once.push_back(Event::Acked { bytes });
            }
            Effect::DeviceAcked(_) => {
                self.generation += 1;
                let outlook = self.outlook();
                self.at_once.push_back(Event::Devices(outlook));
            }
            Effect::Begin { .. } => self.at_once.push_back(Event::Begun),
            Effect::RoundEncoded => self.at_once.push_back(Event::Encoded {
                octets: 4096,
                unacked_octets: 4096,
            }),
            Effect::OpenRound { round, .. } => {
                for lane in self.lanes.values_mut().filter(|lane| lane.up) {
                    lane.round = Some(round);
                }
            }
            Effect::Collect { last } => {
                let pages = u64::from(!last);
                self.at_once.push_back(Event::Collected { pages });
            }
            Effect::Pause => {
                assert!(!self.paused, "paused twice");
                self.paused = true;
                self.at_once.push_back(Event::Paused);
            }
            Effect::Quiesce => self.answers.push_back(Event::DevicesQuiesced),
            Effect::StopDevices => {
                self.answers.push_back(Event::DevicesStopped);
                self.answers.push_back(Event::DevicesSaved);
            }
            Effect::Save => self.at_once.push_back(Event::Saved),
            Effect::SendFinal { .. } => {
                self.final_sent = true;
                self.at_once.push_back(Event::FinalSent { digest: DIGEST });
            }
            Effect::Commit => {
                assert!(self.paused && self.prepared, "COMMIT without PREPARED");
                assert!(!self.committed || self.denied, "committed twice");
                (self.committed, self.denied) = (true, false);
            }
            Effect::Disconnect => {
                // What its threads would have said is about channels that do not count any more.
                for lane in self.lanes.values_mut() {
                    (lane.up, lane.ended, lane.round) = (false, true, None);
                }
                self.answers.clear();
                self.way = if self.session.phase() == Phase::Commit {
                    Way::Asking
                } else {
                    Way::Resuming
                };
            }
            Effect::DialControl { number, .. } => self.attempt = number,
            Effect::StartAfresh => {
                self.lanes.clear();
                self.way = Way::Starting;
                let name = SessionId::new([2; 16]);
                self.at_once.push_back(Event::Named(name));
            }
            Effect::Reclaim { paused, .. } => {
                assert!(!self.committed || self.denied, "taken back after COMMIT");
                assert_eq!(paused, self.paused, "the guest runs, or does not");
                self.paused = false;
                (self.final_sent, self.prepared) = (false, false);
            }
            Effect::Finish(outcome) => self.finish(outcome),
            Effect::Granted { .. }
            | Effect::SendSetup { .. }
            | Effect::Send(_)
            | Effect::Migrated
            | Effect::SettleBefore { .. }
            | Effect::GiveBack { .. }
            | Effect::DeviceLoaded(_)
            | Effect::Resumed { .. }
            | Effect::Forecast(_)
            | Effect::Throttle { .. }
            | Effect::Steered(_)
            | Effect::AwaitDevices
            | Effect::Abort { .. } => {}
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        let (word, error) = match outcome {
            Outcome::Migrated => ("migrated", None),
            Outcome::Failed(error) => ("failed", Some(error)),
            Outcome::Cancelled(error) => ("cancelled", Some(error)),
            Outcome::Stranded(error) => ("stranded", Some(error)),
            Outcome::Unknown(error) => ("unknown", Some(error)),
            Outcome::Gone(error) => ("gone", Some(error)),
        };
        if let Some(error) = error {
            assert_ne!(error.code(), "sender.internal", "{error}");
            assert!(!error.to_string().is_empty());
        }
        let ours = matches!(word, "failed" | "cancelled" | "gone");
        assert_eq!(self.paused, !ours, "{word}");
        assert!(ours || self.committed, "{word} without COMMIT");
        self.ended = Some(word);
    }
}

/// The VMM can't do what it was asked for.
fn refusal() -> Event {
    let fault = Fault::Vmm {
        step: "do it",
        source: crate::common::VmmError::new("no"),
    };
    Event::Failed(Error::new(Phase::Switchover, fault))
}

fn closed_channel() -> Fault {
    Fault::Channel(ChannelFault::new("channel-closed", false, "closed"))
}
