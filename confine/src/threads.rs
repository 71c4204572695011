//! A filter for each thread of a migration, by what its name says that it does.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use multifd_transport::Spawner;
use seccompiler::{BpfProgram, apply_filter};

use crate::{Error, calls};

/// The side of a migration whose threads are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its lanes dial, and read a hello reply.
    Source,
    /// Its lanes and greeters read what any stranger says.
    Destination,
    /// The same where RDMA is among the kinds of channel: a greeter opens its devices.
    DestinationByRdma,
}

impl Side {
    /// How the names begin (docs/architecture.md section 5) of threads that read a peer's bytes, and neither dial, open files
    /// nor run an embedder's code.
    fn readers(self) -> &'static [&'static str] {
        match self {
            Self::Source => &["mfd-reader"],
            Self::Destination => &["mfd-reader", "mfd-lane", "mfd-greet"],
            Self::DestinationByRdma => &["mfd-reader", "mfd-lane"],
        }
    }
}

/// Starts threads through another [`Spawner`]: those that read a peer's bytes with a filter of system calls that leaves them
/// little else, the others as they are.
#[derive(Debug, Clone)]
pub struct Confined<S> {
    inner: S,
    reader: Arc<BpfProgram>,
    side: Side,
}

impl<S: Spawner> Confined<S> {
    /// A spawner for one side. The filter is tried in a thread of its own first.
    ///
    /// # Errors
    /// If this kernel does not take it.
    pub fn new(inner: S, side: Side) -> Result<Self, Error> {
        let reader = Arc::new(calls::reader()?);
        let tried = Arc::clone(&reader);
        let thread = std::thread::Builder::new().spawn(move || apply_filter(&tried));
        let thread = thread.map_err(|source| Error::System {
            step: "start a thread",
            source,
        })?;
        match thread.join() {
            Ok(applied) => applied?,
            Err(_) => unreachable!("applying a filter does not panic"),
        }
        Ok(Self {
            inner,
            reader,
            side,
        })
    }
}

impl<S: Spawner> Spawner for Confined<S> {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let mut readers = self.side.readers().iter();
        if !readers.any(|reader| name.starts_with(reader)) {
            return self.inner.spawn(name, body);
        }
        let filter = Arc::clone(&self.reader);
        let confined = move || {
            // It was taken before, by a thread like this one.
            if let Err(error) = apply_filter(&filter) {
                tracing::error!(%error, "a thread that reads a peer's octets could not be confined");
            }
            body();
        };
        self.inner.spawn(name, Box::new(confined))
    }
}
