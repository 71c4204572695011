//! What users change while it runs: limits, whether pages are sent, how much the guest may be slowed.

use std::time::Duration;

use super::dice::Dice;
use super::{MS, Pair, What};
use crate::source::config::WhenNotConverging;
use crate::source::{Sending, Steer};

impl Pair {
    /// Some changes, each at its time. Whoever holds the sending lets it go on again.
    pub(super) fn plan_steers(&mut self) {
        let Some(mut dice) = self.steers.take() else {
            return;
        };
        let (lasts, gentle) = (self.plan.lasts_ms, self.plan.gentle);
        self.later(
            Duration::ZERO,
            What::Steers(Steer::ThrottleLimit(20 + dice.below(80) as u8)),
        );
        if !gentle && dice.one_in(2) {
            // So low that it needs the throttle, with a guest that is busy.
            let limit = Steer::DowntimeLimit(MS * (1 + dice.below(6) as u32));
            self.later(Duration::ZERO, What::Steers(limit));
            for _ in 0..dice.below(2000) {
                let at = dice.ms(lasts);
                self.later(at, What::Write);
            }
        }
        for _ in 0..dice.below(6) {
            let at = dice.ms(lasts);
            let change = change(gentle, &mut dice);
            self.later(at, What::Steers(change));
            if change == Steer::Sending(Sending::Held) {
                let until = at + dice.ms(lasts);
                self.later(until, What::Steers(Steer::Sending(Sending::On)));
                self.done.last = self.done.last.max(until);
            }
        }
    }
}

/// Of a gentle plan, none that could end it.
fn change(gentle: bool, dice: &mut Dice) -> Steer {
    match dice.below(if gentle { 4 } else { 6 }) {
        0 => Steer::Bandwidth(dice.one_in(2).then(|| (1 << 20) << dice.below(8))),
        1 => Steer::ThrottleLimit(dice.below(100) as u8),
        2 => Steer::WhenNotConverging(WhenNotConverging::Switch),
        3 => Steer::Sending(Sending::Held),
        4 => Steer::DowntimeLimit(MS * (1 + dice.below(400) as u32)),
        _ => Steer::MaxRounds(1 + dice.below(8) as u32),
    }
}
