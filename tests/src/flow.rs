//! Reads along with one direction of a connection: what a byte that passes belongs to.
//!
//! ```text
//!   hello or reply │ header │ table │ body │ header │ …
//! ```
//! It must see every byte as it was sent, before anything is changed.

use multifd_wire::{HEADER_BYTES, HELLO_BYTES, HELLO_REPLY_BYTES, Kind};

use crate::proxy::Direction;

/// What a byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// What a connection begins with.
    Hello,
    /// A frame's header.
    Header,
    /// The table of a frame of this kind.
    Table(&'static str),
    /// Its body.
    Body(&'static str),
}

impl Place {
    /// By which name a report must call it when it was changed.
    #[must_use]
    pub fn name(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Hello, Direction::Forth) => "hello",
            (Self::Hello, Direction::Back) => "hello_reply",
            (Self::Header, _) => "header",
            (Self::Table(kind) | Self::Body(kind), _) => kind,
        }
    }
}

/// One direction of a connection.
#[derive(Debug, Clone)]
pub struct Flow {
    hello: Vec<u8>,
    hello_bytes: usize,
    header: Vec<u8>,
    kind: &'static str,
    table: u64,
    body: u64,
}

impl Flow {
    /// Nothing has passed yet.
    #[must_use]
    pub fn new(direction: Direction) -> Self {
        Self {
            hello: Vec::new(),
            hello_bytes: match direction {
                Direction::Forth => HELLO_BYTES,
                Direction::Back => HELLO_REPLY_BYTES,
            },
            header: Vec::new(),
            kind: "",
            table: 0,
            body: 0,
        }
    }

    /// What the next byte belongs to.
    #[must_use]
    pub fn place(&self) -> Place {
        if self.hello.len() < self.hello_bytes {
            Place::Hello
        } else if self.header.len() < HEADER_BYTES {
            Place::Header
        } else if self.table > 0 {
            Place::Table(self.kind)
        } else {
            Place::Body(self.kind)
        }
    }

    /// The lane that a source's hello is for; `None` before it has passed.
    #[must_use]
    pub fn lane(&self) -> Option<u32> {
        let octets = self.hello.get(64..68)?;
        Some(u32::from_le_bytes(octets.try_into().ok()?))
    }

    /// Bytes that passed.
    pub fn pass(&mut self, mut octets: &[u8]) {
        while !octets.is_empty() {
            let count = match self.place() {
                Place::Hello => fill(&mut self.hello, self.hello_bytes, octets),
                Place::Header => {
                    let count = fill(&mut self.header, HEADER_BYTES, octets);
                    if self.header.len() == HEADER_BYTES {
                        self.begin();
                    }
                    count
                }
                Place::Table(_) => spend(&mut self.table, octets),
                Place::Body(_) => spend(&mut self.body, octets),
            };
            octets = &octets[count..];
            if self.header.len() == HEADER_BYTES && self.table == 0 && self.body == 0 {
                self.header.clear();
            }
        }
    }

    fn begin(&mut self) {
        let number = |from: usize| {
            let octets = self.header[from..from + 4].try_into().unwrap_or([0; 4]);
            u64::from(u32::from_le_bytes(octets))
        };
        let code = u16::from_le_bytes([self.header[0], self.header[1]]);
        self.kind = Kind::from_code(code).map_or("?", Kind::name);
        (self.table, self.body) = (number(4), number(16));
    }
}

fn fill(to: &mut Vec<u8>, bytes: usize, from: &[u8]) -> usize {
    let count = (bytes - to.len()).min(from.len());
    to.extend_from_slice(&from[..count]);
    count
}

fn spend(left: &mut u64, octets: &[u8]) -> usize {
    let count = usize::try_from(*left)
        .unwrap_or(usize::MAX)
        .min(octets.len());
    *left -= count as u64;
    count
}

#[cfg(test)]
mod tests {
    use multifd_wire::frame::BlobPart;
    use multifd_wire::frame::{Asks, KeepAlive, VmState};
    use multifd_wire::{Body, Frame, Sequence};

    use super::*;

    #[test]
    fn each_octet_of_two_frames_is_where_it_is() {
        let mut octets = vec![0; HELLO_BYTES];
        let body = [7u8; 10];
        let blob = BlobPart {
            kind: 1,
            version: 1,
            index: 0,
            part: 0,
            blob_bytes: 10,
        };
        Frame::from(VmState { blob })
            .encode(Sequence::FIRST, Body::Octets(&body), &mut octets)
            .unwrap();
        octets.extend_from_slice(&body);
        let second = octets.len();
        Frame::from(KeepAlive {
            stamp_us: 1,
            echo_us: 0,
            held_us: 0,
            asks: Asks::Nothing,
        })
        .encode(Sequence::new(1), Body::None, &mut octets)
        .unwrap();
        let mut flow = Flow::new(Direction::Forth);
        let mut places = Vec::new();
        for octet in &octets {
            places.push(flow.place());
            flow.pass(&[*octet]);
        }
        assert_eq!(places[HELLO_BYTES - 1], Place::Hello);
        assert_eq!(places[HELLO_BYTES], Place::Header);
        assert_eq!(places[HELLO_BYTES + HEADER_BYTES], Place::Table("VM_STATE"));
        assert_eq!(places[second - 1], Place::Body("VM_STATE"));
        assert_eq!(places[second], Place::Header);
        assert_eq!(places[octets.len() - 1], Place::Table("KEEP_ALIVE"));
        assert_eq!(flow.place(), Place::Header);
    }
}
