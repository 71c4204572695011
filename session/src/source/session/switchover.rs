//! From the decision to the commit: the guest is paused, its devices stop, and rounds are made until nothing is missing.

use std::time::Duration;

use multifd_wire::frame::Switchover;
use multifd_wire::{ChannelRef, Phase, Round};

use super::{Effect, Event, Session, State};
use crate::source::commit::{Last, Needs};
use crate::source::error::{Error, Fault};

/// Damaged or lost pages are sent again in a further last round; more than this many and the link can't be trusted.
pub const REPAIR_ROUNDS_MAX: u32 = 16;

impl Session {
    /// What happens between the decision and the first round with the guest paused.
    pub(super) fn handle_switchover(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        match (self.state, event) {
            // Old news: the guest is on its way already, and rounds close and pages come back long after.
            (_, Event::Devices(_)) if self.devices.are_there() => Vec::new(),
            (State::Pausing { round }, Event::AcksMissing) if self.devices.are_there() => {
                self.deadlines.paused_at = None;
                let live = Round::new(round.value().saturating_sub(1));
                self.wait_for_devices(live, now, now)
            }
            (State::Pausing { round }, Event::Paused) if self.devices.are_there() => {
                self.state = State::Quiescing { round };
                vec![Effect::Quiesce]
            }
            (State::Quiescing { round }, Event::DevicesQuiesced) => {
                self.state = State::Stopping { round };
                vec![Effect::StopDevices]
            }
            (State::Stopping { .. } | State::Collecting { .. }, Event::DevicesSaved)
                if !self.devices.are_saved() =>
            {
                self.devices.saved();
                Vec::new()
            }
            (State::Pausing { round }, Event::Paused)
            | (State::Stopping { round }, Event::DevicesStopped) => {
                self.state = State::Collecting { round };
                vec![Effect::Collect { last: true }]
            }
            (State::Collecting { round }, Event::Collected { .. }) => {
                self.state = State::Last(Last::new(round));
                vec![
                    switchover(round),
                    self.open_round(round, true),
                    Effect::Save,
                ]
            }
            (_, Event::Closed { .. } | Event::LaneLost { .. }) => Vec::new(),
            (_, event) => self.unexpected(&event),
        }
    }

    pub(super) fn handle_last(
        &mut self,
        mut last: Last,
        event: Event,
        now: Duration,
    ) -> Vec<Effect> {
        match event {
            Event::Encoded { .. } => last.encoded = true,
            // Saving the state or a device may write memory: the collection comes after both.
            Event::Saved => {
                last.saved = true;
                self.state = State::Last(last);
                return self.collect_after_save(last);
            }
            Event::DevicesSaved if !self.devices.are_saved() => {
                self.devices.saved();
                return self.collect_after_save(last);
            }
            Event::Collected { pages } => {
                last.collected = true;
                last.missing += pages;
            }
            Event::LaneLost { pages, items } => last.lost(pages, items),
            Event::Closed { round, damaged } if round == last.round => last.closed(damaged),
            Event::Closed { .. } => {}
            Event::FinalSent { digest } => last.final_sent(digest),
            Event::Prepared { digest } => {
                let wrong = |fault| Error::new(Phase::Switchover, fault).at(ChannelRef::Control);
                match last.prepared(digest, self.closed) {
                    Ok(()) => {}
                    Err(early @ Fault::PreparedTooEarly) => return self.lost(wrong(early), now),
                    Err(fault) => return self.fail(wrong(fault)),
                }
                self.guest.give();
                self.state = State::Committed { since: now, last };
                return vec![Effect::Commit];
            }
            event => return self.unexpected(&event),
        }
        self.state = State::Last(last);
        self.conclude(last)
    }

    pub(super) fn collect_after_save(&self, last: Last) -> Vec<Effect> {
        if last.saved && self.devices.are_saved() {
            vec![Effect::Collect { last: true }]
        } else {
            Vec::new()
        }
    }

    /// Once the last round is encoded and the save's own writes are known: FINAL, or a further round for missing pages.
    pub(super) fn conclude(&mut self, last: Last) -> Vec<Effect> {
        match last.needs() {
            Needs::Time => return Vec::new(),
            Needs::Final => return vec![Effect::SendFinal { round: last.round }],
            Needs::Round => {}
        }
        self.repairs += 1;
        let next = last
            .round
            .next()
            .filter(|_| self.repairs <= REPAIR_ROUNDS_MAX);
        let Some(round) = next else {
            return self.fail(Error::new(
                Phase::Switchover,
                Fault::Unrepairable {
                    pages: last.missing,
                    rounds: self.repairs,
                },
            ));
        };
        self.state = State::Last(last.further(round));
        vec![switchover(round), self.open_round(round, true)]
    }
}

/// SWITCHOVER: the guest is paused, and this round is begun.
fn switchover(round: Round) -> Effect {
    Effect::Send(Switchover { final_round: round }.into())
}
