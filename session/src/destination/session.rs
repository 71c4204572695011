//! The control plane at the destination, as a machine without I/O: frames, events and the time in, effects out.
//!
//! ```text
//!  Setup ──tables, machine, lanes──► Rounds(k) ──every living lane at its end──► Rounds(k+1)
//!                                       │ a round with the guest paused
//!                                       ▼
//!                                    Fenced(k) ──FINAL(k), digests equal──► Loading ──► Prepared ──COMMIT──► Owning ──► Over
//!                                       └── SWITCHOVER(k+1): pages are missing, the gate opens once more
//! ```
//! Each concern has a machine of its own, which this one owns and asks: [`set_up`](super::set_up) the order of the tables,
//! `lanes` the life of each data channel, `rounds` the gate between rounds, `devices`, `commit` the way to the guest, `deadlines`,
//! `remembered` what is left to say after the end. What is legal in which state is in two tables: [`Session::frame`] for what the
//! source says, [`Session::handle`] for what happens here. A frame out of place is the source's fault; an event out of place is
//! ours ([`Fault::Internal`]), and is never reported to the source as its misbehaviour.

mod end;
mod lanes;
mod resume;
mod rounds;
mod time;

pub use resume::DAMAGES_MAX;

use std::collections::BTreeMap;
use std::time::Duration;

use multifd_wire::frame::{Asks, Final, GuestState, KeepAlive};
use multifd_wire::{
    ChannelKind, ChannelRef, Digest, Features, Frame, Incarnation, Kind, LaneId, Layout,
    Misbehaved, PageRun, Phase, Pulse, Role, Round,
};

use super::blobs::BlobAssembler;
use super::commit::{Loading, Loads, ReadyToCommit};
use super::config::Config;
use super::deadlines::Deadlines;
use super::devices::Devices;
use super::error::{Error, Fault};
use super::event::{Effect, Event, Secrets};
use super::lanes::Lanes;
use super::remembered::Remembered;
use super::rounds::{Fence, Rounds};
use super::set_up::SetUp;
use crate::common::Encoder;

#[derive(Debug)]
enum State {
    Setup,
    Rounds,
    /// Every lane is at the end of a round with the guest paused, the gate shut.
    Fenced(Fence),
    Loading(Loading),
    Prepared(ReadyToCommit),
    /// Without channels, until this time.
    Suspended {
        until: Duration,
    },
    Owning {
        since: Duration,
    },
    Over,
}

/// The machine of one migration at the destination.
#[derive(Debug)]
pub struct Session {
    config: Config,
    state: State,
    /// Whether it outlives its channels.
    kept: bool,
    /// A guest that is paused at the source stays paused here.
    leaves_paused: bool,
    /// READY was sent once: on the way back one lane is enough (SPEC: RESUME-14).
    begun: bool,
    /// The set-up is made again, over new channels.
    resumed: bool,
    set_up: SetUp,
    lanes: Lanes,
    /// Lanes that were faster than the SETUP_END that announces them.
    early: BTreeMap<LaneId, Incarnation>,
    rounds: Rounds,
    devices: Devices,
    states: BlobAssembler,
    loads: Loads,
    deadlines: Deadlines,
    /// The sending direction of the control channel.
    control: Encoder,
    /// Stamps and echoes on it.
    pulse: Pulse,
    secrets: Option<Secrets>,
    /// What is damaged when a session comes back, until it was said.
    damaged: Vec<PageRun>,
    /// How often the control channel was lost by wrong checksums.
    damages: u32,
    remembered: Remembered,
}

type Done = Result<(), Fault>;

impl Session {
    /// A session whose hello was accepted at `now`, with these features.
    #[must_use]
    pub fn new(config: Config, features: Features, now: Duration) -> Self {
        Self {
            state: State::Setup,
            // SPEC: FEAT-5
            kept: features.contains(Features::RESUME) && !config.suspend().is_zero(),
            // SPEC: FEAT-7
            leaves_paused: features.contains(Features::PAUSED),
            begun: false,
            resumed: false,
            set_up: SetUp::new(&config),
            lanes: Lanes::default(),
            early: BTreeMap::new(),
            rounds: Rounds::new(),
            devices: Devices::new(features, config.device_window_bytes()),
            states: BlobAssembler::new(Kind::VmState, config.blob_bytes_max()),
            loads: Loads::default(),
            deadlines: Deadlines::new(now),
            control: Encoder::default(),
            pulse: Pulse::new(Duration::MAX),
            secrets: None,
            damaged: Vec::new(),
            damages: 0,
            remembered: Remembered::default(),
            config,
        }
    }

