//! The source's lanes as their threads would have them: pages and items of devices, taken as each lane has room.
//!
//! A lane takes a few pages at a time, so that the fastest takes most; between rounds it sends items as they come. What a lane took is in
//! its ledger before it is on its way.

use std::collections::VecDeque;
use std::time::Duration;

use multifd_wire::frame::{LaneMark, Pages, RawRun, Zeros};
use multifd_wire::{
    Body, Frame, Incarnation, LaneId, Misbehaved, PAGE_BYTES_U64, Phase, Reason, Role, Round,
    Sequence,
};
use zerocopy::byteorder::little_endian::U32;

use super::back::{refused, unanswered};
use super::guest::{run_of, sum};
use super::network::{Carries, Message};
use super::{Pair, What};
use crate::source::event::Event;
use crate::source::lane::Lane;
use crate::source::session::Counted;
use crate::source::speed::LaneCount;
use crate::source::stream::{Head, Item};
use crate::source::{Attempt, Seen};

/// Pages that a lane takes at a time, at most.
const EXTENT_PAGES: u64 = 4;

/// The round that is under way.
pub(super) struct Open {
    round: Round,
    pages: u64,
    left: VecDeque<u64>,
    sent_before: u64,
}

struct Command {
    round: Round,
    last: bool,
    behind: Vec<(Round, bool)>,
}

/// One lane's connection, and what is left of the one before a resume.
pub(super) struct Slot {
    machine: Option<Lane>,
    incarnation: Incarnation,
    pub(super) channel: usize,
    /// Its hello was accepted, and it is not being closed.
    pub(super) up: bool,
    /// Its thread has said its last word.
    pub(super) ended: bool,
    commands: VecDeque<Command>,
    round: Option<(Round, bool)>,
    /// Its thread is about to go on.
    woken: bool,
    /// Until when it has said what it encoded: a thread says such things in order.
    encoded_at: Duration,
    /// The connection that LANDED settles, with its channel; no ledger if it was settled already.
    before: Option<(Option<Lane>, usize)>,
}

impl Slot {
    pub(super) fn end(&mut self) {
        (self.ended, self.up) = (true, false);
    }
}

impl Pair {
    fn slot(&mut self, lane: LaneId, channel: usize) -> Option<&mut Slot> {
        let slot = self.source.slots.get_mut(&lane)?;
        (slot.channel == channel).then_some(slot)
    }

