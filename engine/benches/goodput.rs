//! Goodput of a migration by engines beside the same one in process, in one run, alternated.
//!
//! ```text
//!   in process   this process (source, multifd)  ═══ TCP over loopback ═══  its child (destination, multifd)
//!   by engines   this process ─ engine ═══ TCP over loopback ═══ engine ─ its child
//! ```
//! Memory is a memfd of pages that are not zero, and nobody writes it meanwhile: what is compared is the way of the bytes. The dirty pages are
//! looked for all the same, by userfaultfd.
//!
//! `cargo bench -p multifd-engine --bench goodput -- [--gib N] [--runs N]`
#![allow(clippy::print_stdout)] // its output is its purpose

use std::error::Error;
use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use multifd::tracking::process::{MappedRange, Permission, ProcessSource};
use multifd::transport::{
    Address, ChannelOptions, FileRegion, GuestMemory, Listener, RegionLayout,
};
use multifd::{Blob, Layout, VmmError, destination, source};
use multifd_engine::client::{
    Destination, DestinationMachine, MemoryRegion, Source, SourceMachine, Tracker,
};
use multifd_engine::socket::{Listening, Socket};

const PAGE: u64 = 4096;

type Done<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Done<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str, default: u64| {
        let at = arguments.iter().position(|word| word == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok())
            .unwrap_or(default)
    };
    match arguments.first().map(String::as_str) {
        Some("as-destination") => return as_destination(),
        Some("as-vmm") => return as_vmm(Path::new(&arguments[1])),
        _ => {}
    }
    let bytes = value("--gib", 2) << 30;
    let runs = value("--runs", 5);
    let guest = Guest::new(bytes)?;
    guest.fill()?;
    println!(
        "{} GiB, {runs} pairs, 4 channels by TCP over loopback",
        bytes >> 30
    );
    println!(
        " run   in process, MiB/s   by engines, MiB/s   ratio      CPU s of both sides   ratio"
    );
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    // One of each to warm up, which does not count.
    for run in 0..=runs {
        // Who goes first is alternated as well.
        let (a, b) = if run % 2 == 0 {
            let a = in_process(&guest)?;
            (a, by_engines(&guest)?)
        } else {
            let b = by_engines(&guest)?;
            (in_process(&guest)?, b)
        };
        if run > 0 {
            line(&format!("{run:>4}"), &a, &b);
            inside.push(a);
            outside.push(b);
        }
    }
    line(" med", &medians(&inside), &medians(&outside));
    Ok(())
}

/// What one migration took.
#[derive(Clone, Copy)]
struct Took {
    /// MiB a second.
    goodput: f64,
    /// Seconds of processor time of both sides' threads.
    cpu: f64,
}

fn line(name: &str, a: &Took, b: &Took) {
    println!(
        "{name} {:>19.0} {:>19.0} {:>7.3} {:>12.2} {:>11.2} {:>7.3}",
        a.goodput,
        b.goodput,
        b.goodput / a.goodput,
        a.cpu,
        b.cpu,
        b.cpu / a.cpu
    );
}

fn medians(all: &[Took]) -> Took {
    let median = |value: fn(&Took) -> f64| {
        let mut values: Vec<f64> = all.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Took {
        goodput: median(|took| took.goodput),
        cpu: median(|took| took.cpu),
    }
}

/// Memory in one region.
struct Guest {
    file: OwnedFd,
    memory: GuestMemory,
    bytes: u64,
}

impl Guest {
    fn new(bytes: u64) -> Done<Self> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("guest", flags)?;
        rustix::fs::ftruncate(&file, bytes)?;
        let memory = GuestMemory::from_files(&[FileRegion {
            layout: layout(bytes),
            file: file.as_fd(),
            offset: 0,
        }])?;
        Ok(Self {
            file,
            memory,
            bytes,
        })
    }

    fn fill(&self) -> Done<()> {
        let mut page = [0u8; PAGE as usize];
        for number in 0..self.bytes / PAGE {
            for (word, place) in page.chunks_exact_mut(8).zip(1u64..) {
                let value = (number << 9 | place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                word.copy_from_slice(&value.to_le_bytes());
            }
            self.memory.span(0, number * PAGE, PAGE)?.copy_from(&page);
        }
        Ok(())
    }

    fn range(&self) -> Done<MappedRange> {
        let span = self.memory.span(0, 0, self.bytes)?;
        Ok(MappedRange {
            region: 0,
            first: 0,
            address: span.as_ptr() as u64,
            pages: self.bytes / PAGE,
        })
    }

    fn handed_over(&self) -> Result<Vec<MemoryRegion>, VmmError> {
        Ok(vec![MemoryRegion {
            guest_address: 0,
            bytes: self.bytes,
            file: self.file.try_clone().map_err(VmmError::new)?,
            offset: 0,
        }])
    }
}

fn layout(bytes: u64) -> RegionLayout {
    RegionLayout {
        guest_address: 0,
        bytes,
    }
}

/// A machine that does nothing.
struct Machine<'g>(&'g Guest);

struct Idle;

impl source::Vmm for Idle {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }
    fn pause(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }
    fn resume(&mut self, _: source::Reclaimed) -> Result<(), VmmError> {
        Ok(())
    }
}

