#![forbid(unsafe_code)]
//! Takes from a program that moves guests what it does not need, so that bytes of a hostile peer that find a fault in it find
//! little to do with it.
//!
//! ```text
//!   start        capabilities                 for the whole process, before it has threads
//!   set up       process(): landlock          files and TCP ports that were not named are out of reach
//!                           seccomp           no exec, no trace, no mount, no module, no io_uring, ... in any thread
//!                           no core dump      that would hold guest memory and the resume secret
//!   each thread  Confined: seccomp by role    what reads a peer's bytes may read, write, wait and allocate, and nothing else
//! ```
//!
//! A call that is refused fails with EPERM; it never kills the process, because a guest runs in it. What the kernel does not have
//! is left out and named ([`Applied`]); what it has and refuses is an error.
//!
//! ```no_run
//! use multifd_confine::{Capabilities, Confined, Files, Policy, Ports, Side};
//!
//! multifd_confine::capabilities(Capabilities::NONE)?;
//! // Threads from before have no landlock: call it early.
//! let applied = multifd_confine::process(&Policy {
//!     files: Files::of_a_host().and_write("/dev/kvm"),
//!     ports: Ports { bind: vec![], connect: vec![4444] },
//!     ..Policy::default()
//! })?;
//! eprintln!("confined: {applied}");
//! let spawner = Confined::new(multifd_transport::StdSpawner, Side::Destination)?;
//! # drop(spawner);
//! # Ok::<(), multifd_confine::Error>(())
//! ```

mod calls;
mod files;
mod threads;

use std::fmt;

pub use calls::Exec;
pub use files::{Files, Ports};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, geteuid, set_dumpable_behavior, setrlimit,
};
pub use rustix::thread::CapabilitySet as Capability;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
pub use threads::{Confined, Side};

/// What a program may still do.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Files and folders that stay in reach.
    pub files: Files,
    /// TCP ports that stay in reach.
    pub ports: Ports,
    /// Whether it may start programs.
    pub exec: Exec,
}

/// Why a program could not be confined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a step that it has.
    #[error("cannot {step}: {source}")]
    System {
        /// What was to be done.
        step: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// Landlock refused the rules.
    #[error("cannot restrict files and ports: {0}")]
    Files(#[from] landlock::RulesetError),
    /// The filter of system calls could not be made or was refused.
    #[error("cannot restrict system calls: {0}")]
    Calls(#[from] seccompiler::Error),
}

impl Error {
    fn step(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::System {
            step,
            source: errno.into(),
        }
    }
}

/// What was done, for the log: a part that this kernel does not have is named.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// How far files and ports are restricted.
    pub files: Restricted,
    /// Whether the process can be traced and dumped by others of its user.
    pub dumpable: Dumpable,
}

/// How far landlock goes here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restricted {
    /// All that was asked for.
    Fully,
    /// This kernel's landlock is older: files, but not TCP ports, or not every operation.
    Partly,
    /// This kernel has no landlock.
    Not,
}

/// Whether the kernel writes a core dump and lets others of the same user look in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dumpable {
    /// No.
    No,
    /// No core dump is written. The process is traceable by its own user still: to a process that is not dumpable and not root the
    /// kernel shuts `/proc/self/pagemap`, without which a sparse guest can't be told from a full one.
    OnlyByTrace,
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.files {
            Restricted::Fully => "files, ports and system calls",
            Restricted::Partly => "files and system calls (this kernel restricts no ports)",
            Restricted::Not => "system calls (this kernel has no landlock: no files, no ports)",
        })?;
        f.write_str(match self.dumpable {
            Dumpable::No => "; not dumpable",
            Dumpable::OnlyByTrace => "; no core dump",
        })
    }
}

/// Capabilities that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities(CapabilitySet);

impl Capabilities {
    /// None.
    pub const NONE: Self = Self(CapabilitySet::empty());

    /// One more, if `condition` holds.
    #[must_use]
    pub fn and_if(self, condition: Needed, capability: Capability) -> Self {
        match condition {
            Needed::Yes => Self(self.0.union(capability)),
            Needed::No => self,
        }
    }
}

/// Whether something is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needed {
    /// It is.
    Yes,
    /// It is not.
    No,
}

impl From<bool> for Needed {
    fn from(is: bool) -> Self {
        if is { Self::Yes } else { Self::No }
    }
}

/// Gives up every capability but these, for good. Call it before the process has other threads: they keep theirs.
///
/// # Errors
/// If the kernel refuses.
pub fn capabilities(kept: Capabilities) -> Result<(), Error> {
    let now = rustix::thread::capabilities(None).map_err(Error::step("read the capabilities"))?;
    // What was not had can't be kept.
    let kept = kept.0.intersection(now.permitted);
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::clear_ambient_capability_set()
        .map_err(Error::step("clear the ambient capabilities"))?;
    set_capabilities(None, sets).map_err(Error::step("give up capabilities"))?;
    // Nobody gets them back by starting a program.
    set_no_new_privs(true).map_err(Error::step("forbid new privileges"))
}

/// Confines the process from now on: files and ports in this thread and all that it starts, system calls in every thread.
///
/// # Errors
/// If the kernel has a part and refuses it. What it does not have is in what is returned.
pub fn process(policy: &Policy) -> Result<Applied, Error> {
    set_no_new_privs(true).map_err(Error::step("forbid new privileges"))?;
    let dumpable = forbid_dumps()?;
    let files = files::restrict(&policy.files, &policy.ports, policy.exec)?;
    calls::restrict_process(policy.exec)?;
    Ok(Applied { files, dumpable })
}

fn forbid_dumps() -> Result<Dumpable, Error> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(Error::step("forbid core dumps"))?;
    if !geteuid().is_root() {
        return Ok(Dumpable::OnlyByTrace);
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(Error::step("become not dumpable"))?;
    Ok(Dumpable::No)
}
