//! What the source's session is told, and what it wants done.

use std::time::Duration;

use multifd_wire::frame::{DeviceLoaded, Grant, LaneMark, OutcomeState, RawRun, SwitchoverAck};
use multifd_wire::{
    ChannelRef, Features, Frame, Incarnation, LaneId, Phase, Reason, Round, Sequence, SessionId,
};

use super::ask::AskTicket;
use super::error::{Error, Fault};
use super::forecast::Outlook;
use super::hello::{Attempt, NotOpened, Purpose};
use super::lanes::Seen;
use super::session::{Counted, Reclaimed};
use super::speed::LaneCount;
use super::steer::Steer;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A random name for a session: for the first one, and in answer to [`Effect::StartAfresh`].
    Named(SessionId),
    /// Answer to [`Effect::DialControl`]: a control channel is open and was accepted, with these features.
    Connected {
        /// What both sides use.
        agreed: Features,
        /// From the hello to its reply: a round trip, or longer than one.
        round_trip: Duration,
    },
    /// Answer to [`Effect::DialControl`]: it came to nothing.
    NotConnected {
        /// Which attempt.
        number: u32,
        /// Why.
        why: NotOpened,
    },
    /// Answer to [`Effect::DialLane`]: it came to nothing.
    LaneNotOpened {
        /// Which.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// Why.
        why: NotOpened,
    },
    /// A lane's connection is open, and its hello was accepted.
    LaneUp {
        /// Which.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
    },
    /// A lane has encoded the whole of this round.
    LaneEncoded {
        /// Which.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// Which round.
        round: Round,
    },
    /// A lane's thread has ended.
    LaneEnded {
        /// Which.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// Why, if it did not end in peace.
        fault: Option<Fault>,
    },
    /// Answer to [`Effect::LookAtLanes`].
    LanesSeen(Vec<Seen>),
    /// What [`Effect::Acknowledged`] settled, in bytes of heads and bodies.
    Acked {
        /// How many.
        bytes: u64,
    },
    /// Answer to [`Effect::Begin`].
    Begun,
    /// The destination granted the session; lanes may be dialled.
    Granted,
    /// The destination's machine, memory and lanes are ready, and tracking is on at the source.
    Ready,
    /// Answer to [`Effect::RoundEncoded`].
    Encoded {
        /// Octets that were handed to channels in this round.
        octets: u64,
        /// Octets that were handed to channels and are not acknowledged yet.
        unacked_octets: u64,
    },
    /// How far the round is and what each lane has acknowledged. Nothing follows from it at once.
    Counted {
        /// The round.
        round: Counted,
        /// The lanes that live.
        lanes: Vec<LaneCount>,
    },
    /// The sources were collected into the dirty set, which now has this many pages.
    Collected {
        /// Pages in the dirty set.
        pages: u64,
    },
    /// The VMM paused the guest.
    Paused,
    /// What is known of the devices, before a decision.
    Devices(DeviceOutlook),
    /// Instead of [`Event::Paused`]: a device announced new initial bytes meanwhile. Nothing was paused.
    AcksMissing,
    /// Every device is P2P-quiescent.
    DevicesQuiesced,
    /// Every device stands still.
    DevicesStopped,
    /// Every device was read to its end.
    DevicesSaved,
    /// The VM state was saved and sent.
    Saved,
    /// FINAL was sent with this digest.
    FinalSent {
        /// The digest over all pages as last sent.
        digest: u64,
    },
    /// The destination closed a round.
    Closed {
        /// Which.
        round: Round,
        /// Pages that were damaged on the way and are still missing there.
        damaged: u64,
    },
    /// Answer to [`Effect::SettleLane`]: what the lane had not been acknowledged for is back.
    LaneLost {
        /// Pages that are dirty now.
        pages: u64,
        /// Items of devices that have to be sent again.
        items: u64,
    },
    /// Instead of sending COMMIT: the channel was gone before it took anything of it.
    CommitUnsent(Error),
    /// The destination verified and loaded everything.
    Prepared {
        /// The digest over all pages as landed.
        digest: u64,
    },
    /// The guest runs at the destination.
    Running,
    /// The channels are lost: the link failed, or nothing was heard for too long. What was said on them is worth nothing now.
    Lost(Error),
    /// A lane is open again and the destination said what landed; the rest is back in the dirty set.
    Landed {
        /// Rounds that it has closed.
        rounds_closed: u32,
    },
    /// Answer to [`Effect::DialControl`] with a question: how the destination says that it ended.
    Answered(OutcomeState),
    /// Round trip of a keep-alive.
    RoundTrip(Duration),
    /// The user wants it to stop.
    Cancel,
    /// Nobody would notice a pause now: the switchover is wanted when the round under way is over, whatever the forecast says.
    SwitchOverNow,
    /// Instead of doing what [`Effect::Throttle`] asked for: the VMM can't. It is as it was.
    NotThrottled,
    /// A limit is another one from now on. One that is out of its range changes nothing: whoever asked was told.
    Steer(Steer),
    /// The guest has shut down or crashed.
    GuestGone,
    /// Something failed: a channel, the VMM, the tracking, the peer said no.
    Failed(Error),
    /// Only the time has gone on.
    Tick,
}

