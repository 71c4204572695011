//! The destination, driven by a script: what the source says, what its lanes carry, and when this side's own work is done.
//!
//! What must hold, whatever the source does: the guest runs only after PREPARED and a COMMIT with its digest, and never once "not
//! committed" was said; it ends once; what is sent is well-formed, numbered without gaps, and of a kind that travels from here.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use multifd_wire::frame::{
    Abort, Asks, BlobPart, Commit, Config as ConfigFrame, Credit, Device, DeviceFlags,
    DeviceLoaded, Devices, Final, GuestState, KeepAlive, LaneDown, LaneMark, OutcomeState,
    RawDevice, RawRegion, Regions, SetupEnd, Switchover, SwitchoverAck, VmState, blob_parts,
};
use multifd_wire::{
    Body, ChannelKind, ChannelRef, DeviceId, Digest, Features, Frame, Generation, HEADER_BYTES,
    Header, Incarnation, Kind, LaneId, Layout, Misbehaved, PAGE_BYTES_U64, PageIndex, Phase,
    Reason, Region, RegionId, Role, Round, Sequence, Text, Token,
};

use super::Script;
use crate::common::{ChannelFault, Encoded, VmmError};
use crate::destination::lane::Begins;
use crate::destination::{
    Closed, Config, Counts, DeviceEvent, Effect, Event, Fault, Incomplete, Outcome, Secrets,
    Session,
};

const PAGES: u64 = 4;
const DIGEST: u64 = 1;
const LANES: u32 = 3;

// What a byte of a script means, modulo their number.
const ANSWER: u8 = 0;
const CONFIG: u8 = 1;
const REGIONS: u8 = 2;
const DEVICES: u8 = 3;
const SETUP_END: u8 = 4;
const JOIN: u8 = 5;
const ARRIVE: u8 = 6;
const END_LANE: u8 = 7;
const DAMAGE: u8 = 8;
const SWITCHOVER_SAID: u8 = 9;
const VM_STATE: u8 = 10;
const FINAL: u8 = 11;
const COMMIT: u8 = 12;
const LOSE: u8 = 13;
const RESUME: u8 = 14;
const ASK: u8 = 15;
const TIME: u8 = 16;
const ALIVE: u8 = 17;
const LANE_DOWN: u8 = 18;
const ABORT: u8 = 19;
const CANCEL: u8 = 20;
const DEVICE: u8 = 21;
const STRANGE: u8 = 22;
const KINDS: u8 = STRANGE + 1;

/// A set-up of two lanes without devices, up to READY.
#[cfg(test)]
pub(super) const SET_UP: &[u8] = &[
    REGIONS, 0, DEVICES, 0, SETUP_END, 1, 0, ANSWER, 0, JOIN, 0, JOIN, 1,
];

/// A round with the guest running, and SWITCHOVER.
#[cfg(test)]
pub(super) const SWITCHOVER: &[u8] = &[
    ARRIVE,
    0,
    0,
    ARRIVE,
    1,
    0,
    ANSWER,
    0,
    SWITCHOVER_SAID,
    0,
    VM_STATE,
    ARRIVE,
    0,
    1,
    ARRIVE,
    1,
    1,
    ANSWER,
    0,
];

/// Drives a session of the destination with a script made of any bytes.
pub fn destination(script: &[u8]) {
    let _ = run(script);
}

/// The same; says how it ended.
pub(super) fn run(script: &[u8]) -> Option<&'static str> {
    let mut driver = Driver::new();
    let mut script = Script(script.iter());
    let opened = driver.secrets();
    driver.happen(Event::Opened(opened));
    while let Some(step) = script.next() {
        driver.step(step % KINDS, &mut script);
    }
    driver.ended
}

/// A lane that was let in, as its thread would know it.
#[derive(Clone, Copy)]
struct Lane {
    incarnation: Incarnation,
    /// The round that it reads; `None` before READY.
    round: Option<Round>,
    /// It waits at the gate.
    waits: bool,
    frames: u64,
}

struct Driver {
    session: Session,
    now: Duration,
    /// What this side's own work will answer.
    answers: VecDeque<Event>,
    lanes: BTreeMap<LaneId, Lane>,
    incarnations: BTreeMap<LaneId, u32>,
    counts: Counts,
    /// The number of the next frame on the control channel.
    next: u64,
    tickets: u8,
    prepared: Option<Digest>,
    resumed: bool,
    refused: bool,
    ended: Option<&'static str>,
}

impl Driver {
    fn new() -> Self {
        let features = Features::DEVICE_STATE.union(Features::RESUME);
        Self {
            session: Session::new(Config::default(), features, Duration::ZERO),
            now: Duration::ZERO,
            answers: VecDeque::new(),
            lanes: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            counts: Counts::default(),
            next: 0,
            tickets: 0,
            prepared: None,
            resumed: false,
            refused: false,
            ended: None,
        }
    }

