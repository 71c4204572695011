//! What goes into the destination's session beside frames, and what comes out of it.

use std::time::Duration;

use multifd_wire::frame::{Credit, Device, DeviceLoaded, LaneMark, OutcomeState, SwitchoverAck};
use multifd_wire::{
    DeviceId, Digest, Incarnation, LaneId, Layout, Misbehaved, PAGE_BYTES_U64, PageRun, Reason,
    Round, Sequence, Token,
};

use super::commit::Ownership;
use super::error::{Error, Fault};
use super::lane::Begins;
use crate::common::{Blob, Encoded};

/// A device of whose stream items are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incomplete {
    /// Its number.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// The lowest index that is missing.
    pub index: u64,
}

impl From<Incomplete> for Fault {
    fn from(incomplete: Incomplete) -> Self {
        Self::DeviceMisbehaved {
            device: incomplete.name,
            source: Misbehaved::DeviceStream {
                device: incomplete.device.value(),
                index: incomplete.index,
                rule: "DEVSTREAM-7, it did not come before the end of the last round",
            },
        }
    }
}

/// What was counted on the data channels so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that landed with content.
    pub pages: u64,
    /// Zero pages that landed.
    pub zero_pages: u64,
    /// Frames that were handled.
    pub frames: u64,
    /// Processor time that was used.
    pub cpu: Duration,
}

impl Counts {
    /// Bytes of all pages that landed.
    #[must_use]
    pub fn landed_bytes(&self) -> u64 {
        self.pages
            .saturating_add(self.zero_pages)
            .saturating_mul(PAGE_BYTES_U64)
    }
}

/// The random numbers of one control channel.
#[derive(Debug, Clone, Copy)]
pub struct Secrets {
    /// What data channels have to show.
    pub ticket: Token,
    /// What a source that comes back, or asks, has to show.
    pub resume: Token,
}

/// What is in memory when every living lane has reached the end of a round.
#[derive(Debug)]
pub struct Closed {
    /// How far each lane's frames were handled.
    pub handled: Vec<LaneMark>,
    /// The digest over all pages as landed.
    pub digest: Digest,
    /// Pages that are damaged.
    pub damaged: u64,
    /// A device of whose stream items are missing.
    pub incomplete: Option<Incomplete>,
    /// How often each device's stream began anew, in the order of the table, going by what came.
    pub restarts: Vec<u32>,
    /// What was counted.
    pub counts: Counts,
}

/// What happened, beside the frames of the control channel.
#[derive(Debug)]
pub enum Event {
    /// The control channel of a new session is open.
    Opened(Secrets),
    /// The VMM built the machine, and its memory is what the source described.
    MachineReady,
    /// A data channel said hello and showed this ticket. It waits for [`Effect::Admit`] or [`Effect::TurnAway`].
    LaneJoined {
        /// Which lane.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// What it showed.
        ticket: Token,
    },
    /// A lane was let in, but could not be told: the source does not know, and nothing came on it.
    LaneUnheard {
        /// Which lane.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
    },
    /// A lane reached the end of a round.
    LaneArrived {
        /// Which lane.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// Of which round.
        round: Round,
        /// The mark said that the guest is paused in this round.
        last: bool,
    },
    /// A lane's channel has ended; nothing of it will land any more.
    LaneEnded {
        /// How far its frames were handled.
        mark: LaneMark,
        /// Why it ended.
        fault: Fault,
    },
    /// Pages of one frame failed their checksums.
    Damaged {
        /// Which lane.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// The frame.
        sequence: Sequence,
        /// The pages.
        runs: Vec<PageRun>,
    },
    /// So far the lanes' frames were handled. Every [`Event::Damaged`] of these frames was passed on before (SPEC: BACK-2).
    Handled(Vec<LaneMark>),
    /// Answer to [`Effect::SettleLanes`]: no lane of the old channels can land anything any more.
    LanesSettled {
        /// How far each lane's frames were handled.
        marks: Vec<LaneMark>,
        /// The pages that are damaged.
        damaged: Vec<PageRun>,
    },
    /// Answer to [`Effect::CloseRound`].
    Closed(Closed),
    /// The VMM loaded the VM state of one [`Effect::Load`], or could not.
    Loaded(Result<(), Fault>),
    /// A device's loader got on.
    Device(DeviceEvent),
    /// The VMM runs the guest.
    Resumed(Counts),
    /// The control channel failed, or what came on it can't be read.
    ControlLost(Fault),
    /// The source opened a new control channel for this session, and showed its secret.
    Resuming(Secrets),
    /// The source asks how the session ended, and showed its secret.
    Asked,
    /// The answer was taken.
    Answered(OutcomeState),
    /// The user wants it to stop.
    Cancel,
    /// The VMM, or a device, could not run the guest.
    NotResumed(Fault),
    /// Something of this side failed: the VMM, a device, a thread.
    Failed(Fault),
    /// The time has gone on.
    Tick(Counts),
}

