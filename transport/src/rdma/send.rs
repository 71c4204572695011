//! The sending half: heads and small pieces in messages, everything else written into the peer's landing before its message.
//!
//! Rule: guest memory is read by the device from where it lies. It is read until the write completes, which may be after `send` returned;
//! what the guest writes meanwhile is reported as written and sent again, as on every kind.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::{Draft, Link, STAGING_BYTES, Side};
use super::registrar::{Pieces, Refused};
use super::wire::{HEADER_BYTES, INLINE_BYTES_MAX, Kind, MESSAGE_BYTES};
use crate::channel::{IoSource, SendHalf};
use crate::error::{ChannelError, remember};
use crate::memory::Span;
use crate::patience::{Patience, Wait};

/// Guest pieces below this are copied: to register and gather them would cost more.
const DIRECT_BYTES_MIN: usize = 1024;

/// How long a half that is dropped tries to announce the end.
const LINGER_MAX: Duration = Duration::from_millis(500);

pub(super) struct RdmaSend {
    link: Arc<Link>,
    scratch: Box<[u8]>,
    /// Pieces that a message may have, so that its work fits into the device's queue.
    pieces_max: usize,
    patience: Patience,
    finished: bool,
    failed: Option<ChannelError>,
}

impl SendHalf for RdmaSend {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        self.check()?;
        let result = self.send_all(head, body);
        remember(&mut self.failed, result)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.check()?;
        let result = self.announce_end(self.patience.start());
        self.failed = Some(
            result
                .as_ref()
                .err()
                .cloned()
                .unwrap_or(ChannelError::ShutDown),
        );
        result
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.patience.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.patience.stall = stall;
    }

    fn describe(&self) -> String {
        self.link.name.to_string()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // Room is given by the peer's writes into this side's memory, which no descriptor shows.
        None
    }
}

/// One operation.
struct Job {
    bytes_done: u64,
    bytes_wanted: u64,
    wait: Wait,
}

/// What is left of a head and its body.
struct Cursor<'s, 'd> {
    now: Option<IoSource<'d>>,
    rest: std::slice::Iter<'s, IoSource<'d>>,
    at: usize,
}

impl<'d> Cursor<'_, 'd> {
    /// The rest of the current piece; empty ones are passed over.
    fn piece(&mut self) -> Option<IoSource<'d>> {
        loop {
            let piece = self.now?;
            if self.at < piece.len() {
                return Some(match piece {
                    IoSource::Bytes(octets) => IoSource::Bytes(&octets[self.at..]),
                    IoSource::Guest(span) => {
                        IoSource::Guest(span.subspan(self.at, span.len() - self.at).ok()?)
                    }
                });
            }
            self.now = self.rest.next().copied();
            self.at = 0;
        }
    }

    fn advance(&mut self, count: usize) {
        self.at += count;
    }
}

impl RdmaSend {
    pub(super) fn new(link: Arc<Link>) -> Self {
        let (works, gather) = link.works();
        Self {
            link,
            scratch: vec![0; STAGING_BYTES].into_boxed_slice(),
            pieces_max: (works as usize).saturating_sub(1).max(1) * gather as usize,
            patience: Patience::default(),
            finished: false,
            failed: None,
        }
    }

    fn check(&self) -> Result<(), ChannelError> {
        if self.link.is_shut() {
            return Err(ChannelError::ShutDown);
        }
        self.failed
            .as_ref()
            .map_or(Ok(()), |error| Err(error.clone()))
    }

    fn send_all(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let mut job = Job {
            bytes_done: 0,
            bytes_wanted: head.len() as u64
                + body.iter().map(|piece| piece.len() as u64).sum::<u64>(),
            wait: self.patience.start(),
        };
        let mut cursor = Cursor {
            now: Some(IoSource::Bytes(head)),
            rest: body.iter(),
            at: 0,
        };
        while job.bytes_done < job.bytes_wanted {
            let mut draft = self.draft(&mut job, Kind::Data)?;
            match self.fill_and_post(&mut job, &mut cursor, &mut draft) {
                Ok(()) => job.wait.moved(),
                Err(error) => {
                    self.link.give_back(draft);
                    return Err(job.counted(error));
                }
            }
        }
        Ok(())
    }

