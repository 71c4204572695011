//! The honest side of a test, with short deadlines, watched: how it ended, how soon, and who runs the guest.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::{Address, Channel, GuestMemory, Listener, Spawner, TcpOptions};
use multifd_wire::frame::Device;
use multifd_wire::{ChannelRef, Layout};

use crate::host::Host;
use crate::model::{DestinationMachine, SourceMachine, fill, memory};

/// A channel on which nothing moves for this long is given up, in these tests.
pub const STALL: Duration = Duration::from_secs(1);

/// How long a hello may take, in these tests.
pub const HELLO_DEADLINE: Duration = Duration::from_millis(500);

/// How long set-up may take, in these tests.
pub const SETUP_DEADLINE: Duration = Duration::from_millis(1500);

/// How long a paused guest is kept waiting, in these tests.
pub const COMMIT_DEADLINE: Duration = Duration::from_secs(1);

/// What an end may take beyond its deadline: a farewell of 1 s, and a machine that is busy with other tests.
pub const GRACE: Duration = Duration::from_secs(3);

/// Waits for a result; a side that hangs fails the test instead of hanging it. The time is one on a host that has time for it.
///
/// # Panics
/// If there is none in time, or what was waited for panicked.
pub fn within<T: Send + 'static>(
    time: Duration,
    what: &str,
    wait: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = crossbeam_channel::bounded(1);
    let thread = std::thread::spawn(move || {
        let _ = done.send(wait());
    });
    let (host, began) = (Host::watch(), Instant::now());
    let result = loop {
        // What the host keeps waiting is not held against the one who is waited for.
        let left = (time + host.delayed()).saturating_sub(began.elapsed());
        match result.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) if began.elapsed() < time + host.delayed() => {}
            end => break end,
        }
    };
    match result {
        Ok(result) => result,
        Err(_) if thread.is_finished() => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("it has sent its result before it ended"),
        },
        Err(_) => panic!("{what} did not come within {time:?}"),
    }
}

/// The settings of an honest destination.
///
/// # Panics
/// Never: they are within their limits.
#[must_use]
pub fn destination_config() -> rx::Config {
    rx_builder().build().expect("within the limits")
}

/// The same, to be changed.
#[must_use]
pub fn rx_builder() -> rx::config::ConfigBuilder {
    rx::Config::builder()
        .hello_deadline(HELLO_DEADLINE)
        .setup_deadline(SETUP_DEADLINE)
        .stall(STALL)
        .keep_alive(STALL / 5)
        // Lost is lost: what comes back has tests of its own.
        .suspend(Duration::ZERO)
        .lanes_max(4)
}

/// The settings of an honest source, to be changed.
#[must_use]
pub fn tx_builder() -> tx::config::ConfigBuilder {
    tx::Config::builder()
        .hello_deadline(HELLO_DEADLINE)
        .setup_deadline(SETUP_DEADLINE)
        .stall(STALL)
        .keep_alive(STALL / 5)
        .commit_deadline(COMMIT_DEADLINE)
        // Lost is lost: what comes back has tests of its own.
        .reconnect_deadline(Duration::ZERO)
        // On a host that is busy with other tests even this guest can outpace its link; convergence is not what is tested.
        .downtime_limit(Duration::from_secs(60))
        .channels(1)
}

/// The destination's machine, which also notes that it was taken down.
struct Watched {
    machine: DestinationMachine,
    devices: Vec<Box<dyn rx::DeviceSink>>,
    discarded: Arc<AtomicBool>,
}

impl rx::Vmm for Watched {
    fn prepare(
        &mut self,
        configs: Vec<rx::Blob>,
        layout: &Layout,
    ) -> Result<GuestMemory, rx::VmmError> {
        self.machine.prepare(configs, layout)
    }

    fn devices(&mut self, _: &[Device]) -> Result<Vec<Box<dyn rx::DeviceSink>>, rx::VmmError> {
        Ok(std::mem::take(&mut self.devices))
    }

    fn load(&mut self, states: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        self.machine.load(states)
    }

    fn resume(&mut self, proof: rx::Ownership) -> Result<(), rx::VmmError> {
        self.machine.resume(proof)
    }

    fn discard(&mut self) {
        self.discarded.store(true, Ordering::SeqCst);
    }
}

/// An honest destination that waits for a source.
pub struct Destination {
    reception: rx::Reception,
    /// Where it listens.
    pub address: Address,
    /// What its machine made for guest memory.
    pub memory: Arc<Mutex<Option<GuestMemory>>>,
    /// Whether the guest runs here.
    pub running: Arc<AtomicBool>,
    discarded: Arc<AtomicBool>,
}

