//! What may be done to a session, by name; the states that it leads to; and effects in words.

use multifd_wire::frame::{
    Abort, Asks, BlobPart, Commit, Config as ConfigFrame, Device, DeviceFlags, DeviceLoaded,
    Devices, GuestState, LaneDown, LaneMark, RawDevice, RawRegion, Regions, SetupEnd, Switchover,
    VmState, blob_parts,
};
use multifd_wire::{
    Body, DeviceId, HEADER_BYTES, Header, PAGE_BYTES_U64, PageIndex, PageRun, Reason, Region,
    RegionId, Sequence, Text, Token,
};

use super::*;
use crate::common::{ChannelFault, Encoded};
use crate::destination::event::{Closed, Counts, Incomplete};

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const STALL: Duration = Duration::from_secs(10);
pub(super) const NOW: Duration = Duration::from_millis(80);
pub(super) const DIGEST: Digest = Digest::new(0xd1);
pub(super) const OTHER_DIGEST: Digest = Digest::new(0xd2);
pub(super) const PAGES: u64 = 16;
pub(super) const NIC: DeviceId = DeviceId::new(0);
pub(super) const FEATURES: Features = Features::DEVICE_STATE.union(Features::RESUME);
const TICKET: Token = Token::new([7; 16]);

/// What the source may say on the control channel.
#[derive(Debug, Clone)]
pub(super) enum Say {
    Config(&'static [u8]),
    Regions(u64),
    Devices(u32),
    SetupEnd {
        lanes: u32,
        devices: u32,
        configs: u32,
    },
    KeepAlive(u64, u64),
    LaneDown(u32, u32),
    Switchover(u32),
    VmState,
    Final(u32, Digest),
    Commit(Digest),
    Abort,
    Ready,
}

#[derive(Debug)]
pub(super) enum Step {
    Event(Event),
    Frame(Say),
}

/// Does one step, by way of the bytes that a frame has on the channel.
pub(super) fn feed(session: &mut Session, step: Step, now: Duration) -> Vec<Effect> {
    match step {
        Step::Event(event) => session.handle(event, now),
        Step::Frame(frame) => frame.feed(session, now),
    }
}

fn sent(session: &mut Session, frame: Frame<'_>, body: &[u8], now: Duration) -> Vec<Effect> {
    let with = if body.is_empty() {
        Body::None
    } else {
        Body::Octets(body)
    };
    let mut bytes = Vec::new();
    frame.encode(Sequence::FIRST, with, &mut bytes).unwrap();
    let (header, table) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
    let header = Header::decode(header).unwrap();
    let frame = Frame::decode(&header, table).unwrap();
    session.frame(&frame, body, now)
}

fn part(session: &Session, body: &'static [u8], of_state: bool) -> BlobPart {
    let index = if of_state { session.states.count() } else { 0 };
    let mut parts = blob_parts(1, 1, index, body).unwrap();
    parts.next().unwrap().0
}

impl Say {
    fn feed(self, session: &mut Session, now: Duration) -> Vec<Effect> {
        match self {
            Self::Config(body) => {
                let blob = part(session, body, false);
                sent(session, ConfigFrame { blob }.into(), body, now)
            }
            Self::Regions(pages) => {
                let regions = [RawRegion::from(Region {
                    id: RegionId::new(0),
                    guest_address: 0,
                    bytes: pages * PAGE_BYTES_U64,
                })];
                sent(session, Regions { regions: &regions }.into(), &[], now)
            }
            Self::Devices(count) => {
                let devices: Vec<RawDevice> = (0..count).map(nic).map(RawDevice::from).collect();
                sent(session, Devices { devices: &devices }.into(), &[], now)
            }
            Self::SetupEnd {
                lanes,
                devices,
                configs,
            } => {
                let end = SetupEnd {
                    configs,
                    regions: 1,
                    devices,
                    lanes,
                    memory_bytes: PAGES * PAGE_BYTES_U64,
                };
                sent(session, end.into(), &[], now)
            }
            Self::KeepAlive(stamp_us, echo_us) => {
                let alive = KeepAlive {
                    stamp_us,
                    echo_us,
                    held_us: 0,
                    asks: if echo_us == 0 {
                        Asks::Answer
                    } else {
                        Asks::Nothing
                    },
                };
                sent(session, alive.into(), &[], now)
            }
            Self::LaneDown(lane, incarnation) => {
                let down = LaneDown {
                    lane: LaneId::new(lane),
                    incarnation: Incarnation::new(incarnation),
                    reason: Reason::ChannelsLost,
                };
                sent(session, down.into(), &[], now)
            }
            Self::Switchover(round) => {
                let final_round = Round::new(round);
                sent(session, Switchover { final_round }.into(), &[], now)
            }
            Self::VmState => {
                let blob = part(session, b"state", true);
                sent(session, VmState { blob }.into(), b"state", now)
            }
            Self::Final(round, digest) => {
                let last = Final {
                    final_round: Round::new(round),
                    states: 1,
                    digest,
                    memory_pages: PAGES,
                    guest: GuestState::Running,
                };
                sent(session, last.into(), &[], now)
            }
            Self::Commit(digest) => sent(session, Commit { digest }.into(), &[], now),
            Self::Abort => {
                let abort = Abort {
                    reason: Reason::Cancelled,
                    phase: Phase::Rounds,
                    channel: ChannelRef::None,
                    text: "no",
                };
                sent(session, abort.into(), &[], now)
            }
            Self::Ready => {
                let ready = multifd_wire::frame::Ready {
                    lanes: 1,
                    prepare_us: 0,
                };
                session.frame(&ready.into(), &[], now)
            }
        }
    }
}

fn nic(id: u32) -> Device {
    Device {
        id: DeviceId::new(id),
        flags: if id == 0 {
            DeviceFlags::P2P
        } else {
            DeviceFlags::NONE
        },
        initial_bytes: 0,
        state_bytes: 0,
        chunk_bytes_max: 4096,
        name: Text::new(&format!("nic{id}")).unwrap(),
    }
}

pub(super) fn opened() -> Step {
    Step::Event(Event::Opened(secrets()))
}

fn secrets() -> Secrets {
    Secrets {
        ticket: TICKET,
        resume: Token::new([9; 16]),
    }
}

pub(super) fn resuming() -> Step {
    Step::Event(Event::Resuming(secrets()))
}

/// So many frames of lane 0 were handled, and so many pages are damaged.
pub(super) fn settled(frames: u64, damaged: u32) -> Step {
    let runs = (0..damaged).map(|page| run(page.into()));
    Step::Event(Event::LanesSettled {
        marks: vec![mark(0, 0, frames), mark(1, 0, frames)],
        damaged: runs.collect(),
    })
}

fn run(page: u64) -> PageRun {
    let layout = Layout::new([Region {
        id: RegionId::new(0),
        guest_address: 0,
        bytes: PAGES * PAGE_BYTES_U64,
    }]);
    layout
        .unwrap()
        .run(RegionId::new(0), PageIndex::new(page), 1)
        .unwrap()
}

pub(super) fn mark(lane: u32, incarnation: u32, frames: u64) -> LaneMark {
    LaneMark {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        frames,
    }
}

pub(super) fn say_config(body: &'static [u8]) -> Step {
    Step::Frame(Say::Config(body))
}

/// The tables of a set-up with so many lanes and blobs.
pub(super) fn tables(lanes: u32, configs: u32) -> [Step; 3] {
    [
        Step::Frame(Say::Regions(PAGES)),
        Step::Frame(Say::Devices(0)),
        Step::Frame(Say::SetupEnd {
            lanes,
            devices: 0,
            configs,
        }),
    ]
}

/// A whole set-up without a configuration.
pub(super) fn set_up(lanes: u32) -> [Step; 3] {
    tables(lanes, 0)
}

pub(super) fn joined(lane: u32) -> Step {
    joined_again(lane, 0)
}

pub(super) fn joined_again(lane: u32, incarnation: u32) -> Step {
    joined_with(lane, incarnation, TICKET)
}

pub(super) fn joined_with(lane: u32, incarnation: u32, ticket: Token) -> Step {
    Step::Event(Event::LaneJoined {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        ticket,
    })
}

pub(super) fn arrived(lane: u32, round: u32, last: bool) -> Step {
    arrived_again(lane, 0, round, last)
}

pub(super) fn arrived_again(lane: u32, incarnation: u32, round: u32, last: bool) -> Step {
    Step::Event(Event::LaneArrived {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        round: Round::new(round),
        last,
    })
}

pub(super) fn channel_closed() -> Fault {
    Fault::Channel(ChannelFault::new("channel.closed", false, "closed"))
}

pub(super) fn misbehaved() -> Fault {
    let (expected, found) = (1, 2);
    Misbehaved::Sequence { expected, found }.into()
}

pub(super) fn ended(lane: u32) -> Step {
    ended_by(lane, channel_closed())
}

pub(super) fn ended_by(lane: u32, fault: Fault) -> Step {
    let mark = mark(lane, 0, 0);
    Step::Event(Event::LaneEnded { mark, fault })
}

pub(super) fn ended_at(lane: u32, frames: u64) -> Step {
    let (mark, fault) = (mark(lane, 0, frames), channel_closed());
    Step::Event(Event::LaneEnded { mark, fault })
}

/// Of both lanes.
pub(super) fn handled(frames: u64) -> Step {
    Step::Event(Event::Handled(vec![mark(0, 0, frames), mark(1, 0, frames)]))
}

pub(super) fn damaged(lane: u32, incarnation: u32) -> Step {
    Step::Event(Event::Damaged {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        sequence: Sequence::new(1),
        runs: vec![run(3)],
    })
}

pub(super) fn closed(damaged: u64) -> Step {
    closed_with(damaged, None)
}

/// All pages are here, and item 7 of device 2 is not.
pub(super) fn closed_without_device() -> Step {
    closed_with(
        0,
        Some(Incomplete {
            device: DeviceId::new(2),
            name: "nic0".into(),
            index: 7,
        }),
    )
}

fn closed_with(damaged: u64, incomplete: Option<Incomplete>) -> Step {
    Step::Event(Event::Closed(Closed {
        handled: Vec::new(),
        digest: DIGEST,
        damaged,
        incomplete,
        restarts: vec![0],
        counts: Counts::default(),
    }))
}

pub(super) fn switchover(round: u32) -> Step {
    Step::Frame(Say::Switchover(round))
}

pub(super) fn vm_state() -> Step {
    Step::Frame(Say::VmState)
}

pub(super) fn final_of(round: u32, digest: Digest) -> Step {
    Step::Frame(Say::Final(round, digest))
}

pub(super) fn commit(digest: Digest) -> Step {
    Step::Frame(Say::Commit(digest))
}

pub(super) fn abort() -> Step {
    Step::Frame(Say::Abort)
}

pub(super) fn alive() -> Step {
    Step::Frame(Say::KeepAlive(7, 0))
}

/// What the source answers to the question with this stamp.
pub(super) fn answers(stamp_us: u64) -> Step {
    Step::Frame(Say::KeepAlive(7, stamp_us))
}

pub(super) fn lane_down(lane: u32, incarnation: u32) -> Step {
    Step::Frame(Say::LaneDown(lane, incarnation))
}

pub(super) fn loaded() -> Step {
    Step::Event(Event::Loaded(Ok(())))
}

pub(super) fn device_loaded(restarts: u32) -> Step {
    let loaded = DeviceLoaded {
        device: NIC,
        bytes: 5,
        load_us: 1,
        config_us: 1,
    };
    Step::Event(Event::Device(DeviceEvent::Loaded { loaded, restarts }))
}

pub(super) fn lost() -> Step {
    Step::Event(Event::ControlLost(channel_closed()))
}

pub(super) fn tick() -> Step {
    Step::Event(Event::Tick(Counts::default()))
}

// Places in the happy path.
const TABLES: usize = 4;
const MACHINE: usize = 5;
/// Every lane has joined.
pub(super) const ROUNDS: usize = 7;
/// The live round is closed.
pub(super) const SECOND_ROUND: usize = 10;
/// SWITCHOVER and the VM state came.
pub(super) const SWITCHED: usize = 12;
const CLOSED: usize = 15;
const FINAL: usize = 16;
/// Everything is loaded.
pub(super) const COMMITS: usize = 17;

/// A migration over two lanes: round 0 live, round 1 paused.
pub(super) fn happy_path() -> Vec<Step> {
    let mut steps = vec![opened()];
    steps.extend(set_up(2));
    steps.extend([
        Step::Event(Event::MachineReady),
        joined(0),
        joined(1),
        arrived(0, 0, false),
        arrived(1, 0, false),
        closed(0),
        switchover(1),
        vm_state(),
        arrived(0, 1, true),
        arrived(1, 1, true),
        closed(0),
        final_of(1, DIGEST),
        loaded(),
        commit(DIGEST),
        Step::Event(Event::Resumed(Counts::default())),
    ]);
    steps
}

pub(super) const HAPPY: [&str; 17] = [
    "GRANT",
    "prepare",
    "admit 0.0",
    "admit 1.0",
    "start 0",
    "READY 2",
    "close 0",
    "ROUND_CLOSED 0",
    "open 1",
    "close 1",
    "ROUND_CLOSED 1",
    "load 1",
    "PREPARED",
    "resume",
    "finish: running",
    "RUNNING",
    "KEEP_ALIVE",
];

pub(super) fn after(steps: impl IntoIterator<Item = Step>) -> Session {
    let mut session = Session::new(Config::default(), FEATURES, Duration::ZERO);
    for step in steps {
        let _ = feed(&mut session, step, MS);
    }
    session
}

/// With a device whose state travels.
fn after_with_device(steps: impl IntoIterator<Item = Step>) -> Session {
    after(steps.into_iter().map(|step| match step {
        Step::Frame(Say::Devices(_)) => Step::Frame(Say::Devices(1)),
        Step::Frame(Say::SetupEnd { lanes, configs, .. }) => Step::Frame(Say::SetupEnd {
            lanes,
            devices: 1,
            configs,
        }),
        other => other,
    }))
}

/// Each state by name, and the steps that lead to it.
pub(super) fn states() -> Vec<(&'static str, Vec<Step>)> {
    let path = |steps| happy_path().into_iter().take(steps).collect::<Vec<_>>();
    let with = |steps, more: Vec<Step>| path(steps).into_iter().chain(more).collect::<Vec<_>>();
    let back = |lanes| {
        let mut steps = vec![lost(), resuming(), settled(0, 0)];
        steps.extend(set_up(lanes));
        steps
    };
    vec![
        ("set-up", path(1)),
        ("set-up, REGIONS", path(2)),
        ("set-up, DEVICES", path(3)),
        ("set-up, tables", path(TABLES)),
        ("set-up, tables and a lane", with(TABLES, vec![joined(0)])),
        ("set-up, a lane before the tables", with(1, vec![joined(0)])),
        ("set-up, machine and a lane", path(MACHINE + 1)),
        ("rounds", path(ROUNDS)),
        ("rounds, lane 0 at the fence", path(ROUNDS + 1)),
        (
            "rounds, lane 1 given up",
            with(ROUNDS, vec![lane_down(1, 0)]),
        ),
        ("rounds, lane 1 lost", with(ROUNDS, vec![ended(1)])),
        ("rounds, no lane", with(ROUNDS, vec![ended(0), ended(1)])),
        ("rounds, closing", path(ROUNDS + 2)),
        ("rounds, paused", path(SWITCHED)),
        (
            "rounds, paused, FINAL early",
            with(SWITCHED, vec![final_of(1, DIGEST)]),
        ),
        ("rounds, paused, closing", path(CLOSED - 1)),
        ("fenced", path(CLOSED)),
        (
            "fenced before SWITCHOVER",
            with(
                SECOND_ROUND,
                vec![arrived(0, 1, true), arrived(1, 1, true), closed(0)],
            ),
        ),
        (
            "fenced, damaged, FINAL",
            with(CLOSED - 1, vec![closed(3), final_of(1, DIGEST)]),
        ),
        (
            "fenced, lane lost, FINAL differs",
            with(
                SWITCHED,
                vec![
                    arrived(0, 1, true),
                    ended(1),
                    closed(0),
                    final_of(1, OTHER_DIGEST),
                ],
            ),
        ),
        ("loading", path(FINAL)),
        ("devices: rounds", path(ROUNDS)),
        ("devices: loading", path(FINAL)),
        ("devices: loading, state loaded", path(FINAL + 1)),
        (
            "devices: loading, devices loaded",
            with(FINAL, vec![device_loaded(0)]),
        ),
        (
            "devices: suspended",
            with(FINAL, vec![device_loaded(0), lost()]),
        ),
        ("prepared", path(COMMITS)),
        ("suspended in round 0", with(ROUNDS + 1, vec![lost()])),
        ("suspended while loading", with(FINAL, vec![lost()])),
        ("suspended after PREPARED", with(COMMITS, vec![lost()])),
        ("settling", with(ROUNDS + 1, vec![lost(), resuming()])),
        ("resumed, tables", with(COMMITS, back(2))),
        ("owning", path(COMMITS + 1)),
        ("over", path(COMMITS + 2)),
    ]
}

pub(super) fn state_after(wanted: &str) -> Session {
    let found = states().into_iter().find(|(name, _)| *name == wanted);
    let steps = found.expect("a state of the list").1;
    if wanted.starts_with("devices") {
        return after_with_device(steps);
    }
    after(steps)
}

/// Steps by name: frames in capitals, events in small letters; round numbers are those of the paused round 1 of the happy path.
pub(super) fn all_steps() -> Vec<(&'static str, Step, Duration)> {
    let event = Step::Event;
    let say = Step::Frame;
    let vmm = Fault::Vmm {
        step: "run the guest",
        source: VmmError::new("no processor"),
    };
    let unheard = Event::LaneUnheard {
        lane: LaneId::new(1),
        incarnation: Incarnation::new(0),
    };
    let damage = multifd_wire::Malformed::HeaderCrc {
        found: 1,
        computed: 2,
    };
    let end = |lanes, devices| {
        say(Say::SetupEnd {
            lanes,
            devices,
            configs: 0,
        })
    };
    let at_once = [
        ("CONFIG", say_config(b"a config")),
        ("REGIONS", say(Say::Regions(PAGES))),
        ("REGIONS, other", say(Say::Regions(9))),
        ("DEVICES", say(Say::Devices(0))),
        ("DEVICES, two without P2P", say(Say::Devices(3))),
        ("SETUP_END", end(2, 0)),
        ("SETUP_END, a device too many", end(2, 1)),
        ("KEEP_ALIVE", alive()),
        ("KEEP_ALIVE, echo", say(Say::KeepAlive(7, 9))),
        ("LANE_DOWN 0.0", lane_down(0, 0)),
        ("LANE_DOWN 1.1", lane_down(1, 1)),
        ("LANE_DOWN 9.0", lane_down(9, 0)),
        ("SWITCHOVER 0", switchover(0)),
        ("SWITCHOVER 1", switchover(1)),
        ("SWITCHOVER 2", switchover(2)),
        ("SWITCHOVER 3", switchover(3)),
        ("VM_STATE", vm_state()),
        ("FINAL 1", final_of(1, DIGEST)),
        ("FINAL 1, other digest", final_of(1, OTHER_DIGEST)),
        ("FINAL 2", final_of(2, DIGEST)),
        ("COMMIT", commit(DIGEST)),
        ("COMMIT, other digest", commit(OTHER_DIGEST)),
        ("ABORT", abort()),
        ("READY", say(Say::Ready)),
        ("machine ready", event(Event::MachineReady)),
        ("lane 0 joined", joined(0)),
        ("lane 1 joined", joined(1)),
        ("lane 1 joined again", joined_again(1, 1)),
        ("lane 9 joined", joined(9)),
        ("lane 1 joined late", joined_with(1, 1, Token::new([8; 16]))),
        ("lane 1 unheard", event(unheard)),
        ("lane 0 ended", ended(0)),
        ("lane 1 ended", ended(1)),
        ("lane 1 ended, damaged", ended_by(1, damage.into())),
        ("lane 1 ended, misbehaved", ended_by(1, misbehaved())),
        ("lane 9 ended", ended(9)),
        ("lane 0 at 0", arrived(0, 0, false)),
        ("lane 1 at 0", arrived(1, 0, false)),
        ("lane 0 at 1, paused", arrived(0, 1, true)),
        ("lane 1 at 1, paused", arrived(1, 1, true)),
        ("lane 9 at 0", arrived(9, 0, false)),
        ("pages of lane 0 damaged", damaged(0, 0)),
        ("frames handled", handled(3)),
        ("closed, whole", closed(0)),
        ("closed, damaged", closed(3)),
        ("loaded", loaded()),
        ("device loaded", device_loaded(0)),
        (
            "device restarted",
            event(Event::Device(DeviceEvent::Restarted(NIC))),
        ),
        ("resumed", event(Event::Resumed(Counts::default()))),
        ("control lost", lost()),
        (
            "control misbehaved",
            event(Event::ControlLost(misbehaved())),
        ),
        ("resuming", resuming()),
        ("lanes settled", settled(3, 0)),
        ("asked", event(Event::Asked)),
        ("cancel", event(Event::Cancel)),
        ("failed, VMM", event(Event::Failed(vmm))),
        ("tick", tick()),
    ];
    let now = at_once.into_iter().map(|(name, step)| (name, step, NOW));
    now.chain([("tick, late", tick(), STALL + NOW)]).collect()
}

/// Does one step and says what came of it.
pub(super) fn say(session: &mut Session, step: Step, now: Duration) -> Vec<String> {
    feed(session, step, now).iter().map(word).collect()
}

pub(super) fn trace(steps: impl IntoIterator<Item = Step>) -> Vec<String> {
    let mut session = Session::new(Config::default(), FEATURES, Duration::ZERO);
    let steps = steps.into_iter();
    steps.flat_map(|step| say(&mut session, step, MS)).collect()
}

pub(super) fn word(effect: &Effect) -> String {
    match effect {
        Effect::Send(frame) => said(frame),
        Effect::Prepare { .. } => "prepare".into(),
        Effect::Admit {
            lane,
            incarnation,
            begins,
        } => match begins {
            None => format!("admit {lane}.{incarnation}"),
            Some(Begins::Within(round)) => format!("admit {lane}.{incarnation} within {round}"),
            Some(Begins::Behind(round)) => format!("admit {lane}.{incarnation} behind {round}"),
        },
        Effect::TurnAway {
            lane,
            incarnation,
            reason,
            ..
        } => format!("turn {lane}.{incarnation} away: {}", reason.as_u32()),
        Effect::CloseLane(lane) => format!("close lane {lane}"),
        Effect::StartLanes(round) => format!("start {round}"),
        Effect::CountHandled => "count".into(),
        Effect::CloseRound(round) => format!("close {round}"),
        Effect::OpenGate(round) => format!("open {round}"),
        Effect::Load { states } => format!("load {}", states.len()),
        Effect::Resume(_) => "resume".into(),
        Effect::Suspend => "suspend".into(),
        Effect::SettleLanes => "settle".into(),
        Effect::AcceptResume => "accept".into(),
        Effect::RefuseResume { reason, .. } => format!("refuse: {}", reason.as_u32()),
        Effect::Answer(state) => format!("answer {}", state.as_u32()),
        Effect::Discard => "discard".into(),
        Effect::Finish(Outcome::Running) => "finish: running".into(),
        Effect::Finish(Outcome::Failed(error)) => format!("finish: failed, {}", error.code()),
        Effect::Finish(Outcome::Stranded(error)) => format!("finish: stranded, {}", error.code()),
    }
}

/// A frame in words: what it says that a reader acts on.
fn said(encoded: &Encoded) -> String {
    let (header, table) = encoded.bytes().split_first_chunk::<HEADER_BYTES>().unwrap();
    let header = Header::decode(header).unwrap();
    let name = header.kind().name();
    match Frame::decode(&header, table).unwrap() {
        Frame::Ready(ready) => format!("{name} {}", ready.lanes),
        Frame::Ack(acks) => {
            let counts = acks.lanes.iter().map(|mark| LaneMark::from(mark).frames);
            let counts: Vec<String> = counts.map(|frames| frames.to_string()).collect();
            format!("{name} {}", counts.join(" "))
        }
        Frame::GiveBack(back) => format!("{name} {}.{}", back.lane, back.incarnation),
        Frame::RoundClosed(closed) => format!("{name} {}", closed.round),
        Frame::LaneDown(down) => {
            let (lane, incarnation, reason) = (down.lane, down.incarnation, down.reason.as_u32());
            format!("{name} {lane}.{incarnation}: {reason}")
        }
        Frame::KeepAlive(alive) if alive.echo_us != 0 => format!("{name}, echo {}", alive.echo_us),
        Frame::Abort(abort) => {
            let (reason, phase, channel) = (abort.reason.as_u32(), abort.phase, abort.channel);
            format!("{name} {reason} in {phase} about {channel}")
        }
        Frame::Landed(landed) => {
            let frames = landed.iter().map(|mark| format!(" {}", mark.frames));
            format!(
                "{name} {}:{}",
                landed.rounds_closed,
                frames.collect::<String>()
            )
        }
        _ => name.to_owned(),
    }
}