    /// A message's buffer, when there is credit for it.
    fn draft(&self, job: &mut Job, kind: Kind) -> Result<Draft, ChannelError> {
        let link = &self.link;
        let buffer = link
            .until(Side::Send, &mut job.wait, job.bytes_done, |state| {
                link.take_message(state, kind)
            })
            .map_err(|error| job.counted(error))?;
        Ok(Draft {
            kind,
            buffer,
            inline: 0,
            slot: 0,
            landed: 0,
            pieces: Vec::new(),
            held: Vec::new(),
            stagings: Vec::new(),
        })
    }

    fn fill_and_post(
        &mut self,
        job: &mut Job,
        cursor: &mut Cursor<'_, '_>,
        draft: &mut Draft,
    ) -> Result<(), ChannelError> {
        self.fill_inline(cursor, draft);
        if cursor.piece().is_some() {
            let link = &self.link;
            draft.slot = link.until(Side::Send, &mut job.wait, job.bytes_done, |state| {
                link.next_slot(state)
            })?;
            self.fill_landing(job, cursor, draft)?;
        }
        let link = &self.link;
        link.until(Side::Send, &mut job.wait, job.bytes_done, |state| {
            link.post(state, draft)
        })?;
        job.bytes_done += (draft.inline + draft.landed) as u64;
        Ok(())
    }

    /// Private bytes and small guest pieces, up to the first large guest piece.
    fn fill_inline(&mut self, cursor: &mut Cursor<'_, '_>, draft: &mut Draft) {
        let mut filled = 0;
        while filled < INLINE_BYTES_MAX
            && let Some(piece) = cursor.piece()
        {
            let count = piece.len().min(INLINE_BYTES_MAX - filled);
            let room = &mut self.scratch[filled..filled + count];
            match piece {
                IoSource::Bytes(octets) => room.copy_from_slice(&octets[..count]),
                IoSource::Guest(span) if span.len() < DIRECT_BYTES_MIN => copy(span, room),
                IoSource::Guest(_) => break,
            }
            filled += count;
            cursor.advance(count);
        }
        if let Ok(inline) = self
            .link
            .buffers
            .outgoing(draft.buffer, MESSAGE_BYTES)
            .subspan(HEADER_BYTES, filled)
        {
            inline.copy_from(&self.scratch[..filled]);
        }
        draft.inline = filled;
    }

    /// Everything that fits into one slot: guest memory from where it lies, private bytes by way of registered buffers.
    fn fill_landing(
        &mut self,
        job: &mut Job,
        cursor: &mut Cursor<'_, '_>,
        draft: &mut Draft,
    ) -> Result<(), ChannelError> {
        let slot_bytes = usize::try_from(self.link.peer.slot_bytes).unwrap_or(usize::MAX);
        // The buffer in use, and how much of it is filled.
        let mut staging: Option<(u32, usize)> = None;
        let own_stagings = self.link.buffers.sizes.stagings as usize;
        while draft.landed < slot_bytes
            && draft.pieces.len() + 1 < self.pieces_max
            && let Some(piece) = cursor.piece()
        {
            let room = slot_bytes - draft.landed;
            if let IoSource::Guest(span) = piece
                && span.len() >= DIRECT_BYTES_MIN
                && let Ok(part) = span.subspan(0, span.len().min(room))
                && self.direct(job, part, draft)?
            {
                draft.landed += part.len();
                cursor.advance(part.len());
                continue;
            }
            let (buffer, at) = match staging {
                Some((buffer, at)) if at < STAGING_BYTES => (buffer, at),
                // What is left goes with the next message: this one holds all buffers that there are.
                _ if draft.stagings.len() == own_stagings => break,
                _ => {
                    let buffer = self.staging(job)?;
                    draft.stagings.push(buffer);
                    (buffer, 0)
                }
            };
            let count = piece.len().min(room).min(STAGING_BYTES - at);
            let to = self.link.buffers.staging(buffer, at, count);
            match piece {
                IoSource::Bytes(octets) => to.copy_from(&octets[..count]),
                IoSource::Guest(span) => {
                    if let Ok(part) = span.subspan(0, count) {
                        to.copy_from_span(part);
                    }
                }
            }
            let piece = self.link.staged(buffer, at, count);
            match draft.pieces.last_mut() {
                Some(last)
                    if last.lkey == piece.lkey
                        && last.address + u64::from(last.length) == piece.address =>
                {
                    last.length += piece.length;
                }
                _ => draft.pieces.push(piece),
            }
            staging = Some((buffer, at + count));
            draft.landed += count;
            cursor.advance(count);
        }
        Ok(())
    }

