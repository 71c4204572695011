//! Goodput of a whole migration against a bare socket loop, alternated in one run.
//!
//! ```text
//! cargo bench -p multifd-tests --bench stream -- [--json] [--quick] [--rounds N] [--memory MIB] [--channels 1,2,4] [--content NAME] [--body KIB] [--buffers KIB]
//!     [--congestion NAME] [--bare-congestion NAME]
//! ```
//! *Ours* is a complete migration of an idle machine from memory to prepared memory over TCP on the loopback interface: hello,
//! set-up, rounds, checksums on heads and bodies, digest, commit. Goodput is guest memory divided by the time from READY until
//! the last round was closed at the destination; CPU is that of all migration threads of both sides.
//! *Bare* is as many connections, one thread at each end, `writev` from mapped memory and `readv` into mapped memory with the
//! same body size, the kernel's default options, and nothing else: no heads, no checks. `--bare-congestion reno` gives it the
//! congestion control that our channels choose on one host. Medians over the rounds; `ratio` is the median of the ratios of
//! neighbours, which does not suffer when the machine's speed drifts, and `of_best` that of the ratios to the best number of
//! channels in the same round.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program's business

use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::model::{Random, SourceMachine};
use multifd_transport::memory::RegionLayout;
use multifd_transport::{GuestMemory, Listener, TcpOptions};
use multifd_wire::Layout;
use rustix::time::{ClockId, clock_gettime};
use socket2::SockRef;

/// One measurement: goodput in MiB/s and CPU seconds of both ends.
#[derive(Debug, Clone, Copy)]
struct Figure {
    mib_s: f64,
    cpu_s: f64,
}

#[derive(Debug)]
struct Settings {
    json: bool,
    rounds: usize,
    memory_mib: u64,
    body_bytes: usize,
    buffer_bytes: Option<usize>,
    congestion: Option<String>,
    bare_congestion: Option<String>,
    channels: Vec<usize>,
    contents: Vec<Content>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Incompressible,
    HalfZero,
    AllZero,
}

impl Content {
    const ALL: [Self; 3] = [Self::Incompressible, Self::HalfZero, Self::AllZero];

    fn name(self) -> &'static str {
        match self {
            Self::Incompressible => "incompressible",
            Self::HalfZero => "half-zero",
            Self::AllZero => "all-zero",
        }
    }

    fn is_zero(self, page: u64) -> bool {
        match self {
            Self::Incompressible => false,
            // Runs of 16 pages, as memory has them: not every second page.
            Self::HalfZero => (page / 16).is_multiple_of(2),
            Self::AllZero => true,
        }
    }
}

fn main() {
    let settings = settings();
    let bytes = settings.memory_mib << 20;
    let bare_source = prepared(bytes as usize);
    let mut bare_destination = prepared(bytes as usize);
    for content in &settings.contents {
        let source = filled(bytes, *content);
        // Channel counts take turns within a round, so that a machine that gets slower makes all of them slower.
        let mut rows = vec![(Vec::new(), Vec::new()); settings.channels.len()];
        for _ in 0..settings.rounds {
            for (channels, (ours, bare)) in settings.channels.iter().zip(&mut rows) {
                bare.push(bare_loop(
                    &bare_source,
                    &mut bare_destination,
                    *channels,
                    &settings,
                ));
                ours.push(migrate(&source, *channels, &settings));
            }
        }
        let best = rows
            .iter()
            .map(|(ours, _)| ours)
            .max_by(|one, other| goodput(one).total_cmp(&goodput(other)))
            .cloned()
            .unwrap_or_default();
        for (channels, (ours, bare)) in settings.channels.iter().zip(&rows) {
            print_row(&settings, *content, *channels, ours, bare, &best);
        }
    }
}

