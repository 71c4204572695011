//! The devices at the source: one reader thread for each, and the outbox from which lanes take what the readers put there.
//!
//! ```text
//!   control ── orders ──► reader of a device ── items ──► outbox ──► whichever lane is free
//!      ▲                     │    ▲                                        │
//!      └────── notes ────────┘    └── credit, buffers that came home ◄── acknowledgements
//! ```
//! A reader numbers an item only when the credit reaches so far, so what is in the outbox can be sent at once. What it must
//! never do: let go of octets that it read before they are in the outbox, or keep an order waiting for credit or for a buffer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TrySendError};
use multifd_wire::frame::{DeviceFlags, Mark, Section};
use multifd_wire::limits::{BLOB_BYTES_MAX, LANES_MAX};
use multifd_wire::{DeviceId, DeviceState, Generation, Misbehaved};

use super::{Note, lock};
use crate::device::stream::{Home, Item, Stream};
use crate::device::{DeviceError, DeviceSource, DeviceTraits, Read};
use crate::error::Fault;

/// Tokens that may lie in the outbox: more items than any number of devices has buffers for. A lane looks without a token as well,
/// from time to time, so one that does not fit is not lost.
const TOKENS_MAX: usize = 1 << 16;

/// How often a device that has nothing to say is asked again.
const POLL: Duration = Duration::from_millis(10);

/// How often one without pre-copy is asked how much it would have.
const POLL_IDLE: Duration = Duration::from_millis(100);

/// Octets that changed in a device are read once there is a chunk of them, or after this time.
const LINGER: Duration = Duration::from_millis(50);

/// What the control thread wants of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Begin pre-copy, if it has it.
    PreCopy,
    /// Into the P2P-quiescent state, if it has one.
    Quiesce,
    /// Stand still, and be read to the end.
    Stop,
    /// The migration failed: back to where it runs, quiescent.
    Back,
    /// Run.
    Run,
    /// The switchover was broken off, and another will follow: back to where it runs, quiescent, with its pre-copy if that stands.
    Hold,
    /// Run, and go on with pre-copy where it stands; otherwise begin the stream anew.
    GoOn,
    /// The guest is gone: stand still for good.
    Retire,
    /// Go home.
    End,
}

/// What a reader tells the control thread.
#[derive(Debug)]
pub(super) enum DeviceNote {
    /// An order was carried out.
    Done { device: DeviceId, order: Order },
    /// The device was read to its end.
    Saved { device: DeviceId },
    /// The device failed.
    Failed(Fault),
}

/// What is known of a device, and what it did. Read by the control thread.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures {
    pub(super) state: Option<DeviceState>,
    /// Octets that it would give if it were stopped now.
    pub(super) stop_bytes: u64,
    /// The generation that has to be acknowledged, and the newest that is.
    pub(super) announced: u32,
    pub(super) acked: u32,
    /// The time of what was loaded for acknowledgements.
    pub(super) acked_load: Duration,
    /// Octets that were read of it in all, and the time that its own code took for them: how fast it can be read.
    pub(super) read_bytes: u64,
    pub(super) read_time: Duration,
    /// The same for loading at the destination, as far as that was told.
    pub(super) loaded_bytes: u64,
    pub(super) loaded_time: Duration,
    pub(super) initial_bytes: u64,
    pub(super) pre_copy_bytes: u64,
    pub(super) stop_copy_bytes: u64,
    pub(super) config_bytes: u64,
    pub(super) quiesce: Duration,
    pub(super) stop: Duration,
    /// Spent in the device's own read calls since it was stopped.
    pub(super) read: Duration,
    pub(super) stopped_at: Option<Instant>,
    pub(super) saved_at: Option<Instant>,
    /// When the last item was handed to a channel.
    pub(super) sent_at: Option<Instant>,
    /// Items that the destination has, and how many the stream has once its end was among them.
    items_arrived: u64,
    items: Option<u64>,
    /// When the destination had said that it has them all.
    pub(super) arrived_at: Option<Instant>,
    pub(super) loaded: Option<(Duration, Duration)>,
    pub(super) loaded_at: Option<Instant>,
    pub(super) was_reset: bool,
    /// How often its stream began anew.
    pub(super) restarts: u32,
    /// It came back from its reader in the end.
    pub(super) given_back: bool,
    pub(super) trouble: Option<String>,
}

impl Figures {
    /// Whether the newest initial bytes are not acknowledged.
    pub(super) fn is_unacked(&self) -> bool {
        self.acked < self.announced
    }

