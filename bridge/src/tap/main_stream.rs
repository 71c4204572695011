//! QEMU's main stream, from its header to the first section that has no length.
//!
//! ```text
//!   QEVM version | 07 configuration | 08 commands | 01 section "ram" { records } 7e | 02 ... | 03 ... | 04 device: stop
//! ```
//!
//! All numbers are big-endian. A record of "ram" is an address whose lower twelve bits say what follows it. The sections of other devices have
//! no length, so only "ram" can be walked; reading ends for good at the first of another device.

use super::Seen;

/// How far the migration is, as far as the main stream shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Memory travels while the guest runs at the source: the destination can't run it, whatever happens.
    Memory,
    /// The guest is stopped at the source, or the stream can't be read: the destination may run it once it has everything.
    Device,
    /// Post-copy: the guest may run at the destination.
    PostCopy,
}

/// The longest name of a section or a block that is believed; QEMU's have at most 255 bytes.
const NAME_BYTES_MAX: usize = 255;

/// Blocks of memory that are remembered, to tell where a pass begins.
const BLOCKS_MAX: usize = 256;

const PAGE: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Magic,
    Section,
    ConfigurationBytes,
    Command,
    PackageBytes,
    Start,
    StartName(u8),
    Part { last: bool },
    Record,
    BlockName { flags: u64, address: u64 },
    BlockNameOctets { flags: u64, address: u64, bytes: u8 },
    SizedPage,
    Xbzrle,
    SizesName(u64),
    SizesEntry { left: u64, bytes: u8 },
    DescriptionBytes,
    Nothing,
}

/// The tap of the main stream.
#[derive(Debug)]
pub struct MainStream {
    next: Next,
    skip: u64,
    held: Vec<u8>,
    stage: Stage,
    return_path: bool,
    section: Option<u32>,
    ram: Option<u32>,
    seen: Seen,
    blocks: Vec<Vec<u8>>,
    block: usize,
    address: u64,
    stopped: Option<&'static str>,
    refused: bool,
}