fn settings() -> Settings {
    let mut s = Settings {
        json: false,
        rounds: 7,
        memory_mib: 2048,
        body_bytes: 256 << 10,
        buffer_bytes: None,
        congestion: None,
        bare_congestion: None,
        channels: vec![1, 2, 4, 8, 16],
        contents: Content::ALL.to_vec(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--json" => s.json = true,
            "--quick" => (s.rounds, s.memory_mib, s.channels) = (3, 512, vec![1, 4]),
            "--rounds" => s.rounds = value().parse().expect("a number"),
            "--memory" => s.memory_mib = value().parse().expect("MiB"),
            "--body" => s.body_bytes = value().parse::<usize>().expect("KiB") << 10,
            "--buffers" => s.buffer_bytes = Some(value().parse::<usize>().expect("KiB") << 10),
            "--congestion" => s.congestion = Some(value()),
            "--bare-congestion" => s.bare_congestion = Some(value()),
            "--channels" => {
                s.channels = value()
                    .split(',')
                    .map(|n| n.parse().expect("a number"))
                    .collect()
            }
            "--content" => {
                let name = value();
                s.contents.retain(|content| content.name() == name);
            }
            // What `cargo bench` passes to every harness.
            "--bench" => {}
            other => panic!("unknown argument {other}; see the head of tests/benches/stream.rs"),
        }
    }
    s
}

/// Memory in huge pages, every page backed, every byte the same.
fn prepared(bytes: usize) -> MmapMut {
    let mut memory = MmapMut::map_anon(bytes).expect("memory for the bench");
    let _ = memory.advise(Advice::HugePage);
    memory.fill(0x5a);
    memory
}

fn filled(bytes: u64, content: Content) -> GuestMemory {
    let memory = GuestMemory::anonymous(&[RegionLayout {
        guest_address: 0,
        bytes,
    }])
    .expect("memory for the bench");
    memory.populate(0, 0..bytes).expect("memory for the bench");
    let mut random = Random::new(7);
    let mut octets = vec![0u8; 4096];
    for page in (0..bytes / 4096).filter(|page| !content.is_zero(*page)) {
        for word in octets.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next_u64().to_le_bytes());
        }
        memory
            .span(0, page * 4096, 4096)
            .expect("inside")
            .copy_from(&octets);
    }
    memory
}

/// The floor: each connection carries its share of the memory.
fn bare_loop(
    source: &[u8],
    destination: &mut [u8],
    channels: usize,
    settings: &Settings,
) -> Figure {
    let body = settings.body_bytes;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let pairs: Vec<(TcpStream, TcpStream)> = (0..channels)
        .map(|_| {
            let ours = TcpStream::connect(address).expect("loopback");
            let theirs = listener.accept().expect("loopback").0;
            for socket in [&ours, &theirs] {
                socket.set_nodelay(true).expect("TCP_NODELAY");
                if let Some(name) = &settings.bare_congestion {
                    SockRef::from(socket)
                        .set_tcp_congestion(name.as_bytes())
                        .expect("a congestion control");
                }
            }
            (ours, theirs)
        })
        .collect();
    let share = source.len() / channels;
    let (cpu, began) = (process_cpu(), Instant::now());
    std::thread::scope(|scope| {
        for ((pair, from), to) in pairs
            .into_iter()
            .zip(source.chunks(share))
            .zip(destination.chunks_mut(share))
        {
            let (mut ours, mut theirs) = pair;
            scope.spawn(move || {
                for piece in from.chunks(body) {
                    let mut sent = 0;
                    while sent < piece.len() {
                        sent += ours
                            .write_vectored(&[IoSlice::new(&piece[sent..])])
                            .expect("writev");
                    }
                }
            });
            scope.spawn(move || {
                for piece in to.chunks_mut(body) {
                    let mut received = 0;
                    while received < piece.len() {
                        received += theirs
                            .read_vectored(&mut [IoSliceMut::new(&mut piece[received..])])
                            .expect("readv");
                    }
                }
                let mut end = [0u8];
                assert_eq!(theirs.read(&mut end).expect("the end"), 0);
            });
        }
    });
    figure(source.len() as u64, began.elapsed(), process_cpu() - cpu)
}

/// A destination whose memory is prepared before READY.
struct Prepared;

impl rx::Vmm for Prepared {
    fn prepare(&mut self, _: Vec<rx::Blob>, layout: &Layout) -> Result<GuestMemory, rx::VmmError> {
        let regions: Vec<RegionLayout> = layout
            .regions()
            .map(|region| RegionLayout {
                guest_address: region.guest_address,
                bytes: region.bytes,
            })
            .collect();
        let memory = GuestMemory::anonymous(&regions).map_err(rx::VmmError::new)?;
        for (index, region) in (0..).zip(&regions) {
            memory
                .populate(index, 0..region.bytes)
                .map_err(rx::VmmError::new)?;
        }
        Ok(memory)
    }