    fn staging(&self, job: &mut Job) -> Result<u32, ChannelError> {
        let link = &self.link;
        link.until(Side::Send, &mut job.wait, job.bytes_done, |state| {
            link.take_staging(state)
        })
    }

    /// Adds guest memory as it lies, if it is registered or can be; otherwise says no.
    fn direct(
        &self,
        job: &mut Job,
        span: Span<'_>,
        draft: &mut Draft,
    ) -> Result<bool, ChannelError> {
        let Some(registrar) = &self.link.registrar else {
            return Ok(false);
        };
        loop {
            let mut found = Pieces {
                pieces: Vec::new(),
                held: Vec::new(),
            };
            match registrar.pieces(&self.link.pd, span, &mut found) {
                None => return Ok(false),
                Some(Ok(())) => {
                    draft.pieces.extend(found.pieces);
                    draft.held.extend(found.held);
                    return Ok(true);
                }
                Some(Err(Refused::Failed(error))) => {
                    return Err(ChannelError::Io(Arc::new(error)));
                }
                Some(Err(Refused::Busy)) if !draft.held.is_empty() => {
                    // This very message holds what would have to go: copy instead.
                    return Ok(false);
                }
                Some(Err(Refused::Busy)) => {
                    let idle =
                        self.link
                            .until(Side::Send, &mut job.wait, job.bytes_done, |state| {
                                state.check(0, 0)?;
                                Ok(state.is_idle().then_some(()))
                            });
                    drop(found);
                    idle?;
                    // Other channels may hold the rest: then it is copied, which needs no more memory.
                    let mut again = Pieces {
                        pieces: Vec::new(),
                        held: Vec::new(),
                    };
                    if let Some(Err(Refused::Busy)) =
                        registrar.pieces(&self.link.pd, span, &mut again)
                    {
                        return Ok(false);
                    }
                }
            }
        }
    }

    fn announce_end(&mut self, wait: Wait) -> Result<(), ChannelError> {
        self.finished = true;
        let mut job = Job {
            bytes_done: 0,
            bytes_wanted: 0,
            wait,
        };
        let mut draft = self.draft(&mut job, Kind::End)?;
        let link = &self.link;
        link.until(Side::Send, &mut job.wait, 0, |state| {
            link.post(state, &mut draft)
        })
    }
}

impl Job {
    /// Puts the count of this operation into an error that was made without it.
    fn counted(&self, error: ChannelError) -> ChannelError {
        match error {
            ChannelError::Closed | ChannelError::ClosedMidway { .. } => {
                ChannelError::closed(self.bytes_done, self.bytes_wanted)
            }
            ChannelError::Reset { .. } => ChannelError::Reset {
                bytes_done: self.bytes_done,
            },
            other => other,
        }
    }
}

impl Drop for RdmaSend {
    fn drop(&mut self) {
        if self.finished || self.link.is_shut() {
            return;
        }
        let patience = Patience {
            deadline: Some(Instant::now() + LINGER_MAX),
            stall: None,
        };
        // A peer that is gone needs no announcement.
        let _ = self.announce_end(patience.start());
    }
}

fn copy(span: Span<'_>, to: &mut [u8]) {
    if let Ok(part) = span.subspan(0, to.len()) {
        part.copy_to(to);
    }
}