/// What happened to a device's stream.
#[derive(Debug)]
pub enum DeviceEvent {
    /// The initial bytes of a generation are loaded.
    InitialLoaded(SwitchoverAck),
    /// The source may send more.
    Credit(Credit),
    /// Everything of it is here, and not all is loaded.
    Arrived,
    /// It has loaded everything and stands still.
    Loaded {
        /// What the source is told.
        loaded: DeviceLoaded,
        /// How often its stream had begun anew before.
        restarts: u32,
    },
    /// What it had loaded is void.
    Restarted(DeviceId),
}

/// What the driver must do, in this order.
#[derive(Debug)]
pub enum Effect {
    /// Send this on the control channel. After an ABORT nothing more comes.
    Send(Encoded),
    /// Let the VMM build the machine. Once in a session.
    Prepare {
        /// The configuration.
        configs: Vec<Blob>,
        /// Its memory.
        layout: Layout,
        /// Its devices whose state travels.
        devices: Vec<Device>,
    },
    /// Let this data channel in, and watch it. Without `begins` it waits for [`Effect::StartLanes`].
    Admit {
        /// Which lane.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// Where it begins to read.
        begins: Option<Begins>,
    },
    /// Close a data channel that asks to be let in, and say why if it was not accepted yet.
    TurnAway {
        /// Which lane.
        lane: LaneId,
        /// Which connection of it.
        incarnation: Incarnation,
        /// The code.
        reason: Reason,
        /// The text.
        text: &'static str,
    },
    /// Close a lane's channel; what it has read whole still lands. Answered by [`Event::LaneEnded`].
    CloseLane(LaneId),
    /// Let the devices load, and the lanes that wait read, beginning with this round.
    StartLanes(Round),
    /// Count how far the lanes' frames were handled, pass on what is known by then, and answer with [`Event::Handled`].
    CountHandled,
    /// Every living lane is at the end of this round: answer with [`Event::Closed`].
    CloseRound(Round),
    /// Let the lanes go on into this round.
    OpenGate(Round),
    /// Memory is complete: let the VMM load the VM state, and devices what had to wait for it.
    Load {
        /// The VM state.
        states: Vec<Blob>,
    },
    /// Let the VMM run the guest, or take it over paused: the proof says which.
    Resume(Ownership),
    /// Close every channel; memory and what is known of it stay.
    Suspend,
    /// Wait until no lane of the old channels can land anything; answer with [`Event::LanesSettled`].
    SettleLanes,
    /// Accept the source that came back: its channel is the control channel now.
    AcceptResume,
    /// Turn the source that came back away.
    RefuseResume {
        /// The code.
        reason: Reason,
        /// The text.
        text: &'static str,
    },
    /// Answer the question.
    Answer(OutcomeState),
    /// Take the machine down: the guest is the source's.
    Discard,
    /// It is over.
    Finish(Outcome),
}

/// How it ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest runs here.
    Running,
    /// The guest is the source's.
    Failed(Error),
    /// The source gave the guest away, and it could not be run here: it is loaded and paused.
    Stranded(Error),
}
