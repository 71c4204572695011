//! What both roles are made of.

mod channel;
pub(crate) mod config;
mod embedder;
mod encoded;
mod error;
mod report;
mod ticket;

pub use channel::ChannelFault;
pub use config::ConfigError;
pub use embedder::{Blob, DeviceError, VmmError};
pub use encoded::Encoded;
pub(crate) use encoded::Encoder;
pub use error::{Error, Failure, StartError};
pub use report::{DamageReport, ErrorReport};
pub use ticket::AskTicket;
