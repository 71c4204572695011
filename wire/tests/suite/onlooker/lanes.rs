//! The lanes: who joins, what each carries in which round, what is said of it on the control channel.

use std::collections::BTreeSet;

use multifd_wire::frame::{GiveBack, LaneDown, LaneMark, RawRun, RoundClosed, RoundEnd};
use multifd_wire::{Features, Frame, Hello, Misbehaved, Phase, Role};

use super::memory::Page;
use super::{Id, Kept, Onlooker, keep, place};

/// A frame that a lane carried.
#[derive(Default)]
struct Sent {
    round: Option<u32>,
    /// The pages of a PAGES frame, and those of them that did not land.
    pages: BTreeSet<Page>,
    missing: BTreeSet<Page>,
    given_back: BTreeSet<Page>,
}

#[derive(Default)]
pub(super) struct Lane {
    frames: Vec<Sent>,
    pub(super) read: usize,
    acked: u64,
    down: [bool; 2],
    is_lost: bool,
    /// The round that it is in, or behind whose ROUND_END it stands.
    round: u32,
    /// The round that was open when it joined.
    joined_in: u32,
    pages: u64,
    zero_pages: u64,
}

impl Lane {
    fn lives(&self) -> bool {
        !self.is_lost && self.down == [false; 2]
    }

    /// Both sides have given it up.
    fn is_settled(&self) -> bool {
        self.down == [true; 2]
    }
}

impl Onlooker {
    pub(super) fn living(&self) -> impl Iterator<Item = (&Id, &Lane)> {
        self.lanes.iter().filter(|(_, lane)| lane.lives())
    }

    pub(super) fn is_living(&self, id: Id) -> bool {
        self.lanes.get(&id).is_some_and(Lane::lives)
    }

