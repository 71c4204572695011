//! What happens to a migration: channels that are cut, bits that are changed, programs that die, come back or stand still, a network that
//! is down, users who cancel, a VMM that refuses or never answers. And what was done, for the oracle.

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{Role, Token};

use super::destination::Destination;
use super::guest::Memory;
use super::network::Carries;
use super::{MS, Pair, What};
use crate::source::event::Event;
use crate::{destination as rx, source as tx};

/// What was done to the two.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) faults: u32,
    pub(super) cuts: u32,
    pub(super) flips: u32,
    pub(super) outages: u32,
    pub(super) freezes: u32,
    pub(super) slowed: u32,
    /// By the source's user, and by the destination's.
    pub(super) cancelled: [bool; 2],
    pub(super) crashed: [bool; 2],
    pub(super) vmm_refused: bool,
    pub(super) vmm_hung: bool,
    /// Something happened before GRANT was read: nothing is kept then.
    pub(super) early: bool,
    /// The last of all that, and its end.
    pub(super) last: Duration,
    /// COMMIT was handed to a channel.
    pub(super) committed: bool,
    /// The destination gave its word that it takes no COMMIT.
    pub(super) refused: bool,
    /// What the source was answered last.
    pub(super) answer: Option<OutcomeState>,
    /// What the destination answered was lost on its way, and it is not there any more.
    pub(super) answer_lost: bool,
    /// The round that was opened last is one with the guest paused.
    pub(super) last_round: bool,
    /// The guest was slowed.
    pub(super) throttled: bool,
}

impl Done {
    /// Somebody did not want to, or could not, that was asked.
    pub(super) fn unwilling(&self) -> bool {
        self.cancelled != [false; 2] || self.vmm_refused || self.vmm_hung
    }

    /// Something was wrong with the way, or with time.
    pub(super) fn to_the_way(&self) -> bool {
        let count = self.cuts + self.outages + self.freezes + self.slowed + self.flips;
        count > 0 || self.crashed != [false; 2]
    }
}

/// A program on its host.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Host {
    /// It stands still until then: nothing is read, and its time goes on.
    pub(super) frozen_until: Duration,
    pub(super) gone: bool,
}

impl Pair {
    pub(super) fn plan_faults(&mut self) {
        let lasts = self.plan.lasts_ms;
        let most = if self.plan.liar.is_some() { 2 } else { 5 };
        for _ in 0..self.dice.below(most) {
            let at = self.dice.ms(lasts);
            self.later(at, What::Fault);
        }
        for _ in 0..self.dice.below(30) {
            let at = self.dice.ms(lasts);
            self.later(at, What::Write);
        }
        if !self.plan.devices.is_empty() {
            for _ in 0..self.dice.below(10) {
                let at = self.dice.ms(lasts);
                self.later(at, What::DeviceChanges);
            }
        }
        if self.plan.liar.is_some() {
            let at = self.dice.ms(lasts);
            self.later(at, What::LiarSpeaks);
        }
    }

    pub(super) fn strike(&mut self) {
        self.done.faults += 1;
        self.done.early |= self.source.ticket == Token::NONE;
        self.done.last = self.done.last.max(self.now);
        match self.dice.below(20) {
            0..4 => self.cut_some(Some(true)),
            4..6 => self.cut_some(None),
            6..8 => self.cut_some(Some(false)),
            8..11 => {
                let count = 1 + self.dice.below(3) as u32;
                self.network.flips += count;
                self.done.flips += count;
            }
            11 => self.cancel(),
            12 => self.crash(),
            13..15 => self.freeze(),
            15 => self.outage(),
            16..18 => self.slow(),
            18 => self.vmm_is_difficult(),
            // Written, with the guest running or not, as far as the sources of dirty pages say.
            _ => self.source.guest.written.extend([0]),
        }
    }

    /// Cuts one lane, the control channel, or everything.
    fn cut_some(&mut self, lane: Option<bool>) {
        let open = self.network.open_now();
        let fits = |channel: &usize| {
            let is_lane = self.network.channels[*channel].carries != Carries::Control;
            lane.is_none_or(|lane| lane == is_lane)
        };
        let mut channels: Vec<usize> = open.into_iter().filter(fits).collect();
        if lane == Some(true) && !channels.is_empty() {
            let place = self.dice.place(channels.len());
            channels = vec![channels[place]];
        }
        self.note(|| format!("cut {channels:?}"));
        self.done.cuts += channels.len() as u32;
        channels.into_iter().for_each(|channel| self.cut(channel));
    }

    fn cancel(&mut self) {
        let who = self.dice.place(2);
        self.done.cancelled[who] = true;
        if who == 0 {
            self.tell_source(Event::Cancel);
        } else {
            self.tell_destination(rx::Event::Cancel);
        }
    }

