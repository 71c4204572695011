//! Migrates real VFIO devices, one to another, through the real source and destination in one process, and checks what came of it.
//!
//! For the lab. It opens the devices by either door, lets them write guest memory if they can (`labdev`), chooses how that is tracked,
//! and compares memory, device state and the order of states. It prints what it saw, and ends with status 1 if anything is wrong.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A program for a terminal.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use multifd_guest::vfio::{Door, Host, HostDevice};
use multifd_receiver as rx;
use multifd_receiver::vfio::VfioSink;
use multifd_sender as tx;
use multifd_sender::vfio::VfioSource;
use multifd_tests::model::{SourceMachine, fill, memory};
use multifd_tests::vfio_machine::{Destination, NotedSink, NotedSource, Seen, WithDevices, octets};
use multifd_tracking::Source;
use multifd_tracking::vfio::{
    DmaDevice, DmaGroup, DmaMap, DmaMemory, DmaOptions, MigrationDevice, MigrationState,
    Translation, choose,
};
use multifd_transport::{GuestMemory, Listener, TcpOptions};
use multifd_wire::DeviceState::{
    self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use multifd_wire::frame::DeviceFlags;

const HELP: &str = "\
usage: multifd-vfio [OPTIONS] SOURCE DESTINATION [SOURCE DESTINATION]...

Migrates each SOURCE device to its DESTINATION device, all in one migration, over TCP on this host. A device is its place in
sysfs, such as /sys/bus/platform/devices/labdev.0 or /sys/bus/mdev/devices/<uuid>.

  --door group|cdev|tracked   how devices are opened: a group in a type 1 container (default), the character device bound to
                              an iommufd, or that with a page table that tracks dirty pages
  --memory MIB                guest memory (default 16)
  --dma PAGES                 pages a second that a labdev writes (default 5000)
  --channels N                data channels (default 2)
  --times N                   migrate to and fro so many times (default 1)

Prints the tracking that was chosen and why, the states of each device in order, and sizes and times. Status 0 if memory and
devices are the same at the end and the states came in the right order; 1 if not; 2 for a wrong command line.";

struct Options {
    door: Door,
    memory_mib: u64,
    dma: u64,
    channels: u32,
    times: u32,
    pairs: Vec<[PathBuf; 2]>,
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        door: Door::Group,
        memory_mib: 16,
        dma: 5000,
        channels: 2,
        times: 1,
        pairs: Vec::new(),
    };
    let mut devices = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "-h" | "--help" => return Ok(None),
            "--door" => {
                options.door = match value()?.as_str() {
                    "group" => Door::Group,
                    "cdev" => Door::Cdev,
                    "tracked" => Door::CdevTracked,
                    other => bail!("--door {other}: group, cdev or tracked"),
                }
            }
            "--memory" => options.memory_mib = value()?.parse().context("--memory")?,
            "--dma" => options.dma = value()?.parse().context("--dma")?,
            "--channels" => options.channels = value()?.parse().context("--channels")?,
            "--times" => options.times = value()?.parse().context("--times")?,
            option if option.starts_with('-') => bail!("{option} is unknown; --help tells more"),
            _ => devices.push(PathBuf::from(argument)),
        }
    }
    let (pairs, rest) = devices.as_chunks::<2>();
    ensure!(
        !pairs.is_empty() && rest.is_empty(),
        "devices come in pairs: source, destination; --help tells more"
    );
    options.pairs = pairs.to_vec();
    Ok(Some(options))
}

/// Registers of `labdev` (tests/lab/module/labdev.h), by number.
const LABDEV_DMA_IOVA: u64 = 2;
const LABDEV_DMA_BYTES: u64 = 3;
const LABDEV_DMA_RATE: u64 = 6;
const LABDEV_DMA_PAGES: u64 = 7;
const LABDEV_TOUCHES: u64 = 11;
const LABDEV_CRC: u64 = 12;

/// A register of an `mtty` that keeps what is written: the scratch register of its first port.
const MTTY_SCRATCH: u64 = 7;
/// Where VFIO has the first base address register of a PCI device's configuration.
const PCI_BAR0: u64 = (7 << 40) + 0x10;

/// One side's devices.
struct Side {
    host: Host,
    devices: Vec<HostDevice>,
}

impl Side {
    fn open(door: Door, paths: &[&PathBuf]) -> Result<Self> {
        let mut host = Host::open(door).context("the host's side of VFIO")?;
        let devices = paths
            .iter()
            .map(|path| {
                host.open_device(path)
                    .with_context(|| format!("{}", path.display()))
            })
            .collect::<Result<_>>()?;
        Ok(Self { host, devices })
    }
}

