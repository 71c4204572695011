//! The destination: lets pages land, verifies them, and takes the guest over.
//!
//! ```text
//!   session     the whole of it: frames and events in, effects out        lane, assembler    one data channel, one device's stream
//!     set_up    tables and their order, features                          blobs              configuration and VM state, put together
//!     lanes     who may join, who is waited for, who is lost              event              what goes in and comes out
//!     rounds    the gate between rounds, SWITCHOVER, FINAL                config, error      settings, and what can go wrong
//!     devices   what is loaded        commit       PREPARED, COMMIT, and the proofs between
//!     deadlines when something is due remembered   what is left to say after the end
//! ```

pub mod assembler;
pub mod blobs;
mod commit;
pub mod config;
mod deadlines;
mod devices;
pub mod error;
pub mod event;
pub mod lane;
mod lanes;
pub mod registry;
mod remembered;
mod rounds;
pub mod session;
pub mod set_up;

pub use commit::{Ownership, ReadyToCommit};

pub use config::{Config, ConfigBuilder, ConfigError, Overcommit};
pub use error::{Error, Fault};
pub use event::{Closed, Counts, DeviceEvent, Effect, Event, Incomplete, Outcome, Secrets};
pub use session::Session;