    fn secrets(&mut self) -> Secrets {
        self.tickets = self.tickets.wrapping_add(1).max(1);
        Secrets {
            ticket: Token::new([self.tickets; 16]),
            resume: Token::new([0xaa; 16]),
        }
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        match step {
            ANSWER => {
                let fails = script.below(8) == 7;
                if let Some(answer) = self.answers.pop_front() {
                    self.happen(if fails { failing(answer) } else { answer });
                }
            }
            CONFIG => {
                let body = [script.below(4) as u8; 3];
                let blob = part(0, &body);
                self.say(ConfigFrame { blob }.into(), &body);
            }
            REGIONS => {
                let regions = [RawRegion::from(Region {
                    id: RegionId::new(0),
                    guest_address: 0,
                    bytes: (PAGES + u64::from(script.below(2))) * PAGE_BYTES_U64,
                })];
                self.say(Regions { regions: &regions }.into(), &[]);
            }
            DEVICES => {
                let devices: Vec<RawDevice> = (0..script.below(3)).map(device).collect();
                self.say(Devices { devices: &devices }.into(), &[]);
            }
            SETUP_END => {
                let lanes = 1 + script.below(LANES);
                let (configs, devices) = match script.below(8) {
                    7 => (1, 1),
                    more => (more & 1, more >> 1),
                };
                let end = SetupEnd {
                    configs,
                    regions: 1,
                    devices,
                    lanes,
                    memory_bytes: PAGES * PAGE_BYTES_U64,
                };
                self.say(end.into(), &[]);
            }
            JOIN => {
                let lane = LaneId::new(script.below(LANES + 1));
                let next = self.incarnations.entry(lane).or_default();
                let incarnation = Incarnation::new(*next);
                *next += 1;
                let ticket = Token::new([self.tickets; 16]);
                self.happen(Event::LaneJoined {
                    lane,
                    incarnation,
                    ticket,
                });
            }
            ARRIVE => self.arrive(script),
            END_LANE => self.end_lane(script),
            DAMAGE => {
                let lane = LaneId::new(script.below(LANES));
                let state = self.lanes.get(&lane).copied();
                if let Some(state) = state.filter(|state| state.round.is_some() && !state.waits) {
                    let layout = layout();
                    let run = layout.run(RegionId::new(0), PageIndex::new(0), 1).unwrap();
                    self.happen(Event::Damaged {
                        lane,
                        incarnation: state.incarnation,
                        sequence: Sequence::new(state.frames),
                        runs: vec![run],
                    });
                }
            }
            SWITCHOVER_SAID => {
                let final_round = Round::new(self.session.round().value() + script.below(3));
                self.say(Switchover { final_round }.into(), &[]);
            }
            VM_STATE => {
                let body = [7; 5];
                let blob = part(0, &body);
                self.say(VmState { blob }.into(), &body);
            }
            FINAL => {
                let (ahead, wrong) = (script.below(2), script.below(4));
                let last = Final {
                    final_round: Round::new(self.session.round().value() + ahead),
                    states: u32::from(wrong != 2),
                    digest: Digest::new(DIGEST + u64::from(wrong == 3)),
                    memory_pages: PAGES,
                    guest: GuestState::Running,
                };
                self.say(last.into(), &[]);
            }
            COMMIT => {
                let digest = Digest::new(DIGEST + u64::from(script.below(4) == 3));
                let may = self.prepared == Some(digest);
                let before = self.resumed;
                self.say(Commit { digest }.into(), &[]);
                assert!(
                    may || self.resumed == before,
                    "run without PREPARED of this digest"
                );
            }
            LOSE => self.happen(Event::ControlLost(closed_channel())),
            RESUME => {
                let secrets = self.secrets();
                self.happen(Event::Resuming(secrets));
            }
            ASK => self.happen(Event::Asked),
            TIME => {
                self.now += Duration::from_millis(10) * script.below(256) * script.below(256);
                self.happen(Event::Tick(self.counts));
            }
            ALIVE => {
                let (stamp_us, echo_us) =
                    (1 + u64::from(script.below(9)), u64::from(script.below(3)));
                let asks = if script.below(2) == 0 {
                    Asks::Answer
                } else {
                    Asks::Nothing
                };
                let alive = KeepAlive {
                    stamp_us,
                    echo_us,
                    held_us: 0,
                    asks,
                };
                self.say(alive.into(), &[]);
            }
            LANE_DOWN => {
                let down = LaneDown {
                    lane: LaneId::new(script.below(LANES + 1)),
                    incarnation: Incarnation::new(script.below(4)),
                    reason: Reason::ChannelsLost,
                };
                self.say(down.into(), &[]);
            }
            ABORT => {
                let abort = Abort {
                    reason: Reason::Cancelled,
                    phase: Phase::Rounds,
                    channel: ChannelRef::None,
                    text: "no",
                };
                self.say(abort.into(), &[]);
            }
            CANCEL => self.happen(Event::Cancel),
            DEVICE => self.device(script),
            // A kind that does not travel from the source on this channel.
            _ => {
                let ready = multifd_wire::frame::Ready {
                    lanes: 1,
                    prepare_us: 0,
                };
                if script.below(4) == 3 {
                    self.say(ready.into(), &[]);
                } else {
                    self.say(Frame::Skipped(0x9999), &[]);
                }
            }
        }
    }

