//! What the control thread does about devices (SPEC: section 13).
//!
//! The rules it keeps: the guest is not paused before every acknowledgement that counts is here, unless the user waived it;
//! and whenever the guest comes back to the source, its devices have come back before it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use multifd_wire::frame::{DeviceLoaded, SwitchoverAck};
use multifd_wire::{Misbehaved, Phase};

use super::Control;
use crate::driver::device::{DeviceNote, DeviceStream};
use crate::error::{Error, Fault};
use crate::report::{DeviceReport, ms};
use crate::session::Event;
use crate::vmm::Reclaimed;

impl Control {
    /// The VMM's devices: whether there are any.
    pub(super) fn take_devices(&mut self) -> Result<bool, Error> {
        let fail = |fault| Error::new(Phase::Hello, fault);
        let step = "give its devices";
        self.shared.watch.at("have the VMM give its devices");
        let sources = self
            .vmm
            .devices()
            .map_err(|source| fail(Fault::Vmm { step, source }))?;
        let chunk = self.shared.config.device_chunk();
        self.device_set.take(sources, chunk).map_err(fail)?;
        Ok(!self.device_set.is_empty())
    }

    /// The destination is ready: readers start, and devices that can begin pre-copy.
    pub(super) fn start_devices(&mut self) -> Result<(), Error> {
        let window = self.device_window;
        if self.device_set.is_empty() {
            return Ok(());
        }
        self.device_set
            .start(window, &self.shared.devices, &*self.spawner, &self.notes)
            .map_err(|fault| Error::new(Phase::Setup, fault))
    }

    /// Tells the machine what devices would add to the downtime, before it decides.
    pub(super) fn look_at_devices(&mut self) {
        if !self.device_set.is_empty() {
            let outlook = self.device_set.outlook(&self.shared.devices);
            // A decision follows anyway: it is not asked for here.
            let _ = self
                .session
                .handle(Event::Devices(outlook), self.shared.now());
        }
    }

    /// The last look at the acknowledgements: from here on no device announces anything.
    pub(super) fn devices_allow_pause(&mut self) -> bool {
        let unacked = self.device_set.close();
        self.shared.counters.devices_awaited.store(0, Relaxed);
        if unacked.is_empty() {
            return true;
        }
        if self.session.acks_waived(self.shared.now()) {
            tracing::warn!(devices = %unacked.join(", "), "switching over although initial bytes are not loaded yet");
            return true;
        }
        self.device_set.reopen();
        false
    }

    /// The guest runs on: says why.
    pub(super) fn await_devices(&mut self) {
        let unacked = self.device_set.unacked();
        let count = u32::try_from(unacked.len()).unwrap_or(u32::MAX);
        let before = self.shared.counters.devices_awaited.swap(count, Relaxed);
        self.timeline.awaiting(self.shared.now());
        if before == 0 {
            tracing::info!(devices = %unacked.join(", "), "the switchover waits for initial bytes to be loaded at the destination; the guest runs on");
        }
    }

    /// A device's own code may not return: then neither does its reader, and the migration ends without it.
    pub(super) fn watch_devices(&mut self) {
        // Nothing is asked of them any more, and nothing may break the commit off.
        if self.session.is_committed() {
            return;
        }
        if let Some(fault) = self.device_set.stuck(self.shared.config.device_deadline()) {
            let error = Error::new(self.session.phase(), fault);
            self.drive(Event::Failed(error));
        }
    }

    pub(super) fn device(&mut self, note: DeviceNote) {
        let phase = self.session.phase();
        match self.device_set.note(note) {
            Ok(event) => {
                if let Some(event) = event {
                    self.drive(event);
                }
            }
            Err(fault) => self.drive(Event::Failed(Error::new(phase, fault))),
        }
    }

    pub(super) fn device_acked(&mut self, ack: &SwitchoverAck) -> Result<Event, Misbehaved> {
        let stream = Arc::clone(self.shared.devices.stream(ack.device)?);
        stream.acked(
            ack.generation,
            ack.bytes,
            Duration::from_micros(ack.load_us),
        )?;
        tracing::info!(device = %stream.name, generation = %ack.generation, bytes = ack.bytes, load_ms = ack.load_us / 1000, "initial bytes loaded");
        Ok(Event::Devices(
            self.device_set.outlook(&self.shared.devices),
        ))
    }

