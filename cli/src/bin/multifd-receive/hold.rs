//! Standing still at a chosen moment of a migration, so that a test can let something happen exactly then.
//!
//! The moments are those at which the destination's VMM is called. Its thread waits; all others go on, so that the source hears
//! that this side lives.

use clap::ValueEnum;

/// See `--hold-at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Moment {
    /// The set-up is here, and the machine is not built yet.
    Prepare,
    /// All of memory and the devices are here, and the state is not loaded yet.
    Load,
    /// The commit is here: the guest is this side's, and does not run yet.
    Resume,
    /// The guest runs, and the source has not been told.
    Running,
}

/// Stands still once.
pub(crate) struct Hold(Option<Moment>);

impl Hold {
    /// Stands still at this moment when it comes for the first time.
    pub(crate) fn at(moment: Moment) -> Self {
        Self(Some(moment))
    }

    /// If this is the moment: says so on standard error, and waits for a line on standard input, or for its end.
    pub(crate) fn reached(&mut self, moment: Moment) {
        if self.0 == Some(moment) {
            self.0 = None;
            err!("held at {}", format!("{moment:?}").to_lowercase());
            let _ = std::io::stdin().read_line(&mut String::new());
        }
    }
}
