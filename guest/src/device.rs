//! A device that writes guest memory from the host, behind KVM's back, and a driver in the guest that makes this safe.
//!
//! ```text
//!   host    heart-beat: the guest gives the device the pages of its next batch ("map"); the device writes a word into each
//!   guest   for each page of the batch: stores its stamp there                           ("unmap": the driver touches the page)
//! ```
//!
//! No dirty log sees the device's store. The guest's own store into the same page follows it, and is seen; whoever sends the
//! page because of that store sends the device's word as well. That is the whole scheme (proposed for Linux's swiotlb in
//! 2015): nothing in the hypervisor or in the migration knows of the device.
//!
//! What it asks for is that the guest takes its pages back before it stands still: a page that the device wrote and the
//! driver has not touched yet is not reported. So a virtual CPU with a device comes to rest only at the end of a batch, and
//! no transfer begins after the wish to rest.
//!
//! [`Device::DmaUnreported`] writes a page that nobody touches: the fault that the debug scan is there to find.

use std::sync::atomic::Ordering;

use crate::config::Device;
use crate::layout::{Layout, PageWords, Purpose};
use crate::memory::Memory;
use crate::workload::{Share, mix};

/// Word of a page that the device writes; the guest's own words are far before it.
pub(crate) const DMA_WORD: usize = 64;

/// The device of one virtual CPU.
#[derive(Debug)]
pub(crate) struct DmaDevice {
    memory: Memory,
    kind: Device,
}

impl DmaDevice {
    /// The device, if there is one.
    pub(crate) fn new(kind: Device, memory: &Memory) -> Option<Self> {
        (kind != Device::None).then(|| Self {
            memory: memory.clone(),
            kind,
        })
    }

    /// Does the transfers of the batch that follows stamp `counter`.
    pub(crate) fn transfer(&self, layout: &Layout, share: &Share, counter: u64) {
        let last = counter.wrapping_add(share.batch);
        match self.kind {
            Device::None => {}
            Device::Dma => {
                for stamp in counter.wrapping_add(1)..=last {
                    self.store(share.first_page + share.page_of(stamp), value(share, stamp));
                }
            }
            Device::DmaUnreported if share.batch > 0 => {
                self.store(unreported_page(layout, share), value(share, last));
            }
            Device::DmaUnreported => {}
        }
    }

    fn store(&self, page: u64, value: u64) {
        self.memory
            .word(page, DMA_WORD as u64)
            .store(value, Ordering::Relaxed);
    }
}

/// Overwrites the device's word in what the image and the guest say of a page. `stamp` is the last one in a page of the
/// working set; `counters` are those of the virtual CPUs, which rest at the end of a batch.
pub(crate) fn put_into(
    kind: Device,
    layout: &Layout,
    page: u64,
    stamp: u64,
    counters: &[u64],
    words: &mut PageWords,
) {
    match (kind, layout.purpose(page)) {
        (Device::Dma, Purpose::Work(share, _)) if stamp > 0 => {
            words[DMA_WORD] = value(share, stamp);
        }
        (Device::DmaUnreported, Purpose::Plain) => {
            let written = layout
                .shares
                .iter()
                .zip(counters)
                .find(|(share, _)| unreported_page(layout, share) == page);
            if let Some((share, &counter)) = written
                && counter > 0
            {
                words[DMA_WORD] = value(share, counter);
            }
        }
        _ => {}
    }
}

/// The plain page that an unreported device writes.
fn unreported_page(layout: &Layout, share: &Share) -> u64 {
    layout.plain_page + u64::from(share.vcpu)
}

/// What the device writes into the page of `stamp`.
fn value(share: &Share, stamp: u64) -> u64 {
    mix(stamp ^ share.weyl)
}
