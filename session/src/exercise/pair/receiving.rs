//! The destination's lanes as their threads would have them: what comes is checked, lands, and waits at the gate.

use std::collections::VecDeque;

use multifd_wire::frame::{LaneMark, Pages, Zeros};
use multifd_wire::{
    ChannelKind, Frame, HEADER_BYTES, Header, Incarnation, LaneId, Misbehaved, PageRun, Role, Round,
};

use super::Pair;
use super::guest::{pages_of, sum};
use super::network::Message;
use crate::destination::lane::{Begins, Lane, Mark};
use crate::destination::{Event, Fault};

/// One lane's connection.
pub(super) struct Receiving {
    pub(super) incarnation: Incarnation,
    pub(super) channel: usize,
    machine: Option<Lane>,
    begins: Option<Begins>,
    /// It waits at the gate for this round.
    waits: Option<Round>,
    inbox: VecDeque<Message>,
    pub(super) handled: u64,
    /// Its thread has said its last word.
    pub(super) ended: bool,
}

impl Receiving {
    pub(super) fn new(incarnation: Incarnation, channel: usize, begins: Option<Begins>) -> Self {
        let (machine, waits) = match begins {
            None => (None, None),
            Some(Begins::Within(round)) => (Some(Lane::rejoined(round)), None),
            Some(Begins::Behind(round)) => (None, Some(round)),
        };
        Self {
            incarnation,
            channel,
            machine,
            begins,
            waits,
            inbox: VecDeque::new(),
            handled: 0,
            ended: false,
        }
    }

    /// READY was sent.
    pub(super) fn start(&mut self, round: Round) {
        if self.begins.is_none() && self.machine.is_none() {
            self.machine = Some(Lane::new(round));
        }
    }
}

/// What one frame means for the lane's thread.
enum Step {
    Next,
    Fence { last: bool },
}

impl Pair {
    pub(super) fn read_all(&mut self) {
        let lanes: Vec<LaneId> = self.destination.slots.keys().copied().collect();
        lanes.into_iter().for_each(|lane| self.read_lane(lane));
    }

    pub(super) fn arrive_on(&mut self, lane: LaneId, channel: usize, message: Message) {
        let slot = self.destination.slots.get_mut(&lane);
        if let Some(slot) = slot.filter(|slot| slot.channel == channel && !slot.ended) {
            slot.inbox.push_back(message);
            self.read_lane(lane);
        }
    }

    /// The channel of a lane was cut while this was on its way: a part of it may have come.
    pub(super) fn arrive_in_part(&mut self, channel: usize, message: &Message) {
        let slots = self.destination.slots.iter();
        let mut reading = slots.filter(|(_, slot)| {
            let reads = slot.machine.is_some() && slot.waits.is_none() && slot.inbox.is_empty();
            slot.channel == channel && !slot.ended && reads
        });
        let Some(lane) = reading.next().map(|(lane, _)| *lane) else {
            return;
        };
        if let Ok((header, table)) = self.read_head(lane, message)
            && let Ok(Frame::Pages(pages)) = Frame::decode(&header, table)
            && let Ok(runs) = self.admit(pages.runs)
        {
            // SPEC: DIGEST-6
            for page in runs.into_iter().flat_map(pages_of) {
                self.land(page, 0x5eed_0000_0000_0000 | page);
                self.destination.damaged.insert(page);
            }
        }
        self.end_lane(lane, Fault::Channel(super::source::closed()));
    }

    /// A lane's thread ends, and says so.
    pub(super) fn end_lane(&mut self, lane: LaneId, fault: Fault) {
        let Some(slot) = self.destination.slots.get_mut(&lane) else {
            return;
        };
        slot.ended = true;
        let mark = LaneMark {
            lane,
            incarnation: slot.incarnation,
            frames: slot.handled,
        };
        let channel = slot.channel;
        self.cut(channel);
        self.lane_of_devices_lost();
        self.destination_note(Event::LaneEnded { mark, fault });
    }

    /// A lane's thread handles what is there, until it waits at the gate.
    pub(super) fn read_lane(&mut self, lane: LaneId) {
        while let Some(slot) = self.destination.slots.get_mut(&lane) {
            if slot.ended {
                return;
            }
            if let Some(round) = slot.waits {
                if self.destination.gate < round {
                    return;
                }
                slot.waits = None;
                match &mut slot.machine {
                    Some(machine) => machine.gate_opened(round).unwrap(),
                    None => slot.machine = Some(Lane::rejoined(round)),
                }
            }
            if slot.machine.is_none() {
                return;
            }
            let Some(message) = slot.inbox.pop_front() else {
                return;
            };
            let channel = slot.channel;
            let step = self.lane_frame(lane, &message);
            self.was_read(channel, message.bytes());
            match step {
                Ok(step) => self.handled(lane, step),
                Err(fault) => return self.end_lane(lane, fault),
            }
        }
    }

