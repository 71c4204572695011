//! The small buffer between a receiving half and the octets that it read before they were asked for.
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

    /// Octets held.
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Takes the next `to.len()` octets, which must be there.
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

    /// Room for more, with at least `READ_AHEAD_BYTES - len()` octets.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.octets.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.octets[self.end..]
    }

    /// The first `count` octets of `room` were filled.
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
