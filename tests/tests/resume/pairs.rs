//! A source and a destination over links that a test can cut.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, Source, SourceEnd, rx_builder, tx_builder};
use multifd_tests::links::Links;
use multifd_tests::model::{DestinationMachine, differing_page};
use multifd_transport::GuestMemory;

/// How long lost channels are dialled again, in these tests.
pub(crate) const RECONNECT: Duration = Duration::from_secs(4);

pub(crate) struct Pair {
    pub(crate) links: Links,
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    memory: GuestMemory,
    there: Arc<Mutex<Option<GuestMemory>>>,
    runs_there: Arc<AtomicBool>,
}

/// How the two sides ended.
pub(crate) struct Ends {
    pub(crate) source: SourceEnd,
    pub(crate) destination: rx::Finished,
}

/// The settings of a source that comes back.
pub(crate) fn comes_back() -> tx::config::ConfigBuilder {
    tx_builder()
        .reconnect_deadline(RECONNECT)
        .commit_deadline(2 * GRACE)
}

/// The settings of a destination that waits.
pub(crate) fn waits() -> rx::config::ConfigBuilder {
    rx_builder().suspend(RECONNECT)
}

impl Pair {
    pub(crate) fn new(bytes: u64, tx: tx::config::ConfigBuilder) -> Self {
        Self::with(bytes, tx, waits())
    }

    pub(crate) fn with(
        bytes: u64,
        tx: tx::config::ConfigBuilder,
        rx: rx::config::ConfigBuilder,
    ) -> Self {
        let destination = Destination::with(rx.build().unwrap(), DestinationMachine::default());
        let links = Links::to(destination.handle());
        let source = Source::sized(bytes, links.dial(), tx.build().unwrap());
        Self::of(links, source, destination)
    }

    pub(crate) fn of(links: Links, source: Source, destination: Destination) -> Self {
        Self {
            memory: source.memory.clone(),
            there: Arc::clone(&destination.memory),
            runs_there: Arc::clone(&destination.running),
            links,
            source,
            destination,
        }
    }

    /// Waits until so many bytes were sent.
    pub(crate) fn sent(&self, octets: u64) {
        let (handle, since) = (self.source.handle(), Instant::now());
        while handle.progress().sent_bytes < octets {
            assert!(since.elapsed() < 5 * GRACE, "{:?}", handle.progress());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for both ends.
    pub(crate) fn end(self) -> Ends {
        let source = self.source.end(10 * GRACE);
        let destination = self.destination.end(5 * GRACE).finished;
        Ends {
            source,
            destination,
        }
    }

    /// Waits for both ends, which have to be good: one owner, and every page equal.
    pub(crate) fn arrives(self, case: &str) -> Ends {
        let (memory, there, runs_there) = (
            self.memory.clone(),
            Arc::clone(&self.there),
            Arc::clone(&self.runs_there),
        );
        let ends = self.end();
        let error = &ends.source.finished.error;
        assert!(error.is_none(), "{case}: {error:?}");
        let error = &ends.destination.error;
        assert!(error.is_none(), "{case}: {error:?}");
        assert!(runs_there.load(Ordering::SeqCst), "{case}");
        let there = there.lock().unwrap().clone().unwrap();
        assert_eq!(differing_page(&memory, &there), None, "{case}");
        ends
    }
}
