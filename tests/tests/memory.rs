//! Guest memory that is not fresh, not full or not there: what is in it at the end, what looking at it made real, and what is said of
//! pages that did not match.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a test's own words: figures, and what was skipped

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::model::{
    BLOB_KIND, DestinationMachine, SourceMachine, differing_page, fill, memory,
};
use multifd_tests::proxy::{Direction, Impairment, Proxy, Rule};
use multifd_tracking::{Run, VmmMarker, VmmWrites};
use multifd_transport::memory::RegionLayout;
use multifd_transport::{Address, GuestMemory, Listener, TcpOptions};
use rustix::fs::MemfdFlags;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// What a migration left behind.
struct Done {
    sent: tx::Finished,
    received: rx::Finished,
    destination: GuestMemory,
}

fn listen() -> (Vec<Listener>, Address) {
    let address = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&address, &TcpOptions::default()).unwrap();
    let address = listener.local_address().clone();
    (vec![listener], address)
}

fn config() -> tx::Config {
    // Convergence is not what is tested, and the host may be busy.
    let config = tx::Config::builder().downtime_limit(Duration::from_secs(60));
    config.build().unwrap()
}

/// Moves `machine` with its memory `source` into `given`, or into fresh memory.
fn migrate(
    machine: Box<dyn tx::Vmm>,
    sources: Vec<Box<dyn multifd_tracking::Source>>,
    source: GuestMemory,
    given: Option<GuestMemory>,
) -> Done {
    let (listeners, address) = listen();
    let destination = DestinationMachine {
        given,
        ..DestinationMachine::default()
    };
    let memory = Arc::clone(&destination.memory);
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners,
        config: rx::Config::default(),
        spawner: None,
    });
    let reception = reception.unwrap();
    let dial = Box::new(tx::Dialer {
        address,
        options: TcpOptions::default().into(),
    });
    let migration = tx::Migration::start(tx::Parts {
        vmm: machine,
        memory: source,
        sources,
        dial,
        config: config(),
        spawner: None,
    });
    let sent = migration.unwrap().wait();
    let received = reception.wait();
    assert!(sent.error.is_none(), "{}", sent.error.unwrap());
    assert!(received.error.is_none(), "{}", received.error.unwrap());
    let destination = memory.lock().unwrap().clone().unwrap();
    Done {
        sent,
        received,
        destination,
    }
}

/// The same of a model machine that writes nothing.
fn move_idle(source: &GuestMemory, given: Option<GuestMemory>) -> Done {
    let machine = SourceMachine::start(source.clone(), 0, 0, 1);
    let sources = vec![machine.source()];
    migrate(Box::new(machine), sources, source.clone(), given)
}

/// Memory of a memfd, in two regions.
fn shared(bytes: u64, flags: MemfdFlags) -> Option<(File, GuestMemory)> {
    let fd = rustix::fs::memfd_create("guest", flags | MemfdFlags::CLOEXEC).ok()?;
    let file = File::from(fd);
    file.set_len(bytes).ok()?;
    let layouts =
        [(0, bytes / 2), (1 << 32, bytes / 2)].map(|(guest_address, bytes)| RegionLayout {
            guest_address,
            bytes,
        });
    let memory = GuestMemory::shared_file(&file, &layouts).ok()?;
    Some((file, memory))
}

fn write(memory: &GuestMemory, region: u32, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        let span = memory.span(region, page * PAGE + 8, 8).unwrap();
        span.copy_from(&(page + 1).to_le_bytes());
    }
}

