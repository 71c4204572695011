//! What both roles are made of.

mod channel;
mod embedder;

pub use channel::ChannelFault;
pub use embedder::{Blob, DeviceError, VmmError};
