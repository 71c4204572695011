//! Peers that lie, stammer, fall silent and vanish, at every step and on both sides.
//!
//! Each case says what the honest side must do: end with this typed error, within its deadline, tell the peer why where a
//! channel still carries it, and leave the guest where it belongs: running at the source unless COMMIT was sent, never
//! running at the destination before it was read.

mod commit_received;
mod commit_sent;
mod devices_received;
mod hello_received;
mod hello_sent;
mod lanes_lost;
mod pages_received;
mod rounds_received;
mod rounds_sent;
mod setup_received;
mod setup_sent;
mod threads;
mod threads_sent;