    /// A frame counts as handled.
    fn handled(&mut self, lane: LaneId, step: Step) {
        let Some(slot) = self.destination.slots.get_mut(&lane) else {
            return;
        };
        let machine = slot.machine.as_ref().unwrap();
        slot.handled = machine.frames();
        self.network.channels[slot.channel].handled = slot.handled;
        self.destination.counts.frames += 1;
        if let Step::Fence { last } = step {
            let (round, incarnation) = (machine.round(), slot.incarnation);
            slot.waits = round.next();
            self.destination_note(Event::LaneArrived {
                lane,
                incarnation,
                round,
                last,
            });
        }
    }

    fn read_head<'m>(
        &mut self,
        lane: LaneId,
        message: &'m Message,
    ) -> Result<(Header, &'m [u8]), Fault> {
        let (header, table) = message.head.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header)?;
        let slot = self.destination.slots.get_mut(&lane).unwrap();
        slot.machine.as_mut().unwrap().header(&header)?;
        let (kind, from, on) = (header.kind(), Role::Source, ChannelKind::Data);
        if !kind.may_travel(from, on) {
            return Err(Misbehaved::Direction { kind, from, on }.into());
        }
        Ok((header, table))
    }

    fn lane_frame(&mut self, lane: LaneId, message: &Message) -> Result<Step, Fault> {
        let (header, table) = self.read_head(lane, message)?;
        let frame = Frame::decode(&header, table)?;
        self.note(|| format!("lane {lane} at the destination: {frame:?}"));
        let slot = self.destination.slots.get_mut(&lane).unwrap();
        let machine = slot.machine.as_mut().unwrap();
        match frame {
            Frame::Pages(pages) => {
                machine.pages(pages.round, pages.checksums.len() as u64)?;
                self.pages(lane, &header, &pages, &message.pages)?;
            }
            Frame::Zeros(zeros) => {
                let most = self.layout.pages_total().value();
                machine.zeros(zeros.round, zeros.page_count(), most)?;
                self.zeros(&zeros)?;
            }
            Frame::RoundEnd(mark) => {
                if machine.round_end(&mark)? == Mark::Fence {
                    let last = mark.final_round;
                    return Ok(Step::Fence { last });
                }
            }
            Frame::DeviceChunk(chunk) => self.device_chunk(&chunk, &header, &message.body)?,
            Frame::DeviceMark(mark) => self.device_mark(&mark)?,
            Frame::Skipped(_) => {}
            other => return Err(Misbehaved::Feature { kind: other.kind() }.into()),
        }
        Ok(Step::Next)
    }

    fn admit(&self, runs: &[multifd_wire::frame::RawRun]) -> Result<Vec<PageRun>, Misbehaved> {
        runs.iter().map(|run| self.layout.admit(run)).collect()
    }

    /// A page has this content now.
    fn land(&mut self, page: u64, value: u64) {
        let run = super::guest::run_of(&self.layout, page);
        self.destination.memory.pages[page as usize] = value;
        self.destination.memory.count(run, value);
    }

    fn pages(
        &mut self,
        lane: LaneId,
        header: &Header,
        pages: &Pages<'_>,
        values: &[u64],
    ) -> Result<(), Fault> {
        let mut bad = Vec::new();
        let runs = self.admit(pages.runs)?;
        // A liar's frame may have been made up, body and all.
        let values = values.iter().copied().chain(std::iter::repeat(7));
        let all = runs.into_iter().flat_map(pages_of);
        for ((page, said), value) in all.zip(pages.checksums).zip(values) {
            self.land(page, value);
            if said.get() == sum(value) {
                self.destination.damaged.remove(&page);
                self.destination.counts.pages += 1;
            } else {
                self.destination.damaged.insert(page);
                bad.push(super::guest::run_of(&self.layout, page));
            }
        }
        if !bad.is_empty() {
            let incarnation = self.destination.slots[&lane].incarnation;
            // Before the frame counts as handled: the give-back must overtake its acknowledgement (SPEC: BACK-2).
            self.destination_note(Event::Damaged {
                lane,
                incarnation,
                sequence: header.sequence(),
                runs: bad,
            });
        }
        Ok(())
    }

    fn zeros(&mut self, zeros: &Zeros<'_>) -> Result<(), Fault> {
        for page in self.admit(zeros.runs)?.into_iter().flat_map(pages_of) {
            self.land(page, 0);
            self.destination.damaged.remove(&page);
            self.destination.counts.zero_pages += 1;
        }
        Ok(())
    }
}
