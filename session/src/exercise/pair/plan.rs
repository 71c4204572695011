//! What a seed says beforehand: the settings of both sides, the devices, how fast the links are, whether one side lies.

use std::time::Duration;

use multifd_wire::Role;
use multifd_wire::frame::DeviceFlags;

use super::dice::Dice;
use crate::source::config::{WhenAckLate, WhenDestinationLost, WhenNotConverging};
use crate::{destination as rx, source as tx};

/// How fast links are.
#[derive(Clone, Copy)]
enum Links {
    Fast,
    /// Each has a rate of its own, from 200 kB/s to 200 MB/s.
    Uneven,
}

/// A device whose state is moved.
#[derive(Debug, Clone, Copy)]
pub(super) struct DevicePlan {
    pub(super) flags: DeviceFlags,
    /// Bytes of one chunk, and of its whole state.
    pub(super) chunk: u64,
    pub(super) state_bytes: u64,
}

pub(super) struct Plan {
    pub(super) source: tx::Config,
    pub(super) destination: rx::Config,
    pub(super) pages: u64,
    pub(super) configs: u64,
    pub(super) devices: Vec<DevicePlan>,
    /// Every deadline is ample: what happens to it is survived.
    pub(super) gentle: bool,
    /// This side says what it must not.
    pub(super) liar: Option<Role>,
    /// A liar lies once in so many frames, from this one on.
    pub(super) lies_one_in: u64,
    pub(super) lies_from: u64,
    /// How long after the begin the guest writes and faults happen, at most; in milliseconds.
    pub(super) lasts_ms: u64,
    links: Links,
}

impl Plan {
    pub(super) fn new(dice: &mut Dice) -> Self {
        let liar = match dice.below(12) {
            0 => Some(Role::Source),
            1 => Some(Role::Destination),
            _ => None,
        };
        let gentle = !dice.one_in(3);
        let links = if dice.one_in(3) {
            Links::Uneven
        } else {
            Links::Fast
        };
        let count = if dice.one_in(3) { 1 + dice.below(2) } else { 0 };
        Self {
            source: source(gentle, dice),
            destination: destination(gentle, dice),
            pages: 4 + dice.below(20),
            configs: dice.below(3),
            devices: (0..count).map(|_| device(count, dice)).collect(),
            gentle,
            liar,
            lies_one_in: 1 + dice.below(30),
            lies_from: dice.below(60),
            lasts_ms: if dice.one_in(4) { 3000 } else { 300 },
            links,
        }
    }

    /// The rate of a new link, in bytes a second.
    pub(super) fn rate(&self, dice: &mut Dice) -> u64 {
        match self.links {
            Links::Fast => 1 << 30,
            Links::Uneven => 200_000 << dice.below(11),
        }
    }
}

/// A time from the one bound to the other, in milliseconds.
fn between(least: u64, most: u64, dice: &mut Dice) -> Duration {
    Duration::from_millis(least + dice.below(most - least + 1))
}

fn source(gentle: bool, dice: &mut Dice) -> tx::Config {
    let lost = if dice.one_in(2) {
        WhenDestinationLost::Fail
    } else {
        WhenDestinationLost::StartAfresh
    };
    let mut builder = tx::Config::builder()
        .channels(1 + dice.below(3) as u32)
        .downtime_limit(Duration::from_secs(30))
        .stall(Duration::from_secs(6))
        .progress_deadline(Duration::from_secs(12))
        .setup_deadline(Duration::from_secs(12))
        .commit_deadline(Duration::from_secs(10))
        .reconnect_deadline(Duration::from_secs(12))
        .ack_deadline(Some(Duration::from_secs(8)))
        .when_destination_lost(lost);
    if !gentle {
        let stall = between(300, 3000, dice);
        let progress = stall + between(0, 3000, dice);
        let reconnect = if dice.one_in(4) {
            Duration::ZERO
        } else {
            between(200, 5000, dice)
        };
        if dice.one_in(2) {
            builder = builder
                .downtime_limit(between(1, 400, dice))
                .max_rounds(1 + dice.below(8) as u32);
        }
        let not_converging = if dice.one_in(2) {
            WhenNotConverging::Fail
        } else {
            WhenNotConverging::Switch
        };
        let late = if dice.one_in(2) {
            WhenAckLate::Fail
        } else {
            WhenAckLate::GoOn
        };
        builder = builder
            .stall(stall)
            .keep_alive(stall / 3)
            .progress_deadline(progress)
            .setup_deadline(between(300, 4000, dice))
            .hello_deadline(between(200, 2000, dice))
            .commit_deadline(between(200, 3000, dice))
            .reconnect_deadline(reconnect)
            .ack_deadline(Some(between(50, 2000, dice)))
            .when_ack_late(late)
            .when_not_converging(not_converging);
    }
    builder.build().unwrap()
}

fn destination(gentle: bool, dice: &mut Dice) -> rx::Config {
    let mut builder = rx::Config::builder()
        .device_window_bytes(64 << 10)
        .stall(Duration::from_secs(6))
        .progress_deadline(Duration::from_secs(12))
        .setup_deadline(Duration::from_secs(12))
        .suspend(Duration::from_secs(12));
    if !gentle {
        let stall = between(300, 3000, dice);
        let suspend = if dice.one_in(4) {
            Duration::ZERO
        } else {
            between(200, 5000, dice)
        };
        builder = builder
            .stall(stall)
            .keep_alive(stall / 3)
            .progress_deadline(stall + between(0, 3000, dice))
            .setup_deadline(between(300, 4000, dice))
            .device_deadline(between(200, 2000, dice))
            .suspend(suspend);
    }
    builder.build().unwrap()
}

fn device(count: u64, dice: &mut Dice) -> DevicePlan {
    let mut flags = DeviceFlags::NONE;
    if count > 1 || dice.one_in(2) {
        flags = flags.union(DeviceFlags::P2P);
    }
    if dice.one_in(2) {
        flags = flags.union(DeviceFlags::PRE_COPY);
        if dice.one_in(2) {
            flags = flags.union(DeviceFlags::SWITCHOVER_ACK);
        }
    }
    if dice.one_in(3) {
        flags = flags.union(DeviceFlags::CONFIG_AFTER_MEMORY);
    }
    // Seldom so much that the destination's window is what it waits for.
    let (chunk, state_bytes) = if dice.one_in(12) {
        (16 << 10, (50 << 10) + dice.below(100 << 10))
    } else {
        (4096, dice.below(4000))
    };
    DevicePlan {
        flags,
        chunk,
        state_bytes,
    }
}