    fn load(&mut self, _: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        Ok(())
    }

    fn resume(&mut self, _: rx::Ownership) -> Result<(), rx::VmmError> {
        Ok(())
    }
}

fn migrate(source: &GuestMemory, channels: usize, settings: &Settings) -> Figure {
    let options = TcpOptions {
        send_buffer: settings.buffer_bytes,
        receive_buffer: settings.buffer_bytes,
        congestion: settings.congestion.clone(),
        ..TcpOptions::default()
    };
    let listener =
        Listener::bind(&"127.0.0.1:0".parse().expect("an address"), &options).expect("a port");
    let address = listener.local_address().clone();
    let parts = rx::Parts {
        vmm: Box::new(Prepared),
        listeners: vec![listener],
        config: rx::Config::default(),
        spawner: None,
    };
    let reception = rx::Reception::start(parts).expect("a thread");
    let machine = SourceMachine::start(source.clone(), 0, 0, 1);
    let config = tx::Config::builder()
        .channels(channels as u32)
        .body_bytes(settings.body_bytes as u64)
        .build()
        .expect("within limits");
    let parts = tx::Parts {
        sources: vec![machine.source()],
        vmm: Box::new(machine),
        memory: source.clone(),
        dial: Box::new(tx::Dialer {
            address,
            options: options.into(),
        }),
        config,
        spawner: None,
    };
    let sent = tx::Migration::start(parts).expect("a thread").wait();
    let received = reception.wait();
    assert!(
        sent.error.is_none() && received.error.is_none(),
        "{:?} {:?}",
        sent.error,
        received.error
    );
    assert_eq!(sent.report.digest_equal, Some(true));
    Figure {
        mib_s: sent.report.goodput_mib_s,
        cpu_s: sent.report.cpu_sender_s + received.report.cpu_receiver_s,
    }
}

fn print_row(
    settings: &Settings,
    content: Content,
    channels: usize,
    ours: &[Figure],
    bare: &[Figure],
    best: &[Figure],
) {
    let gib = settings.memory_mib as f64 / 1024.0;
    let of = |figures: &[Figure], f: fn(&Figure) -> f64| median(figures.iter().map(f).collect());
    let ratio_to = |others: &[Figure]| {
        let pairs = ours.iter().zip(others);
        median(pairs.map(|(one, other)| one.mib_s / other.mib_s).collect())
    };
    let ratio = ratio_to(bare);
    let of_best = ratio_to(best);
    let row = serde_json::json!({
        "content": content.name(),
        "channels": channels,
        "goodput_mib_s": of(ours, |f| f.mib_s).round(),
        "bare_mib_s": of(bare, |f| f.mib_s).round(),
        "ratio": (ratio * 1000.0).round() / 1000.0,
        "of_best": (of_best * 1000.0).round() / 1000.0,
        "cpu_s_per_gib": (of(ours, |f| f.cpu_s) / gib * 1000.0).round() / 1000.0,
        "bare_cpu_s_per_gib": (of(bare, |f| f.cpu_s) / gib * 1000.0).round() / 1000.0,
    });
    if settings.json {
        println!("{row}");
    } else {
        println!(
            "{:<15} {:>2} channels: {:>6} MiB/s, bare {:>6} MiB/s, ratio {:.3}, of the best {:.3}; CPU {:.3} s/GiB, bare {:.3}",
            content.name(),
            channels,
            row["goodput_mib_s"],
            row["bare_mib_s"],
            ratio,
            of_best,
            row["cpu_s_per_gib"],
            row["bare_cpu_s_per_gib"]
        );
    }
}

fn goodput(figures: &[Figure]) -> f64 {
    median(figures.iter().map(|figure| figure.mib_s).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn figure(bytes: u64, took: Duration, cpu_s: f64) -> Figure {
    Figure {
        mib_s: bytes as f64 / f64::from(1 << 20) / took.as_secs_f64(),
        cpu_s,
    }
}

fn process_cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