    /// What was measured from the stop on is void: the device runs again.
    fn runs_again(&mut self) {
        *self = Self {
            stop_copy_bytes: 0,
            config_bytes: 0,
            quiesce: Duration::ZERO,
            stop: Duration::ZERO,
            read: Duration::ZERO,
            stopped_at: None,
            saved_at: None,
            sent_at: None,
            arrived_at: None,
            loaded: None,
            loaded_at: None,
            ..std::mem::take(self)
        };
    }

    fn arrived(&mut self, item: &Item) {
        self.items_arrived += 1;
        if item.is_last() {
            self.items = Some(item.index() + 1);
        }
        if self.items == Some(self.items_arrived) {
            self.arrived_at = Some(Instant::now());
        }
    }
}

/// What the reader of one device shares with the others.
pub(super) struct Desk {
    pub(super) id: DeviceId,
    pub(super) name: String,
    pub(super) flags: DeviceFlags,
    /// What the destination holds of it at most.
    window: u64,
    state: Mutex<DeskState>,
    changed: Condvar,
}

struct DeskState {
    order: Option<Order>,
    done: Option<Order>,
    stream: Stream,
    free: Vec<Vec<u8>>,
    /// Buffers that were made; no more than [`DeskState::buffers_max`].
    buffers: usize,
    buffers_max: usize,
    chunk: usize,
    /// From here on no new generation is announced: the guest is about to be paused.
    closed: bool,
    /// The control channel from which on credit is for this stream.
    epoch: u32,
    /// The newest acknowledgement may be said once more: the migration was resumed (SPEC: RESUME-12).
    repeats: bool,
    /// What the device is being asked for, and since when.
    call: Option<(&'static str, Instant)>,
    figures: Figures,
}

impl Desk {
    fn new(id: DeviceId, traits: &DeviceTraits, window: u64, chunk: u64) -> Self {
        let wants_ack = traits.flags.contains(DeviceFlags::SWITCHOVER_ACK);
        // One window on its way, one loaded and not acknowledged yet.
        let buffers_max = usize::try_from(window / chunk.max(1) * 2).unwrap_or(usize::MAX);
        Self {
            id,
            name: traits.name.clone(),
            flags: traits.flags,
            window,
            state: Mutex::new(DeskState {
                order: None,
                done: None,
                stream: Stream::new(id, window),
                free: Vec::new(),
                buffers: 0,
                buffers_max: buffers_max.max(2),
                chunk: usize::try_from(chunk).unwrap_or(usize::MAX),
                closed: false,
                epoch: 0,
                repeats: false,
                call: None,
                figures: Figures {
                    stop_bytes: traits.state_bytes,
                    announced: u32::from(wants_ack),
                    ..Figures::default()
                },
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, DeskState> {
        lock(&self.state)
    }

    pub(super) fn figures(&self) -> Figures {
        self.lock().figures.clone()
    }

    fn note(&self, how: impl FnOnce(&mut Figures)) {
        how(&mut self.lock().figures);
    }

    fn order(&self, order: Order) {
        let mut state = self.lock();
        (state.order, state.done) = (Some(order), None);
        drop(state);
        self.changed.notify_all();
    }

    /// The next order, or none after so long.
    fn take_order(&self, wait: Duration) -> Option<Order> {
        let state = self.lock();
        let idle = |state: &mut DeskState| state.order.is_none();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, wait, idle)
            .unwrap_or_else(PoisonError::into_inner);
        state.order.take()
    }

    fn has_order(&self) -> bool {
        self.lock().order.is_some()
    }

    fn answer(&self, order: Order) {
        self.lock().done = Some(order);
        self.changed.notify_all();
    }

    /// What the device has been asked for since longer than `limit`, and since how long. Its own code does not return.
    pub(super) fn stuck(&self, limit: Duration) -> Option<Stuck> {
        let (step, since) = self.lock().call?;
        let waited = since.elapsed();
        (waited >= limit).then_some(Stuck { step, waited })
    }

    /// Waits until an order was carried out, as long as each call of the device returns within `limit`.
    fn wait_for(&self, order: Order, limit: Duration) -> bool {
        let mut state = self.lock();
        let began = Instant::now();
        loop {
            if state.done == Some(order) {
                return true;
            }
            // Between two calls the reader itself is at work, which takes no time.
            let since = state.call.map_or(began, |(_, since)| since);
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() {
                return false;
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A buffer, unless an order comes first.
    fn buffer(&self, bytes: usize) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if state.order.is_some() {
                return None;
            }
            if let Some(mut buffer) = state.free.pop() {
                buffer.resize(bytes, 0);
                return Some(buffer);
            }
            if state.buffers < state.buffers_max {
                state.buffers += 1;
                let mut buffer = Vec::with_capacity(state.chunk.max(bytes));
                buffer.resize(bytes, 0);
                return Some(buffer);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A place for octets that were read, as soon as the credit reaches so far; the octets back if an order comes first.
    fn place(self: &Arc<Self>, section: Section, octets: Vec<u8>) -> Result<Arc<Item>, Vec<u8>> {
        let mut state = self.lock();
        loop {
            if let Some(chunk) = state.stream.chunk(section, octets.len() as u64) {
                drop(state);
                return Ok(Item::chunk(
                    chunk,
                    octets,
                    Arc::clone(self) as Arc<dyn Home>,
                ));
            }
            if state.order.is_some() {
                return Err(octets);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// More credit, said on the control channel of this number.
    pub(super) fn grant(&self, epoch: u32, offset_max: u64) -> Result<(), Misbehaved> {
        let mut state = self.lock();
        // A destination that has lost the migration spoke of the stream that it had.
        let result = if epoch < state.epoch {
            Ok(())
        } else {
            state.stream.grant(offset_max)
        };
        drop(state);
        self.changed.notify_all();
        result
    }

    /// For a destination that has nothing: an empty stream, to which the control channels from this number on speak.
    fn begin_anew(&self, epoch: u32) {
        let mut state = self.lock();
        // Its credit comes with the grant.
        state.stream = Stream::new(self.id, 0);
        (state.epoch, state.closed, state.repeats) = (epoch, false, false);
        let figures = &mut state.figures;
        figures.runs_again();
        (figures.items_arrived, figures.items) = (0, None);
        figures.announced = u32::from(self.flags.contains(DeviceFlags::SWITCHOVER_ACK));
        (figures.acked, figures.acked_load) = (0, Duration::ZERO);
        (figures.loaded_bytes, figures.loaded_time) = (0, Duration::ZERO);
    }

    /// The destination has loaded the initial bytes of a generation. Gives whether that was news.
    pub(super) fn acked(
        &self,
        generation: Generation,
        bytes: u64,
        load: Duration,
    ) -> Result<(), Misbehaved> {
        let mut state = self.lock();
        let newest = state.stream.generation();
        if state.repeats && generation.value() == state.figures.acked {
            state.repeats = false;
            return Ok(());
        }
        if generation > newest || generation.value() <= state.figures.acked {
            return Err(Misbehaved::Amount {
                field: "switchover_ack.generation",
                expected: newest.value().into(),
                found: generation.value().into(),
            });
        }
        let figures = &mut state.figures;
        figures.acked = generation.value();
        figures.acked_load += load;
        figures.loaded_bytes += bytes;
        figures.loaded_time += load;
        Ok(())
    }
}

impl Desk {
    /// The migration failed. If that was not this device's doing, and its state was on its way, the report says so.
    pub(super) fn was_cut_off(&self) {
        let mut state = self.lock();
        let sent = state.stream.index();
        let arrived = state.figures.items_arrived;
        if sent > arrived {
            let name = &self.name;
            state.figures.trouble.get_or_insert_with(|| {
                format!(
                    "device {name} was cut off: of {sent} pieces of its state {arrived} had arrived"
                )
            });
        }
    }

    /// The destination has loaded everything of it.
    pub(super) fn loaded(&self, bytes: u64, load: Duration, config: Duration) {
        self.note(|figures| {
            // All of it, what was acknowledged included.
            (figures.loaded_bytes, figures.loaded_time) = (bytes, load);
            figures.loaded = Some((load, config));
            figures.loaded_at = Some(Instant::now());
        });
    }
}

/// A call of a device's that does not return.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stuck {
    /// What it was asked for.
    pub(super) step: &'static str,
    /// Since how long.
    pub(super) waited: Duration,
}

impl Home for Desk {
    fn take_back(&self, octets: Vec<u8>) {
        self.lock().free.push(octets);
        self.changed.notify_all();
    }
}

/// What lanes and the control channel's reader see of the devices.
pub(super) struct Depot {
    pub(super) outbox: Outbox,
    desks: OnceLock<Vec<Arc<Desk>>>,
}

impl Depot {
    pub(super) fn new() -> Self {
        Self {
            outbox: Outbox::new(),
            desks: OnceLock::new(),
        }
    }

    pub(super) fn desks(&self) -> &[Arc<Desk>] {
        self.desks.get().map_or(&[], Vec::as_slice)
    }

    /// The destination speaks of a device.
    pub(super) fn desk(&self, device: DeviceId) -> Result<&Arc<Desk>, Misbehaved> {
        self.desks()
            .get(device.value() as usize)
            .ok_or(Misbehaved::UnknownDevice {
                device: device.value(),
            })
    }

    /// The destination has these: each comes here once, since it is acknowledged or sent again.
    pub(super) fn arrived<'i>(&self, items: impl Iterator<Item = &'i Arc<Item>>) {
        for item in items {
            if let Ok(desk) = self.desk(item.device()) {
                desk.note(|figures| figures.arrived(item));
            }
        }
    }

    /// A lane handed an item to its channel.
    pub(super) fn sent(&self, item: &Item) {
        if item.is_last()
            && let Ok(desk) = self.desk(item.device())
        {
            desk.note(|figures| figures.sent_at = Some(Instant::now()));
        }
    }
}

/// Items that can be sent at once. While the guest runs devices take turns; when it is paused the one with most left goes first.
pub(super) struct Outbox {
    state: Mutex<OutboxState>,
    /// One token for each item, so that a lane can wait for items and commands at once.
    tokens: (Sender<()>, Receiver<()>),
    any: AtomicBool,
}

#[derive(Default)]
struct OutboxState {
    /// Nothing is given out: the channels are lost, and what landed is not known yet (SPEC: RESUME-11).
    held: bool,
    /// Items of lanes that were lost: before all others.
    again: VecDeque<Arc<Item>>,
    queues: Vec<Queue>,
    turn: usize,
    paused: bool,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Arc<Item>>,
    /// Estimate of the octets that are still to be taken after the stop.
    left: u64,
    /// The end of its stream was taken.
    over: bool,
}

impl Outbox {
    fn new() -> Self {
        Self {
            state: Mutex::default(),
            tokens: crossbeam_channel::bounded(TOKENS_MAX),
            any: AtomicBool::new(false),
        }
    }

    fn open(&self, devices: usize) {
        lock(&self.state)
            .queues
            .resize_with(devices, Queue::default);
        self.any.store(devices > 0, Ordering::Relaxed);
    }

    /// Whether there are devices at all.
    pub(super) fn is_used(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// What a lane waits on.
    pub(super) fn tokens(&self) -> &Receiver<()> {
        &self.tokens.1
    }

    fn token(&self) -> bool {
        !matches!(self.tokens.0.try_send(()), Err(TrySendError::Full(())))
    }

    fn push(&self, item: Arc<Item>) {
        let mut state = lock(&self.state);
        if let Some(queue) = state.queues.get_mut(item.device().value() as usize) {
            queue.items.push_back(item);
        }
        drop(state);
        self.token();
    }

    /// Items that were lost with a lane, or that a lane could not send, the oldest first. Gives how many.
    pub(super) fn again(&self, items: Vec<Arc<Item>>) -> u64 {
        let count = items.len() as u64;
        let mut state = lock(&self.state);
        for item in items.into_iter().rev() {
            state.again.push_front(item);
        }
        drop(state);
        for _ in 0..count {
            self.token();
        }
        count
    }

    /// The channels are lost, or the destination said what landed: whether items are given out.
    pub(super) fn hold(&self, held: bool) {
        let mut state = lock(&self.state);
        state.held = held;
        let waiting = state.queues.iter().map(|queue| queue.items.len());
        let count = state.again.len() + waiting.sum::<usize>();
        drop(state);
        for _ in 0..if held { 0 } else { count } {
            self.token();
        }
    }

    /// The guest runs on: devices take turns again.
    fn go_on(&self) {
        lock(&self.state).paused = false;
    }

    /// Forgets all items: their destination is gone.
    fn clear(&self) {
        let mut state = lock(&self.state);
        let void = std::mem::take(&mut state.again);
        let queues = state
            .queues
            .iter_mut()
            .map(std::mem::take)
            .collect::<Vec<_>>();
        state.paused = false;
        drop(state);
        // Their buffers go home, which must not be waited for with the lock.
        drop((void, queues));
    }

    /// The guest is paused: the longest first from here on.
    fn pause(&self, left: impl Fn(usize) -> u64) {
        let mut state = lock(&self.state);
        state.paused = true;
        for (index, queue) in state.queues.iter_mut().enumerate() {
            queue.left = left(index);
        }
    }

    /// Whether there is an item now.
    pub(super) fn has_item(&self) -> bool {
        let state = lock(&self.state);
        let any = !state.again.is_empty() || state.queues.iter().any(|q| !q.items.is_empty());
        any && !state.held
    }

    /// Octets that were read and wait for a lane.
    fn octets(&self) -> u64 {
        let state = lock(&self.state);
        let queued = state.queues.iter().flat_map(|queue| &queue.items);
        let items = state.again.iter().chain(queued);
        items.map(|item| item.octets().len() as u64).sum()
    }

    /// The item that is most urgent now.
    pub(super) fn take(&self) -> Option<Arc<Item>> {
        let mut state = lock(&self.state);
        if state.held {
            return None;
        }
        let item = match state.again.pop_front() {
            Some(item) => item,
            None => state.take_new()?,
        };
        if item.is_last() && state.is_drained() {
            drop(state);
            // Lanes that wait for the end of all streams look up.
            for _ in 0..LANES_MAX {
                if !self.token() {
                    break;
                }
            }
        }
        Some(item)
    }

    /// Whether every stream was taken to its end, and nothing is to be sent again.
    pub(super) fn is_drained(&self) -> bool {
        !self.is_used() || lock(&self.state).is_drained()
    }
}

impl OutboxState {
    fn take_new(&mut self) -> Option<Arc<Item>> {
        let count = self.queues.len();
        let ready = |(_, queue): &(usize, &Queue)| !queue.items.is_empty();
        let index = if self.paused {
            let most = self.queues.iter().enumerate().filter(ready);
            most.max_by_key(|(_, queue)| queue.left)?.0
        } else {
            let turn = self.turn;
            let next = self.queues.iter().enumerate().filter(ready);
            next.min_by_key(|(index, _)| (index + count - turn % count) % count)?
                .0
        };
        self.turn = index + 1;
        let queue = self.queues.get_mut(index)?;
        let item = queue.items.pop_front()?;
        queue.left = queue.left.saturating_sub(item.octets().len() as u64);
        queue.over = (queue.over || item.is_last()) && !item.is_restart();
        Some(item)
    }

    fn is_drained(&self) -> bool {
        // A stream that was taken to its end may begin anew with what is waiting.
        let drained = |queue: &Queue| queue.over && queue.items.is_empty();
        self.again.is_empty() && self.queues.iter().all(drained)
    }
}

/// What a reader does between orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Nothing: it runs without pre-copy, or everything was read, or it failed.
    Idle,
    PreCopy,
    StopCopy,
}

/// The reader of one device.
pub(super) struct Reader {
    pub(super) desk: Arc<Desk>,
    source: Box<dyn DeviceSource>,
    depot: Arc<Depot>,
    notes: Sender<Note>,
    chunk: usize,
    mode: Mode,
    /// Read and not placed yet.
    pending: Option<(Section, Vec<u8>)>,
    /// Octets of the initial ones that were announced and not read yet.
    initial_left: u64,
    /// The end of the newest generation was marked.
    initial_marked: bool,
    linger: Option<Instant>,
    /// Its configuration, once it was read, and how much of it was cut.
    config: Option<(Bytes, usize)>,
}

impl Reader {
    /// Until it is sent home; gives the device back.
    pub(super) fn run(mut self) -> Box<dyn DeviceSource> {
        let mut wait = Duration::ZERO;
        loop {
            match self.desk.take_order(wait) {
                Some(Order::End) => return self.source,
                Some(order) => {
                    let begun = Instant::now();
                    match self.obey(order) {
                        Ok(()) => self.done(order, begun.elapsed()),
                        Err(fault) => self.failed(order, fault),
                    }
                    wait = Duration::ZERO;
                }
                None => {
                    wait = match self.turn() {
                        Ok(wait) => wait,
                        Err(fault) => {
                            self.mode = Mode::Idle;
                            self.tell(DeviceNote::Failed(fault));
                            POLL_IDLE
                        }
                    };
                }
            }
        }
    }

    fn done(&self, order: Order, took: Duration) {
        let state = self.source.state();
        self.desk.note(|figures| {
            figures.state = Some(state);
            match order {
                Order::Quiesce => figures.quiesce = took,
                Order::Stop => {
                    figures.stop = took;
                    figures.stopped_at = Some(Instant::now());
                }
                _ => {}
            }
        });
        self.desk.answer(order);
        self.tell(DeviceNote::Done {
            device: self.desk.id,
            order,
        });
    }

    fn failed(&mut self, order: Order, fault: Fault) {
        self.mode = Mode::Idle;
        let (state, text) = (self.source.state(), fault.to_string());
        self.desk.note(|figures| {
            figures.state = Some(state);
            figures.trouble.get_or_insert(text);
        });
        // Whoever waits for it looks at the state; one that failed is as far as it gets.
        self.desk.answer(order);
        self.tell(DeviceNote::Failed(fault));
    }

    /// Says it, unless nobody listens any more.
    fn tell(&self, note: DeviceNote) {
        let mut note = Note::Device(note);
        while let Err(error) = self.notes.send_timeout(note, POLL) {
            if error.is_disconnected() || self.desk.has_order() {
                return;
            }
            note = error.into_inner();
        }
    }

    fn obey(&mut self, order: Order) -> Result<(), Fault> {
        use DeviceState::{PreCopy, PreCopyP2p, Running, RunningP2p, Stop, StopCopy};
        let flags = self.desk.flags;
        let p2p = flags.contains(DeviceFlags::P2P);
        match order {
            Order::PreCopy if flags.contains(DeviceFlags::PRE_COPY) => {
                self.lead(PreCopy, "begin pre-copy")?;
                self.mode = Mode::PreCopy;
            }
            Order::Quiesce if p2p => {
                let to = if self.source.state() == PreCopy {
                    PreCopyP2p
                } else {
                    RunningP2p
                };
                self.mode = Mode::Idle;
                self.lead(to, "become quiescent")?;
            }
            Order::PreCopy | Order::Quiesce | Order::End => {}
            Order::Stop => {
                self.lead(StopCopy, "stop")?;
                self.mode = Mode::StopCopy;
            }
            Order::Back => {
                self.mode = Mode::Idle;
                self.let_go();
                // One that was never made quiescent need not become so now.
                let state = self.source.state();
                if p2p && (state == DeviceState::Error || state.is_quiescent()) {
                    self.lead_back(RunningP2p, "come back, quiescent")?;
                }
            }
            Order::Run => {
                self.lead_back(Running, "run again")?;
                self.forget();
            }
            Order::Hold => match self.source.state() {
                // The stream stands: it is quiescent, or has not even become so.
                PreCopy | PreCopyP2p => self.mode = Mode::Idle,
                _ => self.obey(Order::Back)?,
            },
            Order::GoOn => match self.source.state() {
                PreCopy | PreCopyP2p => {
                    self.lead(PreCopy, "go on with pre-copy")?;
                    self.mode = Mode::PreCopy;
                }
                _ => {
                    self.lead_back(Running, "run again")?;
                    self.begin_anew();
                    self.obey(Order::PreCopy)?;
                }
            },
            Order::Retire => {
                self.mode = Mode::Idle;
                if self.source.state() != DeviceState::Error {
                    self.lead(Stop, "stop for good")?;
                }
            }
        }
        Ok(())
    }

    /// Where it stood in a stream that is void.
    fn forget(&mut self) {
        self.let_go();
        (self.config, self.linger) = (None, None);
        (self.initial_left, self.initial_marked) = (0, false);
    }

    /// What was read and not placed is not wanted any more.
    fn let_go(&mut self) {
        if let Some((_, octets)) = self.pending.take() {
            self.desk.take_back(octets);
        }
    }

    /// The stream that was read is void, since the device runs again; it is read anew (SPEC: RESUME-8).
    fn begin_anew(&mut self) {
        self.forget();
        let mut state = self.desk.lock();
        state.figures.runs_again();
        if self.desk.flags.contains(DeviceFlags::SWITCHOVER_ACK) {
            // What is loaded of the generations before is void as well.
            state.figures.announced = state.stream.generation().value() + 1;
        }
        let begun = state.stream.index() > 0;
        state.figures.restarts += u32::from(begun);
        drop(state);
        if begun {
            self.mark(Mark::Restart);
        }
    }

    /// Step by step along the arcs.
    fn lead(&mut self, to: DeviceState, step: &'static str) -> Result<(), Fault> {
        while let Some(next) = self.source.state().step_to(to, self.desk.flags) {
            self.call(step, |source| source.set_state(next))?;
        }
        let state = self.source.state();
        if state == to {
            return Ok(());
        }
        Err(self.fault(step, DeviceError::new(format!("it is in {state}"))))
    }

    /// Back to where it runs. One that is broken is reset first; one that broke by itself may show it only now.
    fn lead_back(&mut self, to: DeviceState, step: &'static str) -> Result<(), Fault> {
        if self.source.state() != DeviceState::Error {
            let led = self.lead(to, step);
            if led.is_ok() || self.source.state() != DeviceState::Error {
                return led;
            }
        }
        self.call("be reset", |source| source.reset())?;
        self.desk.note(|figures| figures.was_reset = true);
        self.lead(to, step)
    }

    /// A bounded piece of work; gives how long to wait for an order before the next.
    fn turn(&mut self) -> Result<Duration, Fault> {
        if let Some((section, octets)) = self.pending.take() {
            match self.desk.place(section, octets) {
                Ok(item) => self.depot.outbox.push(item),
                Err(octets) => self.pending = Some((section, octets)),
            }
            return Ok(Duration::ZERO);
        }
        match self.mode {
            Mode::Idle => {
                if self.source.state() == DeviceState::Running {
                    self.estimate();
                }
                Ok(POLL_IDLE)
            }
            Mode::PreCopy => self.pre_copy_turn(),
            Mode::StopCopy => self.stop_copy_turn(),
        }
    }

    fn pre_copy_turn(&mut self) -> Result<Duration, Fault> {
        if self.initial_left > 0 {
            let read = self.read(self.initial_left, false)?;
            self.initial_left -= read.min(self.initial_left);
            self.desk.note(|figures| {
                figures.initial_bytes += read;
                figures.stop_bytes = figures.stop_bytes.saturating_sub(read);
            });
            // A device that said that there is more and gives nothing is asked again, in a while.
            return Ok(if read == 0 { POLL } else { Duration::ZERO });
        }
        let info = self.call("say what it has to give", |source| source.pre_copy_info())?;
        if info.reinit {
            self.announce();
        }
        self.estimate();
        self.initial_left = info.initial_bytes;
        if info.initial_bytes > 0 {
            return Ok(Duration::ZERO);
        }
        if !self.initial_marked {
            self.initial_marked = true;
            self.mark(Mark::InitialEnd);
        }
        if info.dirty_bytes == 0 {
            self.linger = None;
            return Ok(POLL);
        }
        let since = *self.linger.get_or_insert_with(Instant::now);
        if info.dirty_bytes < self.chunk as u64 && since.elapsed() < LINGER {
            return Ok(POLL);
        }
        self.linger = None;
        let read = self.read(info.dirty_bytes, false)?;
        Ok(if read == 0 { POLL } else { Duration::ZERO })
    }

    /// New initial bytes: the destination has to load them before the guest is paused, unless it is about to be.
    fn announce(&mut self) {
        let mut state = self.desk.lock();
        if state.closed {
            return;
        }
        if self.desk.flags.contains(DeviceFlags::SWITCHOVER_ACK) {
            state.figures.announced = state.stream.generation().value() + 1;
        }
        drop(state);
        if !self.initial_marked {
            // The batch before was not even complete: both are one.
            return;
        }
        self.initial_marked = false;
    }

    fn stop_copy_turn(&mut self) -> Result<Duration, Fault> {
        if let Some((config, cut)) = &mut self.config {
            let rest = config.get(*cut..).unwrap_or(&[]);
            if rest.is_empty() {
                self.mark(Mark::ConfigEnd);
                self.mode = Mode::Idle;
                self.desk
                    .note(|figures| figures.saved_at = Some(Instant::now()));
                self.tell(DeviceNote::Saved {
                    device: self.desk.id,
                });
                return Ok(Duration::ZERO);
            }
            let bytes = rest.len().min(self.chunk);
            if let Some(mut buffer) = self.desk.buffer(bytes) {
                buffer.copy_from_slice(&rest[..bytes]);
                *cut += bytes;
                self.pending = Some((Section::Config, buffer));
            }
            return Ok(Duration::ZERO);
        }
        if self.read(u64::MAX, true)? > 0 || self.pending.is_some() || self.desk.has_order() {
            return Ok(Duration::ZERO);
        }
        Ok(Duration::from_millis(1))
    }

    /// Reads up to a chunk, and leaves it pending. Gives how much.
    fn read(&mut self, most: u64, last: bool) -> Result<u64, Fault> {
        let wanted = usize::try_from(most).unwrap_or(usize::MAX).min(self.chunk);
        let Some(mut buffer) = self.desk.buffer(wanted) else {
            return Ok(0);
        };
        let (mut filled, mut ended) = (0, false);
        let began = Instant::now();
        while filled < wanted {
            let room = buffer.get_mut(filled..).unwrap_or(&mut []);
            match self.call("be read", |source| source.read(room)) {
                Ok(Read::Octets(count)) if count <= wanted - filled => filled += count,
                Ok(Read::Octets(_)) => {
                    return Err(self.fault("be read", DeviceError::new("it gave more than asked")));
                }
                Ok(Read::NothingNow) => break,
                Ok(Read::End) => {
                    ended = true;
                    break;
                }
                Err(fault) => return Err(fault),
            }
            if self.desk.has_order() {
                break;
            }
        }
        let (took, read) = (began.elapsed(), filled as u64);
        self.desk.note(|figures| {
            if read > 0 {
                figures.read_bytes += read;
                figures.read_time += took;
            }
            if last {
                figures.read += took;
                figures.stop_copy_bytes += read;
            } else {
                figures.pre_copy_bytes += read;
            }
        });
        if filled > 0 {
            buffer.truncate(filled);
            self.pending = Some((Section::Data, buffer));
        } else {
            self.desk.take_back(buffer);
        }
        if ended && last {
            // What is pending goes first.
            if let Some((section, octets)) = self.pending.take() {
                match self.desk.place(section, octets) {
                    Ok(item) => self.depot.outbox.push(item),
                    Err(octets) => {
                        // An order came: the end is found again after it.
                        self.pending = Some((section, octets));
                        return Ok(read);
                    }
                }
            }
            self.end_of_data()?;
        }
        Ok(read)
    }

    fn end_of_data(&mut self) -> Result<(), Fault> {
        self.mark(Mark::DataEnd);
        let config = self.call("give its configuration", |source| source.config())?;
        if config.len() as u64 > BLOB_BYTES_MAX {
            let text = format!("it has {} octets, {BLOB_BYTES_MAX} at most", config.len());
            return Err(self.fault("give its configuration", DeviceError::new(text)));
        }
        let bytes = config.len() as u64;
        // SPEC: CREDIT-5
        if bytes > self.desk.window {
            let text = format!(
                "it has {bytes} octets, and the destination holds {} of a device at most (its device window)",
                self.desk.window
            );
            return Err(self.fault("give its configuration", DeviceError::new(text)));
        }
        self.desk.note(|figures| figures.config_bytes = bytes);
        self.config = Some((config, 0));
        Ok(())
    }

    /// How much it would give if it were stopped now, if it can say.
    fn estimate(&mut self) {
        let asked = self.call("say how much it has", |source| source.stop_copy_bytes());
        if let Ok(bytes) = asked {
            self.desk.note(|figures| figures.stop_bytes = bytes);
        }
    }

    /// Asks the device for something. It is the device's own code, which may never return: the control thread sees since when.
    fn call<T>(
        &mut self,
        step: &'static str,
        ask: impl FnOnce(&mut dyn DeviceSource) -> Result<T, DeviceError>,
    ) -> Result<T, Fault> {
        self.desk.lock().call = Some((step, Instant::now()));
        let answer = ask(&mut *self.source);
        self.desk.lock().call = None;
        answer.map_err(|source| self.fault(step, source))
    }

    fn mark(&self, mark: Mark) {
        let placed = self.desk.lock().stream.mark(mark);
        self.depot.outbox.push(Item::mark(placed));
    }

    fn fault(&self, step: &'static str, source: DeviceError) -> Fault {
        Fault::Device {
            device: self.desk.name.clone(),
            step,
            source,
        }
    }
}

mod fleet;

pub(super) use fleet::Fleet;

#[cfg(test)]
mod tests {
    use super::*;

    struct Nowhere;

    impl Home for Nowhere {
        fn take_back(&self, _: Vec<u8>) {}
    }

    #[test]
    fn octets_that_wait_for_a_lane_are_counted_and_those_that_were_lost_with_one() {
        let outbox = Outbox::new();
        outbox.open(2);
        for (device, bytes) in [(0, 300), (1, 50)] {
            let mut stream = Stream::new(DeviceId::new(device), 1000);
            let chunk = stream.chunk(Section::Data, bytes).unwrap();
            outbox.push(Item::chunk(
                chunk,
                vec![0; bytes as usize],
                Arc::new(Nowhere),
            ));
        }
        assert_eq!(outbox.octets(), 350);
        let taken = outbox.take().unwrap();
        assert_eq!(outbox.octets(), 350 - taken.octets().len() as u64);
        outbox.again(vec![taken]);
        assert_eq!(outbox.octets(), 350);
    }
}
