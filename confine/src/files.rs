//! Files and TCP ports that stay in reach, by landlock.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath,
    PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};

use crate::{Error, Exec, Restricted};

/// The newest landlock that the rules are written for: TCP ports came with the fourth. An older kernel takes what it knows.
const WRITTEN_FOR: ABI = ABI::V5;

/// Files and folders that stay in reach, with all that is below them.
#[derive(Debug, Clone, Default)]
pub struct Files {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Files {
    /// What libraries read on any Linux: themselves and their settings, names of hosts, what the kernel tells of the process and the
    /// machine. Nothing of a user's.
    #[must_use]
    pub fn of_a_host() -> Self {
        let read = [
            "/etc",
            "/lib",
            "/lib64",
            "/usr",
            "/proc",
            "/sys",
            "/run/systemd/resolve",
        ];
        let write = ["/dev/null", "/dev/urandom"];
        Self {
            read: read.map(PathBuf::from).into(),
            write: write.map(PathBuf::from).into(),
        }
    }

    /// One more that may be read.
    #[must_use]
    pub fn and_read(mut self, path: impl AsRef<Path>) -> Self {
        self.read.push(path.as_ref().to_owned());
        self
    }

    /// One more that may be read and written; in a folder also made and removed.
    #[must_use]
    pub fn and_write(mut self, path: impl AsRef<Path>) -> Self {
        self.write.push(path.as_ref().to_owned());
        self
    }
}

/// TCP ports that stay in reach; 0 is a free one that the kernel chooses. None at all: no connection is made, nothing is listened on. What
/// is open already stays open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports {
    /// May be listened on, and connected from.
    pub bind: Vec<u16>,
    /// May be connected to.
    pub connect: Vec<u16>,
}

/// Restricts this thread and those that it starts. A path that is not there is left out: nothing could be done with it, and nothing
/// can be made in its place.
pub(crate) fn restrict(files: &Files, ports: &Ports, exec: Exec) -> Result<Restricted, Error> {
    let read = AccessFs::from_read(WRITTEN_FOR) & !AccessFs::Execute;
    let all = match exec {
        Exec::Forbidden => AccessFs::from_all(WRITTEN_FOR),
        // The program, its interpreter and its libraries can be anywhere.
        Exec::Allowed => AccessFs::from_all(WRITTEN_FOR) & !AccessFs::Execute,
    };
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::from_all(WRITTEN_FOR))?
        .create()?;
    for (paths, allowed) in [
        (&files.read, read),
        (
            &files.write,
            (all & !AccessFs::Execute) | AccessFs::IoctlDev,
        ),
    ] {
        for path in paths {
            if let Ok(found) = PathFd::new(path) {
                rules = rules.add_rule(beneath(found, path, allowed))?;
            }
        }
    }
    for (ports, allowed) in [
        (&ports.bind, AccessNet::BindTcp),
        (&ports.connect, AccessNet::ConnectTcp),
    ] {
        for port in ports {
            rules = rules.add_rule(NetPort::new(*port, allowed))?;
        }
    }
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Restricted::Fully,
        RulesetStatus::PartiallyEnforced => Restricted::Partly,
        RulesetStatus::NotEnforced => Restricted::Not,
    })
}

/// A file has no rights that only a folder can have.
fn beneath(found: PathFd, path: &Path, allowed: BitFlags<AccessFs>) -> PathBeneath<PathFd> {
    let allowed = if path.is_dir() {
        allowed
    } else {
        allowed & AccessFs::from_file(WRITTEN_FOR)
    };
    PathBeneath::new(found, allowed)
}
