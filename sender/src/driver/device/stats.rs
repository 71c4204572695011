//! What a device did at the source, and how fast: for the forecast and for the report.

use std::time::{Duration, Instant};

use multifd_wire::DeviceState;

use crate::device::stream::Item;

/// What is known of a device, and what it did. Read by the control thread.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeviceStats {
    pub(crate) state: Option<DeviceState>,
    /// Bytes that it would give if it were stopped now.
    pub(crate) stop_bytes: u64,
    /// The generation that has to be acknowledged, and the newest that is.
    pub(crate) announced: u32,
    pub(crate) acked: u32,
    /// The time of what was loaded for acknowledgements.
    pub(crate) acked_load: Duration,
    /// Bytes that were read of it in all, and the time that its own code took for them: how fast it can be read.
    pub(crate) read_bytes: u64,
    pub(crate) read_time: Duration,
    /// The same for loading at the destination, as far as that was told.
    pub(crate) loaded_bytes: u64,
    pub(crate) loaded_time: Duration,
    pub(crate) initial_bytes: u64,
    pub(crate) pre_copy_bytes: u64,
    pub(crate) stop_copy_bytes: u64,
    pub(crate) config_bytes: u64,
    pub(crate) quiesce: Duration,
    pub(crate) stop: Duration,
    /// Spent in the device's own read calls since it was stopped.
    pub(crate) read: Duration,
    pub(crate) stopped_at: Option<Instant>,
    pub(crate) saved_at: Option<Instant>,
    /// When the last item was handed to a channel.
    pub(crate) sent_at: Option<Instant>,
    /// Items that the destination has, and how many the stream has once its end was among them.
    pub(super) items_arrived: u64,
    pub(super) items: Option<u64>,
    /// When the destination had said that it has them all.
    pub(crate) arrived_at: Option<Instant>,
    pub(crate) loaded: Option<(Duration, Duration)>,
    pub(crate) loaded_at: Option<Instant>,
    pub(crate) was_reset: bool,
    /// How often its stream began anew.
    pub(crate) restarts: u32,
    /// It came back from its reader in the end.
    pub(crate) given_back: bool,
    pub(crate) trouble: Option<String>,
}

impl DeviceStats {
    /// Whether the newest initial bytes are not acknowledged.
    pub(crate) fn is_unacked(&self) -> bool {
        self.acked < self.announced
    }

    /// What was measured from the stop on is void: the device runs again.
    pub(super) fn runs_again(&mut self) {
        *self = Self {
            stop_copy_bytes: 0,
            config_bytes: 0,
            quiesce: Duration::ZERO,
            stop: Duration::ZERO,
            read: Duration::ZERO,
            stopped_at: None,
            saved_at: None,
            sent_at: None,
            arrived_at: None,
            loaded: None,
            loaded_at: None,
            ..std::mem::take(self)
        };
    }

    pub(super) fn arrived(&mut self, item: &Item) {
        self.items_arrived += 1;
        if item.is_last() {
            self.items = Some(item.index() + 1);
        }
        if self.items == Some(self.items_arrived) {
            self.arrived_at = Some(Instant::now());
        }
    }
}
