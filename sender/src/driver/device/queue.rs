//! The queue of items that can be sent at once, from which whichever lane is free takes them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use multifd_wire::limits::LANES_MAX;

use crate::device::stream::Item;
use crate::driver::lock;

/// Tokens that may lie in the queue: more items than any number of devices has buffers for. A lane looks without a token as well,
/// from time to time, so one that does not fit is not lost.
const TOKENS_MAX: usize = 1 << 16;

/// Items that can be sent at once. While the guest runs devices take turns; when it is paused the one with most left goes first.
pub(crate) struct ItemQueue {
    state: Mutex<QueueState>,
    /// One token for each item, so that a lane can wait for items and commands at once.
    tokens: (Sender<()>, Receiver<()>),
    any: AtomicBool,
}

#[derive(Default)]
struct QueueState {
    /// Nothing is given out: the channels are lost, and what landed is not known yet (SPEC: RESUME-11).
    held: bool,
    /// Items of lanes that were lost: before all others.
    again: VecDeque<Arc<Item>>,
    queues: Vec<DeviceQueue>,
    turn: usize,
    paused: bool,
}

#[derive(Default)]
struct DeviceQueue {
    items: VecDeque<Arc<Item>>,
    /// Estimate of the bytes that are still to be taken after the stop.
    left: u64,
    /// The end of its stream was taken.
    over: bool,
}

impl ItemQueue {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            tokens: crossbeam_channel::bounded(TOKENS_MAX),
            any: AtomicBool::new(false),
        }
    }

    pub(super) fn open(&self, devices: usize) {
        lock(&self.state)
            .queues
            .resize_with(devices, DeviceQueue::default);
        self.any.store(devices > 0, Ordering::Relaxed);
    }

    /// Whether there are devices at all.
    pub(crate) fn is_used(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// What a lane waits on.
    pub(crate) fn tokens(&self) -> &Receiver<()> {
        &self.tokens.1
    }

    fn token(&self) -> bool {
        !matches!(self.tokens.0.try_send(()), Err(TrySendError::Full(())))
    }

    pub(super) fn push(&self, item: Arc<Item>) {
        let mut state = lock(&self.state);
        if let Some(queue) = state.queues.get_mut(item.device().value() as usize) {
            queue.items.push_back(item);
        }
        drop(state);
        self.token();
    }

    /// Items that were lost with a lane, or that a lane could not send, the oldest first. Gives how many.
    pub(crate) fn again(&self, items: Vec<Arc<Item>>) -> u64 {
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
    pub(crate) fn hold(&self, held: bool) {
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
    pub(super) fn go_on(&self) {
        lock(&self.state).paused = false;
    }

    /// Forgets all items: their destination is gone.
    pub(super) fn clear(&self) {
        let mut state = lock(&self.state);
        let void = std::mem::take(&mut state.again);
        let queues = state
            .queues
            .iter_mut()
            .map(std::mem::take)
            .collect::<Vec<_>>();
        state.paused = false;
        drop(state);
        // Their buffers go back to their pools, which must not be waited for with the lock.
        drop((void, queues));
    }

    /// The guest is paused: the longest first from here on.
    pub(super) fn pause(&self, left: impl Fn(usize) -> u64) {
        let mut state = lock(&self.state);
        state.paused = true;
        for (index, queue) in state.queues.iter_mut().enumerate() {
            queue.left = left(index);
        }
    }

    /// Whether there is an item now.
    pub(crate) fn has_item(&self) -> bool {
        let state = lock(&self.state);
        let any = !state.again.is_empty() || state.queues.iter().any(|q| !q.items.is_empty());
        any && !state.held
    }

    /// Bytes that were read and wait for a lane.
    pub(super) fn octets(&self) -> u64 {
        let state = lock(&self.state);
        let queued = state.queues.iter().flat_map(|queue| &queue.items);
        let items = state.again.iter().chain(queued);
        items.map(|item| item.octets().len() as u64).sum()
    }

    /// The item that is most urgent now.
    pub(crate) fn take(&self) -> Option<Arc<Item>> {
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
    pub(crate) fn is_drained(&self) -> bool {
        !self.is_used() || lock(&self.state).is_drained()
    }
}

impl QueueState {
    fn take_new(&mut self) -> Option<Arc<Item>> {
        let count = self.queues.len();
        let ready = |(_, queue): &(usize, &DeviceQueue)| !queue.items.is_empty();
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
        let drained = |queue: &DeviceQueue| queue.over && queue.items.is_empty();
        self.again.is_empty() && self.queues.iter().all(drained)
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::DeviceId;
    use multifd_wire::frame::Section;

    use super::*;
    use crate::device::stream::{BufferPool, Stream};

    struct Nowhere;

    impl BufferPool for Nowhere {
        fn take_back(&self, _: Vec<u8>) {}
    }

    #[test]
    fn octets_that_wait_for_a_lane_are_counted_and_those_that_were_lost_with_one() {
        let queue = ItemQueue::new();
        queue.open(2);
        for (device, bytes) in [(0, 300), (1, 50)] {
            let mut stream = Stream::new(DeviceId::new(device), 1000);
            let chunk = stream.chunk(Section::Data, bytes).unwrap();
            queue.push(Item::chunk(
                chunk,
                vec![0; bytes as usize],
                Arc::new(Nowhere),
            ));
        }
        assert_eq!(queue.octets(), 350);
        let taken = queue.take().unwrap();
        assert_eq!(queue.octets(), 350 - taken.octets().len() as u64);
        queue.again(vec![taken]);
        assert_eq!(queue.octets(), 350);
    }
}
