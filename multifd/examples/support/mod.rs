//! The machines of the examples: memory, a thread that keeps writing it, and one number as VM state.
#![allow(dead_code)] // no example uses all of it

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use multifd::tracking::{VmmMarker, VmmWrites};
use multifd::transport::{Channel, GuestMemory, RegionLayout};
use multifd::{Blob, Device, Layout, VmmError, destination, source};

type Failure = Box<dyn std::error::Error>;

/// Pages of guest memory.
pub(crate) const PAGES: u64 = 4096;

/// Guest memory of one region, with something in each page: zero pages would be moved in no time.
pub(crate) fn memory() -> GuestMemory {
    let region = RegionLayout {
        guest_address: 0,
        bytes: PAGES * 4096,
    };
    let memory = GuestMemory::anonymous(&[region]).expect("16 MiB can be had");
    for page in 0..PAGES {
        let something = memory.span(0, page * 4096 + 64, 8).expect("inside");
        something.copy_from(b"content!");
    }
    memory
}

/// Settings of a migration that ends well on a busy host too: it switches over, whatever the downtime.
pub(crate) fn settings() -> source::ConfigBuilder {
    source::Config::builder().when_not_converging(source::WhenNotConverging::Switch)
}

/// A destination in this process, and the way to it: each channel is a pair, of which it is handed the other end.
pub(crate) fn arrival<V: destination::Vmm>(
    vmm: V,
    pair: impl Fn() -> (Box<dyn Channel>, Box<dyn Channel>) + Send + Sync + 'static,
) -> Result<(destination::Reception<V>, impl source::Dial + 'static), Failure> {
    let reception = destination::Reception::start(destination::Parts::new(vmm))?;
    let there = reception.handle();
    let dial = source::dial_by(move |_, _| {
        let (ours, theirs) = pair();
        there.offer(theirs)?;
        Ok(ours)
    });
    Ok((reception, dial))
}

/// What is left on both sides when a migration has ended well.
pub(crate) struct Moved {
    pub(crate) report: source::Report,
    pub(crate) machine: Arriving,
    pub(crate) devices: Vec<Box<dyn destination::DeviceSink>>,
}

/// A migration from this process into itself, with these devices, over channels that `pair` makes.
pub(crate) fn migrate(
    pair: impl Fn() -> (Box<dyn Channel>, Box<dyn Channel>) + Send + Sync + 'static,
    devices: Vec<Box<dyn source::DeviceSource>>,
    make_device: Option<MakeDevice>,
) -> Result<Moved, Failure> {
    let arriving = Arriving {
        make_device,
        ..Arriving::default()
    };
    let (reception, dial) = arrival(arriving, pair)?;
    let memory = memory();
    let (mut machine, writes) = Leaving::start(&memory);
    machine.devices = devices;
    let parts = source::Parts::new(machine, memory, dial)
        .source(writes)
        .config(settings().build()?);
    let left = source::Migration::start(parts)?.wait();
    let arrived = reception.wait();
    if let Some(error) = left.error {
        return Err(error.into());
    }
    let machine = arrived.vmm.ok_or("it did not come back")?;
    assert!(machine.runs && machine.is_right());
    Ok(Moved {
        report: left.report,
        machine,
        devices: arrived.devices,
    })
}

/// The machine that leaves: its "vCPU" is a thread that writes a counter into one page after the other.
pub(crate) struct Leaving {
    run: Arc<Mutex<bool>>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    vcpu: Option<JoinHandle<()>>,
    devices: Vec<Box<dyn source::DeviceSource>>,
}

