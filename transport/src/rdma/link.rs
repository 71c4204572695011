//! What both halves of an RDMA channel share: the queue pair, its buffers, and the account of credit.
//!
//! ```text
//!   sender                                                     receiver
//!   guest memory ─ write ─────────────────────────────────►   landing, a slot        ─ copy ─► where it belongs
//!   head, inline bytes ─ message (after its write) ───────►   one of the posted buffers
//!   credit cell  ◄────────────────────────────── write ─────   what was used up
//! ```
//! A buffer of this side's is free again when the peer has used up what it held. Its completion is not enough: an iWARP device has then
//! handed it to TCP, which may still read it (RFC 5040 section 5.3 asks for no more).
//!
//! Rules: a message is sent only with credit, so its buffer is posted; a slot is written only with credit, so it is free. What is posted
//! stays registered until it completed. Whoever waits takes completions for both halves and rings the other's bell.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::registrar::Registrar;
use super::sys::{
    Access, Bell, Completion, Endpoint, Happened, Mr, Pd, Sge, Signaled, WC_FLUSHED, describe,
    describe_status, wait_any,
};
use super::wire::{
    CREDIT_BYTES, Credit, GREETING_BYTES, Greeting, HEADER_BYTES, Header, Kind, MESSAGE_BYTES,
    Wrong,
};
use crate::error::ChannelError;
use crate::memory::{GuestMemory, RegionLayout, Span};
use crate::patience::{Pace, Wait};

/// Messages that the peer may send without credit; as many buffers are posted, and two for greetings.
pub(super) const MESSAGES: u32 = 64;
/// Buffers for messages on their way out: one for each that may be unused at the peer, as far as this side's bound goes.
const MESSAGES_OUT: u32 = MESSAGES + 2;
/// Bytes of a buffer for private bytes on their way out.
pub(super) const STAGING_BYTES: usize = 64 << 10;
/// Credit that may be on its way.
const CREDITS_OUT: u32 = 16;
/// Writes of nothing that the dialling side may make while it waits for the greeting.
pub(super) const NUDGES_MAX: u32 = 8;
/// Work that the device is asked to queue.
pub(super) const SENDS: u32 = 512;
/// Pieces that the device is asked to gather in one piece of work.
pub(super) const PIECES: u32 = 16;

/// How long the end of a channel waits for what was posted.
const LINGER_MAX: Duration = Duration::from_secs(2);
/// How long a sender that has no credit sleeps before it looks again, at first and later. Credit is written into its memory,
/// which wakes nobody.
const NAPS: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(2));

/// How much memory an end gives to a channel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) slots: u32,
    pub(super) slot_bytes: u64,
    pub(super) stagings: u32,
}

impl Sizes {
    /// The side that is sent most: 4 MiB of landing.
    pub(super) const ACCEPTING: Self = Self {
        slots: 16,
        slot_bytes: 256 << 10,
        stagings: 4,
    };
    /// The side that sends most.
    pub(super) const DIALLING: Self = Self {
        slots: 4,
        slot_bytes: 64 << 10,
        stagings: 8,
    };
}

/// The parts of the buffers, as regions of one memory.
#[derive(Clone, Copy)]
enum Part {
    In,
    Landing,
    Out,
    Staging,
    CreditIn,
    CreditOut,
}

const PARTS: [Part; 6] = [
    Part::In,
    Part::Landing,
    Part::Out,
    Part::Staging,
    Part::CreditIn,
    Part::CreditOut,
];

/// The memory of a channel's buffers. It is reached through spans only, since the device writes it.
pub(super) struct Buffers {
    memory: GuestMemory,
    pub(super) sizes: Sizes,
}

/// The keys of the buffers.
pub(super) struct Keys {
    /// Withdrawn when nothing may land any more.
    landing: Option<Mr>,
    inward: Mr,
    out: Mr,
    staging: Mr,
    credit_in: Mr,
    credit_out: Mr,
}

