//! From verified memory to the guest: loading, PREPARED, COMMIT, and the proofs that lie between.
//!
//! ```text
//!   Verified ──load──► Loading ──state and devices loaded──► ReadyToCommit ──COMMIT──► Ownership
//! ```
//! The rule it keeps: only [`ReadyToCommit`] leads to PREPARED (SPEC: PREP-1), and only a COMMIT of the same digest on top of it gives
//! [`Ownership`] (SPEC: COMMIT-1). Each proof is made in this file and nowhere else, out of the one before.

use std::time::Duration;

use multifd_wire::Digest;
use multifd_wire::frame::GuestState;

use super::error::Fault;
use super::rounds::Verified;

/// Proof that this side has everything: the last round closed, nothing damaged, digests equal, the state and every device loaded.
#[derive(Debug)]
#[must_use = "without it the guest can't be taken over"]
pub struct ReadyToCommit {
    digest: Digest,
    guest: GuestState,
}

/// Proof that the guest belongs to this side: everything is here, verified and loaded, and the source has committed.
#[derive(Debug)]
#[must_use = "the guest runs nowhere until the VMM is shown this"]
pub struct Ownership {
    ready: ReadyToCommit,
}

impl Ownership {
    /// Whether the guest runs now, or stays paused as it was at the source.
    #[must_use]
    pub fn guest(&self) -> GuestState {
        self.ready.guest
    }
}

/// The VM state is being loaded over verified memory.
#[derive(Debug)]
pub(super) struct Loading {
    verified: Verified,
    since: Duration,
    loaded: bool,
}

impl Loading {
    pub(super) fn begin(verified: Verified, now: Duration) -> Self {
        Self {
            verified,
            since: now,
            loaded: false,
        }
    }

    /// The VM state is loaded.
    pub(super) fn loaded(&mut self) {
        self.loaded = true;
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Since when.
    pub(super) fn since(&self) -> Duration {
        self.since
    }

    /// The proof, once the state and every device are loaded.
    pub(super) fn ready(&self, devices_loaded: bool) -> Option<ReadyToCommit> {
        (self.loaded && devices_loaded).then(|| ReadyToCommit {
            digest: self.verified.digest(),
            guest: self.verified.guest(),
        })
    }
}

impl ReadyToCommit {
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// The source commits to this digest.
    pub(super) fn commit(self, theirs: Digest) -> Result<Ownership, (Self, Fault)> {
        if theirs == self.digest {
            return Ok(Ownership { ready: self });
        }
        let fault = Fault::DigestMismatch {
            ours: self.digest.value(),
            theirs: theirs.value(),
        };
        Err((self, fault))
    }
}

/// What the VMM was asked to load. What it still loads when the channels are lost belongs to a switchover that is void.
#[derive(Debug, Default)]
pub(super) struct Loads {
    outstanding: u32,
    void: u32,
}

impl Loads {
    pub(super) fn asked(&mut self) {
        self.outstanding += 1;
    }

    /// One was done; whether it counts.
    pub(super) fn done(&mut self) -> bool {
        self.outstanding = self.outstanding.saturating_sub(1);
        let counts = self.void == 0;
        self.void = self.void.saturating_sub(1);
        counts
    }

    /// Everything that is under way is void.
    pub(super) fn void(&mut self) {
        self.void = self.outstanding;
    }
}
