//! How bytes move: channels that send from guest memory and receive into it.

mod address;
mod channel;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod in_memory;
mod listener;
pub mod memory;
mod patience;
mod read_ahead;
mod spawn;
mod stream;
mod sys;
pub mod tcp;
pub mod unix;

use std::time::Instant;

pub use address::{Address, AddressError, HOST_BYTES_MAX, HostPort, UNIX_PATH_BYTES_MAX};
pub use channel::{Channel, Closer, IoSource, READ_AHEAD_BYTES, ReceiveHalf, SendHalf};
pub use error::{ChannelError, ConnectAttempt, ConnectError, ListenError};
pub use listener::Listener;
pub use memory::{GuestMemory, Span};
pub use spawn::{Spawner, StdSpawner};
pub use tcp::{KeepAlive, TcpOptions};

/// Connects to an address of whatever kind; `options` are for TCP.
///
/// # Errors
/// [`ConnectError`].
pub fn connect(
    address: &Address,
    options: &TcpOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    match address {
        Address::Tcp(target) => tcp::connect(target, options, deadline),
        Address::Unix(path) => unix::connect(path, deadline),
    }
}
