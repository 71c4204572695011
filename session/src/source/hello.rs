//! The hellos of the source: what each offers and wants, how the answer is judged, and whether another attempt may end otherwise.
//!
//! ```text
//!   Start   this session, and what it needs and wants     Ask    how the session ended, and its secret
//!   Resume  the session, its secret, what was agreed on   Join   the lane, the ticket, what was agreed on
//! ```
//! Features are negotiated here and nowhere else at the source: a resume and a lane ask for exactly what the first hello came to.

use std::time::Duration;

use multifd_wire::frame::{Grant, GuestState};
use multifd_wire::negotiate::accept;
use multifd_wire::{
    Features, Hello, HelloReply, Incarnation, Incompatible, LaneId, Reason, SessionId, Token,
};

use super::ask::AskTicket;
use super::error::Fault;
use crate::common::Failure as _;

/// What a control channel is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To begin a session.
    Start,
    /// To go on with it.
    Resume,
    /// To ask how it ended.
    Ask,
}

/// One attempt to open a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// What is said on it first.
    pub hello: Hello,
    /// When there must be a connection at the latest.
    pub connect_by: Duration,
    /// When the answer to the hello must be there at the latest.
    pub answer_by: Duration,
}

/// What the hellos of one session say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hellos {
    id: SessionId,
    pass: Token,
    devices: bool,
    guest: GuestState,
    comes_back: bool,
    agreed: Option<Features>,
    ticket: Token,
    secret: Option<Token>,
}

impl Hellos {
    /// `reconnect`: how long this side tries to come back; a resume is wanted if it does at all.
    pub(super) fn new(pass: Token, reconnect: Duration) -> Self {
        Self {
            id: SessionId::new([0; 16]),
            pass,
            devices: false,
            guest: GuestState::Running,
            comes_back: !reconnect.is_zero(),
            agreed: None,
            ticket: Token::NONE,
            secret: None,
        }
    }

    /// There are devices, without whose state the guest cannot be moved.
    pub(super) fn needs_devices(&mut self) {
        self.devices = true;
    }

    /// Whether the guest runs: one that stands still is to stand still at the destination (SPEC: FEAT-7).
    pub(super) fn guest(&mut self, guest: GuestState) {
        self.guest = guest;
    }

    /// The features that this side can't do without.
    fn needs(&self) -> Features {
        let devices = if self.devices {
            Features::DEVICE_STATE
        } else {
            Features::NONE
        };
        match self.guest {
            GuestState::Running => devices,
            GuestState::Paused => devices.union(Features::PAUSED),
        }
    }

    /// The features that it would like.
    fn wants(&self) -> Features {
        let comes_back = if self.comes_back {
            Features::RESUME
        } else {
            Features::NONE
        };
        comes_back.union(Features::PAUSED).without(self.needs())
    }

    /// A session of this name begins; nothing is agreed on.
    pub(super) fn begin(&mut self, id: SessionId) {
        (self.id, self.agreed, self.secret) = (id, None, None);
    }

    /// A control channel was accepted, with these features.
    pub(super) fn accepted(&mut self, agreed: Features) {
        self.agreed = Some(agreed);
    }

    /// Whether both sides have this feature.
    pub(super) fn have(&self, feature: Features) -> bool {
        self.agreed.is_some_and(|agreed| agreed.contains(feature))
    }

    /// Whether both sides can take the session up again.
    pub(super) fn may_resume(&self) -> bool {
        self.have(Features::RESUME)
    }

    /// What later hellos have to show. Gives what is needed to ask for the outcome.
    pub(super) fn granted(&mut self, grant: &Grant) -> AskTicket {
        self.ticket = grant.ticket;
        self.secret = Some(grant.resume_secret);
        AskTicket::new(self.id.value(), grant.resume_secret.value())
    }

    /// The hello of a control channel; none if there is nothing to resume or to ask for.
    pub(super) fn control(&self, purpose: Purpose) -> Option<Hello> {
        Some(match purpose {
            Purpose::Start => {
                Hello::start(self.id, self.needs(), self.wants()).with_pass(self.pass)
            }
            Purpose::Resume => Hello::resume(self.id, self.secret?, self.agreed?),
            Purpose::Ask => Hello::ask(self.id, self.secret?),
        })
    }