impl Buffers {
    pub(super) fn new(sizes: Sizes) -> io::Result<Self> {
        let bytes = |part| match part {
            Part::In => u64::from(MESSAGES + 2) * MESSAGE_BYTES as u64,
            Part::Landing => u64::from(sizes.slots) * sizes.slot_bytes,
            Part::Out => u64::from(MESSAGES_OUT) * MESSAGE_BYTES as u64,
            Part::Staging => u64::from(sizes.stagings) * STAGING_BYTES as u64,
            Part::CreditIn | Part::CreditOut => 4096,
        };
        let layouts = PARTS.map(|part| RegionLayout {
            guest_address: 0,
            bytes: bytes(part),
        });
        let memory = GuestMemory::anonymous(&layouts).map_err(io::Error::other)?;
        Ok(Self { memory, sizes })
    }

    pub(super) fn register(&self, pd: &Arc<Pd>) -> io::Result<Keys> {
        let register = |part: Part, access| {
            let bytes = self
                .memory
                .layouts()
                .nth(part as usize)
                .map_or(0, |layout| layout.bytes);
            Mr::new(pd, &self.memory, part as u32, 0, bytes, access)
                .map_err(|error| super::registrar::explain(error, bytes))
        };
        Ok(Keys {
            landing: Some(register(Part::Landing, Access::WrittenByPeer)?),
            inward: register(Part::In, Access::WrittenHere)?,
            out: register(Part::Out, Access::ReadHere)?,
            staging: register(Part::Staging, Access::ReadHere)?,
            credit_in: register(Part::CreditIn, Access::WrittenByPeer)?,
            credit_out: register(Part::CreditOut, Access::ReadHere)?,
        })
    }

    fn span(&self, part: Part, offset: u64, bytes: usize) -> Span<'_> {
        match self.memory.span(part as u32, offset, bytes as u64) {
            Ok(span) => span,
            Err(error) => unreachable!("inside the channel's own buffers: {error}"),
        }
    }

    /// Bytes of a message that arrived.
    pub(super) fn message(&self, buffer: u32, at: usize, bytes: usize) -> Span<'_> {
        self.span(Part::In, place(buffer, MESSAGE_BYTES) + at as u64, bytes)
    }

    /// Bytes that landed in a slot.
    pub(super) fn landed(&self, slot: u32, at: usize, bytes: usize) -> Span<'_> {
        let start = u64::from(slot) * self.sizes.slot_bytes;
        self.span(Part::Landing, start + at as u64, bytes)
    }

    /// A message's buffer on this side's way out.
    pub(super) fn outgoing(&self, buffer: u32, bytes: usize) -> Span<'_> {
        self.span(Part::Out, place(buffer, MESSAGE_BYTES), bytes)
    }

    /// A buffer for private bytes.
    pub(super) fn staging(&self, buffer: u32, at: usize, bytes: usize) -> Span<'_> {
        self.span(
            Part::Staging,
            place(buffer, STAGING_BYTES) + at as u64,
            bytes,
        )
    }

    /// All of it, for tests that look for what a peer changed.
    #[cfg(test)]
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What this end tells the other.
    pub(super) fn greeting(&self, keys: &Keys) -> Greeting {
        let landing = self.span(Part::Landing, 0, 0).as_ptr() as u64;
        let credit = self.span(Part::CreditIn, 0, 0).as_ptr() as u64;
        Greeting {
            messages: MESSAGES,
            slots: self.sizes.slots,
            slot_bytes: self.sizes.slot_bytes,
            landing_address: landing,
            landing_key: keys.landing.as_ref().map_or(0, Mr::rkey),
            credit_address: credit,
            credit_key: keys.credit_in.rkey(),
        }
    }
}

fn place(buffer: u32, bytes: usize) -> u64 {
    u64::from(buffer) * bytes as u64
}

fn sge(span: Span<'_>, mr: &Mr) -> Sge {
    Sge {
        address: span.as_ptr() as u64,
        // Buffers of this channel: at most a slot.
        length: span.len() as u32,
        lkey: mr.lkey(),
    }
}