impl MainStream {
    /// A stream of which nothing came yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            next: Next::Magic,
            skip: 0,
            held: Vec::with_capacity(NAME_BYTES_MAX + 8),
            stage: Stage::Memory,
            return_path: false,
            section: None,
            ram: None,
            seen: Seen::default(),
            blocks: Vec::new(),
            block: 0,
            address: 0,
            stopped: None,
            refused: false,
        }
    }

    /// A stream that takes a paused post-copy up again: nothing of it is read.
    #[must_use]
    pub fn recovery() -> Self {
        let mut stream = Self::new();
        stream.return_path = true;
        stream.stage = Stage::PostCopy;
        stream.stop("a recovery of post-copy");
        stream
    }

    /// How far the migration is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether memory begins although no return path was opened: nobody would hear how the migration ends.
    #[must_use]
    pub fn lacks_return_path(&self) -> bool {
        self.refused
    }

    /// What was seen of memory.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.seen
    }

    /// Why nothing more is read, once that is so.
    #[must_use]
    pub fn stopped(&self) -> Option<&'static str> {
        self.stopped
    }

    /// Bytes on their way, in order.
    pub fn feed(&mut self, mut octets: &[u8]) {
        while !octets.is_empty() && self.next != Next::Nothing {
            if self.skip > 0 {
                let bytes = usize::try_from(self.skip)
                    .unwrap_or(usize::MAX)
                    .min(octets.len());
                octets = &octets[bytes..];
                self.skip -= bytes as u64;
                continue;
            }
            let need = self.need();
            let missing = need - self.held.len();
            let bytes = missing.min(octets.len());
            let (now, rest) = octets.split_at(bytes);
            octets = rest;
            if self.held.is_empty() && bytes == need {
                self.step(now);
            } else {
                self.held.extend_from_slice(now);
                if self.held.len() == need {
                    let held = std::mem::take(&mut self.held);
                    self.step(&held);
                    self.held = held;
                    self.held.clear();
                }
            }
        }
    }

    /// Bytes that the next step is about, 1 to [`NAME_BYTES_MAX`] + 8.
    fn need(&self) -> usize {
        match self.next {
            Next::Magic | Next::Record => 8,
            Next::Section | Next::BlockName { .. } | Next::SizesName(_) | Next::Nothing => 1,
            Next::ConfigurationBytes
            | Next::Command
            | Next::PackageBytes
            | Next::Part { .. }
            | Next::SizedPage
            | Next::DescriptionBytes => 4,
            Next::Xbzrle => 3,
            Next::Start => 5,
            Next::StartName(bytes) | Next::SizesEntry { bytes, .. } => usize::from(bytes) + 8,
            Next::BlockNameOctets { bytes, .. } => usize::from(bytes).max(1),
        }
    }

    fn stop(&mut self, why: &'static str) {
        self.stopped = Some(why);
        self.next = Next::Nothing;
        // What can't be read may be anything, the end of the migration too.
        self.stage = self.stage.max(Stage::Device);
    }

    fn skip(&mut self, bytes: u64, then: Next) {
        self.skip = bytes;
        self.next = then;
    }

    fn step(&mut self, now: &[u8]) {
        match self.next {
            Next::Magic if now == b"QEVM\0\0\0\x03" => self.next = Next::Section,
            Next::Magic => self.stop("a stream of an unknown version"),
            Next::Section => self.section(now.first().copied().unwrap_or_default()),
            Next::ConfigurationBytes => match word(now) {
                bytes if bytes as usize <= NAME_BYTES_MAX => self.skip(bytes.into(), Next::Section),
                _ => self.stop("a configuration that is too long"),
            },
            Next::Command => self.command(word(now)),
            Next::PackageBytes => {
                // What is inside starts the guest at the destination.
                self.stage = Stage::PostCopy;
                self.skip(word(now).into(), Next::Section);
            }
            Next::Start => {
                self.section = Some(word(now));
                self.next = Next::StartName(now.last().copied().unwrap_or_default());
            }
            Next::StartName(bytes) => {
                if now.get(..usize::from(bytes)) == Some(b"ram") {
                    self.ram = self.section;
                    self.refused = !self.return_path;
                    self.seen.iterations = 1;
                    self.next = Next::Record;
                } else {
                    self.stop("a device that is sent while the guest runs");
                }
            }
            Next::Part { last } => {
                if last {
                    self.stage = self.stage.max(Stage::Device);
                }
                if Some(word(now)) == self.ram {
                    self.next = Next::Record;
                } else {
                    self.stop("a device that is sent while the guest runs");
                }
            }
            Next::Record => self.record(long(now)),
            Next::BlockName { flags, address } => {
                let bytes = now.first().copied().unwrap_or_default();
                self.next = Next::BlockNameOctets {
                    flags,
                    address,
                    bytes,
                };
                if bytes == 0 {
                    self.stop("a block without a name");
                }
            }
            Next::BlockNameOctets { flags, address, .. } => {
                self.enter(now);
                self.contents(flags, address);
            }
            Next::SizedPage => match word(now) {
                bytes if u64::from(bytes) <= 2 * PAGE => self.skip(bytes.into(), Next::Record),
                _ => self.stop("a compressed page that is too long"),
            },
            Next::Xbzrle => {
                let bytes = u16::from_be_bytes([now[1], now[2]]);
                self.skip(bytes.into(), Next::Record);
            }
            Next::SizesName(left) => {
                let bytes = now.first().copied().unwrap_or_default();
                self.next = Next::SizesEntry { left, bytes };
            }
            Next::SizesEntry { left, bytes } => {
                let used = long(&now[usize::from(bytes)..]);
                match left.checked_sub(used) {
                    Some(0) => self.next = Next::Record,
                    Some(left) => self.next = Next::SizesName(left),
                    None => self.stop("blocks that are larger than all memory"),
                }
            }
            Next::DescriptionBytes => self.skip(word(now).into(), Next::Section),
            Next::Nothing => {}
        }
    }

    fn section(&mut self, kind: u8) {
        match kind {
            0x00 => {}
            0x01 => self.next = Next::Start,
            0x02 => self.next = Next::Part { last: false },
            0x03 => self.next = Next::Part { last: true },
            0x04 => self.stop("the devices' state"),
            0x06 => self.next = Next::DescriptionBytes,
            0x07 => self.next = Next::ConfigurationBytes,
            0x08 => self.next = Next::Command,
            0x7e => self.skip(4, Next::Section),
            _ => self.stop("a kind of section that is not known here"),
        }
    }

    fn command(&mut self, word: u32) {
        let (command, bytes) = (word >> 16, word & 0xffff);
        match command {
            1 => self.return_path = true,
            // Post-copy begins to listen, or runs.
            4 | 5 => self.stage = Stage::PostCopy,
            7 => {
                self.next = Next::PackageBytes;
                return;
            }
            _ => {}
        }
        self.skip(bytes.into(), Next::Section);
    }

    fn record(&mut self, word: u64) {
        let (address, flags) = (word & !(PAGE - 1), word & (PAGE - 1));
        match flags & !0x20 {
            0x04 => {
                // Page-aligned, so nothing of the size is lost with the flags.
                self.seen.memory_bytes = address;
                self.next = if address == 0 {
                    Next::Record
                } else {
                    Next::SizesName(address)
                };
            }
            0x10 => self.next = Next::Section,
            // All channels have ended a pass.
            0x200 => self.seen.iterations += 1,
            0x02 | 0x08 | 0x40 | 0x100 if flags & 0x20 == 0 => {
                self.next = Next::BlockName { flags, address };
            }
            0x02 | 0x08 | 0x40 | 0x100 => self.contents(flags, address),
            _ => self.stop("a kind of memory record that is not known here"),
        }
    }

    /// A block is named: a pass begins where the first one comes again.
    fn enter(&mut self, name: &[u8]) {
        let known = self.blocks.iter().position(|block| block == name);
        let block = known.unwrap_or_else(|| {
            if self.blocks.len() < BLOCKS_MAX {
                self.blocks.push(name.to_vec());
            }
            self.blocks.len() - 1
        });
        if block < self.block {
            self.address = 0;
            self.block = block;
            self.pass();
        } else if block > self.block {
            self.address = 0;
            self.block = block;
        }
    }

    fn pass(&mut self) {
        if self.stage != Stage::PostCopy {
            self.seen.iterations += 1;
        }
    }

    fn contents(&mut self, flags: u64, address: u64) {
        if address < self.address {
            self.pass();
        }
        self.address = address;
        match flags & !0x20 {
            0x02 => {
                self.seen.zero_pages += 1;
                self.skip(1, Next::Record);
            }
            0x08 => {
                self.seen.pages += 1;
                self.skip(PAGE, Next::Record);
            }
            0x40 => {
                self.seen.pages += 1;
                self.next = Next::Xbzrle;
            }
            _ => {
                self.seen.pages += 1;
                self.next = Next::SizedPage;
            }
        }
    }
}

impl Default for MainStream {
    fn default() -> Self {
        Self::new()
    }
}

fn word(octets: &[u8]) -> u32 {
    octets
        .first_chunk()
        .map_or(0, |first| u32::from_be_bytes(*first))
}

fn long(octets: &[u8]) -> u64 {
    octets
        .first_chunk()
        .map_or(0, |first| u64::from_be_bytes(*first))
}
