//! How much of the guest's time is held back, so that it writes less: as little as the forecast needs.
//!
//! ```text
//!   after a live round:   needed > held ──► up, by a step at most
//!   at every end, and whenever the channels are lost ──► 0
//! ```
//! The rules it keeps: nothing is held back of a guest that converges without; never more than the limit; and whatever was held back
//! is released before the guest is left to its owner.

/// The most that is added after one round, in percent: what was measured with less says little about much more.
const STEP_MAX: u8 = 20;

/// What is held back.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    percent: u8,
    /// What it was before the newest change.
    before: u8,
    /// The VMM can't, or did not want to.
    refused: bool,
    /// Something may be held back: there is something to release.
    touched: bool,
}

impl Throttle {
    /// How much is held back now, in percent of the guest's time.
    pub(super) fn percent(&self) -> u8 {
        self.percent
    }

    /// After a live round that leaves `needed` to be held back, at most `limit`; `None`: no throttle would help. Gives what is to be held
    /// back from now on, if that is another share. It is not lowered because a round was quiet: writing comes in bursts, and a guest that needs
    /// less now has switched over soon.
    pub(super) fn decide(&mut self, needed: Option<u8>, limit: u8) -> Option<u8> {
        let held = self.percent;
        let wanted = match needed {
            _ if self.refused => return None,
            None => held,
            Some(needed) if needed > held => needed.min(held.saturating_add(STEP_MAX)),
            Some(_) => held,
        };
        self.set(wanted.min(limit))
    }

    /// The limit is lower now.
    pub(super) fn limit(&mut self, limit: u8) -> Option<u8> {
        self.set(self.percent.min(limit))
    }

    fn set(&mut self, percent: u8) -> Option<u8> {
        if percent == self.percent {
            return None;
        }
        (self.before, self.percent, self.touched) = (self.percent, percent, true);
        Some(percent)
    }

    /// The VMM did not do it: it is as it was, and is asked no more but to release.
    pub(super) fn refused(&mut self) {
        self.percent = self.before;
        self.refused = true;
    }

    /// Whether nothing is to be held back any more that was.
    pub(super) fn release(&mut self) -> bool {
        (self.percent, self.before) = (0, 0);
        std::mem::take(&mut self.touched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_by_steps_up_to_what_is_needed_and_no_further_than_the_limit() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.decide(Some(0), 80), None);
        assert_eq!(throttle.decide(Some(50), 80), Some(20));
        assert_eq!(throttle.decide(Some(50), 80), Some(40));
        assert_eq!(throttle.decide(Some(50), 80), Some(50));
        assert_eq!(throttle.decide(Some(50), 80), None);
        assert_eq!(throttle.decide(Some(99), 80), Some(70));
        assert_eq!(throttle.decide(Some(99), 80), Some(80));
        assert_eq!(throttle.decide(Some(99), 80), None);
        assert_eq!(throttle.decide(None, 80), None, "nothing would help");
    }

    #[test]
    fn it_does_not_fall_because_one_round_was_quiet() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.decide(Some(20), 80), Some(20));
        assert_eq!(throttle.decide(Some(0), 80), None);
        assert_eq!(
            throttle.decide(Some(60), 80),
            Some(40),
            "nor is anything lost"
        );
    }

    #[test]
    fn a_limit_of_nothing_forbids_it_and_a_lower_one_lowers_it() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.decide(Some(50), 0), None);
        assert!(!throttle.release(), "nothing was held back");
        let _ = throttle.decide(Some(50), 80);
        assert_eq!(throttle.limit(80), None);
        assert_eq!(throttle.limit(5), Some(5));
        assert_eq!(throttle.limit(0), Some(0));
    }

    #[test]
    fn who_refuses_is_not_asked_again_but_to_release() {
        let mut throttle = Throttle::default();
        let _ = throttle.decide(Some(50), 80);
        let _ = throttle.decide(Some(50), 80);
        throttle.refused();
        assert_eq!(throttle.percent(), 20);
        assert_eq!(throttle.decide(Some(50), 80), None);
        assert!(throttle.release());
        assert_eq!(throttle.percent(), 0);
        assert!(!throttle.release(), "once");
    }
}
