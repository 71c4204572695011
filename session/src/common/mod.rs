//! What both roles are made of.

mod channel;
mod embedder;
mod encoded;

pub use channel::ChannelFault;
pub use embedder::{Blob, DeviceError, VmmError};
pub use encoded::Encoded;
pub(crate) use encoded::Encoder;
