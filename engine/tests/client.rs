//! A VMM in Rust on both sides, over the client, with engines that are other processes.
//!
//! Its guest is a thread that writes pages, each with the number of its last write; what was written is known, so that what arrived can
//! be compared with it.
#![allow(clippy::print_stdout)] // what was drawn, and what was skipped

mod common;

use std::io::{BufRead as _, BufReader};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use common::engine_program;
use multifd::tracking::process::{MappedRange, Permission};
use multifd::transport::{FileRegion, GuestMemory, RegionLayout};
use multifd::{Blob, VmmError};
use multifd_engine::client::{
    Destination, DestinationMachine, MemoryRegion, Served, Source, SourceMachine, Tracker, say,
};
use multifd_engine::protocol::{Collect, Kind, Outcome, State};
use multifd_engine::socket::Socket;

const PAGE: u64 = 4096;
const REGIONS: [RegionLayout; 2] = [
    RegionLayout {
        guest_address: 0,
        bytes: 8 << 20,
    },
    RegionLayout {
        guest_address: 1 << 32,
        bytes: 24 << 20,
    },
];
const PAGES: u64 = (32 << 20) / PAGE;

/// Both regions in one file.
struct Memory {
    file: OwnedFd,
    mapped: GuestMemory,
}

impl Memory {
    fn new() -> Self {
        let file = memfd(32 << 20);
        let mut offset = 0;
        let regions = REGIONS.map(|layout| {
            let region = FileRegion {
                layout,
                file: std::os::fd::AsFd::as_fd(&file),
                offset,
            };
            offset += layout.bytes;
            region
        });
        let mapped = GuestMemory::from_files(&regions).unwrap();
        Self { file, mapped }
    }

    fn handed_over(&self) -> Vec<MemoryRegion> {
        let mut offset = 0;
        let region = |layout: &RegionLayout| {
            let region = MemoryRegion {
                guest_address: layout.guest_address,
                bytes: layout.bytes,
                file: self.file.try_clone().unwrap(),
                offset,
            };
            offset += layout.bytes;
            region
        };
        REGIONS.iter().map(region).collect()
    }

    /// A page by its number over both regions.
    fn place(page: u64) -> (u32, u64) {
        let low = REGIONS[0].bytes / PAGE;
        match page < low {
            true => (0, page * PAGE),
            false => (1, (page - low) * PAGE),
        }
    }

    fn write(&self, page: u64, value: u64) {
        let (region, offset) = Self::place(page);
        let span = self.mapped.span(region, offset, PAGE).unwrap();
        let bytes: Vec<u8> = value.to_le_bytes().repeat(PAGE as usize / 8);
        span.copy_from(&bytes);
    }

    fn read(&self, page: u64) -> u64 {
        let (region, offset) = Self::place(page);
        let mut bytes = [0; PAGE as usize];
        let span = self.mapped.span(region, offset, PAGE).unwrap();
        span.copy_to(&mut bytes);
        let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(
            bytes.chunks(8).all(|word| word == first.to_le_bytes()),
            "page {page} is torn"
        );
        first
    }
}

fn memfd(bytes: u64) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("guest", flags).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file
}

/// What the guest wrote last to each page, and which pages since the last bitmap.
#[derive(Default)]
struct Written {
    last: Vec<u64>,
    dirty: Vec<u64>,
}

/// How its dirty pages are found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Engine,
    Bitmap,
}

struct Leaving {
    memory: Arc<Memory>,
    written: Arc<Mutex<Written>>,
    runs: Arc<AtomicBool>,
    by: By,
    bitmap: OwnedFd,
    guest: Option<JoinHandle<()>>,
    steps: Arc<AtomicU64>,
    resumed: u32,
    /// What it says to the engine while it pauses.
    wish: Option<(Arc<Socket>, Kind)>,
}

impl Leaving {
    fn new(by: By) -> Self {
        let written = Written {
            last: vec![0; PAGES as usize],
            dirty: vec![0; (PAGES / 64) as usize],
        };
        let mut machine = Self {
            memory: Arc::new(Memory::new()),
            written: Arc::new(Mutex::new(written)),
            runs: Arc::default(),
            by,
            bitmap: memfd(PAGES / 8),
            guest: None,
            steps: Arc::default(),
            resumed: 0,
            wish: None,
        };
        for page in (0..PAGES).step_by(2) {
            machine.memory.write(page, 7);
            machine.written.lock().unwrap().last[page as usize] = 7;
        }
        machine.run();
        machine
    }