fn map(host: &mut Host, memory: &GuestMemory) -> std::io::Result<()> {
    (0..)
        .zip(memory.layouts())
        .try_for_each(|(region, layout)| {
            host.map(memory, region, 0, layout.bytes, layout.guest_address)
        })
}

fn is_labdev(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("labdev"))
}

/// Gives the source's device something to lose.
fn begin(device: &HostDevice, path: &Path, memory: &GuestMemory, dma: u64) -> Result<()> {
    if is_labdev(path) {
        let window = memory
            .layouts()
            .last()
            .context("guest memory has a region")?;
        device.write_u64(LABDEV_DMA_IOVA * 8, window.guest_address)?;
        device.write_u64(LABDEV_DMA_BYTES * 8, window.bytes)?;
        device.write_u64(LABDEV_DMA_RATE * 8, dma)?;
    } else {
        device.write_at(&0xc150u32.to_le_bytes(), PCI_BAR0)?;
        device.write_at(&[0xa5], MTTY_SCRATCH)?;
    }
    Ok(())
}

/// Compares the two devices when one is stopped and the other has its state.
fn compare(source: &HostDevice, destination: &HostDevice, path: &Path) -> Result<String> {
    if !is_labdev(path) {
        let mut scratch = [0];
        destination.read_at(&mut scratch, MTTY_SCRATCH)?;
        ensure!(scratch == [0xa5], "the scratch register is {scratch:?}");
        return Ok("its scratch register came along".into());
    }
    let touches = (
        source.read_u64(LABDEV_TOUCHES * 8)?,
        destination.read_u64(LABDEV_TOUCHES * 8)?,
    );
    ensure!(touches.1 >= touches.0, "touches {touches:?}");
    if touches.0 == touches.1 {
        let sums = (
            source.read_u64(LABDEV_CRC * 8)?,
            destination.read_u64(LABDEV_CRC * 8)?,
        );
        ensure!(sums.0 == sums.1, "checksums {sums:x?}");
    }
    let pages = source.read_u64(LABDEV_DMA_PAGES * 8)?;
    Ok(format!(
        "{pages} pages written by DMA, memory changed {touches:?} times"
    ))
}

/// What each side's device must have gone through.
fn expected(flags: DeviceFlags) -> (Vec<DeviceState>, Vec<DeviceState>) {
    let p2p = flags.contains(DeviceFlags::P2P);
    let source = match (flags.contains(DeviceFlags::PRE_COPY), p2p) {
        (true, true) => vec![PreCopy, PreCopyP2p, StopCopy],
        (true, false) => vec![PreCopy, StopCopy],
        (false, true) => vec![RunningP2p, Stop, StopCopy],
        (false, false) => vec![Stop, StopCopy],
    };
    let destination = if p2p {
        vec![RunningP2p, Stop, Resuming, Stop, RunningP2p, Running]
    } else {
        vec![Stop, Resuming, Stop, Running]
    };
    (source, destination)
}

