//! Items of devices on a lane: between two extents of pages, between rounds, and before the mark of the last one.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use multifd_transport::IoSource;
use multifd_wire::{Body, Frame};

use super::{Feeder, STOP_POLL};
use crate::device::stream::Head;
use crate::driver::link::failed;
use crate::error::Fault;

impl Feeder<'_> {
    /// Items of devices, between two extents of pages: with the guest paused all that are there, otherwise until devices are
    /// `ahead` of memory by some bytes, so that the two share the lane.
    pub(super) fn items(&mut self, last: bool, ahead: &mut u64) -> Result<(), Fault> {
        if !self.shared.devices.queue.is_used() {
            return Ok(());
        }
        while last || *ahead == 0 {
            match self.item_in_round()? {
                Some(bytes) => *ahead += bytes,
                None => break,
            }
            self.check_stop()?;
        }
        Ok(())
    }

    /// Nothing of a device may follow the mark of a round with the guest paused (SPEC: DEVSTREAM-7): sends what is left of all
    /// streams, and waits for what was not read yet. It waits for devices and for no other lane.
    pub(super) fn rest_of_devices(&mut self) -> Result<(), Fault> {
        let table = Arc::clone(&self.shared.devices);
        while !table.queue.is_drained() {
            self.check_stop()?;
            if self.item_in_round()?.is_none() {
                let _ = table.queue.tokens().recv_timeout(STOP_POLL);
            }
        }
        Ok(())
    }

    /// As [`Self::item`], without having waited for its token: takes that too, or a lane between rounds would wake up for each
    /// item that is gone.
    pub(super) fn item_in_round(&mut self) -> Result<Option<u64>, Fault> {
        let sent = self.item()?;
        if sent.is_some() {
            let _ = self.shared.devices.queue.tokens().try_recv();
        }
        Ok(sent)
    }

    /// Sends the most urgent item, if there is one; gives its size. From the ledger it comes back if the lane dies.
    pub(super) fn item(&mut self) -> Result<Option<u64>, Fault> {
        let table = Arc::clone(&self.shared.devices);
        if !table.queue.has_item() {
            return Ok(None);
        }
        // The lane whose channel is free takes it. One that took it first and then waited would keep the destination waiting
        // for this item, with all that follow it in hand and the window full.
        self.tx.wait_for_room().map_err(failed)?;
        let Some(item) = table.queue.take() else {
            return Ok(None);
        };
        let frame = match item.head() {
            Head::Chunk(chunk) => Frame::from(chunk),
            Head::Mark(mark) => Frame::from(mark),
        };
        let octets = (frame.head_bytes() + item.octets().len()) as u64;
        let entered = self
            .wait_for_turn(octets)
            .and_then(|()| self.with_lane(|lane| Ok(lane.item(Arc::clone(&item), octets))));
        let sequence = match entered {
            Ok(sequence) => sequence,
            Err(fault) => {
                table.queue.again(vec![item]);
                return Err(fault);
            }
        };
        self.head.clear();
        if item.octets().is_empty() {
            frame.encode(sequence, Body::None, &mut self.head)?;
            self.tx.send(&self.head, &[]).map_err(failed)?;
        } else {
            let body = Body::Octets(item.octets());
            frame.encode(sequence, body, &mut self.head)?;
            let sources = [IoSource::Bytes(item.octets())];
            self.tx.send(&self.head, &sources).map_err(failed)?;
        }
        table.sent(&item);
        let counters = &self.shared.counters;
        counters.sent_bytes.fetch_add(octets, Relaxed);
        counters
            .device_bytes
            .fetch_add(item.octets().len() as u64, Relaxed);
        Ok(Some(octets))
    }
}