    fn run(&mut self) {
        self.runs.store(true, Ordering::Relaxed);
        let (memory, written) = (Arc::clone(&self.memory), Arc::clone(&self.written));
        let (runs, steps) = (Arc::clone(&self.runs), Arc::clone(&self.steps));
        self.guest = Some(std::thread::spawn(move || {
            let mut at = 1u64;
            while runs.load(Ordering::Relaxed) {
                at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (page, value) = ((at >> 33) % PAGES, 100 + steps.load(Ordering::Relaxed));
                let mut written = written.lock().unwrap();
                memory.write(page, value);
                written.last[page as usize] = value;
                written.dirty[(page / 64) as usize] |= 1 << (page % 64);
                drop(written);
                if steps.fetch_add(1, Ordering::Relaxed) % 16 == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }));
    }
}

impl SourceMachine for Leaving {
    fn memory(&mut self) -> Result<Vec<MemoryRegion>, VmmError> {
        Ok(self.memory.handed_over())
    }

    fn trackers(&mut self) -> Result<Vec<Tracker>, VmmError> {
        if self.by == By::Bitmap {
            return Ok(vec![Tracker::Bitmap(self.bitmap.try_clone().unwrap())]);
        }
        let permission = Permission::of_this_process().map_err(VmmError::new)?;
        let ranges = REGIONS.iter().zip(0..).map(|(layout, region)| {
            let span = self.memory.mapped.span(region, 0, layout.bytes).unwrap();
            MappedRange {
                region,
                first: 0,
                address: span.as_ptr() as u64,
                pages: layout.bytes / PAGE,
            }
        });
        let ranges = ranges.collect();
        Ok(vec![Tracker::Process { permission, ranges }])
    }

    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(vec![Blob::new(1, 1, "a machine of two regions")])
    }

    fn collect(&mut self, step: Collect) -> Result<(), VmmError> {
        assert!(self.by == By::Bitmap);
        let mut written = self.written.lock().unwrap();
        if step != Collect::Start {
            let bytes: Vec<u8> = written
                .dirty
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            rustix::io::pwrite(&self.bitmap, &bytes, 0).unwrap();
        }
        written.dirty.fill(0);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.runs.store(false, Ordering::Relaxed);
        self.guest.take().map(JoinHandle::join);
        if let Some((socket, kind)) = self.wish.take() {
            say(&socket, kind).unwrap();
            // The engine heeds it within some hundredths of a second; the commit is far.
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(vec![Blob::new(2, 1, vec![5; 3 << 20])])
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.resumed += 1;
        self.run();
        Ok(())
    }
}

#[derive(Default)]
struct Arriving {
    memory: Option<Memory>,
    runs: bool,
    refuse: bool,
    discarded: u32,
}

impl DestinationMachine for Arriving {
    fn prepare(
        &mut self,
        configs: Vec<Blob>,
        regions: &[RegionLayout],
    ) -> Result<Vec<MemoryRegion>, VmmError> {
        assert_eq!(configs, [Blob::new(1, 1, "a machine of two regions")]);
        assert_eq!(regions, REGIONS);
        let memory = self.memory.insert(Memory::new());
        Ok(memory.handed_over())
    }

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
        assert_eq!(states, [Blob::new(2, 1, vec![5; 3 << 20])]);
        match self.refuse {
            true => Err(VmmError::new("no vCPU of that kind")),
            false => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), VmmError> {
        self.runs = true;
        Ok(())
    }