fn file_bytes(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn memory_that_was_used_before_holds_the_guest_and_nothing_else() {
    let source = memory(16 * MIB);
    // A few pages with content; most are holes, and some are zero and populated.
    write(&source, 0, [1, 2, 40]);
    source.span(1, 7 * PAGE, PAGE).unwrap().fill_zero();
    let used = memory(16 * MIB);
    fill(&used, 3, 5);
    let done = move_idle(&source, Some(used));
    assert_eq!(differing_page(&source, &done.destination), None);
    assert!(
        done.received.report.pages_cleared > 3000,
        "{:?}",
        done.received.report
    );
    assert_eq!(done.sent.report.digest_equal, Some(true));
}

#[test]
fn a_second_attempt_into_the_same_memory_is_right() {
    let first = memory(8 * MIB);
    fill(&first, 4, 3);
    let (file, into) = shared(8 * MIB, MemfdFlags::empty()).unwrap();
    // In the regions of the model machine.
    let layouts: Vec<_> = first.layouts().collect();
    let into_first = GuestMemory::shared_file(&file, &layouts).unwrap();
    drop(into);
    let done = move_idle(&first, Some(into_first.clone()));
    assert_eq!(differing_page(&first, &done.destination), None);
    let second = memory(8 * MIB);
    write(&second, 1, [3, 9]);
    let done = move_idle(&second, Some(into_first));
    assert_eq!(differing_page(&second, &done.destination), None);
}

#[test]
fn holes_of_shared_memory_stay_holes_on_both_sides() {
    let (source_file, source) = shared(256 * MIB, MemfdFlags::empty()).unwrap();
    let (destination_file, destination) = shared(256 * MIB, MemfdFlags::empty()).unwrap();
    write(&source, 0, 0..3000);
    write(&source, 1, 20_000..23_400);
    let before = file_bytes(&source_file);
    let done = move_idle(&source, Some(destination));
    let report = &done.sent.report;
    // Saving the state writes one page.
    let most = before + PAGE;
    assert!(
        file_bytes(&source_file) <= most,
        "{} of {before}",
        file_bytes(&source_file)
    );
    assert!(
        file_bytes(&destination_file) <= most,
        "{}",
        file_bytes(&destination_file)
    );
    assert_eq!(report.left_out_bytes, 256 * MIB - before);
    assert_eq!(done.received.report.pages_cleared, 0);
    assert_eq!(differing_page(&source, &done.destination), None);
}

#[test]
fn huge_pages_that_nobody_used_are_not_taken_on_either_side() {
    let huge = |bytes| shared(bytes, MemfdFlags::HUGETLB);
    let Some(((source_file, source), (destination_file, destination))) =
        huge(16 * MIB).zip(huge(16 * MIB))
    else {
        eprintln!(
            "SKIPPED huge_pages_that_nobody_used_are_not_taken_on_either_side: needs 16 huge pages (nr_hugepages)"
        );
        return;
    };
    write(&source, 0, [0]);
    // What saving the state writes.
    write(&source, 1, [0]);
    let done = move_idle(&source, Some(destination));
    assert_eq!(
        (file_bytes(&source_file), file_bytes(&destination_file)),
        (4 * MIB, 4 * MIB)
    );
    assert_eq!(done.sent.report.left_out_bytes, 12 * MIB);
    assert_eq!(differing_page(&source, &done.destination), None);
}

/// A machine that says which of its pages are unused.
struct Ballooned {
    memory: GuestMemory,
    marker: VmmMarker,
    unused: Vec<Run>,
    /// A page that is taken out of the balloon when the guest is asked for its state.
    deflated: u64,
}

impl tx::Vmm for Ballooned {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(vec![tx::Blob {
            kind: BLOB_KIND,
            version: 1,
            bytes: b"model machine"[..].into(),
        }])
    }

    fn unused_pages(&mut self) -> Result<Vec<Run>, tx::VmmError> {
        Ok(self.unused.clone())
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        write(&self.memory, 0, [self.deflated]);
        self.marker.mark_bytes(0, self.deflated * PAGE, PAGE);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(vec![tx::Blob {
            kind: BLOB_KIND,
            version: 2,
            bytes: b"state"[..].into(),
        }])
    }

    fn resume(&mut self, _: tx::Reclaimed) -> Result<(), tx::VmmError> {
        Ok(())
    }
}

