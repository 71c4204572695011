//! Limits that are changed while it runs: what is in force, and what follows at once. And how the guest's time is held back and released.

use std::time::Duration;

use super::{Effect, Session, State};
use crate::source::steer::{Limits, Sending, Steer};

/// While sending is held a round lasts this long, or a quarter of `progress_deadline`: it shows the destination, which has such a deadline
/// of its own, that the source means to go on.
const HELD_ROUND: Duration = Duration::from_secs(10);

impl Session {
    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.config.limits
    }

    /// Whether pages are sent now. With the guest paused always: it waits for them.
    #[must_use]
    pub fn sending(&self) -> Sending {
        if self.is_paused() || self.is_committed() {
            Sending::On
        } else {
            self.config.limits.sending
        }
    }

    /// A limit is another one from now on.
    pub(super) fn steer(&mut self, change: Steer, now: Duration) -> Vec<Effect> {
        let before = self.config.limits;
        let after = before.with(change);
        if change.check().is_err() || after == before {
            return Vec::new();
        }
        self.config.limits = after;
        self.rounds.steered(&before, &after, now);
        let mut effects = vec![Effect::Steered(change)];
        if let Some(percent) = self.throttle.limit(after.throttle_limit) {
            effects.push(self.throttle_to(percent));
        }
        if self.config.limits.sending == Sending::On {
            effects.extend(self.decide_again(now));
        }
        effects
    }

    /// So much of the guest's time is held back from now on.
    pub(super) fn throttle_to(&mut self, percent: u8) -> Effect {
        self.rounds.throttled(percent);
        Effect::Throttle { percent }
    }

    /// Nothing is held back any more, if anything was.
    pub(super) fn release(&mut self) -> Option<Effect> {
        self.throttle.release().then(|| self.throttle_to(0))
    }

    /// Where only time is waited for, the decision is made again at once.
    pub(super) fn decide_again(&mut self, now: Duration) -> Vec<Effect> {
        match self.state {
            State::Draining { round, since, .. } => {
                self.state = State::Deciding {
                    round,
                    since,
                    encoded: now,
                };
                vec![Effect::Collect { last: false }]
            }
            State::Waiting { .. } => self.look_again(now),
            _ => Vec::new(),
        }
    }

    /// While sending is held: whether to wait before the next round is opened, and until when.
    pub(super) fn holds_until(&self, since: Duration, now: Duration) -> Option<Duration> {
        let until = since + HELD_ROUND.min(self.config.progress_deadline / 4);
        (now < until).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::{Features, Phase};

    use super::*;
    use crate::source::config::{Config, ConfigBuilder, WhenNotConverging};
    use crate::source::error::{Error, Fault};
    use crate::source::event::Event;

    const S: Duration = Duration::from_secs(1);

    fn begun(config: ConfigBuilder) -> Session {
        let config: Config = config.build().unwrap();
        let mut session = Session::new(config, 1 << 20, Duration::ZERO);
        let connected = Event::Connected {
            agreed: Features::RESUME,
            round_trip: Duration::from_millis(1),
        };
        for event in [connected, Event::Granted, Event::Ready] {
            let _ = session.handle(event, Duration::ZERO);
        }
        session
    }

    /// A round is encoded and its pages are counted, at `now`: what becomes of it.
    fn round(session: &mut Session, octets: u64, pages: u64, now: Duration) -> Vec<Effect> {
        session.heard(now);
        let encoded = Event::Encoded {
            octets,
            unacked_octets: 0,
        };
        let collect = session.handle(encoded, now);
        assert!(matches!(collect[..], [Effect::Collect { last: false }]));
        session.handle(Event::Collected { pages }, now)
    }

    fn steers(session: &mut Session, change: Steer, now: Duration) -> Vec<Effect> {
        session.handle(Event::Steer(change), now)
    }

    fn opens(effects: &[Effect]) -> bool {
        let opens = |effect: &Effect| matches!(effect, Effect::OpenRound { last: false, .. });
        effects.iter().any(opens)
    }

    fn pauses(effects: &[Effect]) -> bool {
        let pauses = |effect: &Effect| matches!(effect, Effect::Pause);
        effects.iter().any(pauses)
    }

    fn fails(effects: &[Effect]) -> bool {
        let fails = |effect: &Effect| matches!(effect, Effect::Finish(_));
        effects.iter().any(fails)
    }

    /// Rounds of 4 s at 1 GiB/s, all of whose pages are dirty again: the third in a row is the last.
    fn two_hopeless_rounds(session: &mut Session) {
        for made in 1..=2 {
            assert!(opens(&round(session, 1 << 32, 1 << 20, 4 * S * made)));
        }
    }

    #[test]
    fn a_migration_that_does_not_converge_gets_new_patience_with_each_change() {
        let mut session = begun(Config::builder());
        two_hopeless_rounds(&mut session);
        assert!(fails(&round(&mut session, 1 << 32, 1 << 20, 12 * S)));

        let mut session = begun(Config::builder());
        two_hopeless_rounds(&mut session);
        let steered = steers(&mut session, Steer::MaxRounds(40), 9 * S);
        assert!(matches!(
            steered[..],
            [Effect::Steered(Steer::MaxRounds(40))]
        ));
        assert!(opens(&round(&mut session, 1 << 32, 1 << 20, 12 * S)));
    }

    #[test]
    fn the_limits_that_were_changed_are_those_of_the_next_decision() {
        // 100,000 pages at 1 GiB/s: some 400 ms.
        for (change, does) in [
            (Steer::DowntimeLimit(S), pauses as fn(&[Effect]) -> bool),
            (Steer::DowntimeLimit(S / 4), opens),
            (Steer::MaxRounds(1), fails),
        ] {
            let mut session = begun(Config::builder());
            assert!(!steers(&mut session, change, S / 4).is_empty());
            // As many as it took to dirty them: a further round would not help.
            let effects = round(&mut session, 1 << 29, 100_000, S / 2);
            assert!(does(&effects), "{change}: {effects:?}");
        }
        let mut session = begun(Config::builder().max_rounds(1));
        let switch = Steer::WhenNotConverging(WhenNotConverging::Switch);
        assert!(!steers(&mut session, switch, S).is_empty());
        assert!(pauses(&round(&mut session, 1 << 32, 1 << 20, 4 * S)));
    }

    #[test]
    fn a_higher_limit_ends_a_wait_for_what_is_on_its_way() {
        let mut session = begun(Config::builder());
        let encoded = Event::Encoded {
            octets: 64 << 20,
            unacked_octets: 60 << 20,
        };
        let _ = session.handle(encoded, S);
        let _ = session.handle(Event::Collected { pages: 10 }, S);
        assert!(matches!(session.state, State::Draining { .. }));
        let effects = steers(&mut session, Steer::DowntimeLimit(2 * S), S);
        assert!(
            matches!(
                effects[..],
                [Effect::Steered(_), Effect::Collect { last: false }]
            ),
            "{effects:?}"
        );
        assert!(pauses(&session.handle(Event::Collected { pages: 10 }, S)));
    }

    fn throttled(effects: &[Effect]) -> Option<u8> {
        effects.iter().find_map(|effect| match effect {
            Effect::Throttle { percent } => Some(*percent),
            _ => None,
        })
    }

    /// A guest that writes twice what a link of 512 MiB/s carries, in rounds of so many pages: what each round says of the throttle, until
    /// the guest is paused, or the migration fails.
    fn twice_the_link(session: &mut Session) -> (Vec<u8>, Vec<Effect>) {
        let (mut now, mut pages, mut steps) = (Duration::ZERO, f64::from(1 << 20), Vec::new());
        let (link, writes, set) = (131_072.0, 262_144.0, f64::from(1 << 20));
        for _ in 0..40 {
            let lasts = pages / link;
            now += Duration::from_secs_f64(lasts);
            let held = f64::from(steps.last().copied().unwrap_or(0)) / 100.0;
            let octets = (pages * 4096.0) as u64;
            pages = set * (1.0 - (-writes * (1.0 - held) * lasts / set).exp());
            let effects = round(session, octets, pages as u64, now);
            steps.extend(throttled(&effects));
            if !opens(&effects) {
                return (steps, effects);
            }
        }
        panic!("{steps:?}")
    }

    #[test]
    fn a_guest_at_twice_the_links_rate_is_slowed_by_steps_as_much_as_needed_and_switches_over() {
        let mut session = begun(Config::builder().throttle_limit(90));
        let (steps, end) = twice_the_link(&mut session);
        assert!(pauses(&end), "{steps:?} {end:?}");
        assert_eq!(steps[..2], [20, 40]);
        let most = *steps.iter().max().unwrap();
        // Half of its writes are what the link carries; the rest is for the number of rounds, and for the margin.
        assert!((50..=65).contains(&most), "{steps:?}");
        assert!(session.predicted_downtime().unwrap() <= Duration::from_millis(300));
    }

    #[test]
    fn without_leave_or_with_too_little_it_is_not_slowed_or_not_enough_and_fails() {
        let mut session = begun(Config::builder());
        let (steps, end) = twice_the_link(&mut session);
        assert!(steps.is_empty() && fails(&end), "{steps:?} {end:?}");
        let mut session = begun(Config::builder().throttle_limit(30));
        let (steps, end) = twice_the_link(&mut session);
        assert!(fails(&end), "{end:?}");
        assert_eq!(steps, [20, 30, 0]);
        let place = |wanted: fn(&Effect) -> bool| end.iter().position(wanted).unwrap();
        let reclaimed = place(|effect| matches!(effect, Effect::Reclaim { .. }));
        let released = place(|effect| matches!(effect, Effect::Throttle { percent: 0 }));
        let over = place(|effect| matches!(effect, Effect::Finish(_)));
        assert!(reclaimed < released && released < over, "{end:?}");
    }

    #[test]
    fn a_guest_that_converges_is_not_slowed() {
        let mut session = begun(Config::builder().throttle_limit(90));
        let first = round(&mut session, 1 << 32, 200_000, 4 * S);
        assert!(opens(&first) && throttled(&first).is_none(), "{first:?}");
        let second = round(&mut session, 800 << 20, 40_000, 4 * S + S * 3 / 4);
        // Below the limit, and a round that halves it costs nothing.
        assert!(opens(&second) && throttled(&second).is_none(), "{second:?}");
        let third = round(&mut session, 160 << 20, 8_000, 4 * S + S * 9 / 10);
        assert!(pauses(&third) || opens(&third), "{third:?}");
        assert_eq!(throttled(&third), None);
    }

    #[test]
    fn whatever_ends_it_the_guest_has_all_of_its_time_again() {
        let fault = || Error::new(Phase::Rounds, Fault::Timeout { what: "anything" });
        type Ends = fn(Error) -> Event;
        let ends: [Ends; 4] = [
            |_| Event::Cancel,
            |_| Event::GuestGone,
            Event::Failed,
            Event::Lost,
        ];
        for (end, kept) in ends.into_iter().zip([None, None, None, Some(S)]) {
            let mut session = begun(Config::builder().throttle_limit(90));
            session.kept_for(kept);
            let effects = round(&mut session, 1 << 32, 1 << 20, 4 * S);
            assert_eq!(throttled(&effects), Some(20));
            let effects = session.handle(end(fault()), 5 * S);
            assert_eq!(throttled(&effects), Some(0), "{effects:?}");
            assert_eq!(kept.is_some(), session.phase() == Phase::Suspended);
        }
    }

    #[test]
    fn a_limit_that_is_lowered_lets_it_go_and_a_vmm_that_can_not_is_not_asked_again() {
        let mut session = begun(Config::builder().throttle_limit(90));
        let _ = round(&mut session, 1 << 32, 1 << 20, 4 * S);
        let effects = steers(&mut session, Steer::ThrottleLimit(7), 5 * S);
        assert_eq!(throttled(&effects), Some(7));

        let mut session = begun(Config::builder().throttle_limit(90));
        let _ = round(&mut session, 1 << 32, 1 << 20, 4 * S);
        assert!(session.handle(Event::NotThrottled, 4 * S).is_empty());
        let effects = round(&mut session, 1 << 32, 1 << 20, 8 * S);
        assert_eq!(throttled(&effects), None);
    }

    #[test]
    fn the_same_limit_again_and_one_out_of_its_range_change_nothing() {
        let mut session = begun(Config::builder());
        for change in [
            Steer::DowntimeLimit(Duration::from_millis(300)),
            Steer::Bandwidth(Some(1)),
            Steer::MaxRounds(0),
            Steer::Sending(Sending::On),
        ] {
            assert!(steers(&mut session, change, S).is_empty(), "{change}");
        }
        assert_eq!(session.limits(), Config::default().limits());
    }

    #[test]
    fn the_bandwidth_is_never_said_to_be_above_the_cap() {
        let mut session = begun(Config::builder());
        let _ = round(&mut session, 1 << 30, 1 << 20, S);
        assert_eq!(session.bandwidth(), Some(f64::from(1 << 30)));
        let _ = steers(&mut session, Steer::Bandwidth(Some(8 << 20)), S);
        assert_eq!(session.bandwidth(), Some(f64::from(8 << 20)));
    }

    #[test]
    fn what_is_held_makes_long_rounds_that_do_not_count_and_switches_over_when_it_goes_on() {
        let mut session = begun(Config::builder().max_rounds(3));
        let _ = steers(&mut session, Steer::Sending(Sending::Held), S);
        assert_eq!(session.sending(), Sending::Held);
        let mut now = 2 * S;
        for _ in 0..20 {
            // Hardly anything is dirty.
            assert!(round(&mut session, 0, 3, now).is_empty());
            assert!(matches!(session.state, State::Waiting { .. }));
            let due = session.next_deadline();
            assert!(due <= now + HELD_ROUND, "{due:?}");
            now = due;
            session.heard(now);
            let collect = session.handle(Event::Tick, now);
            assert!(matches!(collect[..], [Effect::Collect { last: false }]));
            assert!(opens(&session.handle(Event::Collected { pages: 3 }, now)));
            now += S;
        }
        assert!(round(&mut session, 0, 3, now).is_empty());
        let effects = steers(&mut session, Steer::Sending(Sending::On), now);
        assert!(
            matches!(
                effects[..],
                [Effect::Steered(_), Effect::Collect { last: false }]
            ),
            "{effects:?}"
        );
        assert!(pauses(&session.handle(Event::Collected { pages: 3 }, now)));
    }

    #[test]
    fn a_hold_that_comes_after_the_pause_waits_for_the_guest_to_be_here_again() {
        let mut session = begun(Config::builder());
        assert!(pauses(&round(&mut session, 64 << 20, 3, S)));
        assert!(!steers(&mut session, Steer::Sending(Sending::Held), S).is_empty());
        assert_eq!(session.sending(), Sending::On);
        assert_eq!(session.limits().sending, Sending::Held);
    }
}
