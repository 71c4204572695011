//! The source's attempts to open a control channel: what each comes to. When one is made its session says.

use multifd_wire::frame::OutcomeState;
use multifd_wire::{Features, Incompatible, Phase, Reason, Role};

use super::network::Carries;
use super::source::closed;
use super::{Pair, What};
pub(super) use crate::source::Purpose;
use crate::source::event::Event;
use crate::source::{Attempt, Fault, NotOpened};

/// A hello on a new control channel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hello {
    pub(super) purpose: Purpose,
    pub(super) channel: usize,
    pub(super) attempt: u32,
    /// The program whose session it speaks of.
    pub(super) program: u32,
}

/// What came of an attempt.
#[derive(Debug)]
pub(super) enum Reached {
    Control(usize, Features),
    Answer(OutcomeState),
    Refused(Reason),
    /// Nobody is there, or nobody answers.
    Nothing,
}

/// Whoever was connected to said nothing.
pub(super) fn unanswered() -> NotOpened {
    NotOpened::unanswered("the destination".to_owned(), Fault::Channel(closed()))
}

/// Whoever was connected to said no.
pub(super) fn refused(reason: Reason) -> NotOpened {
    let text = "it is not here".into();
    Incompatible::Refused { reason, text }.into()
}

impl Pair {
    /// Makes an attempt.
    pub(super) fn dial_control(&mut self, number: u32, purpose: Purpose, attempt: &Attempt) {
        if purpose == Purpose::Ask {
            self.watch.asks(self.now);
        }
        let channel = self.connect(Carries::Control);
        let wait = self.transit(channel, Role::Source, 128);
        let connect = attempt.connect_by.saturating_sub(self.now);
        let nothing = What::Reached(number, channel, Reached::Nothing);
        if wait >= connect {
            return self.later(connect, nothing);
        }
        let hello = Hello {
            purpose,
            channel,
            attempt: number,
            program: self.source.program,
        };
        self.later(wait, What::Hello(hello));
        self.later(attempt.answer_by.saturating_sub(self.now), nothing);
    }

    /// The destination's answer to a hello travels back.
    pub(super) fn answer(&mut self, hello: Hello, reached: Reached) {
        let wait = self.transit(hello.channel, Role::Destination, 256);
        self.later(wait, What::Reached(hello.attempt, hello.channel, reached));
    }

    /// An attempt has ended.
    pub(super) fn reached(&mut self, number: u32, channel: usize, reached: Reached) {
        let gone = self.hosts[0].gone || self.source.outcome.is_some();
        if gone || !self.source.session.awaits(number) {
            // Nobody waits for it any more.
            if self.source.control != Some(channel) {
                self.cut(channel);
            }
            return;
        }
        let open = self.network.is_open(channel);
        let why = match reached {
            Reached::Control(..) | Reached::Answer(_) | Reached::Refused(_) if !open => {
                self.done.answer_lost |= matches!(reached, Reached::Answer(_));
                unanswered()
            }
            Reached::Control(channel, agreed) => {
                self.watch.heard(Role::Source, self.now);
                if self.source.session.phase() == Phase::Hello {
                    self.watch.started_afresh(self.now);
                }
                return self.source_takes(channel, agreed);
            }
            Reached::Answer(state) => {
                self.cut(channel);
                self.done.answer = Some(state);
                return self.tell_source(Event::Answered(state));
            }
            Reached::Refused(reason) => refused(reason),
            Reached::Nothing => unanswered(),
        };
        self.cut(channel);
        self.tell_source(Event::NotConnected { number, why });
    }
}