#[test]
fn pages_that_the_vmm_calls_unused_are_not_moved_until_they_are_written() {
    let source = memory(16 * MIB);
    fill(&source, 5, 0);
    let writes = VmmWrites::new();
    let machine = Ballooned {
        memory: source.clone(),
        marker: writes.marker(),
        unused: vec![
            Run {
                region: 0,
                first: 100,
                count: 500,
            },
            // Overlapping is allowed.
            Run {
                region: 0,
                first: 300,
                count: 400,
            },
        ],
        deflated: 350,
    };
    let done = migrate(
        Box::new(machine),
        vec![Box::new(writes)],
        source.clone(),
        None,
    );
    assert_eq!(done.sent.report.left_out_bytes, 600 * PAGE);
    let zero = |page: u64| {
        done.destination
            .span(0, page * PAGE, PAGE)
            .unwrap()
            .is_zero()
    };
    for page in 100..700 {
        assert_eq!(zero(page), page != 350, "page {page}");
    }
    assert!(!zero(99) && !zero(700));
}

/// Moves a machine of 16 MiB over one channel through a proxy.
fn through_proxy(
    machine: SourceMachine,
    source: &GuestMemory,
    rules: Vec<Rule>,
) -> (tx::Report, rx::Report) {
    let (listeners, address) = listen();
    let target = address.to_string();
    let target = target.trim_start_matches("tcp:").parse().unwrap();
    let proxy = Proxy::start(target, rules).unwrap();
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(DestinationMachine::default()),
        listeners,
        config: rx::Config::default(),
        spawner: None,
    });
    let reception = reception.unwrap();
    let sources = vec![machine.source()];
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(machine),
        memory: source.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address: format!("tcp:{}", proxy.address()).parse().unwrap(),
            options: TcpOptions::default().into(),
        }),
        config: tx::Config::builder()
            .downtime_limit(Duration::from_secs(60))
            .channels(1)
            .build()
            .unwrap(),
        spawner: None,
    });
    let (sent, received) = (migration.unwrap().wait(), reception.wait());
    assert!(sent.error.is_none(), "{}", sent.error.unwrap());
    (sent.report, received.report)
}

#[test]
fn a_page_that_the_way_changed_is_called_damaged() {
    let source = memory(16 * MIB);
    fill(&source, 6, 0);
    let machine = SourceMachine::start(source.clone(), 0, 0, 6);
    let flip = Rule {
        // The lane; in the body of its first frame of pages.
        connection: 1,
        direction: Direction::Forth,
        after: 100_000,
        impairment: Impairment::Flip,
    };
    let (sent, received) = through_proxy(machine, &source, vec![flip]);
    assert_eq!(
        (sent.pages_mismatched, sent.pages_torn, sent.pages_damaged),
        (1, 0, 1)
    );
    assert_eq!((received.pages_mismatched, received.damaged.len()), (1, 0));
}

#[test]
fn what_a_busy_guest_tears_is_not_called_damaged() {
    let source = memory(16 * MIB);
    fill(&source, 7, 0);
    let machine = SourceMachine::start(source.clone(), 2, 200_000, 7);
    let (sent, received) = through_proxy(machine, &source, vec![]);
    assert_eq!(sent.pages_mismatched, received.pages_mismatched);
    assert_eq!(received.damaged, []);
    // This machine's writers mark after they wrote. One that was put to sleep between the two may be judged wrongly.
    let (torn, damaged) = (sent.pages_torn, sent.pages_damaged);
    assert!(damaged <= 1 + torn / 10, "{torn} torn, {damaged} damaged");
}