    /// The hello of a lane.
    pub(super) fn lane(&self, lane: LaneId, incarnation: Incarnation) -> Hello {
        let agreed = self.agreed.unwrap_or(Features::NONE);
        Hello::join(self.id, self.ticket, agreed, lane, incarnation)
    }
}

/// Whether the same attempt may end otherwise a moment later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// It may.
    MayPass,
    /// It will not.
    ForGood,
}

/// Why a channel could not be opened, and what that means for the next attempt.
///
/// What may pass: nobody listens yet, the destination is busy, the connection was reset. What is wrong for good: a certificate, a
/// version, a refusal.
#[derive(Debug)]
pub struct NotOpened {
    pub(super) fault: Fault,
    pub(super) lasts: Lasts,
}

/// Codes of channels that ended before an answer came: the destination has no room for strangers now, or its process is about to end.
const PASSING: [&str; 4] = [
    "channel-closed",
    "channel-reset",
    "channel-lost",
    OUT_OF_TIME,
];

/// The code of a channel on which the answer did not come in time.
const OUT_OF_TIME: &str = "channel-deadline";

impl NotOpened {
    /// No connection was made. Whether that may pass only the dialler's own error says.
    #[must_use]
    pub fn unconnected(why: String, lasts: Lasts) -> Self {
        let fault = Fault::Dial(why);
        Self { fault, lasts }
    }

    /// Whoever was connected to at `at` gave no answer to the hello, or none that can be read.
    #[must_use]
    pub fn unanswered(at: String, fault: Fault) -> Self {
        let lasts = match &fault {
            Fault::Channel(error) if PASSING.contains(&error.code()) => Lasts::MayPass,
            _ => Lasts::ForGood,
        };
        let fault = match &fault {
            Fault::Channel(_) | Fault::Malformed(_) if !fault.is_damage() => Fault::NoAnswer {
                at,
                why: Box::new(fault),
            },
            _ => fault,
        };
        Self { fault, lasts }
    }

    /// Something of this side prevents it: a thread that can't be started, a user who does not want it any more.
    #[must_use]
    pub fn prevented(fault: Fault) -> Self {
        let lasts = Lasts::ForGood;
        Self { fault, lasts }
    }

    /// Why.
    #[must_use]
    pub fn fault(&self) -> &Fault {
        &self.fault
    }

    /// Only the time ran out: that says less than what an earlier attempt ended with.
    pub(super) fn is_out_of_time(&self) -> bool {
        self.fault.code() == OUT_OF_TIME
    }

    /// The destination does not have the session any more, or not for us: neither a resume nor a question leads anywhere
    /// (SPEC: RESUME-1, RESUME-3). Gives back what is not that.
    pub(super) fn into_forgotten(self) -> Result<Fault, Self> {
        match self.fault {
            Fault::Refused {
                reason: reason @ (Reason::WrongSession | Reason::BadTicket | Reason::Feature),
                text,
            } => Ok(Fault::DestinationLost { reason, text }),
            fault => Err(Self { fault, ..self }),
        }
    }
}

impl From<Incompatible> for NotOpened {
    fn from(error: Incompatible) -> Self {
        let (fault, lasts) = match error {
            Incompatible::Refused { reason, text } => {
                let lasts = if reason == Reason::Busy {
                    Lasts::MayPass
                } else {
                    Lasts::ForGood
                };
                let text = text.to_string();
                (Fault::Refused { reason, text }, lasts)
            }
            other => (Fault::Incompatible(other), Lasts::ForGood),
        };
        Self { fault, lasts }
    }
}

/// Judges the answer to a hello: the features that the two sides now have in common.
///
/// # Errors
/// What the destination refused, or agreed to although it was not asked for.
pub fn judge(hello: &Hello, reply: &HelloReply) -> Result<Features, NotOpened> {
    Ok(accept(hello, reply)?.features)
}

#[cfg(test)]
mod tests {
    use multifd_wire::negotiate::{Offer, answer};

    use super::*;
    use crate::common::ChannelFault;

    const SECRET: Token = Token::new([7; 16]);

    fn hellos() -> Hellos {
        let mut hellos = Hellos::new(Token::NONE, Duration::from_secs(1));
        hellos.begin(SessionId::new([1; 16]));
        hellos
    }

