//! One device's stream at the source, as a machine without I/O: numbers, offsets, generations and credit; and its items.
//!
//! ```text
//!   chunk(n) ─► Some: index, offset taken     None: the credit does not reach so far, ask again after a grant
//!   mark(m)  ─► index taken, no credit needed
//! ```
//! The rule it keeps: nothing is numbered that the destination did not grant room for (SPEC: CREDIT-3). So whoever has an item
//! may send it at once, and no lane ever waits for credit (SPEC: ROUND-7).

use std::fmt;
use std::sync::Arc;

use multifd_wire::frame::{DeviceChunk, DeviceMark, Mark, Section};
use multifd_wire::{DeviceId, Generation, Misbehaved};

/// The machine of one device's stream.
#[derive(Debug)]
pub struct Stream {
    device: DeviceId,
    index: u64,
    offset: u64,
    generation: Generation,
    initial_bytes: u64,
    /// Where the stream began, or began anew.
    began_at: u64,
    offset_max: u64,
}

impl Stream {
    /// A stream of which nothing was sent, with the credit of the grant (SPEC: CREDIT-2).
    #[must_use]
    pub fn new(device: DeviceId, window: u64) -> Self {
        Self {
            device,
            index: 0,
            offset: 0,
            generation: Generation::new(0),
            initial_bytes: 0,
            began_at: 0,
            offset_max: window,
        }
    }

    /// The destination granted more.
    ///
    /// # Errors
    /// [`Misbehaved::Amount`] when it is less than before (SPEC: CREDIT-2).
    pub fn grant(&mut self, offset_max: u64) -> Result<(), Misbehaved> {
        if offset_max < self.offset_max {
            return Err(Misbehaved::Amount {
                field: "credit.offset_max (gone back)",
                expected: self.offset_max,
                found: offset_max,
            });
        }
        self.offset_max = offset_max;
        Ok(())
    }

    /// The place of a chunk of this size, if the credit reaches so far.
    pub fn chunk(&mut self, section: Section, bytes: u64) -> Option<DeviceChunk> {
        let end = self.offset.checked_add(bytes)?;
        if end > self.offset_max {
            return None;
        }
        let chunk = DeviceChunk {
            device: self.device,
            section,
            index: self.index,
            offset: self.offset,
        };
        (self.index, self.offset) = (self.index + 1, end);
        Some(chunk)
    }

    /// The place of a mark. An INITIAL_END begins the next generation (SPEC: DEVSTREAM-4).
    pub fn mark(&mut self, mark: Mark) -> DeviceMark {
        if mark == Mark::InitialEnd {
            self.generation = self.generation.next().unwrap_or(self.generation);
            self.initial_bytes = self.offset - self.began_at;
        }
        if mark == Mark::Restart {
            self.began_at = self.offset;
        }
        let placed = DeviceMark {
            device: self.device,
            mark,
            generation: self.generation,
            index: self.index,
            offset: self.offset,
        };
        self.index += 1;
        placed
    }

    /// Chunks and marks placed so far.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Bytes placed so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the stream up to the newest generation's end, from its beginning or the newest RESTART: what the destination has
    /// loaded when it acknowledges that generation, whatever it says of it.
    #[must_use]
    pub fn initial_bytes(&self) -> u64 {
        self.initial_bytes
    }

    /// The newest generation whose end was marked.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }
}

/// Takes buffers back once nobody needs their bytes any more.
pub trait BufferPool: Send + Sync {
    /// One comes back.
    fn take_back(&self, octets: Vec<u8>);
}

/// A chunk or a mark with its place. It is kept until it is acknowledged: until then it may have to be sent again
/// (SPEC: DEVSTREAM-1).
pub struct Item {
    head: Head,
    octets: Vec<u8>,
    pool: Option<Arc<dyn BufferPool>>,
}

/// What an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// A piece of the stream; the bytes are its body.
    Chunk(DeviceChunk),
    /// A point in it.
    Mark(DeviceMark),
}

impl Item {
    /// A chunk, whose buffer goes back to its pool in the end.
    #[must_use]
    pub fn chunk(chunk: DeviceChunk, octets: Vec<u8>, pool: Arc<dyn BufferPool>) -> Arc<Self> {
        Arc::new(Self {
            head: Head::Chunk(chunk),
            octets,
            pool: Some(pool),
        })
    }

    /// A mark.
    #[must_use]
    pub fn mark(mark: DeviceMark) -> Arc<Self> {
        Arc::new(Self {
            head: Head::Mark(mark),
            octets: Vec::new(),
            pool: None,
        })
    }

    /// What it is.
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// Its bytes; none of a mark.
    #[must_use]
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// Whose it is.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        match self.head {
            Head::Chunk(chunk) => chunk.device,
            Head::Mark(mark) => mark.device,
        }
    }

    /// Whether everything before it is void (SPEC: DEVSTREAM-3).
    #[must_use]
    pub fn is_restart(&self) -> bool {
        matches!(self.head, Head::Mark(mark) if mark.mark == Mark::Restart)
    }

    /// Its place in the stream.
    #[must_use]
    pub fn index(&self) -> u64 {
        match self.head {
            Head::Chunk(chunk) => chunk.index,
            Head::Mark(mark) => mark.index,
        }
    }

    /// Whether its device's stream ends with it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self.head, Head::Mark(mark) if mark.mark == Mark::ConfigEnd)
    }
}

impl fmt::Debug for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} with {} bytes", self.head, self.octets.len())
    }
}

impl Drop for Item {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.take_back(std::mem::take(&mut self.octets));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_up_to_the_granted_octet_and_not_one_more() {
        let mut stream = Stream::new(DeviceId::new(1), 100);
        assert_eq!(stream.chunk(Section::Data, 60).unwrap().offset, 0);
        assert_eq!(stream.chunk(Section::Data, 41), None);
        let second = stream.chunk(Section::Data, 40).unwrap();
        assert_eq!((second.index, second.offset), (1, 60));
        assert_eq!(stream.chunk(Section::Config, 1), None);
        stream.grant(101).unwrap();
        assert_eq!(stream.chunk(Section::Config, 1).unwrap().index, 2);
        assert_eq!(stream.chunk(Section::Data, u64::MAX), None);
    }

    #[test]
    fn refuses_credit_that_falls() {
        let mut stream = Stream::new(DeviceId::new(1), 100);
        stream.grant(100).unwrap();
        assert!(matches!(
            stream.grant(99),
            Err(Misbehaved::Amount {
                expected: 100,
                found: 99,
                ..
            })
        ));
    }

    #[test]
    fn marks_take_an_index_and_no_octets_and_carry_the_newest_generation() {
        let mut stream = Stream::new(DeviceId::new(1), 10);
        stream.chunk(Section::Data, 10).unwrap();
        for (mark, generation, index) in [
            (Mark::InitialEnd, 1, 1),
            (Mark::InitialEnd, 2, 2),
            (Mark::DataEnd, 2, 3),
            (Mark::ConfigEnd, 2, 4),
        ] {
            let placed = stream.mark(mark);
            assert_eq!(
                (placed.generation.value(), placed.index, placed.offset),
                (generation, index, 10)
            );
        }
    }
}
