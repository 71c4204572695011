//! An onlooker who reads every channel of a session: what it knows, and which rule a block breaks.
//!
//! It is a reader of both sides at once, so it finds what only the writer knows to be wrong as well. What is said of a guest's memory is in
//! `memory`, of lanes in `lanes`, of devices in `devices`, of the set-up in `set_up`, of the end in `ends`.

mod devices;
mod ends;
mod lanes;
mod memory;
mod set_up;

use std::collections::BTreeMap;

use multifd_wire::exercise::{Block, check};
use multifd_wire::frame::{Asks, Final, Grant, KeepAlive};
use multifd_wire::negotiate::{Offer, accept, answer, refuse};
use multifd_wire::{
    ChannelKind, Digest, Features, Frame, Hello, HelloReply, Incompatible, Intent, Kind, Layout,
    Phase, Reason, Role, Sequence, SessionId,
};

use devices::Stream;
use lanes::Lane;
use memory::Memory;
use set_up::{Blobs, SetUp};

/// Whether the rules are kept; if not, which one is broken.
pub(crate) type Kept<T = ()> = Result<T, &'static str>;

fn keep(kept: bool, rule: &'static str) -> Kept {
    if kept { Ok(()) } else { Err(rule) }
}

/// A lane and its incarnation.
type Id = (u32, u32);

/// A channel, from its hello on.
#[derive(Default)]
struct Channel {
    said: Vec<u8>,
    hello: Option<Hello>,
    is_open: bool,
    next: [Sequence; 2],
    /// The newest stamp that each side has sent.
    stamps: [u64; 2],
    has_aborted: bool,
    was_answered: bool,
}

/// What an onlooker knows.
#[derive(Default)]
pub(crate) struct Onlooker {
    channels: BTreeMap<String, Channel>,
    /// Of the source and of the destination.
    phases: Option<[Phase; 2]>,
    session: Option<SessionId>,
    features: Features,
    grants: Vec<Grant>,
    is_resumed: bool,
    set_up: SetUp,
    layout: Option<Layout>,
    lanes: BTreeMap<Id, Lane>,
    memory: Memory,
    /// Rounds that were closed.
    closed: u32,
    /// Whether the lanes say that the guest was paused, round by round.
    paused: BTreeMap<u32, bool>,
    devices: Vec<Stream>,
    /// Since the start or the newest resume.
    switchovers: Vec<u32>,
    states: Blobs,
    last: Option<Final>,
    prepared: Option<Digest>,
    is_committed: bool,
    runs: bool,
}

fn place(side: Role) -> usize {
    usize::from(side == Role::Destination)
}

impl Onlooker {
    /// The source's phase.
    pub(crate) fn phase(&self) -> Phase {
        self.phases().map_or(Phase::Hello, |[source, _]| source)
    }

    fn phases(&self) -> Option<[Phase; 2]> {
        self.phases
    }

    fn set_phase(&mut self, side: Role, phase: Phase) {
        let phases = self.phases.get_or_insert([Phase::Hello; 2]);
        phases[place(side)] = phase;
    }

    fn both(&mut self, phase: Phase) {
        self.phases = Some([phase; 2]);
    }

    /// The next block.
    pub(crate) fn see(&mut self, block: &Block) -> Kept {
        match block {
            Block::Lost(name) => {
                self.lose(name);
                Ok(())
            }
            Block::Said {
                side,
                channel,
                octets,
                is_read,
            } => {
                let known = self.channels.entry(channel.clone()).or_default();
                if known.said.is_empty() {
                    keep(*side == Role::Source, "CHAN-1")?;
                    known.said.clone_from(octets);
                    known.hello = Hello::decode(octets.as_slice().try_into().unwrap()).ok();
                    Ok(())
                } else if known.is_open {
                    self.frame(*side, channel, octets, *is_read)
                } else {
                    keep(*side == Role::Destination, "HELLO-1")?;
                    self.reply(channel, octets)
                }
            }
        }
    }