    fn grant() -> Grant {
        Grant {
            ticket: Token::new([6; 16]),
            resume_secret: SECRET,
            lanes_max: 4,
            suspend_ms: 1000,
            device_window_bytes: 0,
        }
    }

    #[test]
    fn a_session_wants_to_be_resumed_only_if_this_side_would_come_back_and_needs_what_its_devices_need()
     {
        let hello = hellos().control(Purpose::Start).unwrap();
        assert_eq!(hello.features_mandatory, Features::NONE);
        let wanted = Features::RESUME.union(Features::PAUSED);
        assert_eq!(hello.features_optional, wanted);
        let mut hellos = Hellos::new(Token::NONE, Duration::ZERO);
        hellos.needs_devices();
        let hello = hellos.control(Purpose::Start).unwrap();
        assert_eq!(hello.features_mandatory, Features::DEVICE_STATE);
        assert_eq!(hello.features_optional, Features::PAUSED);
        // SPEC: FEAT-7
        hellos.guest(GuestState::Paused);
        let hello = hellos.control(Purpose::Start).unwrap();
        let needed = Features::DEVICE_STATE.union(Features::PAUSED);
        assert_eq!(hello.features_mandatory, needed);
        assert_eq!(hello.features_optional, Features::NONE);
    }

    #[test]
    fn what_was_agreed_on_is_what_later_hellos_ask_for_and_a_new_session_knows_nothing_of_it() {
        let mut hellos = hellos();
        assert_eq!(hellos.control(Purpose::Resume), None, "nothing is granted");
        assert_eq!(hellos.control(Purpose::Ask), None);
        let hello = hellos.control(Purpose::Start).unwrap();
        let agreed = judge(&hello, &answer(&hello, &Offer::ALL)).unwrap();
        hellos.accepted(agreed);
        assert!(hellos.may_resume());
        assert_eq!(hellos.granted(&grant()).secret(), SECRET.value());
        let resume = hellos.control(Purpose::Resume).unwrap();
        assert_eq!(resume.features_mandatory, agreed);
        let lane = hellos.lane(LaneId::new(2), Incarnation::new(3));
        assert_eq!(lane.features_mandatory, agreed);
        hellos.begin(SessionId::new([2; 16]));
        assert_eq!(hellos.control(Purpose::Resume), None);
        assert!(!hellos.may_resume());
    }

    #[test]
    fn an_answer_that_agrees_to_what_was_not_asked_for_is_wrong_for_good() {
        let hello = hellos().control(Purpose::Start).unwrap();
        let reply = HelloReply::accepted(1, Features::DEVICE_STATE, hello.session);
        let error = judge(&hello, &reply).unwrap_err();
        assert!(matches!(error.fault(), Fault::Incompatible(_)));
        assert_eq!(error.lasts, Lasts::ForGood);
    }

    #[test]
    fn of_refusals_only_busy_may_pass_and_three_say_that_the_session_is_gone() {
        let hello = hellos().control(Purpose::Start).unwrap();
        for code in 1..=32 {
            let Some(reason) = Reason::from_u32(code) else {
                continue;
            };
            let reply = HelloReply::refused(reason, "no", hello.session);
            let error = judge(&hello, &reply).unwrap_err();
            assert_eq!(error.lasts == Lasts::MayPass, reason == Reason::Busy);
            let gone = [Reason::WrongSession, Reason::BadTicket, Reason::Feature];
            assert_eq!(
                error.into_forgotten().is_ok(),
                gone.contains(&reason),
                "{reason}"
            );
        }
    }

    #[test]
    fn a_connection_that_ends_without_a_word_may_pass_and_one_that_says_something_else_does_not() {
        let ended = |code| {
            let fault = Fault::Channel(ChannelFault::new(code, false, "ended"));
            NotOpened::unanswered("tcp:a:1".into(), fault)
        };
        for code in PASSING {
            assert_eq!(ended(code).lasts, Lasts::MayPass);
            assert_eq!(ended(code).is_out_of_time(), code == OUT_OF_TIME);
        }
        let stranger = ended(ChannelFault::STRANGER);
        assert_eq!(stranger.lasts, Lasts::ForGood);
        assert!(stranger.fault().to_string().contains("tcp:a:1"));
    }
}
