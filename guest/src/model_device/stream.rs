//! The model device's state as a stream: records of blocks, and an end that says how much there was.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | "MDEV"        | 1 block 2 end | block, or number of blocks    |
//!       +---------------+---------------+-------------------------------+
//!    16 | version, or operations done   | records before this one       |
//!       +-------------------------------+-------------------------------+
//!    32 | content of the block ...                                      |
//! ```
//! The records are counted, the content follows from block and version, and the newest version of each block follows from the
//! operations done: so bytes that are lost, doubled or exchanged are found by the one who reads them.

use super::content::Piece;
use super::{DeviceFault, newest};

/// A record with its content, if nothing else is asked for; the last block may be shorter.
pub(super) const BLOCK: u64 = 64 << 10;

/// Head of a record.
const HEAD: usize = 32;

const MAGIC: [u8; 4] = *b"MDEV";

/// How a state is cut into blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    seed: u64,
    size: u64,
    /// Bytes of a block.
    block: u64,
    /// Blocks in all.
    pub(super) blocks: u64,
    /// Blocks that can be read while the device runs: the first ones.
    pub(super) early: u64,
}

impl Cut {
    pub(super) fn new(seed: u64, size: u64, initial: u64, block: u64) -> Self {
        // The last block must have room for its head.
        let whole = (size - 1).checked_div(block).unwrap_or(0);
        let blocks = whole + u64::from(size - whole * block > HEAD as u64);
        Self {
            seed,
            size,
            block,
            blocks: blocks.max(1),
            early: initial.checked_div(block).unwrap_or(0).min(blocks),
        }
    }

    /// Blocks that change while the device runs.
    pub(super) fn working(&self) -> u64 {
        if self.early > 0 {
            self.early
        } else {
            self.blocks
        }
    }

    /// The version of a block after so many operations; 0 is that of a new device.
    pub(super) fn version(&self, block: u64, operations: u64) -> u64 {
        newest(block, operations, self.working())
    }

    /// Bytes of a block's record.
    pub(super) fn bytes(&self, block: u64) -> u64 {
        if block + 1 == self.blocks {
            (self.size - block * self.block).min(self.block)
        } else {
            self.block
        }
    }

    fn piece(&self, block: u64, version: u64) -> Piece {
        Piece {
            seed: self.seed,
            place: block,
            version,
        }
    }
}

/// What a block's entry says when it was not sent yet.
const NEVER: u64 = u64::MAX;

/// The stream that is being read.
pub(super) struct Outgoing {
    cut: Cut,
    /// The version of each block that was sent.
    sent: Vec<u64>,
    /// Where the search for a block to send goes on.
    cursor: u64,
    /// Early blocks that were never sent.
    initial_blocks: u64,
    records: u64,
    record: Option<Record>,
    ended: bool,
}

/// The record of which some was read.
struct Record {
    head: [u8; HEAD],
    piece: Piece,
    /// Bytes of it, and how many of them were read.
    bytes: u64,
    read: u64,
    initial: bool,
}

impl Outgoing {
    pub(super) fn new(cut: Cut) -> Result<Self, DeviceFault> {
        Ok(Self {
            cut,
            sent: versions(&cut)?,
            cursor: 0,
            initial_blocks: cut.early,
            records: 0,
            record: None,
            ended: false,
        })
    }

    /// The device announces its early part anew.
    pub(super) fn reinit(&mut self) {
        let early = usize::try_from(self.cut.early).unwrap_or(usize::MAX);
        self.sent
            .iter_mut()
            .take(early)
            .for_each(|sent| *sent = NEVER);
        (self.cursor, self.initial_blocks) = (0, self.cut.early);
    }

    /// Bytes left of the initial ones.
    pub(super) fn initial_bytes(&self) -> u64 {
        let open = self.record.as_ref().filter(|record| record.initial);
        let open = open.map_or(0, |record| record.bytes - record.read);
        let left = self.sent.iter().zip(0..self.cut.early);
        let left = left.filter(|(sent, _)| **sent == NEVER);
        if self.initial_blocks == 0 {
            return open;
        }
        open + left.map(|(_, block)| self.cut.bytes(block)).sum::<u64>()
    }