    fn discard(&mut self) {
        self.discarded += 1;
    }
}

/// Starts an engine with one end of a socket pair as its standard input.
fn engine(arguments: &[&str], socket: Socket) -> std::process::Child {
    Command::new(engine_program())
        .args(arguments)
        .stdin(socket.into_fd())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the engine starts")
}

/// Moves the guest once; what each side knows then.
fn moved(
    source: &mut Source<Leaving>,
    destination: &mut Destination<Arriving>,
    name: &str,
    wish: Option<Kind>,
) -> (Served, Served) {
    let path = std::env::temp_dir().join(format!("mfde-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let address = format!("unix:{}", path.display());
    let (theirs, ours) = Socket::pair().unwrap();
    let listen = [
        "receive",
        "--vmm",
        "-",
        "--one-attempt",
        "--listen",
        &address,
    ];
    let mut receiver = engine(&listen, theirs);
    let (left, arrived) = std::thread::scope(|threads| {
        let arriving = threads.spawn(|| destination.serve(&ours));
        // It says where it listens when it does.
        let mut line = String::new();
        let mut output = BufReader::new(receiver.stdout.take().expect("it is piped"));
        output.read_line(&mut line).expect("it says something");
        assert!(line.starts_with("listening on unix:"), "{line}");
        let (theirs, ours) = Socket::pair().unwrap();
        let mut sender = engine(&["send", "--vmm", "-", "--connect", &address], theirs);
        let ours = Arc::new(ours);
        source.machine.wish = wish.map(|kind| (Arc::clone(&ours), kind));
        let left = source.serve(&ours).unwrap();
        let arrived = arriving.join().unwrap().unwrap();
        sender.wait().unwrap();
        (left, arrived)
    });
    receiver.wait().unwrap();
    let _ = std::fs::remove_file(&path);
    (left, arrived)
}

fn outcome(served: &Served) -> (State, Option<Outcome>) {
    (served.state, served.ended.as_ref().map(|it| it.outcome))
}

fn is_moved_whole(by: By, name: &str) {
    let mut source = Source::new(Leaving::new(by));
    let mut destination = Destination::new(Arriving::default());
    while source.machine.steps.load(Ordering::Relaxed) < 100 {
        std::thread::yield_now();
    }
    let (left, arrived) = moved(&mut source, &mut destination, name, None);
    assert_eq!(
        outcome(&left),
        (State::Gone, Some(Outcome::Migrated)),
        "{left:?}"
    );
    assert_eq!(
        outcome(&arrived),
        (State::Taken, Some(Outcome::Migrated)),
        "{arrived:?}"
    );
    assert!(destination.machine.runs && !source.machine.runs.load(Ordering::Relaxed));
    let written = source.machine.written.lock().unwrap();
    let memory = destination.machine.memory.as_ref().unwrap();
    for page in 0..PAGES {
        assert_eq!(
            memory.read(page),
            written.last[page as usize],
            "page {page}"
        );
    }
}

#[test]
fn a_guest_whose_dirty_pages_the_engine_finds_arrives_whole() {
    if let Err(error) = Permission::of_this_process() {
        println!("SKIPPED a_guest_whose_dirty_pages_the_engine_finds_arrives_whole: {error}");
        return;
    }
    is_moved_whole(By::Engine, "by-engine");
}

#[test]
fn a_guest_whose_vmm_writes_a_bitmap_arrives_whole() {
    is_moved_whole(By::Bitmap, "by-bitmap");
}

#[test]
fn a_destination_that_refuses_the_state_leaves_the_guest_running_at_the_source() {
    let mut source = Source::new(Leaving::new(By::Bitmap));
    let refusing = Arriving {
        refuse: true,
        ..Arriving::default()
    };
    let mut destination = Destination::new(refusing);
    let (left, arrived) = moved(&mut source, &mut destination, "refused", None);
    assert_eq!(
        outcome(&left),
        (State::Fresh, Some(Outcome::Failed)),
        "{left:?}"
    );
    let words = left.ended.unwrap().text;
    assert!(words.contains("no vCPU of that kind"), "{words}");
    assert_eq!(outcome(&arrived), (State::Discarded, Some(Outcome::Failed)));
    assert_eq!(
        (destination.machine.discarded, destination.machine.runs),
        (1, false)
    );
    assert!(source.machine.runs.load(Ordering::Relaxed));
    assert_eq!(source.machine.resumed, 1);
    source.machine.pause().unwrap();
}

#[test]
fn a_vmm_that_wants_the_end_gets_it() {
    let mut source = Source::new(Leaving::new(By::Bitmap));
    let mut destination = Destination::new(Arriving::default());
    let cancel = Some(Kind::Cancel);
    let (left, arrived) = moved(&mut source, &mut destination, "cancelled", cancel);
    assert_eq!(
        outcome(&left),
        (State::Fresh, Some(Outcome::Cancelled)),
        "{left:?}"
    );
    assert_eq!(outcome(&arrived), (State::Discarded, Some(Outcome::Failed)));
    assert!(source.machine.runs.load(Ordering::Relaxed));
    source.machine.pause().unwrap();
}
