//! Live migrations of the built-in guest through each source of dirty pages: in the end the destination's memory is the
//! source's, word by word, and the figures of the source are in the progress and in the report.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_guest::{Config, Device, Fill, Guest, Heartbeat, Memory, Tracking};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::built_in::{Arriving, Leaving, Slot};
use multifd_tests::model::{DestinationMachine, SourceMachine, fill, memory};
use multifd_tests::programs::kvm_or_skip;
use multifd_tracking::{CollectPhase, Collection, DirtySet, Error, Figures, Source, VmmWrites};
use multifd_transport::{Listener, TcpOptions};

fn config(tracking: Tracking, device: Device) -> Config {
    Config {
        memory_bytes: 96 << 20,
        vcpus: 2,
        working_set_bytes: 16 << 20,
        dirty_rate_bytes_per_s: 60_000_000,
        tracking,
        seed: 11,
        fill: Fill {
            filled_percent: 100,
            zero_percent: 30,
        },
        device,
        ..Config::default()
    }
}

/// What a migration left.
struct Done {
    sent: tx::Finished,
    source: Arc<Guest>,
    arrived: Slot,
    /// The first word that differed when the destination had everything and did not run yet; `None` if it got that far and
    /// none did.
    difference: Option<String>,
    /// The newest figures of each source that the progress showed while it ran.
    seen: BTreeMap<String, Figures>,
}