    /// Where in its life, in the words of SPEC.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Setup => Phase::Setup,
            State::Rounds if !self.rounds.is_switching() => Phase::Rounds,
            State::Rounds | State::Fenced(_) | State::Loading(_) => Phase::Switchover,
            State::Prepared(_) | State::Owning { .. } => Phase::Commit,
            State::Suspended { .. } => Phase::Suspended,
            State::Over => Phase::Done,
        }
    }

    /// The round that is open.
    #[must_use]
    pub fn round(&self) -> Round {
        self.rounds.round()
    }

    /// Lanes that live.
    #[must_use]
    pub fn lanes_alive(&self) -> u32 {
        self.lanes.alive()
    }

    /// The guest's memory, once it was described.
    #[must_use]
    pub fn layout(&self) -> Option<&Layout> {
        self.set_up.layout()
    }

    /// How many devices come with the guest, and how many of them have loaded everything.
    #[must_use]
    pub fn devices(&self) -> (usize, usize) {
        let table = self.devices.table().unwrap_or_default();
        (table.len(), self.devices.loaded_count())
    }

    /// Until when the source may still ask how it ended; `None` once it knows, or as long as it has not ended (SPEC: ASK-4).
    #[must_use]
    pub fn remembers_until(&self) -> Option<Duration> {
        self.remembered.until(self.config.suspend())
    }

    /// The digest that both sides agreed on, once they have.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.remembered.digest()
    }

    /// Whether the source asked how it ended, and was told finally.
    #[must_use]
    pub fn was_answered(&self) -> bool {
        self.remembered.was_answered()
    }

    /// When [`Event::Tick`] is due at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Duration {
        let (mut deadline, _) = self.deadline();
        if self.is_connected() {
            deadline = deadline.min(self.deadlines.next_word());
        }
        if self.deadline_of_our_own().is_some() {
            deadline = deadline.min(self.deadlines.looks_again(&self.config));
        }
        deadline
    }

    fn is_connected(&self) -> bool {
        !matches!(self.state, State::Suspended { .. } | State::Over)
    }

    // ── what the source says ─────────────────────────────────────────────────────────────────────────────────────────

    /// A frame came on the control channel that there is, with this body.
    #[must_use]
    pub fn frame(&mut self, frame: &Frame<'_>, body: &[u8], now: Duration) -> Vec<Effect> {
        self.deadlines.looks(&self.config, now);
        let mut out = Vec::new();
        if !matches!(self.state, State::Suspended { .. })
            && let Err(fault) = self.take(frame, body, now, &mut out)
        {
            let error = Error::new(self.phase(), fault).at(ChannelRef::Control);
            self.fail(error, now, &mut out);
        }
        out
    }

    /// The table of frames: what each means in each state.
    fn take(
        &mut self,
        frame: &Frame<'_>,
        body: &[u8],
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        let (kind, phase) = (frame.kind(), self.phase());
        let (from, on) = (Role::Source, ChannelKind::Control);
        if !kind.may_travel(from, on) {
            return Err(Misbehaved::Direction { kind, from, on }.into());
        }
        self.deadlines.heard = now;
        if !matches!(frame, Frame::KeepAlive(_) | Frame::Skipped(_)) {
            self.deadlines.progress = now;
        }
        match (&mut self.state, frame) {
            (_, Frame::KeepAlive(alive)) => self.keep_alive(*alive, now, out),
            (State::Over, _) | (_, Frame::Skipped(_)) => Ok(()),
            (_, Frame::Abort(abort)) => Err(Fault::PeerAborted {
                reason: abort.reason,
                text: abort.text.to_owned(),
            }),
            (State::Setup, Frame::Config(config)) => self.set_up.config(config.blob, body),
            (State::Setup, Frame::Regions(regions)) => self.set_up.regions(regions, &self.config),
            (State::Setup, Frame::Devices(table)) => {
                self.set_up.devices(table, &mut self.devices, &self.config)
            }
            (State::Setup, Frame::SetupEnd(end)) => {
                let plan = self.set_up.end(end, &self.devices, &self.config, now)?;
                self.set_up_ended(plan, end.lanes, now, out)
            }
            (_, Frame::LaneDown(down)) => self.lane_down(*down, now, out),
            // SPEC: PREP-2. Both sides agree on the content already.
            (State::Loading(_) | State::Prepared(_), Frame::Switchover(_) | Frame::Final(_)) => {
                Ok(())
            }
            (State::Rounds | State::Fenced(_), Frame::Switchover(switchover)) => {
                self.switchover(switchover.final_round, now, out)
            }
            (State::Rounds | State::Fenced(_) | State::Loading(_), Frame::VmState(state))
                if phase == Phase::Switchover =>
            {
                self.states.part(state.blob, body)
            }
            (_, Frame::Final(last)) => self.last(*last, now, out),
            (State::Prepared(_), Frame::Commit(commit)) => self.commit(commit.digest, now, out),
            (
                _,
                Frame::Config(_)
                | Frame::Regions(_)
                | Frame::Devices(_)
                | Frame::SetupEnd(_)
                | Frame::VmState(_),
            ) => Err(Misbehaved::Phase { kind, phase }.into()),
            _ => Err(out_of_turn(kind.name())),
        }
    }

    fn keep_alive(&mut self, alive: KeepAlive, now: Duration, out: &mut Vec<Effect>) -> Done {
        // SPEC: RUNNING-2
        let pulse = &self.pulse;
        self.remembered
            .echo(|stamp_us| pulse.has_read(&alive, stamp_us));
        if let State::Fenced(fence) = &mut self.state {
            fence.echo(now, |since| pulse.has_read(&alive, micros(since)));
        }
        // SPEC: ALIVE-5
        if self.pulse.heard(&alive, now).asks == Asks::Nothing || !self.is_connected() {
            return Ok(());
        }
        let answer = self.pulse.answer(now);
        self.send(answer, out)
    }

    fn switchover(&mut self, round: Round, now: Duration, out: &mut Vec<Effect>) -> Done {
        let fence = match &self.state {
            State::Fenced(fence) => Some(fence),
            _ => None,
        };
        if !self.rounds.may_follow(round, fence) {
            return Err(out_of_turn(format!("SWITCHOVER of round {round}")));
        }
        self.rounds.switchover(round);
        self.conclude(now, out)
    }

    fn last(&mut self, last: Final, now: Duration, out: &mut Vec<Effect>) -> Done {
        // SPEC: FINAL-5
        let pages = self
            .set_up
            .layout()
            .map_or(0, |layout| layout.pages_total().value());
        if last.memory_pages != pages {
            return Err(Misbehaved::Amount {
                field: "final.memory_pages",
                expected: pages,
                found: last.memory_pages,
            }
            .into());
        }
        // SPEC: FINAL-6
        if last.guest == GuestState::Paused && !self.leaves_paused {
            return Err(out_of_turn("a paused guest without the feature PAUSED"));
        }
        let in_rounds = matches!(self.state, State::Rounds | State::Fenced(_));
        if !in_rounds || !self.rounds.may_be_final(&last) {
            return Err(out_of_turn(format!("FINAL of round {}", last.final_round)));
        }
        self.rounds.last(last, now);
        self.conclude(now, out)
    }

    fn commit(&mut self, digest: Digest, now: Duration, out: &mut Vec<Effect>) -> Done {
        match std::mem::replace(&mut self.state, State::Owning { since: now }) {
            State::Prepared(ready) => match ready.commit(digest) {
                Ok(proof) => {
                    out.push(Effect::Resume(proof));
                    Ok(())
                }
                Err((ready, fault)) => {
                    self.state = State::Prepared(ready);
                    Err(fault)
                }
            },
            other => {
                self.state = other;
                Err(out_of_turn("COMMIT"))
            }
        }
    }

    // ── what happens here ────────────────────────────────────────────────────────────────────────────────────────────

    /// Something happened beside the frames of the control channel.
    #[must_use]
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        self.deadlines.looks(&self.config, now);
        let mut out = Vec::new();
        if let Err(fault) = self.happened(event, now, &mut out) {
            let error = Error::new(self.phase(), fault);
            self.fail(error, now, &mut out);
        }
        out
    }

    /// The table of events: what each means in each state.
    fn happened(&mut self, event: Event, now: Duration, out: &mut Vec<Effect>) -> Done {
        match (&mut self.state, event) {
            (_, Event::Asked) => self.asked(now, out),
            (_, Event::Answered(state)) => {
                self.remembered.answered(state);
                Ok(())
            }
            (_, Event::Resuming(secrets)) => self.resuming(secrets, now, out),
            (
                _,
                Event::LaneJoined {
                    lane,
                    incarnation,
                    ticket,
                },
            ) => self.lane_joined(lane, incarnation, ticket, now, out),
            (State::Over, Event::Resumed(_)) => {
                self.runs_after_all(now, out);
                Ok(())
            }
            (State::Over, Event::NotResumed(fault)) => {
                self.fails_after_all(fault, now, out);
                Ok(())
            }
            (State::Over, _) => Ok(()),
            (_, Event::Opened(secrets)) => self.opened(secrets, now, out),
            (_, Event::ControlLost(fault)) => self.control_lost(fault, now, out),
            (_, Event::LanesSettled { marks, damaged }) => self.settled(&marks, damaged, now, out),
            (_, Event::Failed(fault) | Event::NotResumed(fault)) => Err(fault),
            // The guest is this side's: there is no way back, and the end is near.
            (State::Owning { .. }, Event::Cancel) => Ok(()),
            (_, Event::Cancel) => Err(Fault::Cancelled),
            (_, Event::Tick(counts)) => self.tick(counts, now, out),
            (State::Setup | State::Suspended { .. }, Event::MachineReady) => {
                if !self.set_up.machine_ready() {
                    return Err(internal("a machine that was not asked for"));
                }
                self.begin(now, out)
            }
            (_, Event::LaneUnheard { lane, incarnation }) => {
                self.lane_unheard(lane, incarnation, now, out)
            }
            (
                _,
                Event::LaneArrived {
                    lane,
                    incarnation,
                    round,
                    last,
                },
            ) => self.lane_arrived(lane, incarnation, round, last, now, out),
            (_, Event::LaneEnded { mark, fault }) => self.lane_ended(mark, fault, now, out),
            (
                _,
                Event::Damaged {
                    lane,
                    incarnation,
                    sequence,
                    runs,
                },
            ) => self.give_back(lane, incarnation, sequence, &runs, out),
            (_, Event::Handled(marks)) => self.acknowledge(&marks, out),
            (State::Rounds, Event::Closed(closed)) if self.rounds.is_closing() => {
                self.closed(closed, now, out)
            }
            // The channels were lost while it was being counted.
            (State::Suspended { .. }, Event::Closed(_)) => Ok(()),
            (_, Event::Loaded(result)) => {
                // What belongs to a switchover that is void counts no more, whatever came of it.
                if !self.loads.done() {
                    return Ok(());
                }
                result?;
                match &mut self.state {
                    State::Loading(loading) if !loading.is_loaded() => loading.loaded(),
                    _ => return Err(internal("a VM state that was not asked for")),
                }
                self.prepared(now, out)
            }
            (_, Event::Device(event)) => self.device(event, now, out),
            (State::Owning { since }, Event::Resumed(counts)) => {
                let took = now.saturating_sub(*since);
                self.running(took, counts, now, out)
            }
            (_, event) => Err(internal(format!("{event:?}"))),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The source said something that can't be now.
fn out_of_turn(what: impl Into<String>) -> Fault {
    let what = what.into();
    Fault::OutOfTurn { what }
}

/// Something happened here that can't: the fault is ours.
fn internal(what: impl Into<String>) -> Fault {
    let what = what.into();
    Fault::Internal { what }
}

#[cfg(test)]
mod tests;
