//! The source: shards a running guest's dirty pages over many channels, and switches over.

pub mod config;
pub mod error;
pub mod event;
pub mod forecast;
mod keep_alive;
pub mod lane;
mod lanes;
pub mod pacer;
pub mod redial;
pub mod session;
pub mod speed;
pub mod stream;

pub use config::{
    Config, ConfigBuilder, ConfigError, DirtyScan, WhenAckLate, WhenDestinationLost,
    WhenNotConverging,
};
pub use error::{Error, Fault};
pub use lanes::Seen;
pub use session::{Reclaimed, Session};
