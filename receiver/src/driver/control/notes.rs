//! What the other threads say, as events of the session.

use std::sync::Arc;

use multifd_session::destination::Event;

use super::channel::secrets;
use super::{Control, ms};
use crate::driver::greet::Opened;
use crate::driver::vmm::VmmDone;
use crate::driver::{Note, thread_cpu};
use crate::error::Fault;
use crate::landing::{Landing, LandingError};

impl Control {
    pub(super) fn note(&mut self, note: Note) {
        match note {
            Note::Opened(opened) => self.opened(opened),
            // It belongs to a session before this one.
            Note::LaneJoined(_) if self.session.is_none() => {}
            Note::LaneJoined(joined) => self.lane_joined(joined),
            // The same: its greeter was slow.
            Note::Resuming(Opened {
                resume_secret: secret,
                ..
            })
            | Note::Asked { secret, .. }
                if self.secret != Some(secret) => {}
            Note::GiveWay => self.give_way(),
            Note::Resuming(opened) => {
                let secrets = secrets(&opened);
                self.returning = Some(opened);
                self.drive(Event::Resuming(secrets));
            }
            Note::Asked { answer, .. } => {
                self.asking = Some(answer);
                self.timeline.asked += 1;
                self.drive(Event::Asked);
                self.asking = None;
            }
            Note::Inbound { epoch, .. } | Note::ControlLost { epoch, .. }
                if epoch != self.link.epoch => {}
            Note::Inbound { message, .. } => {
                let now = self.now();
                let Some(session) = &mut self.session else {
                    return;
                };
                let effects = match message.frame() {
                    Ok(frame) => session.frame(&frame, message.body(), now),
                    Err(malformed) => session.handle(Event::ControlLost(malformed.into()), now),
                };
                self.carry_out(effects);
            }
            Note::ControlLost { fault, .. } => {
                self.link.lost = true;
                self.drive(Event::ControlLost(fault));
            }
            Note::LaneArrived {
                lane,
                incarnation,
                round,
                last,
            } => self.drive(Event::LaneArrived {
                lane,
                incarnation,
                round,
                last,
            }),
            Note::LaneEnded { mark, fault } => {
                self.lanes.ended(mark.lane, mark.incarnation);
                tracing::debug!(lane = %mark.lane, %fault, "lane ended");
                self.drive(Event::LaneEnded { mark, fault });
            }
            Note::Damaged {
                lane,
                incarnation,
                sequence,
                runs,
            } => {
                tracing::debug!(%lane, %sequence, pages = runs.len(), "pages failed their checksum");
                self.drive(Event::Damaged {
                    lane,
                    incarnation,
                    sequence,
                    runs,
                });
            }
            Note::Vmm(done) => self.vmm_done(done),
            Note::Device(note) => self.device(note),
            Note::Cancel => self.cancel(),
        }
    }

    pub(super) fn vmm_done(&mut self, done: VmmDone) {
        let event = match done {
            VmmDone::Prepared(result, took) => {
                self.devices.note_left(result.as_ref().err());
                self.timeline.prepare_ms = ms(took);
                let built = result.and_then(|(layout, memory, sinks)| {
                    self.devices.take(sinks);
                    Landing::new(layout, memory).map_err(|error| match error {
                        LandingError::Differs(text) => Fault::MemoryDiffers { text },
                        LandingError::NoRoom => Fault::System {
                            step: "memory for page checksums",
                            source: std::io::ErrorKind::OutOfMemory.into(),
                        },
                    })
                });
                match built {
                    Ok(landing) => {
                        self.landing = Some(Arc::new(landing));
                        Event::MachineReady
                    }
                    Err(fault) => Event::Failed(fault),
                }
            }
            VmmDone::Loaded(result, took) => {
                self.timeline.load_ms = ms(took);
                Event::Loaded(result)
            }
            VmmDone::Resumed(result, took, sinks) => {
                self.devices.note_left(result.as_ref().err());
                self.timeline.resume_ms = ms(took);
                self.devices.take(sinks);
                self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
                match result {
                    Ok(()) => Event::Resumed(self.counts()),
                    Err(fault) => Event::NotResumed(fault),
                }
            }
        };
        self.drive(event);
    }
}
