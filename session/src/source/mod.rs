//! The source: shards a running guest's dirty pages over many channels, and switches over.
//!
//! ```text
//!   session     the whole of it: frames and events in, effects out        lane, stream     one data channel, one device's stream
//!     control   the way to a control channel      hello   what is said first, and how the answer is judged
//!     set_up    GRANT, READY, LANDED              redial  when the next attempt is due
//!     lanes     dialled, alive, lost, watched     keep_alive, deadlines    signs of life, when something is due
//!     rounds    what was measured, the forecast   devices what they add, what they hold up
//!     throttle  how much of the guest's time is held back
//!     commit    the last rounds, whose the guest is, and the proof of that
//!   ask         the same question by another process                       event            what goes in and comes out
//!   forecast, pacer, speed   arithmetic                                    config, steer, error    settings, changes of them, what can go wrong
//! ```

pub mod ask;
mod commit;
pub mod config;
mod control;
mod deadlines;
mod devices;
pub mod error;
pub mod event;
pub mod forecast;
pub mod hello;
mod keep_alive;
pub mod lane;
mod lanes;
pub mod pacer;
mod redial;
mod rounds;
pub mod session;
mod set_up;
pub mod speed;
pub mod steer;
pub mod stream;
mod throttle;

pub use commit::Reclaimed;
pub use config::{
    Config, ConfigBuilder, ConfigError, DirtyScan, WhenAckLate, WhenDestinationLost,
    WhenNotConverging,
};
pub use error::{Error, Fault};
pub use hello::{Attempt, Lasts, NotOpened, Purpose};
pub use lanes::Seen;
pub use session::Session;
pub use steer::{Limits, Sending, Steer};