    /// Bytes that changed since they were read.
    pub(super) fn dirty_bytes(&self, operations: u64) -> u64 {
        let open = self.record.as_ref().filter(|record| !record.initial);
        let open = open.map_or(0, |record| record.bytes - record.read);
        let dirty = self.sent.iter().zip(0..self.cut.early);
        let dirty = dirty.filter(|(sent, block)| {
            **sent != NEVER && **sent != self.cut.version(*block, operations)
        });
        open + dirty.map(|(_, block)| self.cut.bytes(block)).sum::<u64>()
    }

    /// Bytes that a stop now would leave to read, the end record among them.
    pub(super) fn rest_bytes(&self, operations: u64) -> u64 {
        let open = self
            .record
            .as_ref()
            .map_or(0, |record| record.bytes - record.read);
        let rest = self.sent.iter().zip(0..);
        let rest = rest.filter(|(sent, block)| **sent != self.cut.version(*block, operations));
        open + HEAD as u64 + rest.map(|(_, block)| self.cut.bytes(block)).sum::<u64>()
    }

    /// Fills the buffer; less comes when nothing more is there now. `last`: the device stands still, read to the end.
    pub(super) fn read(&mut self, operations: u64, last: bool, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            if self.record.is_none() && !self.begin(operations, last) {
                break;
            }
            let Some(record) = &mut self.record else {
                break;
            };
            let at = usize::try_from(record.read).unwrap_or(usize::MAX);
            let left = usize::try_from(record.bytes - record.read).unwrap_or(usize::MAX);
            let room = &mut into[done..];
            let count = if at < HEAD {
                let count = (HEAD - at).min(room.len()).min(left);
                room[..count].copy_from_slice(&record.head[at..at + count]);
                count
            } else {
                let count = left.min(room.len());
                record.piece.fill(at - HEAD, &mut room[..count]);
                count
            };
            done += count;
            record.read += count as u64;
            // The end of the initial bytes is the end of a read: whoever reads asks again there.
            let closes = record.initial && record.read == record.bytes && self.initial_blocks == 0;
            if record.read == record.bytes {
                self.record = None;
            }
            if closes {
                break;
            }
        }
        done
    }

    /// Whether everything was read.
    pub(super) fn is_over(&self) -> bool {
        self.ended && self.record.is_none()
    }

    /// Begins the next record; false if there is none now.
    fn begin(&mut self, operations: u64, last: bool) -> bool {
        let range = if last {
            self.cut.blocks
        } else {
            self.cut.early
        };
        let stale = |sent: u64, block| sent != self.cut.version(block, operations);
        let next = (0..range)
            .map(|step| (self.cursor + step) % range)
            .find(|block| {
                usize::try_from(*block)
                    .ok()
                    .and_then(|index| self.sent.get(index))
                    .is_some_and(|sent| stale(*sent, *block))
            });
        let Some(block) = next else {
            if last && !self.ended {
                self.ended = true;
                self.open(2, self.cut.blocks, operations, HEAD as u64, false);
                return true;
            }
            return false;
        };
        self.cursor = (block + 1) % range;
        let version = self.cut.version(block, operations);
        let index = usize::try_from(block).unwrap_or(usize::MAX);
        let before = std::mem::replace(&mut self.sent[index], version);
        let initial = before == NEVER && block < self.cut.early;
        self.initial_blocks -= u64::from(initial);
        self.open(1, block, version, self.cut.bytes(block), initial);
        true
    }

    fn open(&mut self, kind: u32, block: u64, version: u64, bytes: u64, initial: bool) {
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&MAGIC);
        head[4..8].copy_from_slice(&kind.to_le_bytes());
        head[8..16].copy_from_slice(&block.to_le_bytes());
        head[16..24].copy_from_slice(&version.to_le_bytes());
        head[24..].copy_from_slice(&self.records.to_le_bytes());
        self.records += 1;
        self.record = Some(Record {
            head,
            piece: self.cut.piece(block, version),
            bytes,
            read: 0,
            initial,
        });
    }
}

