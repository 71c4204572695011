//! The states of a migrating device, and every legal arc between them, in one table for both sides.
//!
//! ```text
//!   source:       Running ──► PreCopy ──► PreCopyP2p ──► StopCopy ──► Stop
//!                    │ ▲         │            │ ▲            ▲          │ ▲
//!                    ▼ │         ▼            ▼ │            │          ▼ │
//!                 RunningP2p ◄──────── (back) ──┘            └────────  Stop ◄── Resuming    :destination
//! ```
//! A state never travels; it is here because both sides must mean the same by it, and this crate is the one that both know.
//! The states and arcs are those of the VFIO migration interface, version 2 (`linux/vfio.h`, `enum vfio_device_mig_state`),
//! and nothing else of VFIO is. What this file must never have is an arc that starts a device without the P2P-quiescent
//! state in between when the device has one.

use core::fmt;

use crate::frame::DeviceFlags;

/// What a device is doing. Source: `linux/vfio.h`, `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceState {
    /// Works; it may interrupt, and read and write guest memory and other devices.
    Running,
    /// Works, and its state can be read meanwhile.
    PreCopy,
    /// Works, but begins no transfer to or from another device: peer-to-peer quiescent.
    RunningP2p,
    /// Peer-to-peer quiescent, and its state can be read meanwhile.
    PreCopyP2p,
    /// Stands still, and the rest of its state can be read, to its end.
    StopCopy,
    /// Stands still, and takes in a state.
    Resuming,
    /// Stands still.
    Stop,
    /// Broken; only a reset, which loses its state, makes it run again.
    Error,
}

impl DeviceState {
    /// All states, in the order in which tables are printed.
    pub const ALL: [Self; 8] = [
        Self::Running,
        Self::PreCopy,
        Self::RunningP2p,
        Self::PreCopyP2p,
        Self::StopCopy,
        Self::Resuming,
        Self::Stop,
        Self::Error,
    ];

    /// Its name in logs, reports and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::PreCopy => "pre-copy",
            Self::RunningP2p => "running-p2p",
            Self::PreCopyP2p => "pre-copy-p2p",
            Self::StopCopy => "stop-copy",
            Self::Resuming => "resuming",
            Self::Stop => "stop",
            Self::Error => "error",
        }
    }

    /// Whether the device may change its own state or guest memory in this state.
    #[must_use]
    pub const fn is_running(self) -> bool {
        matches!(
            self,
            Self::Running | Self::PreCopy | Self::RunningP2p | Self::PreCopyP2p
        )
    }

    /// Whether the device begins no transfer to or from another device in this state.
    #[must_use]
    pub const fn is_quiescent(self) -> bool {
        !matches!(self, Self::Running | Self::PreCopy)
    }

    /// Whether a device with these abilities may be asked to go from here to `to` in one step.
    ///
    /// Of `flags` only [`DeviceFlags::PRE_COPY`] and [`DeviceFlags::P2P`] matter.
    #[must_use]
    pub fn may_become(self, to: Self, flags: DeviceFlags) -> bool {
        ARCS.iter()
            .any(|arc| arc.from == self && arc.to == to && arc.needs.met_by(flags))
    }

    /// The first step of a shortest way from here to `to`; `None` when there is none, or when it is here already.
    #[must_use]
    pub fn step_to(self, to: Self, flags: DeviceFlags) -> Option<Self> {
        if self == to {
            return None;
        }
        (0..STEPS_MAX).find_map(|left| {
            ARCS.iter()
                .filter(|arc| arc.from == self && arc.needs.met_by(flags))
                .map(|arc| arc.to)
                .find(|next| next.reaches(to, flags, left))
        })
    }

    /// Whether `to` can be reached in at most so many steps.
    fn reaches(self, to: Self, flags: DeviceFlags, steps: u8) -> bool {
        self == to
            || steps.checked_sub(1).is_some_and(|left| {
                ARCS.iter().any(|arc| {
                    arc.from == self && arc.needs.met_by(flags) && arc.to.reaches(to, flags, left)
                })
            })
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The longest of the shortest ways: pre-copy to resuming.
const STEPS_MAX: u8 = 5;

/// What a device must have for an arc to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Every device has it.
    Nothing,
    /// The peer-to-peer quiescent state.
    P2p,
    /// To be without that state.
    NoP2p,
    /// Pre-copy.
    PreCopy,
    /// Pre-copy and the quiescent state.
    PreCopyAndP2p,
    /// Pre-copy, and to be without the quiescent state.
    PreCopyNoP2p,
}

impl Needs {
    /// Whether a device with these abilities has the arc.
    #[must_use]
    pub const fn met_by(self, flags: DeviceFlags) -> bool {
        let (pre_copy, p2p) = (
            flags.contains(DeviceFlags::PRE_COPY),
            flags.contains(DeviceFlags::P2P),
        );
        match self {
            Self::Nothing => true,
            Self::P2p => p2p,
            Self::NoP2p => !p2p,
            Self::PreCopy => pre_copy,
            Self::PreCopyAndP2p => pre_copy && p2p,
            Self::PreCopyNoP2p => pre_copy && !p2p,
        }
    }
}

/// One legal step.
#[derive(Clone, Copy, Debug)]
pub struct Arc {
    /// From this state.
    pub from: DeviceState,
    /// To this one.
    pub to: DeviceState,
    /// For which devices.
    pub needs: Needs,
}

/// Every step that a device may be asked for. Any step may fail and leave the device in [`DeviceState::Error`]; a reset leads
/// from there to [`DeviceState::Running`], and is no arc, since it loses the state.
pub const ARCS: &[Arc] = {
    use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    const fn arc(from: DeviceState, to: DeviceState, needs: Needs) -> Arc {
        Arc { from, to, needs }
    }
    &[
        arc(Running, PreCopy, Needs::PreCopy),
        arc(Running, RunningP2p, Needs::P2p),
        arc(Running, Stop, Needs::NoP2p),
        arc(PreCopy, PreCopyP2p, Needs::PreCopyAndP2p),
        arc(PreCopy, Running, Needs::PreCopy),
        arc(PreCopy, StopCopy, Needs::PreCopyNoP2p),
        arc(RunningP2p, PreCopyP2p, Needs::PreCopyAndP2p),
        arc(RunningP2p, Running, Needs::P2p),
        arc(RunningP2p, Stop, Needs::P2p),
        arc(PreCopyP2p, RunningP2p, Needs::PreCopyAndP2p),
        arc(PreCopyP2p, PreCopy, Needs::PreCopyAndP2p),
        arc(PreCopyP2p, StopCopy, Needs::PreCopyAndP2p),
        arc(StopCopy, Stop, Needs::Nothing),
        arc(Resuming, Stop, Needs::Nothing),
        arc(Stop, RunningP2p, Needs::P2p),
        arc(Stop, Running, Needs::NoP2p),
        arc(Stop, StopCopy, Needs::Nothing),
        arc(Stop, Resuming, Needs::Nothing),
    ]
};
