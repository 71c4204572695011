//! Which bits of each kind's table are reserved. Written from SPEC.md's diagrams, apart from the decoders.

use crate::kind::Kind;

/// A stretch of octets in which the bits of `mask` are reserved.
#[derive(Clone, Copy)]
struct Stretch {
    offset: usize,
    bytes: usize,
    mask: u8,
}

/// Octets that are reserved as a whole.
const fn all(offset: usize, bytes: usize) -> Stretch {
    Stretch {
        offset,
        bytes,
        mask: 0xff,
    }
}

/// The first octet of a field of flags, of which only the bits of `known` have a meaning.
const fn flags(offset: usize, known: u8) -> Stretch {
    Stretch {
        offset,
        bytes: 1,
        mask: !known,
    }
}

/// The reserved bits before the entries, the size of what is before the entries, the reserved bits of an entry, its size.
type Map = (Vec<Stretch>, usize, Vec<Stretch>, usize);

/// The map of one kind. A kind without entries has entries of no octets.
fn map(kind: Kind) -> Map {
    match kind {
        Kind::Grant => (vec![all(48, 16)], 64, vec![], 0),
        Kind::Config | Kind::VmState => (vec![all(24, 8)], 32, vec![], 0),
        Kind::Regions => (vec![all(4, 4)], 8, vec![all(4, 4), all(24, 8)], 32),
        Kind::Devices => {
            let entry = vec![flags(4, 15), all(5, 3), all(34, 6), all(104, 8)];
            (vec![all(4, 4)], 8, entry, 112)
        }
        Kind::SetupEnd => (vec![all(24, 8)], 32, vec![], 0),
        Kind::Ready => (vec![all(4, 4)], 16, vec![], 0),
        Kind::Pages => (vec![all(12, 4)], 16, vec![], 0),
        Kind::Zeros => (vec![], 16, vec![], 16),
        Kind::RoundEnd => (vec![flags(4, 1), all(5, 3), all(24, 8)], 32, vec![], 0),
        Kind::DeviceChunk => (vec![all(24, 8)], 32, vec![], 0),
        Kind::DeviceMark => (vec![all(12, 4)], 32, vec![], 0),
        Kind::Ack => (vec![all(4, 4)], 8, vec![], 16),
        Kind::GiveBack => (vec![], 24, vec![], 16),
        Kind::RoundClosed => (vec![all(4, 4)], 48, vec![], 0),
        Kind::Credit => (vec![all(4, 4)], 8, vec![all(4, 4)], 16),
        Kind::SwitchoverAck => (vec![], 24, vec![], 0),
        Kind::DeviceLoaded => (vec![all(4, 4)], 32, vec![], 0),
        Kind::KeepAlive => (vec![flags(24, 1), all(25, 3), all(28, 4)], 32, vec![], 0),
        Kind::LaneDown => (vec![all(12, 4)], 16, vec![], 0),
        Kind::Switchover => (vec![all(4, 12)], 16, vec![], 0),
        Kind::Final => (vec![all(24, 8), all(36, 4)], 40, vec![], 0),
        Kind::Prepared => (vec![all(32, 8)], 40, vec![], 0),
        Kind::Commit => (vec![], 8, vec![], 0),
        Kind::Running => (vec![all(24, 8)], 32, vec![], 0),
        Kind::Abort => (vec![], 16, vec![], 0),
        Kind::Landed => (vec![all(8, 8)], 16, vec![], 16),
        Kind::Outcome => (vec![all(4, 12)], 16, vec![], 0),
        Kind::StreamOpen | Kind::StreamOutcome => (vec![all(4, 12)], 16, vec![], 0),
        Kind::StreamData => (vec![all(4, 4)], 16, vec![], 0),
        Kind::StreamCredit => (vec![all(4, 4)], 8, vec![all(4, 4)], 24),
        Kind::StreamEnd => (vec![], 16, vec![], 0),
        Kind::Progress => (vec![all(40, 8)], 48, vec![], 0),
        Kind::OptionalUnknown(_) => (vec![], 0, vec![], 0),
    }
}

/// Every reserved bit of a table of this kind and length, as octet offset and the bit's value in that octet.
#[must_use]
pub fn reserved_bits(kind: Kind, table_bytes: usize) -> Vec<(usize, u8)> {
    let (before, start, entry, step) = map(kind);
    let mut bits = Vec::new();
    let mut add = |base: usize, stretch: &Stretch| {
        for offset in 0..stretch.bytes {
            let values = (0..8)
                .map(|bit| 1_u8 << bit)
                .filter(|bit| stretch.mask & bit != 0);
            bits.extend(values.map(|bit| (base + stretch.offset + offset, bit)));
        }
    };
    before.iter().for_each(|stretch| add(0, stretch));
    let mut base = start;
    while step > 0 && base + step <= table_bytes {
        entry.iter().for_each(|stretch| add(base, stretch));
        base += step;
    }
    bits
}