    fn lose(&mut self, name: &str) {
        let channel = self.channels.remove(name).unwrap();
        let Some(hello) = channel.hello else { return };
        if hello.intent == Intent::Join {
            let id = (hello.lane.value(), hello.incarnation.value());
            self.lane_lost(id);
            return;
        }
        let kept = self.features.contains(Features::RESUME) && !self.grants.is_empty();
        let after = if kept { Phase::Suspended } else { Phase::Done };
        let stays = |phase, committed| phase == Phase::Done || phase == Phase::Commit && committed;
        let [source, destination] = self.phases().unwrap();
        if !stays(source, true) {
            self.set_phase(Role::Source, after);
        }
        if !stays(destination, self.is_committed) {
            self.set_phase(Role::Destination, after);
        }
        let lanes: Vec<Id> = self.lanes.keys().copied().collect();
        lanes.into_iter().for_each(|id| self.lane_lost(id));
    }

    // SPEC: HELLO-3, HELLO-10, VER-3, FEAT-1, JOIN-1, RESUME-1
    fn refusal(&self, channel: &Channel) -> Option<Reason> {
        let octets = channel.said.as_slice().try_into().unwrap();
        let reply = match Hello::decode(octets) {
            Err(error) => refuse(octets, &error, &Offer::ALL),
            Ok(hello) => answer(&hello, &Offer::ALL),
        };
        match reply {
            HelloReply::Refused { reason, .. } => Some(reason),
            HelloReply::Accepted { .. } => Some(Reason::WrongSession),
        }
    }

    fn reply(&mut self, name: &str, octets: &[u8]) -> Kept {
        let channel = &self.channels[name];
        let reply = HelloReply::decode(octets.try_into().unwrap()).unwrap();
        if let HelloReply::Refused { reason, .. } = reply {
            return keep(Some(reason) == self.refusal(channel), "HELLO-10");
        }
        let hello = channel.hello.ok_or("HELLO-10")?;
        let agreed = accept(&hello, &reply).map_err(|error| match error {
            // SPEC: REPLY-5, REPLY-6, PARAM-2
            Incompatible::Features { .. } => "REPLY-6",
            Incompatible::Parameters => "PARAM-2",
            _ => "REPLY-5",
        })?;
        let known = self.session == Some(hello.session);
        let secret = self.grants.last().map(|grant| grant.resume_secret);
        match hello.intent {
            Intent::Start => {
                keep(self.session.is_none(), "CHAN-1")?;
                (self.session, self.features) = (Some(hello.session), agreed.features);
                self.both(Phase::Setup);
            }
            Intent::Join => {
                keep(known, "JOIN-1")?;
                self.join(&hello, agreed.features)?;
            }
            // SPEC: RESUME-1
            Intent::Resume => {
                let right = known && secret == Some(hello.token);
                let may = self.phases() == Some([Phase::Suspended; 2]);
                keep(right && may && agreed.features == self.features, "RESUME-1")?;
                self.is_resumed = true;
                self.set_up.again();
                self.both(Phase::Setup);
            }
            // SPEC: ASK-1
            Intent::Ask => {
                let right = known && secret == Some(hello.token);
                keep(right && self.phase() == Phase::Commit, "ASK-1")?;
                self.set_phase(Role::Source, Phase::Setup);
            }
        }
        let channel = self.channels.get_mut(name).unwrap();
        channel.is_open = true;
        Ok(())
    }

