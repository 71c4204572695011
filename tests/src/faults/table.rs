//! The table of real faults: what happens × when × over which channels, and how that has to end.
//!
//! The rule it keeps: an ending is allowed here because a rule of SPEC.md or a decision says so, and for no other reason.

use std::fmt;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// All links down for less than a stall.
    ShortCut,
    /// All links down for longer than a stall, and up again.
    LongCut,
    /// All links down for longer than both sides wait.
    LastingCut,
    /// One of two links down until the end.
    PathCut,
    /// The same, and all connections are reset: what comes back has fewer lanes.
    PathGone,
    /// All links carry little from then on.
    SlowLink,
    /// The addresses of one side are gone for longer than a stall.
    AddressGone,
    /// All connections are reset.
    Reset,
    /// What one side sends vanishes for longer than a stall.
    Blackhole,
    /// What one side sends vanishes until the end, and what the other sends goes on arriving.
    OneWay,
    /// The same on one of two links, which carries lanes only.
    OneWayPath,
    /// Large packets to the destination vanish until the end, and small ones arrive: a path whose MTU is smaller than the hosts believe.
    LargeLost,
    /// The same on one of two links, which carries lanes only.
    LargeLostPath,
    /// Loopback: a connection is cut, stalled, throttled, damaged or ended at some byte.
    Proxied,
    /// `kill -9` of the destination.
    KillDestination,
    /// `kill -9` of the source, and its guest with it.
    KillSource,
    /// The destination stands still for longer than a stall.
    StopDestination,
    /// The source stands still for longer than a stall.
    StopSource,
    /// `kill -9` of the destination, and a new one at its address.
    ReplaceDestination,
    /// The same, and the source was told to begin again then.
    RestartDestination,
    /// All links down; when that was noticed, `kill -9` of the destination; links up.
    CutKillDestination,
    /// All links down; when that was noticed, `kill -9` of the source; links up.
    CutKillSource,
    /// Links down and up; `kill -9` of the destination when the source is back.
    BackKillDestination,
    /// Links down and up; `kill -9` of the source when it is back.
    BackKillSource,
    /// The source may open few descriptors, from the beginning.
    FewDescriptorsSource,
    /// The destination may.
    FewDescriptorsDestination,
    /// Connections are reset while the source may open no descriptor; then it may again.
    NoDescriptorsSource,
    /// Connections are reset while the destination may not.
    NoDescriptorsDestination,
    /// The destination may have little memory.
    LittleMemory,
    /// The disk under the source's log and report gets full.
    DiskFullSource,
    /// The disk under the destination's.
    DiskFullDestination,
}

/// Each of them.
pub const FAULTS: [Fault; 31] = [
    Fault::ShortCut,
    Fault::LongCut,
    Fault::LastingCut,
    Fault::PathCut,
    Fault::PathGone,
    Fault::SlowLink,
    Fault::AddressGone,
    Fault::Reset,
    Fault::Blackhole,
    Fault::OneWay,
    Fault::OneWayPath,
    Fault::LargeLost,
    Fault::LargeLostPath,
    Fault::Proxied,
    Fault::KillDestination,
    Fault::KillSource,
    Fault::StopDestination,
    Fault::StopSource,
    Fault::ReplaceDestination,
    Fault::RestartDestination,
    Fault::CutKillDestination,
    Fault::CutKillSource,
    Fault::BackKillDestination,
    Fault::BackKillSource,
    Fault::FewDescriptorsSource,
    Fault::FewDescriptorsDestination,
    Fault::NoDescriptorsSource,
    Fault::NoDescriptorsDestination,
    Fault::LittleMemory,
    Fault::DiskFullSource,
    Fault::DiskFullDestination,
];

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// The destination has the configuration and builds the machine.
    SetUp,
    /// Round 0 is under way.
    FirstRound,
    /// A later one is.
    LaterRounds,
    /// The guest stands still at the source; the destination has all of memory, or nearly, and has not said `prepared`.
    Switchover,
    /// The guest stands still, and devices' state is on its way.
    Devices,
    /// The destination has the commit, and the guest does not run there yet.
    Commit,
    /// The guest runs at the destination, and the source does not know it.
    AfterCommit,
}