    fn arrive(&mut self, script: &mut Script<'_>) {
        let (lane, last) = (LaneId::new(script.below(LANES)), script.below(2) == 1);
        let Some(state) = self.lanes.get_mut(&lane) else {
            return;
        };
        if let (Some(round), false) = (state.round, state.waits) {
            state.waits = true;
            state.frames += 1;
            self.counts.frames += 1;
            let incarnation = state.incarnation;
            self.happen(Event::LaneArrived {
                lane,
                incarnation,
                round,
                last,
            });
        }
    }

    fn end_lane(&mut self, script: &mut Script<'_>) {
        let (lane, how) = (LaneId::new(script.below(LANES)), script.below(6));
        if let Some(state) = self.lanes.remove(&lane) {
            let fault = match how {
                5 => Misbehaved::Order { kind: Kind::Pages }.into(),
                4 => multifd_wire::Malformed::HeaderCrc {
                    found: 1,
                    computed: 2,
                }
                .into(),
                _ => closed_channel(),
            };
            let mark = LaneMark {
                lane,
                incarnation: state.incarnation,
                frames: state.frames,
            };
            self.happen(Event::LaneEnded { mark, fault });
        }
    }

    fn device(&mut self, script: &mut Script<'_>) {
        let (devices, _) = self.session.devices();
        let device = DeviceId::new(script.below(3));
        if device.value() as usize >= devices {
            return;
        }
        let event = match script.below(5) {
            0 => DeviceEvent::Loaded {
                loaded: DeviceLoaded {
                    device,
                    bytes: 1,
                    load_us: 1,
                    config_us: 1,
                },
                restarts: script.below(3),
            },
            1 => DeviceEvent::Restarted(device),
            2 => DeviceEvent::Credit(Credit {
                device,
                offset_max: 1 << 20,
            }),
            3 => DeviceEvent::Arrived,
            _ => DeviceEvent::InitialLoaded(SwitchoverAck {
                device,
                generation: Generation::new(1),
                bytes: 1,
                load_us: 1,
            }),
        };
        self.happen(Event::Device(event));
    }