/// The version of each block, of which none is there yet.
fn versions(cut: &Cut) -> Result<Vec<u64>, DeviceFault> {
    let blocks = usize::try_from(cut.blocks).unwrap_or(usize::MAX);
    let mut versions = Vec::new();
    versions
        .try_reserve_exact(blocks)
        .map_err(|_| DeviceFault::new(format!("no memory for {blocks} blocks")))?;
    versions.resize(blocks, NEVER);
    Ok(versions)
}

/// The stream that is being written.
pub(super) struct Intake {
    cut: Cut,
    /// The version of each block that came.
    have: Vec<u64>,
    head: Vec<u8>,
    /// The block whose content comes now, and how much of it came.
    content: Option<(Piece, u64, u64)>,
    records: u64,
    octets: u64,
    operations: Option<u64>,
}

impl Intake {
    pub(super) fn new(cut: Cut) -> Result<Self, DeviceFault> {
        Ok(Self {
            cut,
            have: versions(&cut)?,
            head: Vec::with_capacity(HEAD),
            content: None,
            records: 0,
            octets: 0,
            operations: None,
        })
    }

    /// Operations that the other device had done, once its stream has ended.
    pub(super) fn operations(&self) -> Option<u64> {
        self.operations
    }

    /// Takes bytes in and compares each with what it must be.
    pub(super) fn write(&mut self, mut octets: &[u8]) -> Result<(), DeviceFault> {
        while !octets.is_empty() {
            if self.operations.is_some() {
                return Err(self.fault("bytes after the end"));
            }
            if let Some((piece, done, bytes)) = self.content {
                let left = usize::try_from(bytes - done).unwrap_or(usize::MAX);
                let (now, later) = octets.split_at(left.min(octets.len()));
                let at = usize::try_from(done).unwrap_or(usize::MAX);
                if let Some(wrong) = piece.differs(at, now) {
                    return Err(self.fault(&format!("wrong content at byte {wrong} of it")));
                }
                self.octets += now.len() as u64;
                let done = done + now.len() as u64;
                self.content = (done < bytes).then_some((piece, done, bytes));
                octets = later;
                continue;
            }
            let (now, later) = octets.split_at((HEAD - self.head.len()).min(octets.len()));
            self.head.extend_from_slice(now);
            self.octets += now.len() as u64;
            octets = later;
            if self.head.len() == HEAD {
                self.begin()?;
                self.head.clear();
            }
        }
        Ok(())
    }

    /// Everything came: each block is as new as the operations say.
    pub(super) fn finish(&self) -> Result<u64, DeviceFault> {
        let Some(operations) = self.operations else {
            return Err(self.fault("the stream stops before its end"));
        };
        let stale = self
            .have
            .iter()
            .zip(0..)
            .find(|(have, block)| **have != self.cut.version(*block, operations));
        match stale {
            None => Ok(operations),
            Some((have, block)) => Err(DeviceFault::new(format!(
                "block {block} is of version {have} and not {}",
                self.cut.version(block, operations)
            ))),
        }
    }

    fn begin(&mut self) -> Result<(), DeviceFault> {
        let number = |from: usize| {
            let octets = self
                .head
                .get(from..from + 8)
                .and_then(|o| o.try_into().ok());
            octets.map_or(0, u64::from_le_bytes)
        };
        let (block, version, records) = (number(8), number(16), number(24));
        let kind = number(4) as u32;
        if self.head.get(..4) != Some(&MAGIC[..]) {
            return Err(self.fault("no record where one must begin"));
        }
        if records != self.records {
            return Err(self.fault(&format!("record {records} came")));
        }
        self.records += 1;
        match kind {
            1 if block < self.cut.blocks => {
                let index = usize::try_from(block).unwrap_or(usize::MAX);
                if let Some(have) = self.have.get_mut(index) {
                    *have = version;
                }
                let bytes = self.cut.bytes(block) - HEAD as u64;
                self.content = (bytes > 0).then_some((self.cut.piece(block, version), 0, bytes));
                Ok(())
            }
            2 if block == self.cut.blocks => {
                self.operations = Some(version);
                Ok(())
            }
            _ => Err(self.fault(&format!("a record of kind {kind} for block {block}"))),
        }
    }

    fn fault(&self, what: &str) -> DeviceFault {
        DeviceFault::new(format!(
            "{what}, after {} bytes, in record {}",
            self.octets, self.records
        ))
    }
}