/// Each of them, in the order of a migration's life.
pub const MOMENTS: [Moment; 7] = [
    Moment::SetUp,
    Moment::FirstRound,
    Moment::LaterRounds,
    Moment::Switchover,
    Moment::Devices,
    Moment::Commit,
    Moment::AfterCommit,
];

impl Moment {
    /// Whether the guest is the destination's.
    #[must_use]
    pub fn is_committed(self) -> bool {
        matches!(self, Self::Commit | Self::AfterCommit)
    }
}

/// Which channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// TCP.
    Tcp,
    /// TLS.
    Tls,
    /// Unix sockets.
    Unix,
}

/// Each of them.
pub const KINDS: [Kind; 3] = [Kind::Tcp, Kind::Tls, Kind::Unix];

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// The guest runs at the destination, and nothing was lost on the way.
    Migrated,
    /// The guest runs at the destination; channels were lost and came back, or the destination was asked.
    Resumed,
    /// The guest runs on at the source, with a reason.
    Stays,
    /// The source was never begun: it has no guest.
    NotBegun,
    /// The commit was sent, and nobody can say what came of it: the guest stays paused at the source.
    Unknown,
    /// The source is gone, and its guest was not the destination's yet.
    GoneWithSource,
    /// The source is gone, and the guest runs at the destination.
    SurvivesSource,
}

impl Fault {
    /// Whether it needs links of its own.
    #[must_use]
    pub fn needs_namespaces(self) -> bool {
        use Fault::*;
        matches!(
            self,
            ShortCut
                | LongCut
                | LastingCut
                | PathCut
                | PathGone
                | SlowLink
                | AddressGone
                | Reset
                | Blackhole
                | OneWay
                | OneWayPath
                | LargeLost
                | LargeLostPath
                | CutKillDestination
                | CutKillSource
                | BackKillDestination
                | BackKillSource
                | NoDescriptorsSource
                | NoDescriptorsDestination
        )
    }

    /// Whether it needs to be root: a full disk is a small file system of its own.
    #[must_use]
    pub fn needs_root(self) -> bool {
        self.needs_namespaces() || matches!(self, Self::DiskFullSource | Self::DiskFullDestination)
    }

    /// Whether it is there from the beginning, so that there is only one moment for it.
    #[must_use]
    pub fn is_from_the_beginning(self) -> bool {
        use Fault::*;
        matches!(
            self,
            Proxied
                | FewDescriptorsSource
                | FewDescriptorsDestination
                | LittleMemory
                | DiskFullSource
                | DiskFullDestination
        )
    }