impl SourceMachine for Machine<'_> {
    fn memory(&mut self) -> Result<Vec<MemoryRegion>, VmmError> {
        self.0.handed_over()
    }
    fn trackers(&mut self) -> Result<Vec<Tracker>, VmmError> {
        let permission = Permission::of_this_process().map_err(VmmError::new)?;
        let ranges = vec![self.0.range().map_err(VmmError::new)?];
        Ok(vec![Tracker::Process { permission, ranges }])
    }
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }
    fn pause(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }
    fn resume(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
}

#[derive(Default)]
struct Arriving(Option<Guest>);

impl Arriving {
    fn build(&mut self, bytes: u64) -> Result<&Guest, VmmError> {
        Ok(self.0.insert(Guest::new(bytes).map_err(VmmError::new)?))
    }
}

impl destination::Vmm for Arriving {
    fn prepare(&mut self, _: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
        let bytes = layout.regions().map(|region| region.bytes).sum();
        Ok(self.build(bytes)?.memory.clone())
    }
    fn load(&mut self, _: Vec<Blob>) -> Result<(), VmmError> {
        Ok(())
    }
    fn resume(&mut self, _: destination::Ownership) -> Result<(), VmmError> {
        Ok(())
    }
}

impl DestinationMachine for Arriving {
    fn prepare(
        &mut self,
        _: Vec<Blob>,
        regions: &[RegionLayout],
    ) -> Result<Vec<MemoryRegion>, VmmError> {
        let bytes = regions.iter().map(|region| region.bytes).sum();
        self.build(bytes)?.handed_over()
    }
    fn load(&mut self, _: Vec<Blob>) -> Result<(), VmmError> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn discard(&mut self) {
        self.0 = None;
    }
}

/// Starts a program, and reads the address that it prints.
fn listening(command: &mut Command) -> Done<(Child, String)> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().ok_or("it is piped")?;
    let mut line = String::new();
    let mut output = BufReader::new(output);
    output.read_line(&mut line)?;
    // What it says later is read as well, so that it never waits.
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    let address = line.trim().trim_start_matches("listening on ").to_owned();
    Ok((child, address))
}

fn this(arguments: &[&str]) -> Done<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments);
    Ok(command)
}

fn in_process(guest: &Guest) -> Done<Took> {
    let (mut child, address) = listening(&mut this(&["as-destination"])?)?;
    let dial = source::SpreadDialer {
        control: address.parse()?,
        data: Vec::new(),
        options: ChannelOptions::default(),
    };
    let config = source::Config::builder().channels(4).build()?;
    let parts = source::Parts::new(Idle, guest.memory.clone(), dial)
        .source(ProcessSource::new(vec![guest.range()?])?)
        .config(config);
    let finished = source::Migration::start(parts)
        .map_err(|failed| failed.error)?
        .wait();
    child.wait()?;
    if finished.report.outcome != source::OutcomeKind::Migrated {
        return Err(format!("in process: {:?}", finished.error).into());
    }
    let report = finished.report;
    Ok(Took {
        goodput: report.goodput_mib_s,
        cpu: report.cpu_sender_s + report.cpu_receiver_s.unwrap_or_default(),
    })
}

fn as_destination() -> Done<()> {
    let address: Address = "127.0.0.1:0".parse()?;
    let listener = Listener::bind_with(&address, &ChannelOptions::default())?;
    println!("{}", listener.local_address());
    let parts = destination::Parts::new(Arriving::default()).listener(listener);
    let finished = destination::Reception::start(parts)
        .map_err(|failed| failed.error)?
        .wait();
    match finished.error {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

fn by_engines(guest: &Guest) -> Done<Took> {
    let engine = env!("CARGO_BIN_EXE_multifd-engine");
    let path = std::env::temp_dir().join(format!("mfde-bench-{}", std::process::id()));
    let path = path.to_str().ok_or("a path in UTF-8")?;
    let _ = std::fs::remove_file(path);
    let (mut vmm, _) = listening(&mut this(&["as-vmm", path])?)?;
    let receive = ["receive", "--vmm", path, "--listen", "127.0.0.1:0"];
    let (mut receiver, address) = listening(Command::new(engine).args(receive))?;
    let (theirs, ours) = Socket::pair()?;
    let sender = Command::new(engine)
        .args([
            "send",
            "--vmm",
            "-",
            "--connect",
            &address,
            "--report",
            "json",
        ])
        .stdin(theirs.into_fd())
        .stdout(Stdio::piped())
        .spawn()?;
    Source::new(Machine(guest)).serve(&ours)?;
    let output = sender.wait_with_output()?;
    receiver.wait()?;
    vmm.wait()?;
    let _ = std::fs::remove_file(path);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    if report["outcome"] != "migrated" {
        return Err(format!("by engines: {report}").into());
    }
    let number = |name: &str| report[name].as_f64().ok_or("a report without figures");
    Ok(Took {
        goodput: number("goodput_mib_s")?,
        cpu: number("cpu_sender_s")? + number("cpu_receiver_s")?,
    })
}

fn as_vmm(path: &Path) -> Done<()> {
    let listening = Listening::bind(path)?;
    println!("listening on {}", path.display());
    let engine = listening.accept()?;
    Destination::new(Arriving::default()).serve(&engine)?;
    Ok(())
}
