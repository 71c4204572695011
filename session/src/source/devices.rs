//! What is known of the devices at the source: what they would add to the downtime, and whether they allow it to begin.
//!
//! The rules it keeps: the guest is not paused before every device's initial bytes are loaded at the destination, unless the user's
//! patience is at its end and says so (SPEC: SWACK-2); and rounds that are made only because of that wait do not count as used up.

use std::time::Duration;

use super::config::{Config, WhenAckLate};
use super::error::Fault;
use super::event::DeviceOutlook;

/// While devices are waited for, what is dirty is looked at this often, and sent if it no longer fits the downtime limit.
pub(super) const WAIT_ROUND: Duration = Duration::from_millis(200);

/// The devices of one session.
#[derive(Debug, Default)]
pub(super) struct Devices {
    /// There are devices, and what is known of them.
    outlook: Option<DeviceOutlook>,
    /// They were all read to their end.
    saved: bool,
    /// Since when acknowledgements were the only thing missing.
    waiting_since: Option<Duration>,
    /// Rounds that were made while waiting.
    rounds_waited: u32,
    /// When the last of them was begun.
    round_waited_at: Duration,
}

impl Devices {
    /// There are devices.
    pub(super) fn expected(&mut self) {
        self.outlook = Some(DeviceOutlook::default());
    }

    pub(super) fn are_there(&self) -> bool {
        self.outlook.is_some()
    }

    /// What is known of them now.
    pub(super) fn known(&mut self, outlook: DeviceOutlook) {
        self.outlook = Some(outlook);
    }

    /// They were all read to their end.
    pub(super) fn saved(&mut self) {
        self.saved = true;
    }

    /// Whether nothing of a device is still to be read; also true when there are none.
    pub(super) fn are_saved(&self) -> bool {
        self.saved || self.outlook.is_none()
    }

    /// The guest runs again, and they with it: what was read with it paused is read anew (SPEC: RESUME-8), and the user's patience with
    /// them begins anew.
    pub(super) fn run_again(&mut self) {
        self.saved = false;
        self.waiting_since = None;
    }

    /// Bytes that they would still give, and the time that reading or loading them would take, whichever is longer.
    pub(super) fn share(&self) -> (f64, Duration) {
        self.outlook
            .as_ref()
            .map_or((0.0, Duration::ZERO), |devices| {
                let work = devices.load.max(devices.read);
                (devices.stop_bytes as f64, work)
            })
    }

    /// Whether the guest may be paused although acknowledgements are missing: the user said so for now.
    pub(super) fn waived(&self, config: &Config, now: Duration) -> bool {
        let deadline = self.deadline(config);
        config.when_ack_late == WhenAckLate::GoOn
            && deadline.is_some_and(|deadline| now >= deadline)
    }

    /// Whether they keep the guest from being paused.
    pub(super) fn hold(&self, config: &Config, now: Duration) -> bool {
        let unacked = self
            .outlook
            .as_ref()
            .is_some_and(|it| !it.unacked.is_empty());
        unacked && !self.waived(config, now)
    }

    fn deadline(&self, config: &Config) -> Option<Duration> {
        Some(self.waiting_since? + config.ack_deadline?)
    }

    /// Acknowledgements are the only thing missing: when to look again, or that the user does not want to wait any longer.
    pub(super) fn wait(&mut self, config: &Config, now: Duration) -> Result<Duration, Fault> {
        let began = *self.waiting_since.get_or_insert(now);
        let deadline = self.deadline(config);
        if deadline.is_some_and(|deadline| now >= deadline)
            && config.when_ack_late == WhenAckLate::Fail
        {
            let unacked = self.outlook.as_ref().map(|devices| &devices.unacked);
            return Err(Fault::AckDeadline {
                devices: unacked.map_or_else(String::new, |names| names.join(", ")),
                waited_ms: now.saturating_sub(began).as_millis(),
            });
        }
        Ok((now + WAIT_ROUND).min(deadline.unwrap_or(Duration::MAX)))
    }

    pub(super) fn are_waited_for(&self) -> bool {
        self.waiting_since.is_some()
    }

    /// A round is made that brings the switchover no nearer. `waits`: it is made because acknowledgements are missing.
    pub(super) fn round_made(&mut self, waits: bool, now: Duration) {
        self.round_waited_at = now;
        self.rounds_waited += u32::from(waits);
    }

    pub(super) fn round_was_just_made(&self, now: Duration) -> bool {
        now < self.round_waited_at + WAIT_ROUND
    }

    /// Rounds that do not count.
    pub(super) fn rounds_waited(&self) -> u32 {
        self.rounds_waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn outlook(unacked: &[&str]) -> DeviceOutlook {
        DeviceOutlook {
            unacked: unacked.iter().map(|name| (*name).to_owned()).collect(),
            ..DeviceOutlook::default()
        }
    }

    fn config(choice: WhenAckLate) -> Config {
        let deadline = Some(300 * MS);
        let config = Config::builder().ack_deadline(deadline);
        config.when_ack_late(choice).build().unwrap()
    }

    /// SPEC: SWACK-2
    #[test]
    fn the_guest_is_held_while_an_acknowledgement_is_missing_and_the_user_waits() {
        let config = config(WhenAckLate::GoOn);
        let mut devices = Devices::default();
        assert!(!devices.hold(&config, MS) && devices.are_saved(), "none");
        devices.expected();
        assert!(!devices.are_saved());
        devices.known(outlook(&["nic"]));
        assert!(devices.hold(&config, MS));
        assert_eq!(devices.wait(&config, MS).unwrap(), 201 * MS);
        assert_eq!(devices.wait(&config, 201 * MS).unwrap(), 301 * MS);
        assert!(devices.hold(&config, 300 * MS));
        assert!(!devices.hold(&config, 301 * MS), "waived");
        devices.run_again();
        assert!(devices.hold(&config, 301 * MS), "patience begins anew");
        devices.known(outlook(&[]));
        assert!(!devices.hold(&config, 301 * MS));
    }

    #[test]
    fn a_user_who_does_not_wait_any_longer_is_told_for_which_devices() {
        let config = config(WhenAckLate::Fail);
        let mut devices = Devices::default();
        devices.known(outlook(&["nic", "gpu"]));
        assert!(devices.wait(&config, MS).is_ok());
        assert!(devices.wait(&config, 300 * MS).is_ok());
        let late = devices.wait(&config, 301 * MS).unwrap_err();
        assert!(late.to_string().contains("nic, gpu"), "{late}");
    }

    #[test]
    fn only_rounds_made_for_missing_acknowledgements_do_not_count() {
        let mut devices = Devices::default();
        devices.round_made(true, 500 * MS);
        devices.round_made(false, 900 * MS);
        assert_eq!(devices.rounds_waited(), 1);
        assert!(devices.round_was_just_made(1099 * MS));
        assert!(!devices.round_was_just_made(1100 * MS));
    }
}
