//! One device's stream at the destination, as a machine without I/O: admits items from any lane and puts them in order.
//!
//! ```text
//!                 loaded          next (lowest missing)                     granted
//!                   ▼               ▼                                          ▼
//!    ── gone ───────┼── ready ──────┼── missing ── held ── missing ── held ────┼── refused ──
//!                   └───────────────── the window, in bytes ──────────────────┘
//! ```
//! The rules it keeps: nothing past the granted offset is admitted (SPEC: CREDIT-3), items never overlap, so what is held is
//! never more than the window; the lowest missing item lies inside the window and so always has room (SPEC: CREDIT-4); what
//! is handed over is in the order of the indices and follows the grammar of a stream (SPEC: DEVSTREAM-1 to DEVSTREAM-5). An
//! item comes again only after a lane was lost, at most once for each (SPEC: DEVSTREAM-1), so repeats have an end.

use std::collections::{BTreeMap, VecDeque};

use multifd_wire::frame::{DeviceChunk, DeviceMark, Mark, Section};
use multifd_wire::{DeviceId, Generation, Misbehaved};

use crate::destination::error::Fault;

/// Items of one device that are held at most, chunks and marks, besides one for each 4 KiB of the window. A source that sends
/// smaller chunks in such numbers is refused with reason 10: each item costs some hundred bytes beside its own.
const ITEMS_SPARE: u64 = 64;

/// What is handed over, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// Bytes of the data section.
    Data(Vec<u8>),
    /// Bytes of the configuration.
    Config(Vec<u8>),
    /// The initial bytes of this generation are complete.
    InitialEnd(Generation),
    /// The data is complete.
    DataEnd,
    /// The configuration is complete, and with it the stream.
    ConfigEnd,
    /// All before this is void.
    Restart,
}

/// Whether a chunk is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// Its body is to be read, and brought with [`Assembler::arrived`] or given up.
    Take,
    /// It is here already: its body is to be read over (SPEC: DEVSTREAM-1).
    Have,
}

/// Whether the stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// Items are missing, in the middle or at the end.
    More,
    /// Everything is here, up to the stream's end.
    All,
}

/// An item ahead of the lowest missing one, or that one while its body is being read.
#[derive(Debug)]
struct Held {
    offset: u64,
    end: u64,
    /// Of a chunk's body; 0 of a mark.
    crc: u32,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// A lane is reading its body.
    Coming(Section),
    Chunk(Section, Vec<u8>),
    Mark(Mark, Generation),
}

/// Where in the grammar the lowest missing item stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Data,
    Config,
    Over,
}

/// The machine of one device's stream.
#[derive(Debug)]
pub struct Assembler {
    device: DeviceId,
    chunk_bytes_max: u64,
    window: u64,
    /// The lowest missing index, and the offset at which it begins.
    next: u64,
    offset: u64,
    stage: Stage,
    /// It is complete, and was read for a switchover that is void: it begins anew.
    void: bool,
    generation: Generation,
    held: BTreeMap<u64, Held>,
    ready: VecDeque<Item>,
    loaded: u64,
    granted: u64,
    /// How often it began anew.
    restarts: u32,
    /// One past the highest index that came.
    seen: u64,
    /// Indices below this may come again, so many times in all: lanes were lost that may have carried them.
    again_below: u64,
    again_left: u64,
}

impl Assembler {
    /// A stream of which nothing came yet. The source has the credit `window` already (SPEC: CREDIT-2).
    #[must_use]
    pub fn new(device: DeviceId, chunk_bytes_max: u64, window: u64) -> Self {
        Self {
            device,
            chunk_bytes_max,
            window,
            next: 0,
            offset: 0,
            stage: Stage::Data,
            void: false,
            generation: Generation::new(0),
            held: BTreeMap::new(),
            ready: VecDeque::new(),
            loaded: 0,
            granted: window,
            restarts: 0,
            seen: 0,
            again_below: 0,
            again_left: 0,
        }
    }

    /// A chunk's head came, with a body of this size and checksum.
    ///
    /// # Errors
    /// [`Misbehaved::Credit`], [`Misbehaved::DeviceStream`]; [`Fault::Limit`] for too many small items. Nothing has changed then.
    pub fn admit(&mut self, chunk: &DeviceChunk, bytes: u64, crc: u32) -> Result<Admit, Fault> {
        let (index, offset) = (chunk.index, chunk.offset);
        if bytes == 0 || bytes > self.chunk_bytes_max {
            return Err(self.misfit(index, SIZE).into());
        }
        let coming = Held {
            offset,
            end: offset.saturating_add(bytes),
            crc,
            content: Content::Coming(chunk.section),
        };
        if !self.fits(index, &coming)? {
            return Ok(Admit::Have);
        }
        self.hold(index, coming);
        Ok(Admit::Take)
    }

