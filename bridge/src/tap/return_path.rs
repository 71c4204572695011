//! QEMU's return path: what the destination says on the main connection, and whether it said that the guest runs there.
//!
//! ```text
//!   message: type[2] length[2] bytes[length]; after the bitmap of a recovery, its size[8], the bitmap, a mark[8]
//! ```

/// The last message of a destination: the migration is over, with 0 if the guest runs there.
pub const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// The longest message that is believed: a block's name with a page request. QEMU's own bound is 512.
const MESSAGE_BYTES_MAX: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Head,
    Shut,
    BitmapBytes,
    Nothing,
}

/// The tap of the return path.
#[derive(Debug)]
pub struct ReturnPath {
    next: Next,
    skip: u64,
    then: Next,
    held: Vec<u8>,
    shut: Option<u32>,
}

impl ReturnPath {
    /// A path on which nothing was said yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            next: Next::Head,
            skip: 0,
            then: Next::Head,
            held: Vec::with_capacity(8),
            shut: None,
        }
    }

    /// What the destination said last: 0 if the guest runs there.
    #[must_use]
    pub fn shut(&self) -> Option<u32> {
        self.shut
    }

    /// Whether what was said so far ends with a whole message.
    #[must_use]
    pub fn is_between_messages(&self) -> bool {
        self.next == Next::Head && self.skip == 0 && self.held.is_empty()
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
            self.next = self.then;
            let need = if self.next == Next::BitmapBytes { 8 } else { 4 };
            let bytes = (need - self.held.len()).min(octets.len());
            self.held.extend_from_slice(&octets[..bytes]);
            octets = &octets[bytes..];
            if self.held.len() == need {
                self.step();
                self.held.clear();
            }
        }
    }

    fn step(&mut self) {
        let word = self
            .held
            .first_chunk()
            .map_or(0, |first| u32::from_be_bytes(*first));
        match self.next {
            Next::Head => {
                let (kind, bytes) = (word >> 16, word & 0xffff);
                if kind == 0 || kind > 16 || bytes as usize > MESSAGE_BYTES_MAX {
                    self.next = Next::Nothing;
                } else if kind == 1 && bytes == 4 {
                    self.then = Next::Shut;
                } else {
                    self.skip = bytes.into();
                    self.then = if kind == 5 {
                        Next::BitmapBytes
                    } else {
                        Next::Head
                    };
                }
            }
            Next::Shut => {
                self.shut = Some(word);
                self.then = Next::Head;
            }
            Next::BitmapBytes => {
                let bytes = self
                    .held
                    .first_chunk()
                    .map_or(0, |first| u64::from_be_bytes(*first));
                self.skip = bytes.saturating_add(8);
                self.then = Next::Head;
            }
            Next::Nothing => {}
        }
        if self.next != Next::Nothing {
            self.next = self.then;
        }
    }
}

impl Default for ReturnPath {
    fn default() -> Self {
        Self::new()
    }
}