    /// A lane's channel is lost; with the control channel the whole lane is (SPEC: RESUME-2).
    pub(super) fn lane_lost(&mut self, id: Id) {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.is_lost = true;
        }
    }

    pub(super) fn join(&mut self, hello: &Hello, agreed: Features) -> Kept {
        let id = (hello.lane.value(), hello.incarnation.value());
        let grant = self.grants.last().ok_or("JOIN-1")?;
        // SPEC: JOIN-1
        let admitted = hello.token == grant.ticket && id.0 < grant.lanes_max;
        keep(admitted, "JOIN-1")?;
        let newest = self.lanes.range((id.0, 0)..=(id.0, u32::MAX)).next_back();
        if let Some(((_, before), lane)) = newest {
            keep(id.1 > *before, "JOIN-1")?;
            // SPEC: JOIN-3
            keep(id.1 == before + 1, "JOIN-3")?;
            // SPEC: LANE-5, RESUME-14
            let of_before = lane.is_lost && self.is_resumed;
            keep(lane.is_settled() || of_before, "LANE-5")?;
        } else {
            keep(id.1 == 0, "JOIN-1")?;
        }
        // SPEC: JOIN-2
        keep(agreed == self.features, "JOIN-2")?;
        // SPEC: JOIN-5
        keep(
            self.set_up.lanes.is_some_and(|lanes| id.0 < lanes),
            "JOIN-5",
        )?;
        // SPEC: JOIN-4
        keep(self.prepared.is_none(), "JOIN-4")?;
        let lane = Lane {
            round: self.closed,
            joined_in: self.closed,
            ..Lane::default()
        };
        self.lanes.insert(id, lane);
        Ok(())
    }

    pub(super) fn on_lane(&mut self, id: Id, frame: &Frame<'_>, body: &[u8], read: bool) -> Kept {
        let closed = self.closed;
        let lane = &self.lanes[&id];
        // SPEC: LANE-1
        keep(!lane.down[place(Role::Source)], "LANE-1")?;
        let sent = match frame {
            Frame::Pages(pages) => {
                self.check_round(id, pages.round.value(), read)?;
                let mut sent = Sent {
                    round: Some(pages.round.value()),
                    ..Sent::default()
                };
                let mut contents = body.chunks_exact(4096).zip(pages.checksums);
                for page in self.pages_of(pages.runs)? {
                    let (content, crc) = contents.next().unwrap();
                    let (crc, found) = (crc.get(), crc32fast::hash(content));
                    // SPEC: ROUND-2
                    let once = self.memory.send(pages.round.value(), page, Some(crc));
                    keep(once, "ROUND-2")?;
                    sent.pages.insert(page);
                    if found != crc {
                        sent.missing.insert(page);
                    }
                    match (read, found == crc) {
                        (true, true) => self.memory.land(page, Some(crc)),
                        (true, false) => self.memory.damage(page, found),
                        _ => {}
                    }
                }
                self.lane(id).pages += sent.pages.len() as u64;
                sent
            }
            Frame::Zeros(zeros) => {
                self.check_round(id, zeros.round.value(), read)?;
                for page in self.pages_of(zeros.runs)? {
                    let once = self.memory.send(zeros.round.value(), page, None);
                    keep(once, "ROUND-2")?;
                    if read {
                        self.memory.land(page, None);
                    }
                }
                self.lane(id).zero_pages += zeros.page_count();
                Sent {
                    round: Some(zeros.round.value()),
                    ..Sent::default()
                }
            }
            Frame::RoundEnd(mark) => {
                let round = mark.round.value();
                let past = round < closed && closed == lane.joined_in && lane.frames.is_empty();
                if !past {
                    self.check_round(id, round, read)?;
                    self.round_end(id, mark)?;
                }
                Sent {
                    round: Some(round),
                    ..Sent::default()
                }
            }
            Frame::DeviceChunk(_) | Frame::DeviceMark(_) => {
                // SPEC: FEAT-4
                keep(self.has_devices(), "FEAT-4")?;
                self.check_fence(id, read)?;
                self.item(id, frame, body)?;
                Sent::default()
            }
            _ => Sent::default(),
        };
        let lane = self.lane(id);
        lane.frames.push(sent);
        lane.read += usize::from(read);
        Ok(())
    }

    fn lane(&mut self, id: Id) -> &mut Lane {
        self.lanes.get_mut(&id).unwrap()
    }

    fn check_fence(&self, id: Id, read: bool) -> Kept {
        let before = self.closed.checked_sub(1);
        let shut = before.is_some_and(|round| self.paused.get(&round) == Some(&true));
        // SPEC: ROUND-3
        keep(!read || self.lanes[&id].round <= self.closed, "ROUND-3")?;
        // SPEC: SWITCH-3
        let opened = self.switchovers.last() >= Some(&self.closed);
        keep(!read || !shut || opened, "SWITCH-3")
    }

    fn check_round(&self, id: Id, round: u32, read: bool) -> Kept {
        // SPEC: ROUND-8
        keep(round == self.lanes[&id].round, "ROUND-8")?;
        self.check_fence(id, read)
    }

    fn round_end(&mut self, id: Id, mark: &RoundEnd) -> Kept {
        let round = mark.round.value();
        let lane = self.lane(id);
        // SPEC: ROUND-5
        let counted = (lane.pages, lane.zero_pages) == (mark.pages, mark.zero_pages);
        keep(counted, "ROUND-5")?;
        (lane.pages, lane.zero_pages, lane.round) = (0, 0, round + 1);
        // SPEC: ROUND-4
        let named = self.switchovers.contains(&round);
        keep(mark.final_round == named, "ROUND-4")?;
        self.paused.insert(round, named);
        Ok(())
    }

    fn pages_of(&self, runs: &[RawRun]) -> Kept<Vec<Page>> {
        let layout = self.layout.as_ref().unwrap();
        let mut pages = Vec::new();
        for raw in runs {
            // SPEC: RUN-1, RUN-3
            let run = layout.admit(raw).map_err(|error| match error {
                Misbehaved::UnknownRegion { .. } => "RUN-1",
                _ => "RUN-3",
            })?;
            pages.extend(
                run.page_indices()
                    .map(|page| (raw.region.get(), page.value())),
            );
        }
        Ok(pages)
    }

    pub(super) fn ack(&mut self, mark: LaneMark) -> Kept {
        let id = (mark.lane.value(), mark.incarnation.value());
        // SPEC: ACK-3
        let lane = self.lanes.get_mut(&id).ok_or("ACK-3")?;
        keep(mark.frames <= lane.frames.len() as u64, "ACK-3")?;
        // SPEC: ACK-1
        let grows = (lane.acked..=lane.read as u64).contains(&mark.frames);
        keep(grows, "ACK-1")?;
        // SPEC: BACK-2
        let covered = &lane.frames[lane.acked as usize..mark.frames as usize];
        let said = covered.iter().all(|sent| sent.missing == sent.given_back);
        keep(said, "BACK-2")?;
        lane.acked = mark.frames;
        Ok(())
    }

    pub(super) fn give_back(&mut self, back: &GiveBack<'_>, in_set_up: bool) -> Kept {
        let id = (back.lane.value(), back.incarnation.value());
        // SPEC: RESUME-10
        keep(
            !in_set_up || self.set_up.is_resumed_and_ready(),
            "RESUME-10",
        )?;
        let pages: BTreeSet<Page> = self.pages_of(back.runs)?.into_iter().collect();
        // SPEC: BACK-3
        let lane = self.lanes.get_mut(&id).ok_or("BACK-3")?;
        let sequence = back.sequence.value();
        keep(in_set_up || sequence >= lane.acked, "BACK-3")?;
        let place = usize::try_from(sequence).unwrap();
        let sent = lane.frames.get_mut(place).ok_or("BACK-3")?;
        if !in_set_up {
            keep(pages.is_subset(&sent.pages), "BACK-3")?;
            // SPEC: BACK-1
            keep(pages.is_subset(&sent.missing), "BACK-1")?;
        }
        sent.given_back.extend(pages);
        Ok(())
    }

    pub(super) fn round_closed(&mut self, says: &RoundClosed) -> Kept {
        let round = self.closed;
        // SPEC: CLOSED-1
        let ended = self.living().all(|(_, lane)| lane.round > round);
        let any = self.living().next().is_some();
        keep(says.round.value() == round && ended && any, "CLOSED-1")?;
        // SPEC: CLOSED-3
        let is_over = |lane: &Lane| {
            let rest = &lane.frames[lane.acked as usize..lane.read];
            rest.iter()
                .all(|sent| sent.round.is_none_or(|of| of > round))
        };
        keep(self.living().all(|(_, lane)| is_over(lane)), "CLOSED-3")?;
        let landed = (says.pages, says.zero_pages) == self.memory.landed;
        keep(landed && says.digest == self.memory.digest(), "CLOSED-1")?;
        // SPEC: CLOSED-2
        let damaged = self.memory.damaged.len() as u64;
        keep(says.damaged_pages == damaged, "CLOSED-2")?;
        self.memory.landed = (0, 0);
        self.closed += 1;
        Ok(())
    }

    pub(super) fn lane_down(&mut self, side: Role, down: LaneDown) -> Kept {
        let id = (down.lane.value(), down.incarnation.value());
        // SPEC: LANE-2, LANE-7
        let unheard = side == Role::Source && self.set_up.lanes.is_some_and(|lanes| id.0 < lanes);
        match self.lanes.get_mut(&id) {
            Some(lane) => lane.down[place(side)] = true,
            None => keep(unheard, "LANE-2")?,
        }
        keep(self.phase() != Phase::Hello, "SETUP-1")
    }
}