/// Waits until each virtual CPU (and its device) has written since: on a busy host as well, and on a fast one.
fn wait_for_writes(guest: &Guest) {
    let (before, began) = (guest.heartbeats(), Instant::now());
    let beats = |(now, then): (&Heartbeat, &Heartbeat)| now.beats >= then.beats + 2;
    while !guest.heartbeats().iter().zip(&before).all(beats) {
        assert!(began.elapsed() < Duration::from_secs(20), "it lives");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reports nothing, and holds every round up until the guest has written since.
struct Lives(Arc<Guest>);

/// The guest as the source's VMM, which is paused only when it has written since everything was sent: a migration of one
/// round collects nothing in pre-copy.
struct PausedLater(Leaving);

impl tx::Vmm for PausedLater {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.0.config()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        wait_for_writes(&self.0.0);
        self.0.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.0.save()
    }

    fn resume(&mut self, reclaimed: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.0.resume(reclaimed)
    }
}

impl Source for Lives {
    fn name(&self) -> &str {
        "lives"
    }

    fn start(&mut self, _: &DirtySet) -> Result<(), Error> {
        Ok(())
    }

    fn collect(&mut self, _: &DirtySet, phase: CollectPhase) -> Result<Collection, Error> {
        if phase == CollectPhase::PreCopy {
            wait_for_writes(&self.0);
        }
        Ok(Collection::default())
    }

    fn stop(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn figures(&self) -> Figures {
        Figures::default()
    }
}

/// Moves a guest that writes all the while.
fn migrate(guest: Guest, extra: Vec<Box<dyn Source>>, settings: tx::ConfigBuilder) -> Done {
    let source = Arc::new(guest);
    source.run().unwrap();
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), &TcpOptions::default()).unwrap();
    let address = listener.local_address().clone();
    let arrived = Slot::default();
    let difference = Arc::new(Mutex::new(Some(
        "the destination never had everything".to_owned(),
    )));
    let (found, from) = (Arc::clone(&difference), source.memory());
    let vmm = Arriving::new(arrived.clone())
        .before_run(move |guest| *found.lock().unwrap() = first_difference(&from, &guest.memory()));
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(vmm),
        listeners: vec![listener],
        config: rx::Config::default(),
        spawner: None,
    })
    .unwrap();
    let mut sources = vec![source.tracking_source().unwrap()];
    sources.extend(extra);
    sources.push(Box::new(Lives(Arc::clone(&source))));
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(PausedLater(Leaving(Arc::clone(&source)))),
        memory: source.memory().to_channels(),
        sources,
        dial: Box::new(tx::Dialer {
            address,
            options: TcpOptions::default().into(),
        }),
        // A busy host's link is slower than this guest; whether it converges is not what is tested.
        config: settings
            .downtime_limit(Duration::from_secs(60))
            .build()
            .unwrap(),
        spawner: None,
    })
    .unwrap();
    let handle = migration.handle();
    let waiter = std::thread::spawn(move || migration.wait());
    let mut seen = BTreeMap::new();
    while !waiter.is_finished() {
        for source in handle.progress().sources {
            seen.insert(source.name.to_string(), source.figures);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let sent = waiter.join().unwrap();
    let _ = reception.wait();
    let difference = difference.lock().unwrap().take();
    Done {
        sent,
        source,
        arrived,
        difference,
        seen,
    }
}

fn first_difference(a: &Memory, b: &Memory) -> Option<String> {
    let (mut x, mut y) = (vec![0; 512], vec![0; 512]);
    for region in a.regions() {
        for page in (0..region.bytes).step_by(4096) {
            let address = region.guest_address + page;
            a.read_words(address, &mut x).unwrap();
            b.read_words(address, &mut y).unwrap();
            if let Some(word) = (0..512).find(|&word| x[word] != y[word]) {
                return Some(format!(
                    "guest address {:#x}: {:#x} at the source, {:#x} at the destination",
                    address + word as u64 * 8,
                    x[word],
                    y[word]
                ));
            }
        }
    }
    None
}

/// Everything arrived, runs, and is right; returns the report's object of the guest's own source.
fn assert_moved(done: &Done) -> serde_json::Value {
    if let Some(error) = &done.sent.error {
        panic!("{error}");
    }
    assert_eq!(done.difference, None);
    assert_eq!(done.sent.report.digest_equal, Some(true));
    let arrived = done.arrived.get().unwrap();
    let (before, began) = (arrived.heartbeats(), Instant::now());
    while arrived
        .heartbeats()
        .iter()
        .zip(&before)
        .any(|(now, then)| now.beats < then.beats + 2)
    {
        assert!(began.elapsed() < Duration::from_secs(20), "it runs there");
        std::thread::sleep(Duration::from_millis(2));
    }
    arrived.pause().unwrap();
    for guest in [&arrived, &done.source] {
        let check = guest.check().unwrap();
        assert!(check.passed(), "{check}");
    }
    let report = serde_json::to_value(&done.sent.report).unwrap();
    report["sources"][0].clone()
}

fn moves_through(tracking: Tracking, name: &str) {
    let guest = Guest::create(&config(tracking, Device::None)).unwrap();
    let done = migrate(guest, Vec::new(), tx::Config::builder());
    let source = assert_moved(&done);
    assert_eq!(source["name"], name);
    let number = |key: &str| {
        source[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{key}: {source}"))
    };
    assert!(
        number("pages") > 0.0 && number("reported") >= number("pages"),
        "{source}"
    );
    assert!(
        number("harvests") >= 2.0 && number("harvest_ms") > 0.0,
        "{source}"
    );
    for key in [
        "resets",
        "ring_full",
        "overflows",
        "all_dirty",
        "entries_unknown",
        "unmaps",
        "errors",
    ] {
        number(key);
    }
    assert_eq!(
        (number("errors"), number("entries_unknown")),
        (0.0, 0.0),
        "{source}"
    );
    let seen = done.seen.get(name).expect("the progress names the source");
    assert!(
        seen.harvests > 0 && seen.pages as f64 <= number("pages"),
        "{seen:?}"
    );
    // A dropped migration gave the source back: it can be had again.
    drop(done.sent);
    drop(done.source.tracking_source().unwrap());
}

#[test]
fn a_guest_moves_through_the_ring() {
    if kvm_or_skip("a_guest_moves_through_the_ring") {
        moves_through(Tracking::Ring, "kvm-ring");
    }
}

#[test]
fn a_guest_moves_through_the_log() {
    if kvm_or_skip("a_guest_moves_through_the_log") {
        moves_through(Tracking::Log, "kvm-log");
    }
}

#[test]
fn a_guest_moves_through_process_memory() {
    moves_through(Tracking::Userfault, "process");
}

#[test]
fn a_guest_moves_through_its_own_marks() {
    moves_through(Tracking::Marks, "process-marks");
}

/// The device writes pages behind KVM's back; the guest's driver touches each when it takes it back, and tracking knows of
/// no device.
#[test]
fn a_device_whose_driver_touches_its_pages_loses_nothing_through_ring_and_log() {
    if !kvm_or_skip("a_device_whose_driver_touches_its_pages_loses_nothing_through_ring_and_log") {
        return;
    }
    for tracking in [Tracking::Ring, Tracking::Log] {
        let guest = Guest::create(&config(tracking, Device::Dma)).unwrap();
        let settings = tx::Config::builder().dirty_scan(tx::DirtyScan::AtSwitchover);
        let done = migrate(guest, Vec::new(), settings);
        assert_moved(&done);
        assert!(done.sent.report.dirty_scan_ms.is_some_and(|ms| ms > 0.0));
        assert!(
            done.sent.report.sources[0].pages > 10,
            "{:?}",
            done.sent.report.sources
        );
    }
}

/// The same device without a driver that touches: without the scan, what it wrote is lost …
#[test]
fn an_unreported_device_is_lost_without_the_scan() {
    if !kvm_or_skip("an_unreported_device_is_lost_without_the_scan") {
        return;
    }
    let guest = Guest::create(&config(Tracking::Log, Device::DmaUnreported)).unwrap();
    let done = migrate(guest, Vec::new(), tx::Config::builder());
    let error = &done.sent.error;
    assert!(error.is_none(), "nobody could notice: {error:?}");
    let difference = done
        .difference
        .expect("what the device wrote last is missing");
    assert!(difference.contains("at the source"), "{difference}");
    assert!(
        !done
            .arrived
            .get()
            .unwrap()
            .check()
            .is_ok_and(|check| check.passed())
    );
}

/// … and with it the migration ends with the pages' names, and the guest runs on at the source.
#[test]
fn an_unreported_device_is_caught_by_the_scan() {
    if !kvm_or_skip("an_unreported_device_is_caught_by_the_scan") {
        return;
    }
    for tracking in [Tracking::Ring, Tracking::Log] {
        let guest = Guest::create(&config(tracking, Device::DmaUnreported)).unwrap();
        let settings = tx::Config::builder().dirty_scan(tx::DirtyScan::AtSwitchover);
        let done = migrate(guest, Vec::new(), settings);
        let error = done.sent.error.as_ref().expect("it was found");
        assert_eq!(error.code(), "sender.tracking.unreported", "{error}");
        let text = error.to_string();
        assert!(
            text.contains("2 pages changed and no source reported them: region 0 pages "),
            "{text}"
        );
        assert!(text.contains("multifd_tracking::VmmMarker"), "{text}");
        assert_eq!(done.sent.report.outcome, tx::OutcomeKind::Failed);
        let before = done.source.heartbeats();
        let began = Instant::now();
        while done
            .source
            .heartbeats()
            .iter()
            .zip(&before)
            .any(|(now, then)| now.beats == then.beats)
        {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "the guest runs on at the source"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        done.source.pause().unwrap();
        let check = done.source.check().unwrap();
        assert!(check.passed(), "{check}");
    }
}

/// A VMM's own writes beside the guest's: marked, they arrive; and each source has its figures.
#[test]
fn a_vmm_that_marks_its_writes_is_whole_under_the_scan() {
    let source = memory(32 << 20);
    fill(&source, 3, 3);
    let machine = SourceMachine::start(source.clone(), 1, 2000, 3);
    let writes = VmmWrites::named("back-end");
    let marker = writes.marker();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let back_end = {
        let (memory, stop) = (source.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut number = 0u64;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                number += 1;
                let offset = number % 1000 * 4096 + 128;
                memory
                    .span(0, offset, 8)
                    .unwrap()
                    .copy_from(&number.to_le_bytes());
                marker.mark_bytes(0, offset, 8);
                std::thread::sleep(Duration::from_micros(200));
            }
        })
    };
    let destination = DestinationMachine::default();
    let landed = Arc::clone(&destination.memory);
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), &TcpOptions::default()).unwrap();
    let address = listener.local_address().clone();
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners: vec![listener],
        config: rx::Config::default(),
        spawner: None,
    })
    .unwrap();
    let sources = vec![machine.source(), Box::new(writes)];
    let vmm = Stops {
        machine,
        back_end: Some(back_end),
        stop,
    };
    let sent = tx::Migration::start(tx::Parts {
        vmm: Box::new(vmm),
        memory: source.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address,
            options: TcpOptions::default().into(),
        }),
        config: tx::Config::builder()
            .dirty_scan(tx::DirtyScan::AtSwitchover)
            .bandwidth(Some(64 << 20))
            .downtime_limit(Duration::from_secs(60))
            .build()
            .unwrap(),
        spawner: None,
    })
    .unwrap()
    .wait();
    assert!(sent.error.is_none(), "{}", sent.error.unwrap());
    assert!(reception.wait().error.is_none());
    let landed = landed.lock().unwrap().clone().unwrap();
    assert_eq!(multifd_tests::model::differing_page(&source, &landed), None);
    let names: Vec<&str> = sent
        .report
        .sources
        .iter()
        .map(|source| &*source.name)
        .collect();
    assert_eq!(names, ["model writers", "back-end"]);
    assert!(
        sent.report.sources[1].pages > 0,
        "{:?}",
        sent.report.sources
    );
}