/// How an honest destination ended.
pub struct DestinationEnd {
    /// Its report and error.
    pub finished: rx::Finished,
    /// Whether the guest runs here.
    pub running: bool,
    /// Whether the machine was taken down.
    pub discarded: bool,
}

impl Destination {
    /// One that listens on a free TCP port of this host.
    #[must_use]
    pub fn start() -> Self {
        Self::with(destination_config(), DestinationMachine::default())
    }

    /// One with other settings, or another machine.
    ///
    /// # Panics
    /// If it can't listen.
    #[must_use]
    pub fn with(config: rx::Config, machine: DestinationMachine) -> Self {
        Self::at("127.0.0.1:0", config, machine)
    }

    /// One with devices.
    #[must_use]
    pub fn with_devices(config: rx::Config, devices: Vec<Box<dyn rx::DeviceSink>>) -> Self {
        Self::whole(
            "127.0.0.1:0",
            config,
            DestinationMachine::default(),
            devices,
            None,
        )
    }

    /// One whose threads are started in another way.
    #[must_use]
    pub fn with_threads(config: rx::Config, spawner: Box<dyn Spawner>) -> Self {
        let machine = DestinationMachine::default();
        Self::whole("127.0.0.1:0", config, machine, Vec::new(), Some(spawner))
    }

    /// One that listens somewhere else.
    ///
    /// # Panics
    /// If it can't listen.
    #[must_use]
    pub fn at(address: &str, config: rx::Config, machine: DestinationMachine) -> Self {
        Self::whole(address, config, machine, Vec::new(), None)
    }

    fn whole(
        address: &str,
        config: rx::Config,
        machine: DestinationMachine,
        devices: Vec<Box<dyn rx::DeviceSink>>,
        spawner: Option<Box<dyn Spawner>>,
    ) -> Self {
        let address = address.parse().expect("an address");
        let listener = Listener::bind(&address, &TcpOptions::default()).expect("a free address");
        let address = listener.local_address().clone();
        let (memory, running) = (Arc::clone(&machine.memory), Arc::clone(&machine.running));
        let discarded = Arc::new(AtomicBool::new(false));
        let vmm = Box::new(Watched {
            machine,
            devices,
            discarded: Arc::clone(&discarded),
        });
        let parts = rx::Parts {
            vmm,
            listeners: vec![listener],
            config,
            spawner,
        };
        let reception = rx::Reception::start(parts).expect("threads");
        Self {
            reception,
            address,
            memory,
            running,
            discarded,
        }
    }

    /// A new connection to it.
    ///
    /// # Panics
    /// If none can be made.
    #[must_use]
    pub fn connect(&self) -> Box<dyn Channel> {
        let deadline = Instant::now() + Duration::from_secs(5);
        multifd_transport::connect(&self.address, &TcpOptions::default(), deadline)
            .expect("a connection to this host")
    }

    /// For progress, cancellation and connections that were made elsewhere.
    #[must_use]
    pub fn handle(&self) -> rx::Handle {
        self.reception.handle()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end in time.
    #[must_use]
    pub fn end(self, within_time: Duration) -> DestinationEnd {
        let Self {
            reception,
            running,
            discarded,
            ..
        } = self;
        let finished = within(within_time, "the destination's end", || reception.wait());
        DestinationEnd {
            running: running.load(Ordering::SeqCst),
            discarded: discarded.load(Ordering::SeqCst),
            finished,
        }
    }

    /// Waits for its end, which has to be a failure before the commit with this code.
    ///
    /// # Panics
    /// If it ends otherwise, or not in time.
    pub fn fails(self, within_time: Duration, code: &str, case: &str) {
        let end = self.end(within_time);
        let error = end.finished.error.as_ref();
        let error = error.unwrap_or_else(|| panic!("{case}: it did not fail"));
        assert_eq!(error.code(), code, "{case}: {error}");
        assert_eq!(
            end.finished.report.outcome,
            rx::OutcomeKind::Failed,
            "{case}"
        );
        assert!(!end.running, "{case}: the guest must not run here");
        assert!(end.discarded, "{case}: the machine is taken down");
    }
}

/// An honest source with a guest that writes, on its way to some destination.
pub struct Source {
    migration: tx::Migration,
    /// Its memory.
    pub memory: GuestMemory,
    /// Whether the guest runs here.
    pub running: Arc<AtomicBool>,
    /// Times that it was resumed.
    pub resumed: Arc<AtomicU64>,
    writes: Box<dyn Fn() -> u64 + Send>,
}

/// How an honest source ended. Holds the machine, whose writers would stop otherwise.
pub struct SourceEnd {
    /// Its report and error.
    pub finished: tx::Finished,
    running: Arc<AtomicBool>,
    resumed: Arc<AtomicU64>,
    writes: Box<dyn Fn() -> u64 + Send>,
}

impl Source {
    /// A guest of 8 MiB that writes 2000 pages a second.
    #[must_use]
    pub fn start(dial: Box<dyn tx::Dial>, config: tx::Config) -> Self {
        Self::sized(8 << 20, dial, config)
    }