    /// The body of an admitted chunk is here, whole and right.
    ///
    /// # Errors
    /// [`Misbehaved::DeviceStream`] when what is now complete is no stream.
    pub fn arrived(&mut self, index: u64, octets: Vec<u8>) -> Result<Came, Misbehaved> {
        let Some(held) = self.held.get_mut(&index) else {
            return Err(self.misfit(index, TWICE));
        };
        let Content::Coming(section) = held.content else {
            return Err(self.misfit(index, TWICE));
        };
        held.content = Content::Chunk(section, octets);
        self.advance()
    }

    /// The body of an admitted chunk will not come: its lane is gone. It is missing again.
    pub fn give_up(&mut self, index: u64) {
        let coming = |held: &Held| matches!(held.content, Content::Coming(_));
        if self.held.get(&index).is_some_and(coming) {
            self.held.remove(&index);
        }
    }

    /// A mark came.
    ///
    /// # Errors
    /// As for a chunk.
    pub fn mark(&mut self, mark: &DeviceMark) -> Result<Came, Fault> {
        let coming = Held {
            offset: mark.offset,
            end: mark.offset,
            crc: 0,
            content: Content::Mark(mark.mark, mark.generation),
        };
        if self.fits(mark.index, &coming)? {
            self.hold(mark.index, coming);
            return Ok(self.advance()?);
        }
        Ok(Came::More)
    }

    /// A lane was lost: what it carried may come again on another (SPEC: DEVSTREAM-1).
    pub fn lane_lost(&mut self) {
        self.again_below = self.seen;
        self.again_left = self.again_left.saturating_add(self.seen);
    }

    /// The next item to load.
    pub fn pop(&mut self) -> Option<Item> {
        self.ready.pop_front()
    }