#[test]
fn a_guest_without_room_is_refused_in_set_up_and_runs_on() {
    let source = memory(16 * MIB);
    let layouts: Vec<_> = source.layouts().collect();
    // A file that is shortened behind its mapping, as one that was made too small.
    let (file, _) = shared(16 * MIB, MemfdFlags::empty()).unwrap();
    let given = GuestMemory::shared_file(&file, &layouts).unwrap();
    file.set_len(8 * MIB).unwrap();
    let (listeners, address) = listen();
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(DestinationMachine {
            given: Some(given),
            ..DestinationMachine::default()
        }),
        listeners,
        config: rx::Config::builder()
            .overcommit(rx::Overcommit::Allowed)
            .build()
            .unwrap(),
        spawner: None,
    });
    let reception = reception.unwrap();
    let machine = SourceMachine::start(source.clone(), 0, 0, 8);
    let running = Arc::clone(&machine.running);
    let sources = vec![machine.source()];
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(machine),
        memory: source,
        sources,
        dial: Box::new(tx::Dialer {
            address,
            options: TcpOptions::default().into(),
        }),
        config: config(),
        spawner: None,
    });
    let sent = migration.unwrap().wait();
    assert!(running.load(Ordering::SeqCst));
    let received = reception.wait().error.unwrap();
    assert_eq!(received.code(), "receiver.no-room");
    let text = sent.error.unwrap().to_string();
    assert!(
        text.contains("has 8388608 bytes and is mapped up to 16777216"),
        "{text}"
    );
}

/// What a migration of a guest of 1 GiB that is nine tenths holes makes real, and how long its first round takes: for
/// `docs/measurements/memory.md`.
#[test]
#[ignore = "a measurement"]
fn figures_of_guests_that_are_mostly_holes() {
    const BYTES: u64 = 1 << 30;
    let tmpfs = || {
        let path = format!("/dev/shm/multifd-{}", std::process::id());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .ok()?;
        std::fs::remove_file(path).ok()?;
        file.set_len(BYTES).ok()?;
        let half = BYTES / 2;
        let layouts = [(0, half), (1 << 32, half)].map(|(guest_address, bytes)| RegionLayout {
            guest_address,
            bytes,
        });
        let memory = GuestMemory::shared_file(&file, &layouts).ok()?;
        Some((Some(file), memory))
    };
    let memfd = |flags| shared(BYTES, flags).map(|(file, memory)| (Some(file), memory));
    type Make<'m> = (
        &'static str,
        Box<dyn Fn() -> Option<(Option<File>, GuestMemory)> + 'm>,
    );
    let kinds: [Make<'_>; 4] = [
        ("private", Box::new(|| Some((None, memory(BYTES))))),
        ("memfd", Box::new(|| memfd(MemfdFlags::empty()))),
        ("tmpfs file", Box::new(tmpfs)),
        ("hugetlbfs", Box::new(|| memfd(MemfdFlags::HUGETLB))),
    ];
    println!(
        "| memory | looked | round 0 | populated, source | source, after | destination, after | left out |"
    );
    for (name, make) in kinds {
        let Some(((source_file, source), (file, given))) = make().zip(make()) else {
            println!("| {name} | not here |");
            continue;
        };
        // The first tenth of each region.
        write(&source, 0, 0..source.layout(0).unwrap().bytes / PAGE / 10);
        write(&source, 1, 0..source.layout(1).unwrap().bytes / PAGE / 10);
        let bytes = |file: &Option<File>, memory: &GuestMemory| match file {
            Some(file) => file_bytes(file) / MIB,
            None => {
                let mut bytes = 0;
                let _ = memory.each_populated(&mut |_, range| bytes += range.end - range.start);
                bytes / MIB
            }
        };
        let before = bytes(&source_file, &source);
        let began = std::time::Instant::now();
        let _ = source.each_populated(&mut |_, _| {});
        let looked = began.elapsed();
        let done = move_idle(&source, Some(given));
        let report = &done.sent.report;
        println!(
            "| {name} | {:.2} ms | {:.0} ms | {before} MiB | {} MiB | {} MiB | {} MiB |",
            looked.as_secs_f64() * 1e3,
            report.round_list[0].ms,
            bytes(&source_file, &source),
            bytes(&file, &done.destination),
            report.left_out_bytes / MIB
        );
    }
}
