//! The small buffer between a receiving half and the bytes that it read before they were asked for.
//!
//! Rule: what is in it is the next of the stream. It never grows.

use crate::channel::READ_AHEAD_BYTES;
use crate::memory::Span;

pub(crate) struct ReadAhead {
    octets: Box<[u8]>,
    start: usize,
    end: usize,
}

impl ReadAhead {
    pub(crate) fn new() -> Self {
        Self {
            octets: vec![0; READ_AHEAD_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// A buffer without room, to stand in for one that is in use.
    #[cfg(feature = "rdma")]
    pub(crate) fn empty() -> Self {
        Self {
            octets: Box::default(),
            start: 0,
            end: 0,
        }
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Copies as much as there is and `to` has room for, and keeps it; returns how much.
    pub(crate) fn peek(&self, to: &mut [u8]) -> usize {
        let count = self.len().min(to.len());
        to[..count].copy_from_slice(&self.octets[self.start..][..count]);
        count
    }

    /// Takes the next `to.len()` bytes, which must be there.
    pub(crate) fn take(&mut self, to: &mut [u8]) {
        to.copy_from_slice(&self.octets[self.start..][..to.len()]);
        self.consume(to.len());
    }

    /// Moves as much as there is into private memory; returns how much.
    pub(crate) fn drain(&mut self, to: &mut [u8]) -> usize {
        let count = self.len().min(to.len());
        self.take(&mut to[..count]);
        count
    }

    /// Moves as much as there is into a span; returns how much.
    pub(crate) fn drain_into(&mut self, span: Span<'_>) -> usize {
        let count = self.len().min(span.len());
        if let Ok(part) = span.subspan(0, count) {
            part.copy_from(&self.octets[self.start..][..count]);
            self.consume(count);
        }
        count
    }

    /// Forgets everything held; returns how much it was.
    pub(crate) fn discard(&mut self) -> usize {
        let count = self.len();
        self.consume(count);
        count
    }

    /// Room for more, with at least `READ_AHEAD_BYTES - len()` bytes.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.octets.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.octets[self.end..]
    }

    /// The first `count` bytes of `room` were filled.
    pub(crate) fn filled(&mut self, count: usize) {
        self.end += count;
        debug_assert!(self.end <= self.octets.len(), "filled what room gave");
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, RegionLayout};

    fn put(ahead: &mut ReadAhead, octets: &[u8]) {
        ahead.room()[..octets.len()].copy_from_slice(octets);
        ahead.filled(octets.len());
    }

    #[test]
    fn gives_back_in_order_whatever_the_way() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 4,
        }])
        .unwrap();
        let mut ahead = ReadAhead::new();
        put(&mut ahead, b"abcde");
        let mut two = [0; 2];
        ahead.take(&mut two);
        assert_eq!((&two, ahead.len()), (b"ab", 3));
        assert_eq!(ahead.drain_into(memory.span(0, 1, 1).unwrap()), 1);
        put(&mut ahead, b"fgh");
        let mut rest = [0; 9];
        assert_eq!(ahead.drain(&mut rest), 5);
        assert_eq!((&rest[..5], ahead.len()), (&b"defgh"[..], 0));
        assert_eq!(ahead.drain_into(memory.span(0, 0, 4).unwrap()), 0);
        let mut landed = [0; 4];
        memory.span(0, 0, 4).unwrap().copy_to(&mut landed);
        assert_eq!(&landed, b"\0c\0\0");
    }

    #[test]
    fn has_room_for_the_rest_of_its_size_whatever_was_taken() {
        let mut ahead = ReadAhead::new();
        assert_eq!(ahead.room().len(), READ_AHEAD_BYTES);
        put(&mut ahead, &[1; READ_AHEAD_BYTES]);
        assert!(ahead.room().is_empty());
        ahead.take(&mut [0; 100]);
        assert_eq!(ahead.room().len(), 100);
        put(&mut ahead, &[2; 100]);
        let mut all = [0; READ_AHEAD_BYTES];
        ahead.take(&mut all);
        assert_eq!(
            (
                all[0],
                all[READ_AHEAD_BYTES - 101],
                all[READ_AHEAD_BYTES - 100]
            ),
            (1, 1, 2)
        );
        assert_eq!(
            (ahead.len(), ahead.discard(), ahead.room().len()),
            (0, 0, READ_AHEAD_BYTES)
        );
        put(&mut ahead, b"xyz");
        assert_eq!((ahead.discard(), ahead.len()), (3, 0));
    }
}
