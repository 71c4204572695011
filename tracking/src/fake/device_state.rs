//! The state of a fake VFIO device, its stream, and the arcs of `enum vfio_device_mig_state`.

use std::collections::{BTreeSet, VecDeque};
use std::io;

use super::{refused, u64_at};

/// Bytes that change together.
const BLOCK: usize = 512;
/// Offset and length before the bytes of a record.
const HEAD: usize = 16;
/// The offset of the last record, whose bytes are the checksum.
const END: u64 = u64::MAX;

/// `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Error = 0,
    Stop = 1,
    Running = 2,
    StopCopy = 3,
    Resuming = 4,
    RunningP2p = 5,
    PreCopy = 6,
    PreCopyP2p = 7,
}

impl State {
    pub(super) fn of(number: u32) -> Option<Self> {
        [
            Self::Error,
            Self::Stop,
            Self::Running,
            Self::StopCopy,
            Self::Resuming,
            Self::RunningP2p,
            Self::PreCopy,
            Self::PreCopyP2p,
        ]
        .get(number as usize)
        .copied()
    }

    pub(super) fn runs(self) -> bool {
        matches!(
            self,
            Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p
        )
    }

    pub(super) fn streams(self) -> bool {
        matches!(
            self,
            Self::StopCopy | Self::Resuming | Self::PreCopy | Self::PreCopyP2p
        )
    }
}

/// Whether a device with these `VFIO_MIGRATION_*` flags has the arc. Without P2P the kernel joins the two arcs around the
/// quiescent state.
pub(super) fn arc_allowed(from: State, to: State, flags: u64) -> bool {
    use State::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    let (p2p, pre_copy) = (flags & 2 != 0, flags & 4 != 0);
    match (from, to) {
        (Running, Stop) | (Stop, Running) => !p2p,
        (Running, RunningP2p) | (RunningP2p, Running | Stop) | (Stop, RunningP2p) => p2p,
        (Stop, StopCopy | Resuming) | (StopCopy | Resuming, Stop) => true,
        (Running, PreCopy) | (PreCopy, Running) => pre_copy,
        (PreCopy, StopCopy) => pre_copy && !p2p,
        (PreCopy, PreCopyP2p)
        | (PreCopyP2p, PreCopy | RunningP2p | StopCopy)
        | (RunningP2p, PreCopyP2p) => pre_copy && p2p,
        _ => false,
    }
}

/// The state of a device and where its stream stands.
pub(super) struct Save {
    pub(super) state: State,
    memory: Vec<u8>,
    /// Blocks that changed since they were put into the stream.
    dirty: BTreeSet<usize>,
    /// The next block of the initial pass.
    next_initial: usize,
    reinit: bool,
    /// Bytes of the record that is being read.
    out: VecDeque<u8>,
    ended: bool,
    /// Bytes of the record that is being written.
    coming: Vec<u8>,
    loaded: bool,
    touches: u64,
}

impl Save {
    pub(super) fn new(bytes: usize) -> Self {
        let memory = (0..bytes).map(|at| (at / BLOCK * 7 + at) as u8).collect();
        Self {
            state: State::Running,
            memory,
            dirty: BTreeSet::new(),
            next_initial: 0,
            reinit: false,
            out: VecDeque::new(),
            ended: false,
            coming: Vec::new(),
            loaded: false,
            touches: 0,
        }
    }

    fn blocks(&self) -> usize {
        self.memory.len() / BLOCK
    }

    pub(super) fn touch(&mut self, block: usize) {
        let block = block % self.blocks();
        self.touches += 1;
        self.memory[block * BLOCK..][..8].copy_from_slice(&self.touches.to_ne_bytes());
        if block < self.next_initial {
            self.dirty.insert(block);
        }
    }

    pub(super) fn reinit(&mut self) {
        self.next_initial = 0;
        self.dirty.clear();
        self.reinit = true;
    }

    pub(super) fn take_reinit(&mut self) -> bool {
        std::mem::take(&mut self.reinit)
    }

    /// FNV-1a over the memory.
    pub(super) fn checksum(&self) -> u64 {
        self.memory
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |sum, &octet| {
                (sum ^ u64::from(octet)).wrapping_mul(0x0100_0000_01b3)
            })
    }

    /// A session begins.
    pub(super) fn begin(&mut self, to: State) {
        self.dirty.clear();
        self.next_initial = 0;
        self.out.clear();
        self.ended = false;
        self.coming.clear();
        self.loaded = false;
        if to == State::Resuming {
            self.memory.fill(0);
        }
    }

    /// Bytes left: initial, and changed since.
    pub(super) fn left(&self) -> (u64, u64) {
        let record = (BLOCK + HEAD) as u64;
        let initial = (self.blocks() - self.next_initial) as u64 * record + self.out.len() as u64;
        (initial, self.dirty.len() as u64 * record)
    }

    pub(super) fn stop_copy_bytes(&self) -> u64 {
        let (initial, dirty) = self.left();
        initial + dirty + (HEAD + 8) as u64
    }

    fn put(&mut self, offset: u64, octets: &[u8]) {
        self.out.extend(offset.to_ne_bytes());
        self.out.extend((octets.len() as u64).to_ne_bytes());
        self.out.extend(octets);
    }

    /// Puts the next record out; false if there is none now.
    fn refill(&mut self) -> bool {
        let block = if self.next_initial < self.blocks() {
            self.next_initial += 1;
            self.next_initial - 1
        } else if let Some(block) = self.dirty.pop_first() {
            block
        } else if self.state == State::StopCopy && !self.ended {
            self.ended = true;
            let checksum = self.checksum().to_ne_bytes();
            self.put(END, &checksum);
            return true;
        } else {
            return false;
        };
        self.dirty.remove(&block);
        let octets = self.memory[block * BLOCK..][..BLOCK].to_vec();
        self.put((block * BLOCK) as u64, &octets);
        true
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.state == State::Resuming {
            return refused(libc::EINVAL);
        }
        let mut count = 0;
        while count < into.len() {
            if self.out.is_empty() && !self.refill() {
                break;
            }
            while count < into.len()
                && let Some(octet) = self.out.pop_front()
            {
                into[count] = octet;
                count += 1;
            }
        }
        if count == 0 && self.state != State::StopCopy {
            return refused(libc::ENOMSG);
        }
        Ok(count)
    }

    pub(super) fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        if self.state != State::Resuming {
            return refused(libc::EINVAL);
        }
        // A driver may take less than it is offered.
        let taken = octets.len().min(1000);
        self.coming.extend(&octets[..taken]);
        while self.coming.len() >= HEAD {
            let (offset, length) = (u64_at(&self.coming, 0), u64_at(&self.coming, 8));
            let expected = if offset == END { 8 } else { BLOCK as u64 };
            if length != expected || self.loaded {
                return refused(libc::EINVAL);
            }
            let end = HEAD + length as usize;
            if self.coming.len() < end {
                break;
            }
            let record: Vec<u8> = self.coming.drain(..end).collect();
            if offset == END {
                if u64_at(&record, HEAD) != self.checksum() {
                    return refused(libc::EILSEQ);
                }
                self.loaded = true;
                continue;
            }
            let place = usize::try_from(offset)
                .ok()
                .filter(|at| at.is_multiple_of(BLOCK) && *at < self.memory.len());
            let Some(place) = place else {
                return refused(libc::EINVAL);
            };
            self.memory[place..place + BLOCK].copy_from_slice(&record[HEAD..]);
        }
        Ok(taken)
    }

    /// Whether a whole state was written.
    pub(super) fn loaded(&self) -> bool {
        self.loaded && self.coming.is_empty()
    }
}