impl Leaving {
    /// A machine that runs, and the source of its dirty pages.
    pub(crate) fn start(memory: &GuestMemory) -> (Self, VmmWrites) {
        let writes = VmmWrites::new();
        let (run, stop) = (Arc::new(Mutex::new(true)), Arc::new(AtomicBool::new(false)));
        let count = Arc::new(AtomicU64::new(0));
        let (memory, marker) = (memory.clone(), writes.marker());
        let theirs = (Arc::clone(&run), Arc::clone(&stop), Arc::clone(&count));
        let vcpu =
            std::thread::spawn(move || vcpu(&memory, &marker, &theirs.0, &theirs.1, &theirs.2));
        let machine = Self {
            run,
            stop,
            count,
            vcpu: Some(vcpu),
            devices: Vec::new(),
        };
        (machine, writes)
    }

    /// How often it has written.
    pub(crate) fn writes(&self) -> u64 {
        self.count.load(SeqCst)
    }
}

fn vcpu(
    memory: &GuestMemory,
    marker: &VmmMarker,
    run: &Mutex<bool>,
    stop: &AtomicBool,
    count: &AtomicU64,
) {
    while !stop.load(SeqCst) {
        // Held over the write, so that a pause waits for it.
        let running = run.lock().expect("no panics");
        if *running {
            let number = count.fetch_add(1, SeqCst) + 1;
            let offset = number % PAGES * 4096;
            memory
                .span(0, offset, 8)
                .expect("inside")
                .copy_from(&number.to_le_bytes());
            // After the write: a page that is marked first could be sent before it.
            marker.mark_bytes(0, offset, 8);
        }
        drop(running);
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = self.vcpu.take().map(JoinHandle::join);
    }
}

impl source::Vmm for Leaving {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(vec![Blob::new(1, 1, "one vCPU that counts")])
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn source::DeviceSource>>, VmmError> {
        Ok(std::mem::take(&mut self.devices))
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        *self.run.lock().expect("no panics") = false;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(vec![Blob::new(2, 1, self.writes().to_le_bytes().to_vec())])
    }

    fn resume(&mut self, _: source::Reclaimed) -> Result<(), VmmError> {
        *self.run.lock().expect("no panics") = true;
        Ok(())
    }
}

/// Makes the destination's device for an entry of the source's table.
pub(crate) type MakeDevice = fn(&Device) -> Result<Box<dyn destination::DeviceSink>, VmmError>;

/// The machine that arrives.
#[derive(Default)]
pub(crate) struct Arriving {
    pub(crate) memory: Option<GuestMemory>,
    /// What the other had written.
    pub(crate) count: u64,
    pub(crate) runs: bool,
    make_device: Option<MakeDevice>,
}

impl Arriving {
    /// Whether memory is what a machine that wrote so often has.
    pub(crate) fn is_right(&self) -> bool {
        let memory = self.memory.as_ref().expect("prepared");
        let mut word = [0; 8];
        (0..PAGES).all(|page| {
            memory
                .span(0, page * 4096, 8)
                .expect("inside")
                .copy_to(&mut word);
            // The newest number up to `count` that falls on this page; 0 if there was none.
            let newest = self
                .count
                .saturating_sub((self.count + PAGES - page) % PAGES);
            u64::from_le_bytes(word) == newest
        })
    }
}

impl destination::Vmm for Arriving {
    fn prepare(&mut self, _: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
        let regions = layout.regions().map(|region| RegionLayout {
            guest_address: region.guest_address,
            bytes: region.bytes,
        });
        let regions: Vec<_> = regions.collect();
        let memory = GuestMemory::anonymous(&regions).map_err(VmmError::new)?;
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn devices(
        &mut self,
        table: &[Device],
    ) -> Result<Vec<Box<dyn destination::DeviceSink>>, VmmError> {
        let make = self.make_device;
        let none = || VmmError::new("there are no devices here");
        table
            .iter()
            .map(|entry| make.ok_or_else(none)?(entry))
            .collect()
    }

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
        let state = states.first().ok_or_else(|| VmmError::new("no state"))?;
        let number = state.bytes[..].try_into().map_err(VmmError::new)?;
        self.count = u64::from_le_bytes(number);
        Ok(())
    }

    fn resume(&mut self, _: destination::Ownership) -> Result<(), VmmError> {
        self.runs = true;
        Ok(())
    }
}
