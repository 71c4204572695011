//! How the source reaches the destination: one address for all channels, or several kinds of channel in one migration.

use std::sync::Arc;
use std::time::Instant;

use multifd_transport::{Address, Channel, ChannelOptions, Listener};
use multifd_wire::ChannelRef;

/// Makes connections to the destination. Called again whenever a channel is to be replaced.
pub trait Dial: Send + Sync {
    /// Connects; which channel it is for matters only to dialers that spread channels over several addresses.
    ///
    /// # Errors
    /// Whatever went wrong; shown to the user.
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>>;
}

impl<D: Dial + ?Sized> Dial for Arc<D> {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        (**self).dial(channel, deadline)
    }
}

/// Dials one address for every channel.
#[derive(Debug, Clone)]
pub struct Dialer {
    /// Where the destination listens.
    pub address: Address,
    /// What the kinds need; `TcpOptions` can be turned into it.
    pub options: ChannelOptions,
}

impl Dial for Dialer {
    fn dial(
        &self,
        _: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(multifd_transport::connect_with(
            &self.address,
            &self.options,
            deadline,
        )?)
    }
}

/// Dials one address for the control channel and spreads the data channels over several, of any kinds.
///
/// All of them must be the same destination's. Inside a round the fastest lane takes most, so that kinds of different speed can be
/// mixed.
#[derive(Debug, Clone)]
pub struct SpreadDialer {
    /// Where the control channel goes.
    pub control: Address,
    /// Where data channels go: lane 0 to the first, lane 1 to the second, and from the first again when they are used up. If there are
    /// none, all go to `control`.
    pub data: Vec<Address>,
    /// What the kinds need.
    pub options: ChannelOptions,
}

impl SpreadDialer {
    /// Where this channel goes.
    #[must_use]
    pub fn address(&self, channel: ChannelRef) -> &Address {
        let lane = match channel {
            ChannelRef::Lane(lane) => lane.value() as usize,
            ChannelRef::Control | ChannelRef::None => return &self.control,
        };
        lane.checked_rem(self.data.len())
            .and_then(|index| self.data.get(index))
            .unwrap_or(&self.control)
    }
}

impl Dial for SpreadDialer {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        let address = self.address(channel);
        Ok(multifd_transport::connect_with(
            address,
            &self.options,
            deadline,
        )?)
    }
}

/// Takes what the destination dials, so that only the source has to be reachable. At the destination a
/// [listener that calls](Listener::calling) belongs to it.
///
/// Whoever connects is told what a source says, which is its session's ticket. So this is for TLS, where the certificates say who
/// that is, and for sockets that nobody else can reach.
pub struct CalledDialer {
    /// Where the destination dials.
    pub listener: Listener,
}

impl Dial for CalledDialer {
    fn dial(
        &self,
        _: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.listener.accept(Some(deadline))?.0)
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::LaneId;

    use super::*;

    #[test]
    fn data_channels_take_the_addresses_in_turn() {
        let address = |text: &str| text.parse::<Address>().unwrap();
        let mut dialer = SpreadDialer {
            control: address("tls:a:1"),
            data: vec![address("tcp:a:2"), address("rdma:a:3")],
            options: ChannelOptions::default(),
        };
        let goes = |dialer: &SpreadDialer, lane| {
            dialer
                .address(ChannelRef::Lane(LaneId::new(lane)))
                .to_string()
        };
        assert_eq!(dialer.address(ChannelRef::Control).to_string(), "tls:a:1");
        let lanes: Vec<_> = (0..4).map(|lane| goes(&dialer, lane)).collect();
        assert_eq!(lanes, ["tcp:a:2", "rdma:a:3", "tcp:a:2", "rdma:a:3"]);
        dialer.data.clear();
        assert_eq!(goes(&dialer, 7), "tls:a:1");
    }
}