/// A machine with a back end that its pause stops too.
struct Stops {
    machine: SourceMachine,
    back_end: Option<std::thread::JoinHandle<()>>,
    stop: Arc<std::sync::atomic::AtomicBool>,
}

impl tx::Vmm for Stops {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        if let Some(thread) = self.back_end.take() {
            thread
                .join()
                .map_err(|_| tx::VmmError::new("the back end panicked"))?;
        }
        self.machine.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.machine.resume(proof)
    }
}

/// A source that fails in the middle: the migration ends with its name and its text, and the guest stays.
#[test]
fn a_source_that_fails_is_named_and_the_guest_stays() {
    struct Fails(u32);
    impl Source for Fails {
        fn name(&self) -> &str {
            "fails"
        }
        fn start(&mut self, _: &DirtySet) -> Result<(), Error> {
            Ok(())
        }
        fn collect(&mut self, _: &DirtySet, _: CollectPhase) -> Result<Collection, Error> {
            self.0 += 1;
            if self.0 == 2 {
                return Err(Error::Unsupported {
                    what: "the second collection".into(),
                });
            }
            Ok(Collection::default())
        }
        fn stop(&mut self) -> Result<(), Error> {
            Ok(())
        }
        fn figures(&self) -> Figures {
            Figures::default()
        }
    }
    let guest = Guest::create(&config(Tracking::Userfault, Device::None)).unwrap();
    let done = migrate(guest, vec![Box::new(Fails(0))], tx::Config::builder());
    let error = done.sent.error.as_ref().expect("it failed");
    assert!(
        error
            .to_string()
            .contains("fails: not offered here: the second collection"),
        "{error}"
    );
    done.source.pause().unwrap();
    assert!(done.source.check().unwrap().passed());
}
