//! The rounds with the guest paused: what is missing still, FINAL, and the commit.

use std::time::Duration;

use multifd_wire::{ChannelRef, Phase};

use super::{Effect, Event, Last, Session, State};
use crate::source::error::{Error, Fault};

/// Damaged or lost pages are sent again in a further last round; more than this many and the link can't be trusted.
pub const REPAIR_ROUNDS_MAX: u32 = 16;

impl Session {
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
            Event::DevicesSaved if !self.devices_saved => {
                self.devices_saved = true;
                return self.collect_after_save(last);
            }
            Event::Collected { pages } => {
                last.collected = true;
                last.missing += pages;
            }
            // Items of devices are missing like pages are: they need a round that is open.
            Event::LaneLost { pages, items } => {
                last.missing += pages + items;
                last.final_sent &= pages + items == 0;
                if items > 0 {
                    last.items_lost = Some(last.round);
                }
            }
            // The receiver knows best whether a damaged page is still missing there: one that landed again is counted off.
            Event::Closed { round, damaged } if round == last.round => {
                last.missing += damaged;
                last.final_sent &= damaged == 0;
                last.closed = damaged == 0;
            }
            Event::Closed { .. } => {}
            Event::FinalSent { digest } => {
                last.final_sent = true;
                last.digest = Some(digest);
            }
            Event::Prepared { digest } => {
                let wrong = |fault| Error::new(Phase::Switchover, fault).at(ChannelRef::Control);
                let Some(ours) = last.digest else {
                    let what = "PREPARED before FINAL".into();
                    return self.fail(wrong(Fault::OutOfTurn { what }));
                };
                if digest != ours {
                    let theirs = digest;
                    return self.fail(wrong(Fault::DigestMismatch { ours, theirs }));
                }
                // The digest is that of memory. A stream that was whole before it began anew looks whole to a destination that has lost
                // the RESTART with a lane (SPEC: PREP-3).
                if last
                    .items_lost
                    .is_some_and(|round| self.closed <= Some(round))
                {
                    return self.lost(wrong(Fault::PreparedTooEarly), now);
                }
                self.state = State::Committed { since: now, last };
                return vec![Effect::Commit];
            }
            event => return self.unexpected(&event),
        }
        self.state = State::Last(last);
        self.conclude(last)
    }

    pub(super) fn collect_after_save(&self, last: Last) -> Vec<Effect> {
        if last.saved && self.devices_saved {
            vec![Effect::Collect { last: true }]
        } else {
            Vec::new()
        }
    }

    /// Once the last round is encoded and the save's own writes are known: FINAL, or a further round for missing pages.
    pub(super) fn conclude(&mut self, last: Last) -> Vec<Effect> {
        if !(last.encoded && last.saved && last.collected) || last.final_sent {
            return Vec::new();
        }
        if last.missing == 0 {
            return vec![Effect::SendFinal { round: last.round }];
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
        self.state = State::Last(Last {
            round,
            encoded: false,
            missing: 0,
            closed: false,
            ..last
        });
        vec![
            Effect::AnnounceSwitchover { round },
            self.open_round(round, true),
        ]
    }
}
