//! The source's way back: to resume a session, to ask how it ended, or to begin another one.

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Features, Phase, Reason, Role};

use super::network::Carries;
use super::source::closed;
use super::{Pair, What};
use crate::source::event::Event;
use crate::source::redial::{Next, Redial, connect_timeout};
use crate::source::{Error, Fault};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Resume,
    Ask,
    Start,
}

pub(super) struct Back {
    purpose: Purpose,
    redial: Redial,
    dialling: bool,
}

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

impl Pair {
    pub(super) fn go_back(&mut self, purpose: Purpose, until: Duration) {
        self.source.back = Some(Back {
            purpose,
            redial: Redial::at_once(self.now, until),
            dialling: false,
        });
        self.dial_when_due();
    }

    fn dial_when_due(&mut self) {
        if let Some(back) = &self.source.back {
            let wait = back.redial.due.saturating_sub(self.now);
            self.source.attempts += 1;
            let attempt = self.source.attempts;
            self.later(wait, What::Dial(attempt));
        }
    }

    /// An attempt is due.
    pub(super) fn dial(&mut self, attempt: u32) {
        let Some(back) = self.source.back.as_mut() else {
            return;
        };
        if attempt != self.source.attempts || back.dialling {
            return;
        }
        back.dialling = true;
        let purpose = back.purpose;
        let connect = connect_timeout(self.source.session.round_trip());
        let patience = self.plan.source.hello_deadline();
        let channel = self.connect(Carries::Control);
        let wait = self.transit(channel, Role::Source, 128);
        if wait >= connect.min(patience) {
            let nothing = What::Reached(attempt, channel, Reached::Nothing);
            return self.later(connect.min(patience), nothing);
        }
        let hello = Hello {
            purpose,
            channel,
            attempt,
            program: self.source.program,
        };
        self.later(wait, What::Hello(hello));
        let nothing = What::Reached(attempt, channel, Reached::Nothing);
        self.later(patience, nothing);
    }

    /// The destination's answer to a hello travels back.
    pub(super) fn answer(&mut self, hello: Hello, reached: Reached) {
        let wait = self.transit(hello.channel, Role::Destination, 256);
        self.later(wait, What::Reached(hello.attempt, hello.channel, reached));
    }

    /// An attempt has ended.
    pub(super) fn reached(&mut self, attempt: u32, channel: usize, reached: Reached) {
        let gone = self.hosts[0].gone || self.source.outcome.is_some();
        let current = attempt == self.source.attempts && !gone;
        let back = self.source.back.as_mut();
        let Some(purpose) = back.filter(|back| current && back.dialling).map(|back| {
            back.dialling = false;
            back.purpose
        }) else {
            // Nobody waits for it any more.
            if self.source.control != Some(channel) {
                self.cut(channel);
            }
            return;
        };
        let open = self.network.is_open(channel);
        match reached {
            Reached::Control(..) | Reached::Answer(_) | Reached::Refused(_) if !open => {
                self.done.answer_lost |= matches!(reached, Reached::Answer(_));
                self.dial_failed(purpose, channel);
            }
            Reached::Control(channel, features) => {
                self.source.back = None;
                self.watch.heard(Role::Source, self.now);
                self.source.take_control(channel, features, self.now);
                if purpose == Purpose::Resume {
                    self.tell_source(Event::Reconnected);
                }
            }
            Reached::Answer(state) => {
                self.cut(channel);
                if let Some(back) = &mut self.source.back {
                    let _ = back.redial.failed(self.now);
                }
                self.done.answer = Some(state);
                self.tell_source(Event::Answered(state));
                self.dial_when_due();
            }
            // SPEC: RESUME-1, RESUME-3
            Reached::Refused(reason)
                if matches!(
                    reason,
                    Reason::WrongSession | Reason::BadTicket | Reason::Feature
                ) && purpose != Purpose::Start =>
            {
                self.cut(channel);
                self.source.back = None;
                let text = "it is not here".to_owned();
                let fault = Fault::DestinationLost { reason, text };
                let error = Error::new(self.source.session.phase(), fault);
                self.tell_source(Event::Forgotten(error.at(ChannelRef::Control)));
            }
            Reached::Refused(_) | Reached::Nothing => self.dial_failed(purpose, channel),
        }
    }

    fn dial_failed(&mut self, purpose: Purpose, channel: usize) {
        self.cut(channel);
        let fault = Fault::Channel(closed());
        if purpose == Purpose::Start {
            // What may pass is tried again until the hello's deadline.
            let back = self.source.back.as_mut();
            if back.is_some_and(|back| back.redial.failed(self.now) == Next::GiveUp) {
                let error = Error::new(Phase::Hello, fault).at(ChannelRef::Control);
                return self.tell_source(Event::Failed(error));
            }
            return self.dial_when_due();
        }
        let error = Error::new(Phase::Suspended, fault).at(ChannelRef::Control);
        self.source.session.hindered(error);
        if let Some(back) = &mut self.source.back
            && back.redial.failed(self.now) != Next::GiveUp
        {
            self.dial_when_due();
        }
    }
}
