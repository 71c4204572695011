//! The KEEP_ALIVEs of one control channel: which stamp is echoed, who is answered, and which echo measures the round trip.
//!
//! The rule it keeps: no echo, however late or made up, makes the round trip longer than the hello's was, and only a stamp that
//! was sent on this channel measures anything. Pure: the caller has the clock and the channel.

use core::time::Duration;

use crate::frame::{Asks, KeepAlive};

/// So many stamps of ours are remembered. An echo of an older one is no use: a newer answer has come since, or none will.
const STAMPS: usize = 32;

/// What one side knows of the KEEP_ALIVEs of a control channel. Made anew for each control channel.
#[derive(Clone, Debug)]
pub struct Pulse {
    /// Stamps of ours, each above the one before; 0 where none was sent yet.
    sent: [u64; STAMPS],
    newest: u64,
    /// The newest stamp of the peer, and when it was read.
    theirs: Option<(u64, Duration)>,
    /// No round trip is longer than this one, which was measured without the peer's help.
    at_most: Duration,
}

/// What a KEEP_ALIVE of the peer comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Whether it has to be answered, with [`Pulse::answer`].
    pub asks: Asks,
    /// The time from a stamp of ours to its echo, less the time that the peer held it.
    pub round_trip: Option<Duration>,
}

impl Pulse {
    /// A channel on which nothing was sent or read. `hello`: the time from the hello to its reply, or more.
    #[must_use]
    pub const fn new(hello: Duration) -> Self {
        Self {
            sent: [0; STAMPS],
            newest: 0,
            theirs: None,
            at_most: hello,
        }
    }

    /// A KEEP_ALIVE that is to be answered.
    // SPEC: ALIVE-2
    pub fn ask(&mut self, now: Duration) -> KeepAlive {
        self.frame(Asks::Answer, now)
    }

    /// The answer to one of the peer's.
    // SPEC: ALIVE-5
    pub fn answer(&mut self, now: Duration) -> KeepAlive {
        self.frame(Asks::Nothing, now)
    }

    /// Takes a KEEP_ALIVE of the peer.
    // SPEC: ALIVE-4, ALIVE-6
    pub fn heard(&mut self, frame: &KeepAlive, now: Duration) -> Heard {
        self.theirs = Some((frame.stamp_us, now));
        Heard {
            asks: frame.asks,
            round_trip: self.round_trip(frame, now),
        }
    }

    /// Whether a KEEP_ALIVE of the peer shows that it has read the one with this stamp, or a later one of this channel.
    #[must_use]
    pub fn has_read(&self, frame: &KeepAlive, stamp_us: u64) -> bool {
        self.was_sent(frame.echo_us) && frame.echo_us >= stamp_us
    }

    fn round_trip(&self, frame: &KeepAlive, now: Duration) -> Option<Duration> {
        let sent = self.was_sent(frame.echo_us).then_some(frame.echo_us)?;
        let whole = micros(now).checked_sub(sent)?;
        let trip = Duration::from_micros(whole.checked_sub(frame.held_us)?);
        Some(trip.min(self.at_most))
    }

    fn was_sent(&self, stamp_us: u64) -> bool {
        stamp_us != 0 && self.sent.contains(&stamp_us)
    }

    // SPEC: ALIVE-1, ALIVE-4
    fn frame(&mut self, asks: Asks, now: Duration) -> KeepAlive {
        self.newest = micros(now).max(self.newest.saturating_add(1));
        self.sent.rotate_right(1);
        if let Some(place) = self.sent.first_mut() {
            *place = self.newest;
        }
        let (echo_us, held_us) = self.theirs.map_or((0, 0), |(stamp, read)| {
            (stamp, micros(now.saturating_sub(read)))
        });
        KeepAlive {
            stamp_us: self.newest,
            echo_us,
            held_us,
            asks,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