    /// A larger one.
    ///
    /// # Panics
    /// If the migration can't be started.
    #[must_use]
    pub fn sized(bytes: u64, dial: Box<dyn tx::Dial>, config: tx::Config) -> Self {
        let memory = memory(bytes);
        fill(&memory, bytes, 3);
        let machine = SourceMachine::start(memory.clone(), 1, 2000, 11);
        let (running, resumed) = (Arc::clone(&machine.running), Arc::clone(&machine.resumed));
        let (writes, sources) = (machine.write_counter(), vec![machine.source()]);
        let parts = tx::Parts {
            vmm: Box::new(machine),
            memory: memory.clone(),
            sources,
            dial,
            config,
            spawner: None,
        };
        Self {
            migration: tx::Migration::start(parts).expect("a migration"),
            memory,
            running,
            resumed,
            writes,
        }
    }

    /// One that dials a TCP or Unix address.
    #[must_use]
    pub fn to(address: &Address, config: tx::Config) -> Self {
        let dialer = tx::Dialer {
            address: address.clone(),
            options: TcpOptions::default().into(),
        };
        Self::start(Box::new(dialer), config)
    }

    /// For progress and cancellation.
    #[must_use]
    pub fn handle(&self) -> tx::Handle {
        self.migration.handle()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end in time.
    #[must_use]
    pub fn end(self, within_time: Duration) -> SourceEnd {
        let Self {
            migration,
            running,
            resumed,
            writes,
            ..
        } = self;
        let finished = within(within_time, "the source's end", || migration.wait());
        SourceEnd {
            finished,
            running,
            resumed,
            writes,
        }
    }

    /// Waits for its end, which has to be a failure with this code and a guest that runs on.
    ///
    /// # Panics
    /// If it ends otherwise, or not in time.
    pub fn fails(self, within_time: Duration, code: &str, case: &str) {
        let end = self.end(within_time);
        end.failed(code, case);
    }
}

impl SourceEnd {
    /// It failed before the commit, and the guest runs on.
    ///
    /// # Panics
    /// If not.
    pub fn failed(&self, code: &str, case: &str) {
        let error = self.finished.error.as_ref();
        let error = error.unwrap_or_else(|| panic!("{case}: it did not fail"));
        assert_eq!(error.code(), code, "{case}: {error}");
        assert_eq!(
            self.finished.report.outcome,
            tx::OutcomeKind::Failed,
            "{case}"
        );
        self.runs_on(case);
    }

    /// The guest runs here and writes.
    ///
    /// # Panics
    /// If not.
    pub fn runs_on(&self, case: &str) {
        assert!(
            self.running.load(Ordering::SeqCst),
            "{case}: the guest runs on"
        );
        let (before, since) = ((self.writes)(), Instant::now());
        while (self.writes)() == before {
            assert!(since.elapsed() < GRACE, "{case}: the guest does not write");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The commit was sent and what came of it is not known: the guest stays paused here.
    ///
    /// # Panics
    /// If not.
    pub fn unknown(&self, code: &str, case: &str) {
        let error = self.finished.error.as_ref();
        let error = error.unwrap_or_else(|| panic!("{case}: it did not fail"));
        assert_eq!(error.code(), code, "{case}: {error}");
        assert_eq!(
            self.finished.report.outcome,
            tx::OutcomeKind::Unknown,
            "{case}"
        );
        self.stays_paused(case);
    }

    /// The guest does not run here and was never resumed.
    ///
    /// # Panics
    /// If not.
    pub fn stays_paused(&self, case: &str) {
        let before = (self.writes)();
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            !self.running.load(Ordering::SeqCst),
            "{case}: the guest stays paused"
        );
        assert_eq!(
            self.resumed.load(Ordering::SeqCst),
            0,
            "{case}: it was resumed"
        );
        assert_eq!((self.writes)(), before, "{case}: it writes");
    }
}

/// A dialer made of a closure.
pub struct DialWith<F>(pub F);

impl<F> tx::Dial for DialWith<F>
where
    F: Fn(ChannelRef) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>>
        + Send
        + Sync,
{
    fn dial(
        &self,
        channel: ChannelRef,
        _: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        (self.0)(channel)
    }
}
