//! The bounded buffer of one direction of an in-memory channel.

use crate::channel::IoSource;
use crate::memory::Span;

/// A bounded queue of bytes.
pub(super) struct Ring {
    octets: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Ring {
    /// An empty ring of `capacity` bytes, at least 1.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            octets: vec![0; capacity.max(1)].into_boxed_slice(),
            start: 0,
            len: 0,
        }
    }

    /// Puts in as much of a piece as fits into one stretch of the ring; returns how much. 0 only if the ring is full or the
    /// piece is empty.
    pub(super) fn put(&mut self, piece: IoSource<'_>) -> usize {
        let capacity = self.octets.len();
        let end = (self.start + self.len) % capacity;
        let stretch = (capacity - self.len).min(capacity - end);
        let count = stretch.min(piece.len());
        let room = &mut self.octets[end..][..count];
        match piece {
            IoSource::Bytes(octets) => room.copy_from_slice(&octets[..count]),
            IoSource::Guest(span) => match span.subspan(0, count) {
                Ok(part) => part.copy_to(room),
                Err(_) => return 0,
            },
        }
        self.len += count;
        count
    }

    /// Moves out as much as one stretch holds and `to` takes; returns how much. 0 only if the ring or `to` is empty.
    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let stretch = self.stretch(to.len());
        let count = stretch.len();
        to[..count].copy_from_slice(stretch);
        self.consume(count)
    }

    /// As [`take`](Self::take), into guest memory.
    pub(super) fn take_into(&mut self, span: Span<'_>) -> usize {
        let stretch = self.stretch(span.len());
        let Ok(part) = span.subspan(0, stretch.len()) else {
            return 0;
        };
        part.copy_from(stretch);
        self.consume(part.len())
    }

    fn stretch(&self, at_most: usize) -> &[u8] {
        let count = self.len.min(self.octets.len() - self.start).min(at_most);
        &self.octets[self.start..][..count]
    }

    fn consume(&mut self, count: usize) -> usize {
        self.start = (self.start + count) % self.octets.len();
        self.len -= count;
        count
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::{GuestMemory, RegionLayout};

    #[derive(Clone, Debug)]
    enum Step {
        Put(Vec<u8>),
        PutGuest(Vec<u8>),
        Take(usize),
        TakeInto(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let octets = || prop::collection::vec(any::<u8>(), 0..12);
        prop_oneof![
            octets().prop_map(Step::Put),
            octets().prop_map(Step::PutGuest),
            (0..12_usize).prop_map(Step::Take),
            (0..12_usize).prop_map(Step::TakeInto),
        ]
    }

    proptest! {
        #[test]
        fn ring_is_a_bounded_queue(capacity in 1..9_usize, steps in prop::collection::vec(step(), 0..200)) {
            let memory = GuestMemory::anonymous(&[RegionLayout { guest_address: 0, bytes: 64 }]).unwrap();
            let guest = |len: usize| memory.span(0, 0, len as u64).unwrap();
            let mut ring = Ring::new(capacity);
            let mut model = VecDeque::new();
            for step in steps {
                match step {
                    Step::Put(octets) => {
                        let count = ring.put(IoSource::Bytes(&octets));
                        prop_assert_eq!(count == 0, octets.is_empty() || model.len() == capacity);
                        model.extend(&octets[..count]);
                    }
                    Step::PutGuest(octets) => {
                        guest(octets.len()).copy_from(&octets);
                        let count = ring.put(IoSource::Guest(guest(octets.len())));
                        prop_assert_eq!(count == 0, octets.is_empty() || model.len() == capacity);
                        model.extend(&octets[..count]);
                    }
                    Step::Take(len) => {
                        let mut octets = vec![0; len];
                        let count = ring.take(&mut octets);
                        prop_assert_eq!(count == 0, len == 0 || model.is_empty());
                        let expected: Vec<u8> = model.drain(..count).collect();
                        prop_assert_eq!(&octets[..count], &expected);
                    }
                    Step::TakeInto(len) => {
                        let count = ring.take_into(guest(len));
                        prop_assert_eq!(count == 0, len == 0 || model.is_empty());
                        let mut octets = vec![0; count];
                        guest(count).copy_to(&mut octets);
                        let expected: Vec<u8> = model.drain(..count).collect();
                        prop_assert_eq!(octets, expected);
                    }
                }
                prop_assert!(model.len() <= capacity);
            }
        }
    }
}