    fn frame(&mut self, side: Role, name: &str, octets: &[u8], is_read: bool) -> Kept {
        // Form is for the other vectors.
        let (header, frame, rest) = check(octets).unwrap().unwrap();
        assert!(rest.is_empty(), "{name}: a block is one frame");
        let kind = frame.kind();
        let channel = self.channels.get_mut(name).unwrap();
        let hello = channel.hello.unwrap();
        // SPEC: ABORT-2, ASK-1
        keep(!channel.has_aborted, "ABORT-2")?;
        keep(!channel.was_answered, "ASK-1")?;
        // SPEC: HEAD-8
        let due = &mut channel.next[place(side)];
        header.check_sequence(*due).map_err(|_| "HEAD-8")?;
        *due = due.next();
        // SPEC: KIND-1, CHAN-2
        let on = hello.intent.channel();
        kind.check_direction(side, on).map_err(|_| "KIND-1")?;
        keep(side == Role::Source || on == ChannelKind::Control, "CHAN-2")?;
        if let Frame::KeepAlive(alive) = &frame {
            channel.alive(side, alive)?;
        }
        let asks = hello.intent == Intent::Ask;
        keep(asks == (kind == Kind::Outcome), "ASK-1")?;
        // SPEC: KIND-2, RUNNING-2
        let reader = self.phases().unwrap()[1 - place(side)];
        let crosses =
            reader == Phase::Done && matches!(kind, Kind::KeepAlive | Kind::LaneDown) && self.runs;
        keep(kind.may_come_in(reader) || crosses || !is_read, "KIND-2")?;
        let body = &octets[octets.len() - header.body_bytes()..];
        if on == ChannelKind::Data {
            let id = (hello.lane.value(), hello.incarnation.value());
            return self.on_lane(id, &frame, body, is_read);
        }
        // SPEC: FEAT-4
        let of_devices = matches!(
            kind,
            Kind::Credit | Kind::SwitchoverAck | Kind::DeviceLoaded
        );
        keep(!of_devices || self.has_devices(), "FEAT-4")?;
        let in_set_up = reader == Phase::Setup;
        match &frame {
            Frame::Grant(grant) => self.grant(*grant),
            Frame::Config(_) | Frame::Regions(_) | Frame::Devices(_) => {
                let table = &octets[multifd_wire::HEADER_BYTES..];
                self.set_up_table(&frame, table)
            }
            Frame::SetupEnd(end) => self.set_up_end(end),
            Frame::Ready(ready) => self.ready(*ready),
            Frame::Landed(landed) => self.landed(landed),
            Frame::Ack(acks) => acks.iter().try_for_each(|mark| self.ack(mark)),
            Frame::GiveBack(back) => self.give_back(back, in_set_up),
            Frame::RoundClosed(closed) => self.round_closed(closed),
            Frame::LaneDown(down) => self.lane_down(side, *down),
            Frame::Credit(credits) => credits.iter().try_for_each(|credit| self.credit(credit)),
            Frame::SwitchoverAck(ack) => self.switchover_ack(*ack),
            Frame::DeviceLoaded(loaded) => self.device_loaded(*loaded),
            Frame::Switchover(switchover) => self.switchover(switchover.final_round.value()),
            Frame::VmState(state) => {
                // SPEC: STATE-1
                keep(self.last.is_none(), "STATE-1")?;
                self.states.part(state.blob)
            }
            Frame::Final(last) => self.last(*last),
            Frame::Prepared(prepared) => self.prepared(prepared.digest),
            Frame::Commit(commit) => self.commit(commit.digest),
            Frame::Running(_) => self.running(),
            Frame::Abort(abort) => self.abort(side, name, abort.phase),
            Frame::Outcome(outcome) => self.outcome(name, outcome.state),
            _ => Ok(()),
        }
    }

    fn has_devices(&self) -> bool {
        self.features.contains(Features::DEVICE_STATE)
    }
}

impl Channel {
    fn alive(&mut self, side: Role, alive: &KeepAlive) -> Kept {
        let (own, other) = (place(side), 1 - place(side));
        // SPEC: ALIVE-1, ALIVE-4
        keep(alive.stamp_us > self.stamps[own], "ALIVE-1")?;
        keep(alive.echo_us == self.stamps[other], "ALIVE-4")?;
        self.stamps[own] = alive.stamp_us;
        // SPEC: ALIVE-5
        let answers = alive.asks == Asks::Nothing;
        keep(!answers || self.stamps[other] != 0, "ALIVE-5")
    }
}