    /// How it may end; nothing if this fault can't happen then.
    #[must_use]
    pub fn endings(self, moment: Moment) -> &'static [Ending] {
        use Ending::*;
        use Fault::*;
        if self.is_from_the_beginning() {
            return match self {
                _ if moment != Moment::SetUp => &[],
                // Whatever happens to which byte.
                Proxied => &[Migrated, Resumed, Stays, Unknown],
                DiskFullSource | DiskFullDestination => &[Migrated, Resumed],
                // With too few nothing begins; with nearly enough the migration fails; with enough it does not.
                _ => &[Migrated, Resumed, Stays, NotBegun],
            };
        }
        let committed = moment.is_committed();
        match self {
            // Nobody has to notice.
            ShortCut | SlowLink => &[Migrated, Resumed],
            LastingCut if committed => &[Unknown],
            LastingCut => &[Stays],
            // The control channel lives. What the lanes carried goes over the others.
            PathCut if moment == Moment::SetUp => &[Migrated, Resumed, Stays],
            PathCut => &[Migrated, Resumed],
            // As a path that is cut: the control channel is not on it.
            OneWayPath | LargeLostPath if moment == Moment::SetUp => &[Migrated, Resumed, Stays],
            OneWayPath | LargeLostPath => &[Migrated, Resumed],
            // RUNNING arrives, or it does not.
            OneWay if committed => &[Migrated, Resumed, Unknown],
            // PREPARED arrives, and the commit that answers it does not (COMMIT-5).
            OneWay if matches!(moment, Moment::Switchover | Moment::Devices) => &[Stays, Unknown],
            OneWay => &[Stays],
            // Everything that is still to be said is small.
            LargeLost if committed => &[Migrated, Resumed],
            LargeLost if matches!(moment, Moment::Switchover | Moment::Devices) => {
                &[Migrated, Resumed, Stays]
            }
            LargeLost => &[Stays],
            // RESUME-1 ff.: whatever is lost comes back; before there is a session to come back to, the migration ends.
            LongCut
            | PathGone
            | AddressGone
            | Reset
            | Blackhole
            | StopDestination
            | StopSource
            | NoDescriptorsSource
            | NoDescriptorsDestination => match moment {
                Moment::SetUp => &[Migrated, Resumed, Stays],
                // A commit that is on its way into a channel that is dead already is asked for, and was not heard (ASK-3).
                Moment::Switchover | Moment::Devices => &[Migrated, Resumed, Stays],
                _ => &[Migrated, Resumed],
            },
            KillDestination | ReplaceDestination if committed => &[Unknown],
            // It may just have been told.
            KillDestination | ReplaceDestination => &[Stays],
            RestartDestination if committed => &[Unknown],
            RestartDestination => match moment {
                Moment::SetUp => &[Stays, Resumed, Migrated],
                _ => &[Resumed, Migrated],
            },
            KillSource if committed => &[SurvivesSource],
            KillSource => &[GoneWithSource],
            CutKillDestination | BackKillDestination | CutKillSource | BackKillSource => {
                // A loss has to be noticed, and there has to be a session to come back to.
                if !matches!(moment, Moment::FirstRound | Moment::LaterRounds) {
                    return &[];
                }
                match self {
                    CutKillDestination | BackKillDestination => &[Stays],
                    _ => &[GoneWithSource],
                }
            }
            Proxied
            | FewDescriptorsSource
            | FewDescriptorsDestination
            | LittleMemory
            | DiskFullSource
            | DiskFullDestination => &[],
        }
    }
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    /// What happens.
    pub fault: Fault,
    /// When.
    pub moment: Moment,
    /// Over which channels.
    pub kind: Kind,
    /// With a device.
    pub devices: bool,
}

impl Scenario {
    /// How it may end.
    #[must_use]
    pub fn endings(&self) -> &'static [Ending] {
        self.fault.endings(self.moment)
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = if self.devices { "+device" } else { "" };
        let (fault, moment, kind) = (self.fault, self.moment, self.kind);
        let words = |text: String| {
            let mut name = String::new();
            for letter in text.chars() {
                if letter.is_uppercase() && !name.is_empty() {
                    name.push('-');
                }
                name.extend(letter.to_lowercase());
            }
            name
        };
        write!(
            f,
            "{}/{}/{}{devices}",
            words(format!("{fault:?}")),
            words(format!("{moment:?}")),
            words(format!("{kind:?}"))
        )
    }
}

/// All rows.
#[must_use]
pub fn table() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for fault in FAULTS {
        for moment in MOMENTS {
            for kind in KINDS {
                for devices in [false, true] {
                    let row = Scenario {
                        fault,
                        moment,
                        kind,
                        devices,
                    };
                    let has_links = kind != Kind::Unix;
                    let possible = (has_links
                        || !(fault.needs_namespaces() || fault == Fault::Proxied))
                        && (moment != Moment::Devices || devices)
                        && !row.endings().is_empty();
                    if possible {
                        rows.push(row);
                    }
                }
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_fault_moment_and_kind_is_in_the_table_and_names_are_unique() {
        let rows = table();
        for fault in FAULTS {
            assert!(rows.iter().any(|row| row.fault == fault), "{fault:?}");
        }
        for moment in MOMENTS {
            assert!(rows.iter().any(|row| row.moment == moment), "{moment:?}");
        }
        for kind in KINDS {
            assert!(rows.iter().any(|row| row.kind == kind), "{kind:?}");
        }
        let names: BTreeSet<String> = rows.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn no_row_lets_the_guest_run_at_the_source_after_the_commit() {
        for row in table().iter().filter(|row| row.moment.is_committed()) {
            assert!(!row.endings().contains(&Ending::Stays), "{row}");
        }
    }
}
