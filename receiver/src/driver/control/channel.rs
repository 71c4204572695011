//! The control channel: opened by a source, given up, and taken again from one that came back.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use multifd_session::destination::{Event, Secrets, Session};
use multifd_transport::Closer;

use super::{ANSWER_MAX, Control};
use crate::driver::greet::Opened;
use crate::driver::link::{ControlSender, failed, read_control};
use crate::driver::lock;
use crate::error::Fault;
use crate::vmm::AskTicket;

/// The control channel that there is.
#[derive(Default)]
pub(super) struct Link {
    pub(super) sender: Option<ControlSender>,
    pub(super) closer: Option<Closer>,
    pub(super) reader: Option<JoinHandle<()>>,
    /// The reader has said its last word.
    pub(super) lost: bool,
    /// Counts the control channels: what an earlier one said is void.
    pub(super) epoch: u32,
}

impl Control {
    /// Makes this the control channel.
    pub(super) fn take_control(&mut self, opened: Opened) -> Result<(), Fault> {
        let (shared, epoch, rx) = (Arc::clone(&self.shared), self.link.epoch, opened.rx);
        let mut tx = opened.tx;
        tx.set_stall(Some(self.shared.config.stall()));
        self.link.sender = Some(ControlSender::new(tx));
        self.link.closer = Some(opened.closer);
        self.link.lost = false;
        let body = Box::new(move || read_control(rx, &shared, epoch));
        let reader = self.shared.spawner.spawn("mfd-reader", body);
        self.link.reader = Some(reader.map_err(|source| Fault::System {
            step: "start a thread",
            source,
        })?);
        Ok(())
    }

    pub(super) fn opened(&mut self, opened: Opened) {
        tracing::info!(channel = %opened.description, session = ?opened.session, "control channel open");
        let now = self.now();
        self.features = opened.features;
        self.secret = Some(opened.resume_secret);
        let ticket = AskTicket::new(opened.session.value(), opened.resume_secret.value());
        self.ticket = Some(ticket);
        self.session = Some(Session::new(
            self.shared.config.clone(),
            opened.features,
            now,
        ));
        let secrets = secrets(&opened);
        match self.take_control(opened) {
            Ok(()) => self.drive(Event::Opened(secrets)),
            Err(fault) => self.drive(Event::Failed(fault)),
        }
    }

    /// The source is back, and the session takes it.
    pub(super) fn accept_resume(&mut self) {
        let Some(mut opened) = self.returning.take() else {
            return self.internal("a source that did not come back");
        };
        opened.tx.set_deadline(Some(Instant::now() + ANSWER_MAX));
        let reply = opened.reply.take();
        let sent = reply.map_or(Ok(()), |reply| opened.tx.send(&reply.encode(), &[]));
        opened.tx.set_deadline(None);
        if let Err(error) = sent {
            return self.events.push_back(Event::ControlLost(failed(error)));
        }
        tracing::info!(channel = %opened.description, "the source is back");
        lock(&self.shared.registry).set_yields(false);
        let taken = self.take_control(opened);
        self.events.extend(taken.err().map(Event::Failed));
    }

    /// Closes every channel. The lanes' threads end with what they have read whole.
    pub(super) fn suspend(&mut self) {
        self.link.epoch += 1;
        if let Some(closer) = self.link.closer.take() {
            closer.shutdown();
        }
        self.link.sender = None;
        self.detached.extend(self.link.reader.take());
        self.detached.retain(|thread| !thread.is_finished());
        self.lanes.suspend();
        self.devices.memory_moves_on();
        self.timeline.suspended();
        let yields = self.gives_way();
        lock(&self.shared.registry).set_yields(yields);
    }
}

pub(super) fn secrets(opened: &Opened) -> Secrets {
    Secrets {
        ticket: opened.ticket,
        resume: opened.resume_secret,
    }
}
