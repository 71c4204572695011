//! The source as its driver would have it: what the effects of its session do, and what is told of them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use multifd_wire::frame::{
    Abort, Commit, Config, Devices, Final, GuestState, OutcomeState, RawRegion, Regions, SetupEnd,
    VmState, blob_parts,
};
use multifd_wire::limits::TEXT_BYTES_MAX;
use multifd_wire::{
    Body, ChannelKind, ChannelRef, Features, Frame, HEADER_BYTES, Header, LaneId, Misbehaved,
    PAGE_BYTES_U64, Phase, Region, RegionId, Role, Sequence, SessionId, Text, Token,
};

use super::back::unanswered;
use super::guest::{Guest, pages_of};
use super::network::{Carries, Message};
use super::oracle::{End, Says};
use super::reading::Readers;
use super::sending::{Open, Slot};
use super::{MS, Pair, What};
use crate::common::ChannelFault;
use crate::source::event::{Effect, Event, Outcome};
use crate::source::{self as tx, Error, Fault};

pub(super) struct Source {
    pub(super) session: tx::Session,
    pub(super) guest: Guest,
    pub(super) slots: BTreeMap<LaneId, Slot>,
    /// The round that is under way, and its pages that no lane has taken.
    pub(super) open: Option<Open>,
    pub(super) sent_bytes: u64,
    pub(super) readers: Readers,
    pub(super) control: Option<usize>,
    /// Nothing that comes on it can be read any more.
    deaf: bool,
    next: Sequence,
    heard: Sequence,
    pub(super) ticket: Token,
    /// Which program of the destination granted the session.
    pub(super) program: u32,
    pub(super) events: VecDeque<Event>,
    pub(super) vmm_refuses: bool,
    pub(super) outcome: Option<End>,
}

pub(super) fn closed() -> ChannelFault {
    ChannelFault::new("channel-closed", false, "the connection was cut")
}

/// The channel's own failure ends no more than the channel; anything else ends the migration.
fn failure(error: Error) -> Event {
    if error.loses_control() {
        Event::Lost(error)
    } else {
        Event::Failed(error)
    }
}

impl Source {
    pub(super) fn new(session: tx::Session, guest: Guest, readers: Readers) -> Self {
        Self {
            session,
            guest,
            slots: BTreeMap::new(),
            open: None,
            sent_bytes: 0,
            readers,
            control: None,
            deaf: false,
            next: Sequence::FIRST,
            heard: Sequence::FIRST,
            ticket: Token::NONE,
            program: 0,
            events: VecDeque::new(),
            vmm_refuses: false,
            outcome: None,
        }
    }

    /// A control channel was accepted.
    fn take_control(&mut self, channel: usize) {
        self.control = Some(channel);
        self.deaf = false;
        (self.next, self.heard) = (Sequence::FIRST, Sequence::FIRST);
    }
}

impl Pair {
    pub(super) fn source_takes(&mut self, channel: usize, agreed: Features) {
        self.source.take_control(channel);
        let round_trip = Duration::MAX;
        self.tell_source(Event::Connected { agreed, round_trip });
    }

    pub(super) fn tell_source(&mut self, event: Event) {
        if self.source.outcome.is_none() && !self.hosts[0].gone {
            let effects = self.source.session.handle(event, self.now);
            self.source_does(effects);
        }
    }

    /// Carries effects out, and passes on what comes of them, until the session wants nothing more.
    pub(super) fn source_does(&mut self, mut effects: Vec<Effect>) {
        loop {
            let mut failed = None;
            for effect in effects {
                self.note(|| format!("source: {effect:?}"));
                if let Err(error) = self.source_effect(effect) {
                    failed = failed.or(Some(error));
                }
            }
            if let Some(error) = failed {
                self.source.events.clear();
                self.source.events.push_back(failure(error));
            }
            let next = self.source.events.pop_front();
            let Some(event) = next.filter(|_| self.source.outcome.is_none()) else {
                return;
            };
            effects = self.source.session.handle(event, self.now);
        }
    }