    // ── opening and closing ──────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn dial_lane(&mut self, lane: LaneId, incarnation: Incarnation, attempt: &Attempt) {
        let channel = self.connect(Carries::Lane(lane, incarnation));
        let old = self.source.slots.remove(&lane);
        let slot = Slot {
            machine: Some(Lane::new(lane, incarnation)),
            incarnation,
            channel,
            up: false,
            ended: false,
            commands: VecDeque::new(),
            round: None,
            woken: false,
            encoded_at: Duration::ZERO,
            before: old.and_then(|old| old.before),
        };
        self.source.slots.insert(lane, slot);
        let connect = attempt.connect_by.saturating_sub(self.now);
        let patience = attempt.answer_by.saturating_sub(self.now);
        let wait = self.transit(channel, Role::Source, 128);
        if wait < connect {
            self.later(wait, What::LaneHello(channel));
            self.later(patience, What::LaneLate(channel));
        } else {
            self.later(connect, What::LaneLate(channel));
        }
    }

    /// The destination has answered a lane's hello.
    pub(super) fn lane_answered(&mut self, channel: usize, refused_for: Option<Reason>) {
        let Carries::Lane(lane, incarnation) = self.network.channels[channel].carries else {
            return;
        };
        let open = self.network.is_open(channel);
        let Some(slot) = self.slot(lane, channel).filter(|slot| open && !slot.ended) else {
            return;
        };
        let Some(reason) = refused_for else {
            slot.up = true;
            return self.tell_source(Event::LaneUp { lane, incarnation });
        };
        slot.end();
        self.cut(channel);
        self.tell_source(Event::LaneNotOpened {
            lane,
            incarnation,
            why: refused(reason),
        });
    }

    /// A lane's hello was not answered in time.
    pub(super) fn lane_late(&mut self, channel: usize) {
        let Carries::Lane(lane, incarnation) = self.network.channels[channel].carries else {
            return;
        };
        if let Some(slot) = self.slot(lane, channel)
            && !slot.up
            && !slot.ended
        {
            slot.end();
            self.cut(channel);
            self.tell_source(Event::LaneNotOpened {
                lane,
                incarnation,
                why: unanswered(),
            });
        }
    }

    pub(super) fn close_lane(&mut self, lane: LaneId) {
        if let Some(slot) = self.source.slots.get_mut(&lane) {
            slot.up = false;
            let channel = slot.channel;
            self.cut(channel);
        }
    }

    /// Gives back what a lost lane carried. Its thread is waited for, so it says nothing any more but what it has said.
    pub(super) fn settle_lane(&mut self, lane: LaneId) {
        self.close_lane(lane);
        let Some(slot) = self.source.slots.get_mut(&lane) else {
            return;
        };
        let machine = slot.machine.take();
        let items = machine.map_or(0, |machine| self.give_ledger_back(machine));
        let pages = self.source.guest.dirty.len() as u64;
        self.source
            .events
            .push_back(Event::LaneLost { pages, items });
    }

    /// Everything of a ledger comes back. Gives how many items of devices that is.
    fn give_ledger_back(&mut self, mut machine: Lane) -> u64 {
        let items = machine.take_items();
        let count = items.len() as u64;
        self.source.readers.outbox.again(items);
        self.source.guest.give_back(machine.die());
        if count > 0 {
            self.wake_lanes();
        }
        count
    }

    /// Every channel is closed; what their lanes carried stays in their ledgers.
    pub(super) fn disconnect(&mut self) {
        self.source.readers.outbox.held = true;
        if let Some(control) = self.source.control.take() {
            self.cut(control);
        }
        let lanes: Vec<LaneId> = self.source.slots.keys().copied().collect();
        for lane in lanes {
            self.close_lane(lane);
            if let Some(slot) = self.source.slots.get_mut(&lane) {
                // Its last word is about a channel that does not count any more.
                slot.end();
                // A resume that came to nothing has left no ledger of its own behind.
                let ledger = (slot.machine.take(), slot.channel);
                slot.before.get_or_insert(ledger);
            }
        }
        if let Some(open) = self.source.open.take() {
            self.source.guest.dirty.extend(open.left);
        }
    }

    // ── ledgers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Settles the ledgers of the connections before a resume.
    pub(super) fn settle_before(&mut self, lanes: &[(LaneId, u64)]) -> Result<(), Misbehaved> {
        for (lane, frames) in lanes {
            let slot = self.source.slots.get_mut(lane);
            let before = slot.and_then(|slot| slot.before.as_mut());
            let Some((Some(machine), channel)) = before else {
                continue;
            };
            machine.acked(*frames)?;
            let handled = self.network.channels[*channel].handled;
            if *frames > handled && self.plan.liar.is_none() {
                self.violation(format!(
                    "LANDED, lane {lane}: {frames} frames, {handled} were"
                ));
            }
        }
        let slots = self.source.slots.values_mut();
        let ledgers: Vec<Lane> = slots.filter_map(|slot| slot.before.take()?.0).collect();
        for machine in ledgers {
            self.give_ledger_back(machine);
        }
        self.readers_landed();
        Ok(())
    }

    pub(super) fn acknowledged(&mut self, marks: &[LaneMark]) -> Result<u64, Misbehaved> {
        let mut bytes = 0;
        for mark in marks {
            let Some(slot) = self.source.slots.get_mut(&mark.lane) else {
                continue;
            };
            let handled = self.network.channels[slot.channel].handled;
            if let Some(machine) = &mut slot.machine {
                bytes += machine.acked(mark.frames)?.octets;
            }
            if mark.frames > handled && self.plan.liar.is_none() {
                let (lane, frames) = (mark.lane, mark.frames);
                self.violation(format!("ACK, lane {lane}: {frames} frames, {handled} were"));
            }
        }
        self.watch.taken(bytes, self.now);
        Ok(bytes)
    }

    pub(super) fn look_at_lanes(&self) -> Vec<Seen> {
        let slots = self.source.slots.iter();
        let seen = slots.filter_map(|(lane, slot)| {
            let machine = slot.machine.as_ref()?;
            Some(Seen {
                lane: *lane,
                acked: machine.acked_frames(),
                oldest: machine.oldest_round(),
                unacked_bytes: machine.unacked_octets(),
            })
        });
        seen.collect()
    }

    fn unacked_bytes(&self) -> u64 {
        let machines = self
            .source
            .slots
            .values()
            .filter_map(|slot| slot.machine.as_ref());
        machines.map(Lane::unacked_octets).sum()
    }

    /// Tells the session how far the round and each lane is.
    pub(super) fn count(&mut self) {
        let up = self.source.slots.iter().filter(|(_, slot)| slot.up);
        let lanes: Vec<LaneCount> = up
            .filter_map(|(lane, slot)| {
                let machine = slot.machine.as_ref()?;
                Some(LaneCount {
                    lane: *lane,
                    incarnation: slot.incarnation,
                    acked_bytes: machine.acked_octets(),
                    unacked_bytes: machine.unacked_octets(),
                })
            })
            .collect();
        let mut round = Counted {
            unacked_bytes: lanes.iter().map(|lane| lane.unacked_bytes).sum(),
            ..Counted::default()
        };
        if let Some(open) = &self.source.open {
            round.pages = open.pages;
            round.pages_left = open.left.len() as u64;
            round.sent_bytes = self.source.sent_bytes - open.sent_before;
        }
        let counted = Event::Counted { round, lanes };
        let _ = self.source.session.handle(counted, self.now);
    }

    // ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn open_round(&mut self, round: Round, last: bool) {
        if let Some(open) = self.source.open.take()
            && !open.left.is_empty()
            && self.source.session.phase() < Phase::Done
        {
            self.violation(format!(
                "round {round} begins before the one before is over"
            ));
        }
        let left: VecDeque<u64> = std::mem::take(&mut self.source.guest.dirty)
            .into_iter()
            .collect();
        self.source.open = Some(Open {
            round,
            pages: left.len() as u64,
            left,
            sent_before: self.source.sent_bytes,
        });
        for slot in self.source.slots.values_mut().filter(|slot| slot.up) {
            let behind = Vec::new();
            slot.commands.push_back(Command {
                round,
                last,
                behind,
            });
        }
        self.done.last_round = last;
        self.wake_lanes();
    }

    pub(super) fn lane_back(&mut self, lane: LaneId, behind: Vec<(Round, bool)>) {
        let last = self.done.last_round;
        if let Some(open) = &self.source.open
            && let Some(slot) = self.source.slots.get_mut(&lane)
        {
            let round = open.round;
            slot.commands.push_back(Command {
                round,
                last,
                behind,
            });
            let channel = slot.channel;
            self.wake_lane(lane, channel);
        }
    }

    pub(super) fn round_encoded(&mut self) {
        let Some(open) = &self.source.open else {
            return self.violation("a round that is encoded and was not opened");
        };
        let octets = self.source.sent_bytes - open.sent_before;
        let unacked_octets = self.unacked_bytes();
        self.source.events.push_back(Event::Encoded {
            octets,
            unacked_octets,
        });
    }

    // ── a lane's thread ──────────────────────────────────────────────────────────────────────────────────────────────

    /// There is something to do for any lane.
    pub(super) fn wake_lanes(&mut self) {
        let slots = self.source.slots.iter().filter(|(_, slot)| slot.up);
        let up: Vec<(LaneId, usize)> = slots.map(|(lane, slot)| (*lane, slot.channel)).collect();
        for (lane, channel) in up {
            self.wake_lane(lane, channel);
        }
    }

    pub(super) fn wake_lane(&mut self, lane: LaneId, channel: usize) {
        if let Some(slot) = self.slot(lane, channel)
            && slot.up
            && !std::mem::replace(&mut slot.woken, true)
        {
            let wait = Duration::from_micros(1 + self.dice.below(300));
            self.later(wait, What::LaneWorks(lane, channel));
        }
    }

    /// A lane's thread goes on: one frame, or one item.
    pub(super) fn lane_works(&mut self, lane: LaneId, channel: usize) {
        let Some(slot) = self.slot(lane, channel) else {
            return;
        };
        slot.woken = false;
        if !slot.up || slot.machine.is_none() || !self.network.is_open(channel) {
            return;
        }
        if !self.network.has_room(channel) {
            self.network.channels[channel].awaits_room = true;
            return;
        }
        if self.lane_goes_on(lane, channel) {
            self.wake_lane(lane, channel);
        }
    }

    /// Whether there may be more to do.
    fn lane_goes_on(&mut self, lane: LaneId, channel: usize) -> bool {
        let slot = self.source.slots.get_mut(&lane).unwrap();
        let machine = slot.machine.as_mut().unwrap();
        if slot.round.is_none()
            && let Some(command) = slot.commands.pop_front()
        {
            let mut marks = Vec::new();
            for (round, last) in command.behind {
                machine.begin_round(round, last).unwrap();
                marks.push(machine.end_round().unwrap());
            }
            machine.begin_round(command.round, command.last).unwrap();
            slot.round = Some((command.round, command.last));
            for (mark, sequence) in marks {
                self.send_on(channel, mark.into(), sequence, Message::default());
            }
            return true;
        }
        let round = slot.round;
        if round.is_none_or(|(_, last)| last || self.dice.one_in(2))
            && let Some(item) = self.source.readers.outbox.take(&mut self.dice)
        {
            self.send_item(lane, channel, item);
            return true;
        }
        let Some((round, last)) = round else {
            return false;
        };
        if self.send_pages(lane, channel, round) {
            return true;
        }
        // Nothing of a device may follow the mark of a round with the guest paused (SPEC: DEVSTREAM-7).
        if last && !self.source.readers.outbox.is_drained() {
            return false;
        }
        self.end_round(lane, channel, round);
        true
    }

    fn send_item(&mut self, lane: LaneId, channel: usize, item: std::sync::Arc<Item>) {
        let bytes = 96 + item.octets().len() as u64;
        let slot = self.source.slots.get_mut(&lane).unwrap();
        let machine = slot.machine.as_mut().unwrap();
        let sequence = machine.item(std::sync::Arc::clone(&item), bytes);
        self.source.sent_bytes += bytes;
        let frame = match item.head() {
            Head::Chunk(chunk) => Frame::from(chunk),
            Head::Mark(mark) => Frame::from(mark),
        };
        let message = Message {
            body: item.octets().to_vec(),
            ..Message::default()
        };
        self.send_on(channel, frame, sequence, message);
        if item.is_last() {
            self.wake_lanes();
        }
    }

    /// Takes some pages of the open round and sends them; false if there are none.
    fn send_pages(&mut self, lane: LaneId, channel: usize, round: Round) -> bool {
        let count = 1 + self.dice.below(EXTENT_PAGES);
        let open = self.source.open.as_mut().filter(|open| open.round == round);
        let Some(open) = open.filter(|open| !open.left.is_empty()) else {
            return false;
        };
        let count = open.left.len().min(count as usize);
        let taken: Vec<u64> = open.left.drain(..count).collect();
        let (mut runs, mut values, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        for page in taken {
            let run = run_of(&self.layout, page);
            let value = self.source.guest.memory.pages[page as usize];
            self.source.guest.memory.count(run, value);
            if value == 0 {
                zeros.push(run);
            } else {
                runs.push(run);
                values.push(value);
            }
        }
        let slot = self.source.slots.get_mut(&lane).unwrap();
        let machine = slot.machine.as_mut().unwrap();
        if !zeros.is_empty() {
            let raw: Vec<RawRun> = zeros.iter().copied().map(RawRun::from).collect();
            let sequence = machine.zeros(zeros, 64).unwrap();
            self.source.sent_bytes += 64;
            let frame = Zeros { round, runs: &raw };
            self.send_on(channel, frame.into(), sequence, Message::default());
        }
        if runs.is_empty() {
            return true;
        }
        let slot = self.source.slots.get_mut(&lane).unwrap();
        let machine = slot.machine.as_mut().unwrap();
        let raw: Vec<RawRun> = runs.iter().copied().map(RawRun::from).collect();
        let checksums: Vec<U32> = values.iter().map(|value| U32::new(sum(*value))).collect();
        let bytes = PAGE_BYTES_U64 * runs.len() as u64;
        let pages: Vec<u64> = runs.iter().map(|run| run.first().value()).collect();
        let sequence = machine.pages(runs, bytes).unwrap();
        self.source.sent_bytes += bytes;
        // The guest may write a page while it is sent.
        if self.source.guest.runs && self.dice.one_in(32) {
            let torn = self.dice.place(values.len());
            values[torn] ^= 1 << self.dice.below(31);
            let guest = &mut self.source.guest;
            guest.memory.pages[pages[torn] as usize] = values[torn];
            guest.written.insert(pages[torn]);
        }
        let frame = Pages {
            round,
            runs: &raw,
            checksums: &checksums,
        };
        let message = Message {
            pages: values,
            ..Message::default()
        };
        self.send_on(channel, frame.into(), sequence, message);
        true
    }

    fn end_round(&mut self, lane: LaneId, channel: usize, round: Round) {
        let wait = self.now + self.dice.ms(1);
        let slot = self.source.slots.get_mut(&lane).unwrap();
        let (mark, sequence) = slot.machine.as_mut().unwrap().end_round().unwrap();
        slot.round = None;
        slot.encoded_at = slot.encoded_at.max(wait);
        let (at, incarnation) = (slot.encoded_at, slot.incarnation);
        self.send_on(channel, mark.into(), sequence, Message::default());
        let encoded = Event::LaneEncoded {
            lane,
            incarnation,
            round,
        };
        self.later(at.saturating_sub(self.now), What::Source(encoded));
    }

    /// Sends a frame on a lane, with the body that the message has.
    fn send_on(
        &mut self,
        channel: usize,
        frame: Frame<'_>,
        sequence: Sequence,
        mut message: Message,
    ) {
        let body = match (&message.body[..], &message.pages[..]) {
            ([], []) => Body::None,
            ([], _) => Body::Pages,
            (octets, _) => Body::Octets(octets),
        };
        let mut head = Vec::new();
        frame.encode(sequence, body, &mut head).unwrap();
        message.head = head;
        self.send(channel, Role::Source, message);
    }
}