    /// Whether there is a next item.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.ready.is_empty()
    }

    /// So many bytes that were popped are loaded and their memory is free.
    pub fn loaded(&mut self, bytes: u64) {
        self.loaded += bytes;
    }

    /// Up to where the source may send, if that is worth telling: at least a quarter of the window more than it knows, or whatever
    /// there is when its next chunk may not fit.
    pub fn credit(&mut self) -> Option<u64> {
        let possible = self.loaded.saturating_add(self.window);
        let tight = self.granted - self.offset < self.chunk_bytes_max;
        let more = possible - self.granted;
        if more == 0 || (more < self.window / 4 && !tight) {
            return None;
        }
        self.granted = possible;
        Some(possible)
    }

    /// Up to where the source was told that it may send.
    #[must_use]
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// How often the stream began anew, going by what came.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// The lowest index that is missing.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.next
    }

    /// Bytes held here now: what waits for its turn, and what was popped and is not loaded yet.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let early: u64 = self.held.values().map(|held| held.end - held.offset).sum();
        early + (self.offset - self.loaded)
    }

    /// Whether the stream is complete: everything up to its end came, and it does not begin anew.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Over && !self.void
    }

    /// The channels were lost, and a switchover with them: a stream that is complete begins anew, and what is here of it is not the device's
    /// state any more (SPEC: RESUME-8).
    pub fn break_off(&mut self) {
        self.void = self.stage == Stage::Over;
    }

    /// Whether an item has a place here; false if it is here already.
    fn fits(&mut self, index: u64, coming: &Held) -> Result<bool, Fault> {
        let (offset, end) = (coming.offset, coming.end);
        if index < self.next {
            let before = if end <= self.offset {
                None
            } else {
                Some(OTHER)
            };
            return Ok(self.again(index, before)?);
        }
        if let Some(held) = self.held.get(&index) {
            let other = match &held.content {
                Content::Coming(_) => Some(TWICE),
                _ if held.is_like(coming) => None,
                _ => Some(OTHER),
            };
            return Ok(self.again(index, other)?);
        }
        // SPEC: CREDIT-3
        if end > self.granted {
            return Err(Fault::from(Misbehaved::Credit {
                device: self.device.value(),
                end,
                offset_max: self.granted,
            }));
        }
        let below = self.held.range(..index).next_back();
        let (below, floor) = below.map_or((self.next.checked_sub(1), self.offset), |(at, held)| {
            (Some(*at), held.end)
        });
        let adjacent = below.map_or(index == 0, |below| below.checked_add(1) == Some(index));
        let above = self.held.range(index..).next();
        let under = above.is_none_or(|(at, held)| {
            if index.checked_add(1) == Some(*at) {
                end == held.offset
            } else {
                end <= held.offset
            }
        });
        // SPEC: DEVSTREAM-2, DEVSTREAM-3: offsets go on without gap and overlap.
        let over = if adjacent {
            offset == floor
        } else {
            offset >= floor
        };
        if !over || !under || index == u64::MAX {
            return Err(self.misfit(index, OFFSET).into());
        }
        let most = self.window / 4096 + ITEMS_SPARE;
        if (self.held.len() + self.ready.len()) as u64 >= most {
            return Err(Fault::Limit {
                what: "chunks and marks that are held",
                wanted: most + 1,
                most,
            });
        }
        Ok(true)
    }

    /// An item came that is here already. That may be: a lane was lost before it could say that it had brought it. Gives
    /// false, as [`Assembler::fits`] does.
    fn again(&mut self, index: u64, wrong: Option<&'static str>) -> Result<bool, Misbehaved> {
        if let Some(rule) = wrong {
            return Err(self.misfit(index, rule));
        }
        if index >= self.again_below || self.again_left == 0 {
            return Err(self.misfit(index, AGAIN));
        }
        self.again_left -= 1;
        Ok(false)
    }

    fn hold(&mut self, index: u64, coming: Held) {
        self.seen = self.seen.max(index + 1);
        self.held.insert(index, coming);
    }

    /// Moves what has become complete at the front to where it is popped.
    fn advance(&mut self) -> Result<Came, Misbehaved> {
        let was_over = self.is_over();
        while let Some(entry) = self.held.first_entry() {
            if *entry.key() != self.next || matches!(entry.get().content, Content::Coming(_)) {
                break;
            }
            let held = entry.remove();
            let item = self.in_turn(held.content)?;
            self.next += 1;
            self.offset = held.end;
            self.ready.push_back(item);
        }
        Ok(if self.is_over() && !was_over {
            Came::All
        } else {
            Came::More
        })
    }

    /// The grammar: what may come now (SPEC: DEVSTREAM-3, DEVSTREAM-4).
    fn in_turn(&mut self, content: Content) -> Result<Item, Misbehaved> {
        let newest = self.generation;
        Ok(match (self.stage, content) {
            (Stage::Data, Content::Chunk(Section::Data, octets)) => Item::Data(octets),
            (Stage::Config, Content::Chunk(Section::Config, octets)) => Item::Config(octets),
            (Stage::Data, Content::Mark(Mark::InitialEnd, generation))
                if newest.next() == Some(generation) =>
            {
                self.generation = generation;
                Item::InitialEnd(generation)
            }
            (Stage::Data, Content::Mark(Mark::DataEnd, generation)) if generation == newest => {
                self.stage = Stage::Config;
                Item::DataEnd
            }
            (Stage::Config, Content::Mark(Mark::ConfigEnd, generation)) if generation == newest => {
                self.stage = Stage::Over;
                Item::ConfigEnd
            }
            (_, Content::Mark(Mark::Restart, generation)) if generation == newest => {
                self.stage = Stage::Data;
                self.void = false;
                self.restarts += 1;
                Item::Restart
            }
            _ => return Err(self.misfit(self.next, GRAMMAR)),
        })
    }

    fn misfit(&self, index: u64, rule: &'static str) -> Misbehaved {
        Misbehaved::DeviceStream {
            device: self.device.value(),
            index,
            rule,
        }
    }
}

impl Held {
    /// Whether they say the same of the same bytes.
    fn is_like(&self, other: &Self) -> bool {
        let same = match (&self.content, &other.content) {
            (Content::Chunk(ours, _), Content::Coming(theirs)) => ours == theirs,
            (Content::Mark(ours, of), Content::Mark(theirs, their_of)) => {
                (ours, of) == (theirs, their_of)
            }
            _ => false,
        };
        same && (self.offset, self.end, self.crc) == (other.offset, other.end, other.crc)
    }
}

// What breaks a stream, by its rule.
const SIZE: &str = "DEVSTREAM-2, its body is empty or longer than the device's chunks may be";
const OFFSET: &str = "DEVSTREAM-2, its offset leaves a gap or overlaps another's";
const GRAMMAR: &str =
    "DEVSTREAM-3 and -4, it may not come at this point or is of another generation";
const TWICE: &str = "DEVSTREAM-1, it comes on two lanes at once";
const AGAIN: &str = "DEVSTREAM-1, it was sent again and no lane was lost that carried it";
const OTHER: &str = "DEVSTREAM-1, it was sent again with other content";

#[cfg(test)]
mod tests;