    /// A program dies. The destination's may be begun again, without anything of before; somebody may ask what became of the source's.
    fn crash(&mut self) {
        let all = self.network.open_now();
        if self.dice.one_in(3) && self.source.outcome.is_none() {
            self.done.crashed[0] = true;
            self.hosts[0].gone = true;
            self.source.guest.runs = false;
            all.into_iter().for_each(|channel| self.cut(channel));
            if self.dice.one_in(2) {
                let wait = self.dice.ms(2000);
                self.later(wait, What::Asker);
            }
            return;
        }
        self.done.crashed[1] = true;
        self.crash_destination();
        if self.dice.one_in(2) {
            let wait = self.dice.ms(200);
            self.later(wait, What::Restart(self.destination.program));
        }
    }

    /// Whoever finds the source's program dead asks the destination with the ticket that it left.
    pub(super) fn ask_for_the_dead(&mut self) {
        if self.hosts[1].gone || self.source.ticket == Token::NONE {
            return;
        }
        let channel = self.connect(Carries::Control);
        let hello = super::back::Hello {
            purpose: super::back::Purpose::Ask,
            channel,
            attempt: u32::MAX,
            program: self.source.program,
        };
        self.greet(hello);
        if self.done.refused {
            // It may be run again from what there is: nobody else will ever have it.
            self.source.guest.runs = true;
        }
    }

    pub(super) fn crash_destination(&mut self) {
        self.hosts[1].gone = true;
        let all = self.network.open_now();
        all.into_iter().for_each(|channel| self.cut(channel));
    }

    pub(super) fn restart_destination(&mut self, program: u32) {
        // A guest that runs there is not restarted with its program.
        if program != self.destination.program || self.destination.runs {
            return;
        }
        let pages = vec![0; self.layout.pages_total().value() as usize];
        let memory = Memory::new(&self.layout, pages);
        self.hosts[1].gone = false;
        let before = self.destination.outcome.take();
        self.destination = Destination::new(program + 1, memory);
        self.ends.extend(before);
        self.watch.begun_again(self.now);
    }

    /// A program stands still for a while, with all its threads.
    fn freeze(&mut self) {
        let who = self.dice.place(2);
        let time = if self.plan.gentle || self.dice.one_in(2) {
            self.dice.ms(2000)
        } else {
            self.dice.ms(12_000)
        };
        self.done.freezes += 1;
        let until = self.now + time;
        self.hosts[who].frozen_until = self.hosts[who].frozen_until.max(until);
        self.done.last = self.done.last.max(until);
    }

    /// Nothing arrives for a while.
    fn outage(&mut self) {
        let time = if self.plan.gentle || self.dice.one_in(2) {
            self.dice.ms(3000)
        } else {
            self.dice.ms(12_000)
        };
        self.done.outages += 1;
        self.network.down_until = self.network.down_until.max(self.now + time);
        self.done.last = self.done.last.max(self.network.down_until);
    }

    /// A link becomes slower or faster.
    fn slow(&mut self) {
        let open = self.network.open_now();
        let place = self.dice.place(open.len());
        if let Some(channel) = open.get(place) {
            self.done.slowed += 1;
            self.change_rate(*channel);
        }
    }

    fn vmm_is_difficult(&mut self) {
        match self.dice.below(3) {
            0 => self.source.vmm_refuses = true,
            1 => self.destination.vmm_refuses = true,
            _ => self.destination.vmm_hangs = true,
        }
    }

    /// Whose event it is, for a program that stands still.
    pub(super) fn host_of(what: &What) -> Option<Role> {
        match what {
            What::Back(..)
            | What::SourceSeesEnd(_)
            | What::LaneAnswer(..)
            | What::LaneLate(_)
            | What::Reached(..)
            | What::Source(_)
            | What::LaneWorks(..)
            | What::Reads(_)
            | What::Steers(_)
            | What::Devices(..) => Some(Role::Source),
            What::Forth(..)
            | What::DestinationSeesEnd(_)
            | What::LaneHello(_)
            | What::Hello(_)
            | What::Note(_)
            | What::Vmm(..)
            | What::Loads(..)
            | What::DestinationEnds(_) => Some(Role::Destination),
            What::Write
            | What::DeviceChanges
            | What::Fault
            | What::Asker
            | What::Restart(_)
            | What::LiarSpeaks => None,
        }
    }

    /// How long all deadlines together may take, after the last thing that was done to the two.
    pub(super) fn patience(source: &tx::Config, destination: &rx::Config) -> Duration {
        let rounds = 1000 * MS * (source.rounds_max() + 20);
        let of_source = source.setup_deadline()
            + source.hello_deadline() * 2
            + source.stall() * 8
            + source.progress_deadline()
            + source.commit_deadline()
            + source.reconnect() * 3
            + source.ack_deadline().unwrap_or_default()
            + source.downtime_limit();
        let of_destination = destination.setup_deadline() * 2
            + destination.stall() * 4
            + destination.progress_deadline() * 2
            + destination.suspend() * 3
            + destination.device_deadline();
        of_source + of_destination + rounds
    }
}
