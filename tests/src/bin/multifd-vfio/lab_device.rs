//! The devices of the lab: what a program gives them to lose, and looks at afterwards.
//!
//! Two kinds: `labdev`, with registers that are also text in sysfs (tests/lab/module/labdev.h), and the kernel's sample `mtty`, a serial port
//! on a PCI card.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use multifd_guest::vfio::HostDevice;
use multifd_transport::GuestMemory;

/// A register of an `mtty` that keeps what is written: the scratch register of its first port.
const MTTY_SCRATCH: u64 = 7;
/// Where VFIO has the first base address register of a PCI device's configuration.
const PCI_BAR0: u64 = (7 << 40) + 0x10;
/// What is written there.
const SCRATCH: u8 = 0xa5;

/// What the word at address A of a labdev's window becomes: A ^ SEED.
const SEED: u64 = 0x5eed_5eed_5eed_5eed;

/// What a device does with guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// Pages a second.
    pub(crate) dma: u64,
    pub(crate) initial_bytes: Option<u64>,
}

/// Pages that a device wrote, and that it could not write.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Dma {
    pub(crate) pages: u64,
    pub(crate) errors: u64,
}

/// A device's place in sysfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place(PathBuf);

impl Place {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Its last part.
    pub(crate) fn name(&self) -> &str {
        self.0
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("?")
    }

    pub(crate) fn is_labdev(&self) -> bool {
        self.name().starts_with("labdev")
    }

    fn registers(&self) -> PathBuf {
        self.0.join("registers")
    }

    /// Writes a register of a labdev, whoever holds the device.
    pub(crate) fn set(&self, register: &str, value: u64) -> Result<()> {
        std::fs::write(self.registers(), format!("{register} {value}\n"))
            .with_context(|| format!("{}: {register} = {value}", self.name()))
    }

    /// A register of a labdev.
    pub(crate) fn get(&self, register: &str) -> Result<u64> {
        let text =
            std::fs::read_to_string(self.registers()).with_context(|| self.name().to_owned())?;
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = lines
            .find(|(name, _)| *name == register)
            .with_context(|| format!("{} has no register {register}", self.name()))?;
        let radix = if register == "trace" { 16 } else { 10 };
        u64::from_str_radix(value.trim(), radix).with_context(|| format!("{register}: {value}"))
    }

    /// What it wrote in guest memory since it was loaded; nothing if it cannot.
    pub(crate) fn dma(&self) -> Result<Dma> {
        if !self.is_labdev() {
            return Ok(Dma::default());
        }
        Ok(Dma {
            pages: self.get("dma_pages")?,
            errors: self.get("dma_errors")?,
        })
    }

    /// The states that the kernel's device went through, oldest first, by the numbers of `enum vfio_device_mig_state`; up to 16.
    pub(crate) fn trace(&self) -> Result<Vec<u8>> {
        let trace = self.get("trace")?;
        let digits = (0..16)
            .rev()
            .map(|digit| (trace >> (4 * digit) & 0xf) as u8);
        Ok(digits.filter(|state| *state != 0xf).collect())
    }

    /// Gives a source's device something to do and to lose.
    pub(crate) fn begin(
        &self,
        device: &HostDevice,
        memory: &GuestMemory,
        work: Work,
    ) -> Result<()> {
        if !self.is_labdev() {
            device.write_at(&0xc150u32.to_le_bytes(), PCI_BAR0)?;
            device.write_at(&[SCRATCH], MTTY_SCRATCH)?;
            return Ok(());
        }
        self.set("trace", 0)?;
        let window = memory
            .layouts()
            .last()
            .context("guest memory has a region")?;
        self.set("dma_iova", window.guest_address)?;
        self.set("dma_bytes", window.bytes)?;
        self.set("dma_seed", SEED)?;
        self.set("dma_rate", work.dma)?;
        let initial = match work.initial_bytes {
            Some(bytes) => bytes,
            None => self.get("memory_bytes")?,
        };
        self.set("initial_bytes", initial)
    }

    /// What a device has inside, to compare. The device must stand still.
    pub(crate) fn content(&self, device: &HostDevice) -> Result<Content> {
        if !self.is_labdev() {
            let mut scratch = [0];
            device.read_at(&mut scratch, MTTY_SCRATCH)?;
            return Ok(Content::Scratch(scratch[0]));
        }
        self.memory()
    }

    /// The same of a labdev, whoever holds it.
    pub(crate) fn memory(&self) -> Result<Content> {
        Ok(Content::Memory {
            crc: self.get("crc")?,
            touches: self.get("touches")?,
        })
    }
}

/// What a device has inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A register of a serial port.
    Scratch(u8),
    /// The checksum of a labdev's memory, and how often it changed.
    Memory { crc: u64, touches: u64 },
}

impl Content {
    /// That of a device that was given something to lose.
    pub(crate) fn check(self) -> Result<()> {
        if let Self::Scratch(octet) = self {
            ensure!(octet == SCRATCH, "the scratch register is {octet:#x}");
        }
        Ok(())
    }
}

/// Whether a device has filled its window of this memory.
pub(crate) fn is_filled(memory: &GuestMemory) -> Result<bool> {
    let (region, layout) = (0..)
        .zip(memory.layouts())
        .last()
        .context("guest memory has a region")?;
    let mut page = vec![0; 4096];
    for at in (0..layout.bytes).step_by(page.len()) {
        memory.span(region, at, 4096)?.copy_to(&mut page);
        let whole = (0..)
            .step_by(8)
            .zip(page.chunks_exact(8))
            .all(|(offset, word)| {
                let address = layout.guest_address + at + offset;
                word == (address ^ SEED).to_ne_bytes()
            });
        if !whole {
            return Ok(false);
        }
    }
    Ok(true)
}