    /// The source says something: by way of the bytes that it has on the channel.
    fn say(&mut self, frame: Frame<'_>, body: &[u8]) {
        let with = if body.is_empty() {
            Body::None
        } else {
            Body::Octets(body)
        };
        let mut bytes = Vec::new();
        if frame.encode(Sequence::FIRST, with, &mut bytes).is_err() {
            // A kind that can't be written can't come.
            return;
        }
        let (header, table) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header).unwrap();
        let frame = Frame::decode(&header, table).unwrap();
        let effects = self.session.frame(&frame, body, self.now);
        self.carry_out(effects);
    }

    fn happen(&mut self, event: Event) {
        let effects = self.session.handle(event, self.now);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.apply(effect);
        }
        let _ = (
            self.session.phase(),
            self.session.next_deadline(),
            self.session.remembers_until(),
        );
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Send(frame) => self.sent(&frame),
            Effect::Prepare { .. } => self.answers.push_back(Event::MachineReady),
            Effect::Admit {
                lane,
                incarnation,
                begins,
            } => {
                let (round, waits) = match begins {
                    None => (None, false),
                    Some(Begins::Within(round)) => (Some(round), false),
                    // It waits for this round, as if it had ended the one before.
                    Some(Begins::Behind(round)) => (Some(round), true),
                };
                let lane_now = Lane {
                    incarnation,
                    round,
                    waits,
                    frames: 0,
                };
                let old = self.lanes.insert(lane, lane_now);
                assert!(old.is_none(), "lane {lane} was let in twice");
            }
            Effect::TurnAway { .. } | Effect::CloseLane(_) | Effect::RefuseResume { .. } => {}
            Effect::StartLanes(round) => {
                for lane in self.lanes.values_mut() {
                    assert!(lane.round.is_none(), "a lane was started twice");
                    lane.round = Some(round);
                }
            }
            Effect::CountHandled => {
                let handled = self.marks();
                self.answers.push_back(Event::Handled(handled));
            }
            Effect::CloseRound(round) => {
                for lane in self.lanes.values() {
                    assert!(
                        lane.waits,
                        "a round was closed before every lane had ended it"
                    );
                }
                let (devices, _) = self.session.devices();
                self.answers.push_back(Event::Closed(Closed {
                    handled: self.marks(),
                    digest: Digest::new(DIGEST),
                    damaged: u64::from(round.value() % 5 == 4),
                    incomplete: (round.value() % 7 == 6).then(|| Incomplete {
                        device: DeviceId::new(0),
                        name: "nic".into(),
                        index: 3,
                    }),
                    restarts: vec![0; devices],
                    counts: self.counts,
                }));
            }
            Effect::OpenGate(round) => {
                for lane in self.lanes.values_mut().filter(|lane| lane.waits) {
                    (lane.round, lane.waits) = (Some(round), false);
                }
            }
            Effect::Load { .. } => self.answers.push_back(Event::Loaded(Ok(()))),
            Effect::Resume(_) => {
                assert!(self.prepared.is_some() && !self.resumed && !self.refused);
                self.resumed = true;
                self.answers.push_back(Event::Resumed(self.counts));
            }
            Effect::Suspend => {
                self.prepared = None;
                // What the lanes were about to be told, and what was being counted, is about nothing.
                self.answers
                    .retain(|answer| !matches!(answer, Event::Handled(_) | Event::Closed(_)));
            }
            Effect::SettleLanes => {
                let marks = self.marks();
                self.lanes.clear();
                self.happen(Event::LanesSettled {
                    marks,
                    damaged: Vec::new(),
                });
            }
            Effect::AcceptResume => self.next = 0,
            Effect::Answer(state) => {
                if state == OutcomeState::NotCommitted {
                    assert!(!self.resumed, "it runs");
                    self.refused = true;
                }
                self.happen(Event::Answered(state));
            }
            Effect::Discard => assert!(!self.resumed, "a guest that is ours was discarded"),
            Effect::Finish(outcome) => {
                let given_up = matches!(self.ended, Some("stranded"));
                assert!(self.ended.is_none() || given_up, "it ended twice");
                let (word, runs) = match outcome {
                    Outcome::Running => ("running", true),
                    Outcome::Stranded(_) => ("stranded", true),
                    Outcome::Failed(error) => {
                        assert!(!error.fault().to_string().is_empty());
                        ("failed", false)
                    }
                };
                assert_eq!(self.resumed, runs, "{word}");
                self.ended = Some(word);
            }
        }
    }

    fn sent(&mut self, frame: &Encoded) {
        let (header, table) = frame.bytes().split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header).unwrap();
        let sequence = Sequence::new(self.next);
        assert!(
            header.check_sequence(sequence).is_ok(),
            "a gap in the numbers"
        );
        self.next += 1;
        assert!(
            header
                .kind()
                .may_travel(Role::Destination, ChannelKind::Control)
        );
        if let Frame::Prepared(prepared) = Frame::decode(&header, table).unwrap() {
            assert!(self.prepared.is_none(), "prepared twice");
            self.prepared = Some(prepared.digest);
        }
    }

    fn marks(&self) -> Vec<LaneMark> {
        let mark = |(lane, state): (&LaneId, &Lane)| LaneMark {
            lane: *lane,
            incarnation: state.incarnation,
            frames: state.frames,
        };
        self.lanes.iter().map(mark).collect()
    }
}

/// What the VMM says instead, when it can't.
fn failing(answer: Event) -> Event {
    let refusal = || Fault::Vmm {
        step: "do it",
        source: VmmError::new("no"),
    };
    match answer {
        Event::Loaded(_) => Event::Loaded(Err(refusal())),
        Event::MachineReady | Event::Resumed(_) => Event::Failed(refusal()),
        other => other,
    }
}

fn closed_channel() -> Fault {
    Fault::Channel(ChannelFault::new("channel.closed", false, "closed"))
}

fn layout() -> Layout {
    Layout::new([Region {
        id: RegionId::new(0),
        guest_address: 0,
        bytes: PAGES * PAGE_BYTES_U64,
    }])
    .unwrap()
}

fn part(index: u32, body: &[u8]) -> BlobPart {
    blob_parts(1, 1, index, body).unwrap().next().unwrap().0
}

fn device(id: u32) -> RawDevice {
    RawDevice::from(Device {
        id: DeviceId::new(id),
        flags: DeviceFlags::P2P,
        initial_bytes: 0,
        state_bytes: 0,
        chunk_bytes_max: 4096,
        name: Text::clip(&format!("nic{id}")),
    })
}