fn migrate(options: &Options, to_and_fro: bool) -> Result<()> {
    let side =
        |index: usize| -> Vec<&PathBuf> { options.pairs.iter().map(|pair| &pair[index]).collect() };
    let (from, to) = if to_and_fro {
        (side(1), side(0))
    } else {
        (side(0), side(1))
    };
    let mut source = Side::open(options.door, &from)?;
    let destination = Side::open(options.door, &to)?;
    let guest = memory(options.memory_mib << 20);
    fill(&guest, 7, 4);
    map(&mut source.host, &guest).context("mapping guest memory for the source's devices")?;
    let name = |index: usize| format!("device{index}");
    let names: Vec<String> = (0..from.len()).map(name).collect();
    for (device, path) in source.devices.iter().zip(&from) {
        begin(device, path, &guest, options.dma)?;
    }

    let machine = SourceMachine::start(guest.clone(), 1, 2000, 7);
    let mut sources: Vec<Box<dyn Source>> = vec![machine.source()];
    let translation = match (source.host.container(), source.host.address_space()) {
        (Some(container), _) => Some(Translation::Container(container)),
        (None, Some((iommufd, ioas))) => Some(Translation::AddressSpace {
            iommufd,
            ioas,
            tables: source
                .devices
                .iter()
                .filter_map(HostDevice::table)
                .collect(),
            devices: source.devices.iter().filter_map(HostDevice::id).collect(),
        }),
        (None, None) => None,
    };
    let identity = guest
        .layouts()
        .map(|region| (region.guest_address, region.bytes / 4096));
    let group = DmaGroup {
        name: "lab",
        translation,
        devices: source
            .devices
            .iter()
            .zip(&names)
            .map(|(device, name)| DmaDevice {
                name,
                device: Some(device.as_fd()),
                options: DmaOptions::default(),
                pinned: None,
            })
            .collect(),
        memory: DmaMemory::Fixed(DmaMap::identity(identity)?),
    };
    let mut stopped = HashMap::new();
    for chosen in choose(group)? {
        println!("tracking: {} ({})", chosen.source.name(), chosen.reason);
        for device in &chosen.devices {
            stopped.insert(device.clone(), chosen.source.stopped_handle());
        }
        sources.push(Box::new(chosen.source));
    }

    let mut seen = Vec::new();
    let mut devices: Vec<Box<dyn tx::DeviceSource>> = Vec::new();
    let mut sinks: Vec<Box<dyn rx::DeviceSink>> = Vec::new();
    for ((ours, theirs), name) in source.devices.iter().zip(&destination.devices).zip(&names) {
        let mut device = MigrationDevice::new(ours.as_fd())?;
        if device.state() != MigrationState::Running {
            // Left so by the run before: not every driver begins anew when a device is opened.
            device.reset()?;
        }
        let mut device = VfioSource::new(name, device).with_flags(DeviceFlags::SWITCHOVER_ACK);
        if let Some(stopped) = stopped.remove(name) {
            device = device.with_stopped(stopped);
        }
        let mut sink = MigrationDevice::new(theirs.as_fd())?;
        if sink.state() != MigrationState::Running {
            sink.reset()?;
        }
        let sink = VfioSink::new(name, sink);
        let notes = (Seen::default(), Seen::default());
        let flags = device.device().support();
        let mut both = DeviceFlags::NONE;
        if flags.p2p {
            both = both.union(DeviceFlags::P2P);
        }
        if flags.pre_copy {
            both = both.union(DeviceFlags::PRE_COPY);
        }
        seen.push((both, notes.clone()));
        devices.push(Box::new(NotedSource::new(device, notes.0)));
        sinks.push(Box::new(NotedSink::new(sink, notes.1)));
    }

    let Side {
        host: destination_host,
        devices: destination_devices,
    } = destination;
    // Shared, so that the mappings stay until the end.
    let destination_host = Arc::new(Mutex::new(destination_host));
    let mapper = Arc::clone(&destination_host);
    let on_memory = move |memory: &GuestMemory| map(&mut mapper.lock().expect("no panics"), memory);
    let vmm = Destination::new(sinks, Box::new(on_memory));
    let arrived = vmm.arrived();
    let tcp = TcpOptions::default();
    let listener = Listener::bind(&"127.0.0.1:0".parse()?, &tcp)?;
    let address = listener.local_address().clone();
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(vmm),
        listeners: vec![listener],
        config: rx::Config::default(),
        spawner: None,
    })?;
    let config = tx::Config::builder()
        .channels(options.channels)
        .bandwidth(Some(64 << 20))
        .downtime_limit(Duration::from_secs(3))
        .build()?;
    let sent = tx::Migration::start(tx::Parts {
        vmm: Box::new(WithDevices::new(machine, devices)),
        memory: guest.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address,
            options: tcp,
        }),
        config,
        spawner: None,
    })?
    .wait();
    if sent.error.is_some() {
        // It may never have been dialled.
        reception.handle().cancel();
    }
    let received = reception.wait();
    for ((flags, (from, to)), name) in seen.iter().zip(&names) {
        println!("{name} at the source: {from:?}");
        println!("{name} at the destination: {to:?}");
        if sent.error.is_none() {
            let (want_from, want_to) = expected(*flags);
            ensure!(
                from.states().starts_with(&want_from),
                "{name} at the source: {want_from:?} was expected"
            );
            ensure!(
                to.states() == want_to,
                "{name} at the destination: {want_to:?} was expected"
            );
        }
    }
    if let Some(error) = sent.error {
        bail!("the source: {error}");
    }
    if let Some(error) = received.error {
        bail!("the destination: {error}");
    }
    ensure!(
        *arrived.lock().expect("no panics") == octets(&guest),
        "the memory that arrived is not the source's"
    );
    for ((ours, theirs), path) in source.devices.iter().zip(&destination_devices).zip(&from) {
        let what = compare(ours, theirs, path).with_context(|| format!("{}", path.display()))?;
        println!("{}: {what}", path.display());
        if is_labdev(path) {
            theirs.write_u64(LABDEV_DMA_RATE * 8, 0)?;
        }
    }
    println!(
        "migrated: {} rounds, {} devices, {} octets of device state",
        sent.report.rounds,
        sent.report.devices.len(),
        sent.report.device_bytes
    );
    for source in &sent.report.sources {
        println!("source {}: {} pages", source.name, source.pages);
    }
    drop(destination_host);
    Ok(())
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("multifd-vfio: {error:#}");
            return ExitCode::from(2);
        }
    };
    for time in 0..options.times {
        if let Err(error) = migrate(&options, time % 2 == 1) {
            eprintln!("multifd-vfio: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