    // ── what comes ───────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn arrive_back(&mut self, channel: usize, message: &Message) {
        if self.source.control != Some(channel) || self.source.deaf {
            return;
        }
        let phase = self.source.session.phase();
        match self.read_back(message) {
            Ok(frame) => {
                self.note(|| format!("source hears {frame:?}"));
                if self.source.outcome.is_none() {
                    self.watch.heard(Role::Source, self.now);
                    let control = ChannelRef::Control;
                    let effects = self.source.session.frame(control, &frame, self.now);
                    self.source_does(effects);
                }
            }
            Err(fault) => {
                self.source.deaf = true;
                let error = Error::new(phase, fault).at(ChannelRef::Control);
                self.tell_source(failure(error));
            }
        }
    }

    /// Reads a frame as the driver does: what can't be read is found before anything of it is used, and credit goes to the devices.
    fn read_back<'m>(&mut self, message: &'m Message) -> Result<Frame<'m>, Fault> {
        let (header, table) = message.head.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header)?;
        header.check_sequence(self.source.heard)?;
        self.source.heard = self.source.heard.next();
        let (kind, from, on) = (header.kind(), Role::Destination, ChannelKind::Control);
        if !kind.may_travel(from, on) {
            return Err(Misbehaved::Direction { kind, from, on }.into());
        }
        let frame = Frame::decode(&header, table)?;
        if let Frame::Credit(credits) = &frame
            && self.source.readers.is_started()
        {
            for credit in credits.iter() {
                self.grant(credit.device, credit.offset_max)?;
            }
        }
        Ok(frame)
    }

    pub(super) fn source_sees_end(&mut self, channel: usize) {
        match self.network.channels[channel].carries {
            Carries::Control if self.source.control == Some(channel) => {
                let phase = self.source.session.phase();
                let error = Error::new(phase, Fault::Channel(closed()));
                self.tell_source(Event::Lost(error.at(ChannelRef::Control)));
            }
            Carries::Lane(lane, incarnation) => {
                let slot = self.source.slots.get_mut(&lane);
                if let Some(slot) = slot.filter(|slot| slot.channel == channel && !slot.ended) {
                    let was_up = slot.up;
                    slot.end();
                    self.tell_source(if was_up {
                        Event::LaneEnded {
                            lane,
                            incarnation,
                            fault: Some(Fault::Channel(closed())),
                        }
                    } else {
                        Event::LaneNotOpened {
                            lane,
                            incarnation,
                            why: unanswered(),
                        }
                    });
                }
            }
            Carries::Control => {}
        }
    }

    // ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn say<'a>(&mut self, frame: impl Into<Frame<'a>>, body: &[u8]) {
        let Some(channel) = self.source.control else {
            return;
        };
        let with = if body.is_empty() {
            Body::None
        } else {
            Body::Octets(body)
        };
        let mut head = Vec::new();
        let frame = frame.into();
        frame.encode(self.source.next, with, &mut head).unwrap();
        self.source.next = self.source.next.next();
        let message = Message {
            head,
            body: body.to_vec(),
            pages: Vec::new(),
        };
        self.send(channel, Role::Source, message);
    }

    fn send_set_up(&mut self, lanes: u32) {
        let memory_bytes = self.source.guest.memory.pages.len() as u64 * PAGE_BYTES_U64;
        for index in 0..self.plan.configs {
            let body = [index as u8; 5];
            let (blob, body) = blob_parts(1, 1, index as u32, &body)
                .unwrap()
                .next()
                .unwrap();
            self.say(Config { blob }, body);
        }
        let regions = [RawRegion::from(Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: memory_bytes,
        })];
        self.say(Regions { regions: &regions }, &[]);
        let devices = self.source.readers.table();
        self.say(Devices { devices: &devices }, &[]);
        let end = SetupEnd {
            configs: self.plan.configs as u32,
            regions: 1,
            devices: devices.len() as u32,
            lanes,
            memory_bytes,
        };
        self.say(end, &[]);
    }

    fn vmm_refuses(&mut self, step: &'static str) -> Result<(), Error> {
        if !std::mem::take(&mut self.source.vmm_refuses) {
            return Ok(());
        }
        self.done.vmm_refused = true;
        let source = crate::common::VmmError::new("no");
        Err(Error::new(Phase::Switchover, Fault::Vmm { step, source }))
    }

    // ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    fn source_effect(&mut self, effect: Effect) -> Result<(), Error> {
        let phase = self.source.session.phase();
        let wrong = |it: Misbehaved| Error::new(phase, it).at(ChannelRef::Control);
        match effect {
            Effect::Granted { grant, .. } => {
                self.source.ticket = grant.ticket;
                self.source.program = self.destination.program;
                self.source.readers.window = grant.device_window_bytes;
                self.watch.granted(grant.suspend_ms);
            }
            Effect::SendSetup { lanes } => self.send_set_up(lanes),
            Effect::Send(frame) => self.say(frame, &[]),
            Effect::DialControl {
                number,
                purpose,
                attempt,
            } => self.dial_control(number, purpose, &attempt),
            Effect::DialLane {
                lane,
                incarnation,
                attempt,
            } => self.dial_lane(lane, incarnation, &attempt),
            Effect::LaneBack { lane, behind, .. } => self.lane_back(lane, behind),
            Effect::CloseLane { lane } | Effect::LaneGone { lane, .. } => self.close_lane(lane),
            Effect::SettleLane { lane } => self.settle_lane(lane),
            Effect::SettleBefore { lanes } => self.settle_before(&lanes).map_err(wrong)?,
            Effect::LookAtLanes => {
                let seen = Event::LanesSeen(self.look_at_lanes());
                self.source.events.push_back(seen);
            }
            Effect::Acknowledged(marks) => {
                let bytes = self.acknowledged(&marks).map_err(wrong)?;
                self.count();
                self.source.events.push_back(Event::Acked { bytes });
            }
            Effect::GiveBack { runs, .. } => {
                for run in runs {
                    let run = self.layout.admit(&run).map_err(wrong)?;
                    self.source.guest.dirty.extend(pages_of(run));
                }
            }
            Effect::DeviceAcked(ack) => {
                let outlook = self.device_acked(&ack).map_err(wrong)?;
                self.source.events.push_back(Event::Devices(outlook));
            }
            Effect::DeviceLoaded(loaded) => {
                self.source.readers.get(loaded.device).map_err(wrong)?;
            }
            Effect::Begin { .. } => {
                let guest = &mut self.source.guest;
                guest.dirty = (0..guest.memory.pages.len() as u64).collect();
                self.start_readers();
                self.source.events.push_back(Event::Begun);
            }
            Effect::RoundEncoded => self.round_encoded(),
            Effect::OpenRound { round, last } => self.open_round(round, last),
            Effect::Collect { last } => {
                self.count();
                let pages = self.source.guest.collect();
                if !last {
                    self.look_at_devices();
                }
                self.source.events.push_back(Event::Collected { pages });
            }
            Effect::Throttle { percent } => self.throttle(percent),
            Effect::Pause => self.pause()?,
            Effect::Quiesce => self.quiesce(),
            Effect::StopDevices => self.stop_devices(),
            Effect::Save => self.save()?,
            Effect::SendFinal { round } => {
                let digest = self.source.guest.memory.digest;
                let last = Final {
                    final_round: round,
                    states: 1,
                    digest,
                    memory_pages: self.source.guest.memory.pages.len() as u64,
                    guest: GuestState::Running,
                };
                self.say(last, &[]);
                let digest = digest.value();
                self.source.events.push_back(Event::FinalSent { digest });
            }
            Effect::Commit => self.commit(),
            Effect::Reclaim { .. } => self.reclaim(),
            Effect::Disconnect => self.disconnect(),
            Effect::StartAfresh => self.start_afresh(),
            Effect::Abort {
                reason,
                phase,
                channel,
                text,
            } => {
                let text = Text::<TEXT_BYTES_MAX>::clip(&text);
                let abort = Abort {
                    reason,
                    phase,
                    channel,
                    text: text.as_str(),
                };
                self.say(abort, &[]);
            }
            Effect::Finish(outcome) => self.source_ends(outcome),
            Effect::Migrated
            | Effect::Resumed { .. }
            | Effect::Forecast(_)
            | Effect::Steered(_)
            | Effect::AwaitDevices => {}
        }
        Ok(())
    }

    /// The VMM may be one that can't.
    fn throttle(&mut self, percent: u8) {
        if percent > 0 && self.dice.one_in(4) {
            return self.source.events.push_back(Event::NotThrottled);
        }
        self.source.guest.throttle = percent;
        self.done.throttled |= percent > 0;
    }

    fn pause(&mut self) -> Result<(), Error> {
        if !self.devices_allow_pause() {
            self.source.events.push_back(Event::AcksMissing);
            return Ok(());
        }
        self.vmm_refuses("pause the guest")?;
        self.source.guest.runs = false;
        self.watch.paused(self.now);
        self.source.events.push_back(Event::Paused);
        Ok(())
    }

    /// The VMM saves its state, which may write memory.
    fn save(&mut self) -> Result<(), Error> {
        self.vmm_refuses("save its state")?;
        if self.dice.one_in(4) {
            self.source.guest.write(&mut self.dice);
        }
        let body = self.dice.next().to_le_bytes().to_vec();
        let blob = blob_parts(1, 1, 0, &body).unwrap().next().unwrap().0;
        self.say(VmState { blob }, &body);
        self.source.guest.saved = body;
        self.source.events.push_back(Event::Saved);
        Ok(())
    }

    fn commit(&mut self) {
        let open = self
            .source
            .control
            .is_some_and(|it| self.network.is_open(it));
        if !open && self.dice.one_in(2) {
            let fault = ChannelFault::new("channel-closed", true, "the connection was cut");
            let error = Error::new(Phase::Commit, Fault::Channel(fault));
            let unsent = Event::CommitUnsent(error.at(ChannelRef::Control));
            return self.source.events.push_back(unsent);
        }
        self.done.committed = true;
        self.watch.committed(self.now);
        let digest = self.source.guest.memory.digest;
        self.say(Commit { digest }, &[]);
    }

    fn reclaim(&mut self) {
        if self.done.committed && self.done.answer != Some(OutcomeState::NotCommitted) {
            self.violation("the guest is taken back after a COMMIT that nobody has denied");
        }
        if self.destination.runs && self.is_honest() {
            self.violation("the guest is taken back although it runs at the destination");
        }
        self.devices_come_back();
        self.source.guest.runs = true;
        self.watch.reclaimed();
    }

    fn start_afresh(&mut self) {
        self.source.slots.clear();
        self.source.ticket = Token::NONE;
        self.readers_begin_anew();
        self.source.guest.memory.forget(&self.layout);
        self.source.open = None;
        let name = SessionId::new([1; 16]);
        self.source.events.push_back(Event::Named(name));
        self.watch.started_afresh(self.now);
    }

    fn source_ends(&mut self, outcome: Outcome) {
        self.source.outcome = Some(match outcome {
            Outcome::Migrated => End::new(Says::Migrated, self.now),
            // No guest of these is gone: it would be the first to say so.
            Outcome::Failed(error) | Outcome::Gone(error) => {
                End::of_source(Says::Failed, &error, self.now)
            }
            Outcome::Cancelled(error) => End::of_source(Says::Cancelled, &error, self.now),
            Outcome::Stranded(error) => End::of_source(Says::Stranded, &error, self.now),
            Outcome::Unknown(error) => End::of_source(Says::Unknown, &error, self.now),
        });
        let lanes: Vec<usize> = self.source.slots.values().map(|it| it.channel).collect();
        lanes.into_iter().for_each(|channel| self.cut(channel));
        if let Some(channel) = self.source.control {
            // What was said last still arrives.
            let wait = self.transit(channel, Role::Source, 1) + 50 * MS;
            self.later(wait, What::DestinationSeesEnd(channel));
        }
    }
}
