//! What a bridge did, for its user.

use serde::Serialize;

use crate::tap::Seen;

/// How a migration ended, as far as this side knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// The destination's monitor said that the guest runs there.
    Migrated,
    /// Everything was carried and both monitors ended their connections, but what they said can't be read.
    Carried,
    /// It failed; the guest is the source's.
    Failed,
    /// The source's monitor, or the user, ended it; the guest is the source's.
    Cancelled,
    /// The destination's monitor may run the guest, and could not be asked.
    Unknown,
}

/// The report of one side.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Ended,
    /// Why, if there is something to say.
    pub reason: Option<String>,
    /// Connections that were carried.
    pub streams: u32,
    /// Bytes from this side's monitor.
    pub bytes_from_monitor: u64,
    /// Bytes to this side's monitor.
    pub bytes_to_monitor: u64,
    /// Channels that were lost, and dialled again.
    pub lanes_lost: u64,
    /// How often the session was resumed.
    pub resumes: u64,
    /// The longest time without a link, in milliseconds.
    pub outage_ms_max: u64,
    /// Pieces that came with a wrong checksum and were sent again.
    pub damaged: u64,
    /// The largest window that a stream had at this side, in bytes.
    pub window_bytes_max: u64,
    /// The most bytes of a stream that waited here for the monitor.
    pub held_bytes_max: u64,
    /// The shortest round trip that was seen, in microseconds.
    pub round_trip_us: Option<u64>,
    /// From the first connection of the monitor to the end, in milliseconds.
    pub elapsed_ms: u64,
    /// What the tap saw.
    pub seen: Seen,
    /// Where the tap stopped to read.
    pub tap_stopped: Option<&'static str>,
}