/// Work that was posted and not completed; it completes in order.
struct Pending {
    /// How many pieces of work.
    works: u32,
    what: Posted,
    _held: Vec<Arc<Mr>>,
}

/// What was posted.
enum Posted {
    Greeting,
    Credit,
    Message(Unused),
}

/// The buffers of a message that the peer has not used up.
struct Unused {
    number: u32,
    message: u32,
    stagings: Vec<u32>,
}

/// A message that arrived, as far as it is not taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived {
    pub(super) buffer: u32,
    pub(super) inline_at: usize,
    pub(super) inline_end: usize,
    pub(super) slot: u32,
    pub(super) landed_at: usize,
    pub(super) landed_end: usize,
    uses_slot: bool,
}

/// Everything that is changed under the lock.
pub(super) struct State {
    endpoint: Endpoint,
    keys: Keys,
    pending: VecDeque<Pending>,
    /// Completed, and not used up by the peer.
    unused: VecDeque<Unused>,
    works_free: u32,
    credits_out: u32,
    credit_next: u32,
    messages_free: Vec<u32>,
    stagings_free: Vec<u32>,
    /// What this side sent, and what of it the peer used up.
    sent: Credit,
    returned: Credit,
    /// What arrived, what of it was used up here, and what of that the peer was told.
    inbox: VecDeque<Arrived>,
    arrived: Credit,
    used: Credit,
    told: Credit,
    /// The peer said that it sends no more.
    ended: bool,
    /// The connection is no more.
    gone: bool,
    lost: Option<ChannelError>,
}

/// Which half waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Send,
    Receive,
}

pub(super) struct Link {
    state: Mutex<State>,
    pub(super) buffers: Buffers,
    pub(super) peer: Greeting,
    pub(super) pd: Arc<Pd>,
    pub(super) registrar: Option<Arc<Registrar>>,
    pub(super) name: Arc<str>,
    shut: AtomicBool,
    bells: [Bell; 2],
    completions: OwnedFd,
    events: OwnedFd,
}

/// A connection on which nothing but greetings was exchanged.
pub(super) struct Fresh {
    pub(super) endpoint: Endpoint,
    pub(super) keys: Keys,
    pub(super) buffers: Buffers,
    pub(super) pd: Arc<Pd>,
}

/// The identity of receives is their buffer; that of everything else is this.
const OURS: u64 = 1 << 32;

impl Fresh {
    /// Posts the buffer of a message.
    pub(super) fn post_message(&mut self, buffer: u32) -> io::Result<()> {
        let piece = sge(
            self.buffers.message(buffer, 0, MESSAGE_BYTES),
            &self.keys.inward,
        );
        self.endpoint.post_receive(u64::from(buffer), piece)
    }

    pub(super) fn post_messages(&mut self) -> io::Result<()> {
        (0..MESSAGES + 2).try_for_each(|buffer| self.post_message(buffer))
    }

    pub(super) fn send_greeting(&mut self) -> io::Result<()> {
        let octets = self.buffers.greeting(&self.keys).encode();
        let span = self.buffers.outgoing(0, GREETING_BYTES);
        span.copy_from(&octets);
        self.endpoint.post_send(OURS, sge(span, &self.keys.out))
    }

    /// Lets the peer's device see something: a write of nothing, for which no key is asked (RFC 5041 section 5.2; it is also what RFC 6581
    /// section 4.3 lets a peer begin with). It leaves no completion; that it could not be posted shows elsewhere.
    pub(super) fn nudge(&mut self) {
        let _ = self.endpoint.post_write(OURS, &[], 0, 0, Signaled::No);
    }

    /// The piece of the first buffer for private bytes, for tests that post what no channel would.
    #[cfg(test)]
    pub(super) fn staged(&self, bytes: usize) -> Sge {
        sge(self.buffers.staging(0, 0, bytes), &self.keys.staging)
    }

