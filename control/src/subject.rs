//! The side that is asked: what it can say of itself, and what it can be told.

use multifd_receiver as rx;
use multifd_sender as tx;
use tx::Steer;

use crate::status::Seen;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// A limit is out of its range.
    #[error(transparent)]
    OutOfRange(#[from] tx::ConfigError),
    /// Only the source can do it.
    #[error("only the source can do that")]
    NotHere,
}

/// One side of a migration. The handles of both are.
pub trait Subject: Send + Sync + 'static {
    /// How far it is.
    fn look(&self) -> Seen;

    /// Changes a limit.
    ///
    /// # Errors
    /// Nothing was changed.
    fn steer(&self, change: Steer) -> Result<(), Refused>;

    /// Switches over when the round under way is over.
    ///
    /// # Errors
    /// Only the source can.
    fn switch_over_now(&self) -> Result<(), Refused>;

    /// Ends it.
    fn cancel(&self);
}

impl Subject for tx::Handle {
    fn look(&self) -> Seen {
        Seen::Source(Box::new(self.progress()))
    }

    fn steer(&self, change: Steer) -> Result<(), Refused> {
        Ok(Self::steer(self, change)?)
    }

    fn switch_over_now(&self) -> Result<(), Refused> {
        Self::switch_over_now(self);
        Ok(())
    }

    fn cancel(&self) {
        Self::cancel(self);
    }
}

impl Subject for rx::Handle {
    fn look(&self) -> Seen {
        Seen::Destination(self.progress())
    }

    fn steer(&self, _: Steer) -> Result<(), Refused> {
        Err(Refused::NotHere)
    }

    fn switch_over_now(&self) -> Result<(), Refused> {
        Err(Refused::NotHere)
    }

    fn cancel(&self) {
        Self::cancel(self);
    }
}