/// What the driver must do.
#[derive(Debug)]
pub enum Effect {
    /// Send this on the control channel, if there is one.
    Send(Frame<'static>),
    /// Make a control channel; answer with [`Event::Connected`], [`Event::Answered`] or [`Event::NotConnected`].
    DialControl {
        /// Counts the attempts: only what comes of the newest is waited for.
        number: u32,
        /// What it is for.
        purpose: Purpose,
        /// The hello, and how long it may take.
        attempt: Attempt,
    },
    /// GRANT came.
    Granted {
        /// What was granted.
        grant: Grant,
        /// Of a session that was not resumed: whoever may want to ask for the outcome is told how, now.
        ticket: Option<AskTicket>,
    },
    /// Send the configuration, the tables and SETUP_END, which names so many lanes.
    SendSetup {
        /// How many.
        lanes: u32,
    },
    /// Make a connection for a lane; answer with [`Event::LaneUp`] or [`Event::LaneNotOpened`].
    DialLane {
        /// Which.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// The hello, and how long it may take.
        attempt: Attempt,
    },
    /// A lane that was lost is open again: it ends the rounds behind the present one, empty, and enters that, if there is one.
    LaneBack {
        /// Which.
        lane: LaneId,
        /// The rounds to end first, and whether the guest was paused in them (SPEC: ROUND-6).
        behind: Vec<(Round, bool)>,
        /// It was lost by itself and not with all the others.
        by_itself: bool,
    },
    /// Close a lane's channel: its thread ends, and says so.
    CloseLane {
        /// Which.
        lane: LaneId,
    },
    /// A lane is lost: close its channel, and take note.
    LaneGone {
        /// Which.
        lane: LaneId,
        /// Why, for the log.
        why: String,
    },
    /// Wait until the lane's thread has ended, and give back everything of its ledger; answer with [`Event::LaneLost`].
    SettleLane {
        /// Which.
        lane: LaneId,
    },
    /// Settle the ledgers of the connections before a resume: so many frames of each were handled, everything else comes back.
    SettleBefore {
        /// Each lane, and its frames.
        lanes: Vec<(LaneId, u64)>,
    },
    /// Say what the living lanes' ledgers hold: answer with [`Event::LanesSeen`].
    LookAtLanes,
    /// Frames of lanes were handled: settle their ledgers, and answer with [`Event::Acked`].
    Acknowledged(Vec<LaneMark>),
    /// Pages did not match their checksums at the destination: back into the dirty set with them.
    GiveBack {
        /// The lane that carried them.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// The frame that carried them.
        sequence: Sequence,
        /// The pages.
        runs: Vec<RawRun>,
    },
    /// A device's initial bytes are loaded; answer with [`Event::Devices`].
    DeviceAcked(SwitchoverAck),
    /// A device is loaded.
    DeviceLoaded(DeviceLoaded),
    /// A session that was lost goes on.
    Resumed {
        /// Rounds that the destination has closed.
        rounds_closed: u32,
    },
    /// Everything is ready for the first time: start the sources of dirty pages and the devices; answer with [`Event::Begun`].
    Begin {
        /// How long the destination took to get ready, in microseconds.
        prepare_us: u64,
    },
    /// Every living lane has encoded the whole of the present round: answer with [`Event::Encoded`].
    RoundEncoded,
    /// Begin a round with what the dirty set holds.
    OpenRound {
        /// Its number.
        round: Round,
        /// The guest is paused: this may be the last.
        last: bool,
    },
    /// Collect from all sources. `last`: the guest is paused.
    Collect {
        /// Whether the guest is paused.
        last: bool,
    },
    /// Tell progress readers.
    Forecast(Outlook),
    /// Hold so much of the guest's time back from now on; answer with [`Event::NotThrottled`] if that can't be done.
    Throttle {
        /// In percent; 0 releases it.
        percent: u8,
    },
    /// A limit was changed: tell progress readers and the report. What is in force is [`Session::limits`](super::Session::limits).
    Steered(Steer),
    /// Pause the guest.
    Pause,
    /// Nothing but acknowledgements of devices is missing: tell the user, and answer with [`Event::Devices`] when that changes.
    AwaitDevices,
    /// Lead every device to where none disturbs another; answer with [`Event::DevicesQuiesced`].
    Quiesce,
    /// Stop every device, now that all are quiescent; answer with [`Event::DevicesStopped`], and when it was read to its end with
    /// [`Event::DevicesSaved`].
    StopDevices,
    /// Save the VM state and send it.
    Save,
    /// Send FINAL for this round.
    SendFinal {
        /// Which.
        round: Round,
    },
    /// Send COMMIT. The guest belongs to the destination from before the first octet of it.
    Commit,
    /// Close every channel; what their lanes carried is kept in their ledgers.
    Disconnect,
    /// The destination has nothing any more: all of memory is to be sent, and the digest is that of nothing (SPEC: DIGEST-5). Answer with
    /// [`Event::Named`].
    StartAfresh,
    /// Tell the peer why it ends.
    Abort {
        /// The code.
        reason: Reason,
        /// The phase in which it ended.
        phase: Phase,
        /// The channel that it is about.
        channel: ChannelRef,
        /// The text.
        text: String,
    },
    /// The guest belongs to the source: give all pages back, and run it again if it was paused.
    Reclaim {
        /// Whether the VMM has to be told to resume.
        paused: bool,
        /// The proof that it may.
        proof: Reclaimed,
    },
    /// The guest runs at the destination, which may have to be told yet that this is known.
    Migrated,
    /// It is over.
    Finish(Outcome),
}

/// What the devices would add to the downtime, and whether they allow it to begin.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceOutlook {
    /// Octets that would still have to be sent if they were stopped now: that wait for a lane, and that they would give.
    pub stop_bytes: u64,
    /// How long the slowest of them would take to be read, going by how fast it was read so far; zero where nothing was.
    pub read: Duration,
    /// How long the slowest of them would take to load its share, going by how long what it loaded so far took.
    pub load: Duration,
    /// Names of those that want their initial bytes loaded before the guest is paused, and have not been told yet that they are.
    pub unacked: Vec<String>,
}

/// How a migration ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest runs at the destination.
    Migrated,
    /// The guest runs at the source.
    Failed(Error),
    /// The user stopped it; the guest runs at the source.
    Cancelled(Error),
    /// The guest is the destination's, where it could not be run: it is loaded there and paused; so it stays here.
    Stranded(Error),
    /// The commit was sent, but whether the guest runs at the destination is not known; the source stays paused.
    Unknown(Error),
    /// The guest shut down or crashed at the source meanwhile: it runs nowhere.
    Gone(Error),
}

impl Outcome {
    /// Why it ended otherwise than it should.
    #[must_use]
    pub fn into_error(self) -> Option<Error> {
        match self {
            Self::Migrated => None,
            Self::Failed(error)
            | Self::Cancelled(error)
            | Self::Stranded(error)
            | Self::Unknown(error)
            | Self::Gone(error) => Some(error),
        }
    }
}

impl Outcome {
    /// The same, to be looked at.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        match self {
            Self::Migrated => None,
            Self::Failed(error)
            | Self::Cancelled(error)
            | Self::Stranded(error)
            | Self::Unknown(error)
            | Self::Gone(error) => Some(error),
        }
    }
}