    pub(super) fn device_loaded(&mut self, loaded: &DeviceLoaded) -> Result<(), Misbehaved> {
        let stream = self.shared.devices.stream(loaded.device)?;
        stream.loaded(
            Duration::from_micros(loaded.load_us),
            Duration::from_micros(loaded.config_us),
        );
        tracing::debug!(device = %stream.name, load_us = loaded.load_us, config_us = loaded.config_us, "loaded");
        Ok(())
    }

    /// Before the guest: its devices run again, quiescent first, and are read further or anew, since the migration goes on.
    pub(super) fn go_on_with_devices(&mut self, proof: &Reclaimed) -> Result<(), Error> {
        let table = Arc::clone(&self.shared.devices);
        let limit = self.shared.config.device_deadline();
        let broken = self.device_set.go_on(proof, &table, limit);
        self.check_devices(&broken)
    }

    /// The destination has nothing of them any more; the guest has run here all along.
    pub(super) fn start_devices_over(&mut self) -> Result<(), Error> {
        let table = Arc::clone(&self.shared.devices);
        let (epoch, limit) = (self.epoch, self.shared.config.device_deadline());
        let broken = self.device_set.start_over(&table, epoch, limit);
        self.check_devices(&broken)
    }

    fn check_devices(&self, broken: &[String]) -> Result<(), Error> {
        if broken.is_empty() {
            return Ok(());
        }
        let names = broken.join(", ");
        let fault = Fault::Devices {
            text: format!("{names}: not back at work, so the migration can't go on"),
        };
        Err(Error::new(self.session.phase(), fault))
    }

    /// Before the guest: its devices come back, quiescent first.
    pub(super) fn reclaim_devices(&mut self, proof: &Reclaimed) {
        let limit = self.shared.config.device_deadline();
        let broken = self.device_set.reclaim(proof, limit);
        if !broken.is_empty() {
            // The machine is over already: this can only be told.
            tracing::error!(devices = %broken.join(", "), "devices could not be brought back to running at the source");
        }
    }

    /// The migration is over: devices that do not run here any more stand still, and all come back from their readers.
    pub(super) fn end_devices(&mut self, gone: bool) -> Vec<DeviceReport> {
        let limit = self.shared.config.device_deadline();
        if gone {
            self.device_set.retire(limit);
        }
        let (inbox, shared) = (self.inbox.clone(), Arc::clone(&self.shared));
        self.device_set.end(limit, || {
            shared.watch.at("wait for a device's thread");
            let _ = inbox.recv_timeout(Duration::from_millis(1));
        });
        let streams = self.shared.devices.streams();
        // One that failed is the cause; the others need no word then.
        let cause = streams
            .iter()
            .any(|stream| stream.stats().trouble.is_some());
        if !gone && !cause {
            streams.iter().for_each(|stream| stream.was_cut_off());
        }
        streams.iter().map(|stream| device_report(stream)).collect()
    }
}

fn device_report(stream: &DeviceStream) -> DeviceReport {
    let stats = stream.stats();
    let since_stop = |at: Option<Instant>| {
        let stopped = stats.stopped_at?;
        Some(ms(at?.saturating_duration_since(stopped)))
    };
    DeviceReport {
        name: stream.name.clone(),
        state: stats.state.map_or("unknown", |state| state.name()),
        initial_bytes: stats.initial_bytes,
        pre_copy_bytes: stats.pre_copy_bytes,
        stop_copy_bytes: stats.stop_copy_bytes,
        config_bytes: stats.config_bytes,
        generations: stats.announced.max(stats.acked),
        acked: stats.acked,
        ack_load_ms: ms(stats.acked_load),
        quiesce_ms: ms(stats.quiesce),
        stop_ms: ms(stats.stop),
        read_ms: ms(stats.read),
        saved_after_ms: since_stop(stats.saved_at),
        sent_after_ms: since_stop(stats.sent_at),
        arrived_after_ms: since_stop(stats.arrived_at),
        loaded_after_ms: since_stop(stats.loaded_at),
        load_ms: stats.loaded.map(|(load, _)| ms(load)),
        config_ms: stats.loaded.map(|(_, config)| ms(config)),
        was_reset: stats.was_reset,
        restarts: stats.restarts,
        given_back: stats.given_back,
        error: stats.trouble,
        stopped_at: stats.stopped_at,
        saved_at: stats.saved_at,
        sent_at: stats.sent_at,
        arrived_at: stats.arrived_at,
        loaded_at: stats.loaded_at,
    }
}