    /// The piece of the first message's buffer, for the same tests.
    #[cfg(test)]
    pub(super) fn outgoing_piece(&self, bytes: usize) -> Sge {
        sge(self.buffers.outgoing(0, bytes), &self.keys.out)
    }

    /// The greeting in a message that arrived; its buffer is posted again.
    pub(super) fn read_greeting(&mut self, buffer: u32, bytes: u32) -> Result<Greeting, String> {
        if bytes as usize != GREETING_BYTES {
            return Err(Wrong::Magic.to_string());
        }
        let mut octets = [0; GREETING_BYTES];
        self.buffers
            .message(buffer, 0, GREETING_BYTES)
            .copy_to(&mut octets);
        let greeting = Greeting::decode(&octets).map_err(|wrong| wrong.to_string())?;
        self.post_message(buffer)
            .map_err(|error| error.to_string())?;
        Ok(greeting)
    }
}

impl Link {
    pub(super) fn new(
        fresh: Fresh,
        peer: Greeting,
        greeting_is_out: bool,
        registrar: Option<Arc<Registrar>>,
        name: Arc<str>,
    ) -> io::Result<Self> {
        let Fresh {
            endpoint,
            keys,
            buffers,
            pd,
        } = fresh;
        let completions = endpoint.as_fd().try_clone_to_owned()?;
        let events = endpoint.id().events().as_fd().try_clone_to_owned()?;
        let depth = endpoint.depth();
        let mut state = State {
            // Work that leaves no completion may still be in the queue.
            works_free: depth.sends.saturating_sub(NUDGES_MAX),
            endpoint,
            keys,
            pending: VecDeque::new(),
            unused: VecDeque::new(),
            credits_out: 0,
            credit_next: 0,
            messages_free: (0..MESSAGES_OUT).collect(),
            stagings_free: (0..buffers.sizes.stagings).collect(),
            sent: Credit::default(),
            returned: Credit::default(),
            inbox: VecDeque::new(),
            arrived: Credit::default(),
            used: Credit::default(),
            told: Credit::default(),
            ended: false,
            gone: false,
            lost: None,
        };
        if greeting_is_out {
            // Our greeting has not completed yet: it used buffer 0.
            state.messages_free.retain(|buffer| *buffer != 0);
            state.works_free -= 1;
            state.pending.push_back(Pending {
                works: 1,
                what: Posted::Greeting,
                _held: Vec::new(),
            });
        }
        Ok(Self {
            state: Mutex::new(state),
            buffers,
            peer,
            pd,
            registrar,
            name,
            shut: AtomicBool::new(false),
            bells: [Bell::new()?, Bell::new()?],
            completions,
            events,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock but on a bug of this file.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }

    /// Ends both halves; never waits.
    pub(super) fn shutdown(&self) {
        self.shut.store(true, Ordering::SeqCst);
        let mut state = self.lock();
        state.keys.landing = None;
        state.endpoint.id().disconnect();
        drop(state);
        self.bells.iter().for_each(Bell::ring);
    }

    /// Nothing may land any more: the peer's key is of no use from here on.
    pub(super) fn withdraw(&self) {
        self.lock().keys.landing = None;
    }

    /// Work that one message may take, and pieces that one piece of work may gather.
    pub(super) fn works(&self) -> (u32, u32) {
        let depth = self.lock().endpoint.depth();
        (depth.sends - CREDITS_OUT - NUDGES_MAX, depth.pieces)
    }

    /// Waits until `ready` gives something, after completions were taken.
    pub(super) fn until<T>(
        &self,
        side: Side,
        wait: &mut Wait,
        bytes_done: u64,
        mut ready: impl FnMut(&mut State) -> Result<Option<T>, ChannelError>,
    ) -> Result<T, ChannelError> {
        let io = |error| ChannelError::Io(Arc::new(error));
        let mut nap = NAPS.0;
        loop {
            self.bells[side as usize].silence();
            {
                let mut state = self.lock();
                for armed in [false, true] {
                    if self.is_shut() {
                        return Err(ChannelError::ShutDown);
                    }
                    if armed {
                        state.endpoint.arm().map_err(io)?;
                    }
                    self.pump(&mut state, side);
                    if let Some(found) = ready(&mut state)? {
                        return Ok(found);
                    }
                }
            }
            let at_most = match (wait.pace().check(bytes_done)?, side) {
                (Pace::Forever, Side::Receive) => None,
                (Pace::Forever, Side::Send) => Some(nap),
                (Pace::AtMost(time), Side::Receive) => Some(time),
                (Pace::AtMost(time), Side::Send) => Some(time.min(nap)),
                _ => Some(Duration::ZERO),
            };
            nap = (nap * 2).min(NAPS.1);
            self.sleep(side, at_most).map_err(io)?;
        }
    }

    fn sleep(&self, side: Side, at_most: Option<Duration>) -> io::Result<()> {
        let bell = self.bells[side as usize].as_fd();
        wait_any(
            &[self.completions.as_fd(), self.events.as_fd(), bell],
            at_most,
        )
    }

    /// Takes what happened: events of the connection first, so that what had arrived before its end is found below.
    fn pump(&self, state: &mut State, side: Side) {
        let (mut over, mut reason) = (false, None);
        while let Ok(Some(event)) = state.endpoint.id().events().next() {
            over |= event.happened != Happened::Established;
            if let Happened::Other(number) = event.happened {
                reason.get_or_insert(number);
            }
        }
        let before = (state.pending.len(), state.inbox.len(), state.gone);
        let mut found = [Completion::default(); 16];
        loop {
            let count = match state.endpoint.poll(&mut found) {
                Ok(count) => count,
                Err(error) => {
                    state.lose(ChannelError::Io(Arc::new(error)));
                    break;
                }
            };
            for completion in &found[..count] {
                self.completed(state, completion);
            }
            if count < found.len() {
                break;
            }
        }
        if over {
            // What happens to a connection after its end is no reason for it.
            if let Some(number) = reason.filter(|_| !state.gone) {
                let error = io::Error::other(format!("RDMA: {}", describe(number)));
                state.lose(ChannelError::Lost(Arc::new(error)));
            }
            state.end_connection();
        }
        if before != (state.pending.len(), state.inbox.len(), state.gone) {
            let other = match side {
                Side::Send => Side::Receive,
                Side::Receive => Side::Send,
            };
            self.bells[other as usize].ring();
        }
    }

    fn completed(&self, state: &mut State, completion: &Completion) {
        if completion.status != 0 {
            if completion.status != WC_FLUSHED {
                let text = format!("RDMA: {}", describe_status(completion.status));
                state.lose(ChannelError::Lost(Arc::new(io::Error::other(text))));
            }
            state.end_connection();
        } else if completion.id == OURS {
            if let Some(pending) = state.pending.pop_front() {
                state.works_free += pending.works;
                match pending.what {
                    // Small enough for every device to have copied it.
                    Posted::Greeting => state.messages_free.push(0),
                    Posted::Credit => state.credits_out -= 1,
                    Posted::Message(unused) => state.unused.push_back(unused),
                }
            }
        } else {
            // Buffers are numbered from 0; there are MESSAGES + 2.
            let buffer = completion.id as u32;
            if let Err(wrong) = self.arrived(state, buffer, completion.byte_len as usize) {
                let text = format!("RDMA: the peer broke the agreement: {wrong}");
                let error = io::Error::new(io::ErrorKind::InvalidData, text);
                state.lose(ChannelError::Lost(Arc::new(error)));
                state.end_connection();
            }
        }
    }

    fn arrived(&self, state: &mut State, buffer: u32, bytes: usize) -> Result<(), Wrong> {
        if bytes < HEADER_BYTES {
            return Err(Wrong::Length(bytes));
        }
        let mut octets = [0; HEADER_BYTES];
        // Copied first: what is checked is what is used.
        self.buffers
            .message(buffer, 0, HEADER_BYTES)
            .copy_to(&mut octets);
        let header = Header::decode(&octets, bytes)?;
        if state.ended {
            return Err(Wrong::AfterEnd);
        }
        let expected = state.arrived.messages;
        if header.number != expected {
            return Err(Wrong::Number {
                got: header.number,
                expected,
            });
        }
        state.arrived.messages = expected.wrapping_add(1);
        if header.kind == Kind::End {
            state.ended = true;
            state.keys.landing = None;
            return Ok(());
        }
        let sizes = self.buffers.sizes;
        let uses_slot = header.landed_bytes > 0;
        if uses_slot {
            let turn = state.arrived.slots % sizes.slots;
            if header.slot != turn || u64::from(header.landed_bytes) > sizes.slot_bytes {
                return Err(Wrong::Slot {
                    slot: header.slot,
                    bytes: header.landed_bytes,
                });
            }
            state.arrived.slots = state.arrived.slots.wrapping_add(1);
        }
        state.inbox.push_back(Arrived {
            buffer,
            inline_at: HEADER_BYTES,
            inline_end: HEADER_BYTES + usize::from(header.inline_bytes),
            slot: header.slot,
            landed_at: 0,
            landed_end: header.landed_bytes as usize,
            uses_slot,
        });
        Ok(())
    }

    /// The credit that the peer left.
    fn read_credit(&self, state: &mut State) -> Result<(), ChannelError> {
        let mut octets = [0; CREDIT_BYTES];
        self.buffers
            .span(Part::CreditIn, 0, CREDIT_BYTES)
            .copy_to(&mut octets);
        let Some(credit) = Credit::decode(&octets) else {
            return Ok(());
        };
        let outstanding = |sent: u32, returned: u32| sent.wrapping_sub(returned);
        let grows = outstanding(state.sent.messages, credit.messages)
            <= outstanding(state.sent.messages, state.returned.messages)
            && outstanding(state.sent.slots, credit.slots)
                <= outstanding(state.sent.slots, state.returned.slots);
        if !grows {
            let text = format!("RDMA: the peer broke the agreement: {}", Wrong::Credit);
            let error = io::Error::new(io::ErrorKind::InvalidData, text);
            state.lose(ChannelError::Lost(Arc::new(error)));
            state.end_connection();
            return Err(state.failure(0, 0));
        }
        state.returned = credit;
        // Numbers wrap; what is outstanding is far less than half of them.
        let is_used =
            |unused: &Unused| credit.messages.wrapping_sub(unused.number.wrapping_add(1)) < 1 << 31;
        while state.unused.front().is_some_and(is_used)
            && let Some(unused) = state.unused.pop_front()
        {
            state.messages_free.push(unused.message);
            state.stagings_free.extend(unused.stagings);
        }
        Ok(())
    }

    /// A buffer for a message for which there is credit; one message's credit is kept for the end.
    pub(super) fn take_message(
        &self,
        state: &mut State,
        kind: Kind,
    ) -> Result<Option<u32>, ChannelError> {
        state.check(0, 0)?;
        self.read_credit(state)?;
        let outstanding = state.sent.messages.wrapping_sub(state.returned.messages);
        let kept = u32::from(kind == Kind::Data);
        if outstanding + kept >= self.peer.messages {
            return Ok(None);
        }
        Ok(state.messages_free.pop())
    }

    /// A buffer for private bytes, if one is free.
    pub(super) fn take_staging(&self, state: &mut State) -> Result<Option<u32>, ChannelError> {
        state.check(0, 0)?;
        self.read_credit(state)?;
        Ok(state.stagings_free.pop())
    }

    /// The next slot of the peer's landing, if it is free.
    pub(super) fn next_slot(&self, state: &mut State) -> Result<Option<u32>, ChannelError> {
        state.check(0, 0)?;
        self.read_credit(state)?;
        let outstanding = state.sent.slots.wrapping_sub(state.returned.slots);
        Ok((outstanding < self.peer.slots).then_some(state.sent.slots % self.peer.slots))
    }

    /// Gives buffers back that were taken for a message that is not sent.
    pub(super) fn give_back(&self, draft: Draft) {
        let mut state = self.lock();
        state.messages_free.push(draft.buffer);
        state.stagings_free.extend(draft.stagings);
    }

    /// Posts a message and its writes, if there is room for the work.
    pub(super) fn post(
        &self,
        state: &mut State,
        draft: &mut Draft,
    ) -> Result<Option<()>, ChannelError> {
        state.check(0, 0)?;
        let gather = state.endpoint.depth().pieces as usize;
        let works = draft.pieces.len().div_ceil(gather) as u32 + 1;
        if state.works_free < works + CREDITS_OUT {
            return Ok(None);
        }
        let number = state.sent.messages;
        let uses_slot = draft.landed > 0;
        let slot = if uses_slot { draft.slot } else { 0 };
        let header = Header {
            kind: draft.kind,
            inline_bytes: draft.inline as u16,
            landed_bytes: draft.landed as u32,
            slot,
            number,
        };
        self.buffers
            .outgoing(draft.buffer, HEADER_BYTES)
            .copy_from(&header.encode());
        let mut to = self.peer.landing_address + u64::from(slot) * self.peer.slot_bytes;
        for pieces in draft.pieces.chunks(gather) {
            let key = self.peer.landing_key;
            let result = state
                .endpoint
                .post_write(OURS, pieces, to, key, Signaled::No);
            result.map_err(|error| state.broken(error))?;
            to += pieces
                .iter()
                .map(|piece| u64::from(piece.length))
                .sum::<u64>();
        }
        let message = sge(
            self.buffers
                .outgoing(draft.buffer, HEADER_BYTES + draft.inline),
            &state.keys.out,
        );
        let result = state.endpoint.post_send(OURS, message);
        result.map_err(|error| state.broken(error))?;
        state.works_free -= works;
        state.sent.messages = number.wrapping_add(1);
        if uses_slot {
            state.sent.slots = state.sent.slots.wrapping_add(1);
        }
        state.pending.push_back(Pending {
            works,
            what: Posted::Message(Unused {
                number,
                message: draft.buffer,
                stagings: std::mem::take(&mut draft.stagings),
            }),
            _held: std::mem::take(&mut draft.held),
        });
        Ok(Some(()))
    }

    /// The piece of a buffer for private bytes.
    pub(super) fn staged(&self, buffer: u32, at: usize, bytes: usize) -> Sge {
        let state = self.lock();
        sge(self.buffers.staging(buffer, at, bytes), &state.keys.staging)
    }

    /// A message was taken whole: its buffers are free again, and the peer is told, now or with the next.
    pub(super) fn used(&self, arrived: Arrived) -> Result<(), ChannelError> {
        let mut state = self.lock();
        state.used.messages = state.used.messages.wrapping_add(1);
        if arrived.uses_slot {
            state.used.slots = state.used.slots.wrapping_add(1);
        }
        if state.gone || state.lost.is_some() || self.is_shut() {
            // Nobody is there to be told; what arrived is still taken.
            return Ok(());
        }
        let piece = sge(
            self.buffers.message(arrived.buffer, 0, MESSAGE_BYTES),
            &state.keys.inward,
        );
        let result = state
            .endpoint
            .post_receive(u64::from(arrived.buffer), piece);
        if result.is_err() {
            // The connection ends at this moment; completions will say so.
            return Ok(());
        }
        let untold = state.used.messages.wrapping_sub(state.told.messages);
        if state.used.slots == state.told.slots && untold < MESSAGES / 4 {
            return Ok(());
        }
        // Credit that is on its way completes without the peer's program, so this wait is short.
        let until = Instant::now() + LINGER_MAX;
        while state.credits_out == CREDITS_OUT && !state.gone && Instant::now() < until {
            drop(state);
            let armed = self.lock().endpoint.arm();
            armed.map_err(|error| ChannelError::Io(Arc::new(error)))?;
            state = self.lock();
            self.pump(&mut state, Side::Receive);
            if state.credits_out == CREDITS_OUT {
                drop(state);
                let _ = self.sleep(Side::Receive, Some(NAPS.0));
                state = self.lock();
            }
        }
        self.tell(&mut state);
        Ok(())
    }

    fn tell(&self, state: &mut State) {
        if state.credits_out == CREDITS_OUT || state.works_free == 0 || state.gone {
            return;
        }
        let at = u64::from(state.credit_next) * CREDIT_BYTES as u64;
        let span = self.buffers.span(Part::CreditOut, at, CREDIT_BYTES);
        span.copy_from(&state.used.encode());
        let piece = [sge(span, &state.keys.credit_out)];
        let (address, key) = (self.peer.credit_address, self.peer.credit_key);
        let posted = state
            .endpoint
            .post_write(OURS, &piece, address, key, Signaled::Yes);
        if posted.is_ok() {
            state.told = state.used;
            state.credit_next = (state.credit_next + 1) % CREDITS_OUT;
            state.credits_out += 1;
            state.works_free -= 1;
            state.pending.push_back(Pending {
                works: 1,
                what: Posted::Credit,
                _held: Vec::new(),
            });
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // What was posted is on its way to a peer that may still read it: it goes first, unless nobody takes it.
        let until = Instant::now() + LINGER_MAX;
        loop {
            let mut state = self.lock();
            let armed = state.endpoint.arm();
            self.pump(&mut state, Side::Send);
            let done = state.pending.is_empty() || state.gone || state.lost.is_some();
            if done || armed.is_err() || self.is_shut() || Instant::now() >= until {
                state.endpoint.id().disconnect();
                return;
            }
            drop(state);
            if self.sleep(Side::Send, Some(NAPS.1)).is_err() {
                return;
            }
        }
    }
}

/// A message that is being put together.
pub(super) struct Draft {
    pub(super) kind: Kind,
    pub(super) buffer: u32,
    pub(super) inline: usize,
    pub(super) slot: u32,
    pub(super) landed: usize,
    pub(super) pieces: Vec<Sge>,
    pub(super) held: Vec<Arc<Mr>>,
    pub(super) stagings: Vec<u32>,
}

impl State {
    pub(super) fn next_message(&mut self) -> Option<Arrived> {
        self.inbox.pop_front()
    }

    /// Whether everything that was posted has completed.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// The first reason counts.
    fn lose(&mut self, error: ChannelError) {
        self.lost.get_or_insert(error);
    }

    fn broken(&mut self, error: io::Error) -> ChannelError {
        // Posting fails on a queue pair in its error state, whose reason comes with the completions.
        if !self.gone {
            self.lose(ChannelError::Lost(Arc::new(error)));
            self.end_connection();
        }
        self.failure(0, 0)
    }

    fn end_connection(&mut self) {
        if !self.gone {
            self.gone = true;
            self.keys.landing = None;
            self.endpoint.id().disconnect();
        }
    }

    /// Refuses what needs a connection, if there is none any more.
    pub(super) fn check(&self, bytes_done: u64, bytes_wanted: u64) -> Result<(), ChannelError> {
        if self.gone || self.lost.is_some() {
            return Err(self.failure(bytes_done, bytes_wanted));
        }
        Ok(())
    }

    /// Refuses to wait for what will not come; to be asked when nothing is left of what arrived.
    pub(super) fn check_receive(
        &self,
        bytes_done: u64,
        bytes_wanted: u64,
    ) -> Result<(), ChannelError> {
        if self.ended {
            return Err(ChannelError::closed(bytes_done, bytes_wanted));
        }
        self.check(bytes_done, bytes_wanted)
    }

    /// What the end of the connection means for an operation.
    pub(super) fn failure(&self, bytes_done: u64, bytes_wanted: u64) -> ChannelError {
        match &self.lost {
            Some(lost) => lost.clone(),
            // It had said that it would send no more, and then it left.
            None if self.ended => ChannelError::closed(bytes_done, bytes_wanted),
            None => ChannelError::Reset { bytes_done },
        }
    }
}
