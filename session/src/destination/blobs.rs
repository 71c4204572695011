//! Puts the parts of configuration and state blobs together, within a bound.

use multifd_wire::frame::BlobPart;
use multifd_wire::{Kind, Misbehaved};

use crate::common::Blob;
use crate::destination::error::Fault;

/// Blobs of one kind of frame (CONFIG or VM_STATE), in order, none skipped (SPEC: BLOB-2).
#[derive(Debug)]
pub struct BlobAssembler {
    kind: Kind,
    octets_max: u64,
    octets: u64,
    done: Vec<Blob>,
    open: Option<(BlobPart, Vec<u8>)>,
}

impl BlobAssembler {
    /// Collects blobs of this kind of frame, at most so many bytes in all.
    pub fn new(kind: Kind, octets_max: u64) -> Self {
        Self {
            kind,
            octets_max,
            octets: 0,
            done: Vec::new(),
            open: None,
        }
    }

    /// Complete blobs so far.
    pub fn count(&self) -> u32 {
        u32::try_from(self.done.len()).unwrap_or(u32::MAX)
    }

    /// Takes a part; memory grows by what really came, never by what was announced.
    pub fn part(&mut self, part: BlobPart, body: &[u8]) -> Result<(), Fault> {
        let order = Misbehaved::Order { kind: self.kind };
        let expected_index = self.count();
        let (mut first, mut octets) = self
            .open
            .take()
            .unwrap_or_else(|| (BlobPart { part: 0, ..part }, Vec::new()));
        if part != first || part.index != expected_index {
            return Err(order.into());
        }
        // An announcement that can't be kept is refused before anything of it is held.
        let held = self.octets.saturating_add(body.len() as u64);
        let announced = if part.part == 0 { part.blob_bytes } else { 0 };
        let wanted = held.max(self.octets.saturating_add(announced));
        if wanted > self.octets_max {
            return Err(Fault::Limit {
                what: "bytes of blobs",
                wanted,
                most: self.octets_max,
            });
        }
        self.octets = held;
        if octets.try_reserve(body.len()).is_err() {
            return Err(Fault::System {
                step: "memory for a blob",
                source: std::io::ErrorKind::OutOfMemory.into(),
            });
        }
        octets.extend_from_slice(body);
        if part.is_last() {
            self.done.push(Blob {
                kind: part.kind,
                version: part.version,
                bytes: octets.into(),
            });
        } else {
            first.part += 1;
            self.open = Some((first, octets));
        }
        Ok(())
    }

    /// The blobs, if there are exactly this many and none is half there.
    pub fn take(&mut self, count: u32) -> Result<Vec<Blob>, Misbehaved> {
        if self.open.is_some() {
            return Err(Misbehaved::Order { kind: self.kind });
        }
        if count != self.count() {
            return Err(Misbehaved::Amount {
                field: "number of blobs",
                expected: self.count().into(),
                found: count.into(),
            });
        }
        Ok(std::mem::take(&mut self.done))
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::frame::blob_parts;

    use super::*;

    fn assembler() -> BlobAssembler {
        BlobAssembler::new(Kind::Config, 4 << 20)
    }

    #[test]
    fn blobs_come_out_as_they_went_in() {
        let (big, mut a) = (vec![7u8; (2 << 20) + 5], assembler());
        for (index, blob) in [&big[..], b"", b"x"].into_iter().enumerate() {
            for (part, body) in blob_parts(9, 2, index as u32, blob).unwrap() {
                a.part(part, body).unwrap();
            }
        }
        let blobs = a.take(3).unwrap();
        assert_eq!(
            blobs.iter().map(|b| b.bytes.len()).collect::<Vec<_>>(),
            [big.len(), 0, 1]
        );
        assert_eq!((blobs[0].kind, blobs[0].version), (9, 2));
    }

    // SPEC: BLOB-2, BLOB-4, FINAL-5
    #[test]
    fn refuses_parts_out_of_order_and_blobs_that_are_half_there() {
        let big = vec![7u8; (2 << 20) + 5];
        let parts: Vec<_> = blob_parts(1, 1, 0, &big).unwrap().collect();
        assert!(
            assembler().part(parts[1].0, parts[1].1).is_err(),
            "a blob begins with part 0"
        );
        let mut a = assembler();
        a.part(parts[0].0, parts[0].1).unwrap();
        assert!(a.take(0).is_err() && a.take(1).is_err(), "half there");
        assert!(a.part(parts[2].0, parts[2].1).is_err(), "part 1 is missing");
        let mut a = assembler();
        let next = blob_parts(1, 1, 1, b"x").unwrap().next().unwrap();
        assert!(a.part(next.0, next.1).is_err(), "blob 0 is missing");
    }

    #[test]
    fn refuses_what_is_announced_and_can_t_be_kept_before_it_comes() {
        let mut a = BlobAssembler::new(Kind::Config, 10);
        let whole = vec![0; 11];
        let (part, body) = blob_parts(1, 1, 0, &whole).unwrap().next().unwrap();
        let refused = a.part(part, &body[..1]);
        assert!(matches!(refused, Err(Fault::Limit { wanted: 11, .. })));
        assert_eq!(a.octets, 0);
    }

    #[test]
    fn refuses_one_octet_more_than_the_bound() {
        let mut a = BlobAssembler::new(Kind::Config, 10);
        let part =
            |blob: &'static [u8], index| blob_parts(1, 1, index, blob).unwrap().next().unwrap();
        let (p, b) = part(b"0123456789", 0);
        a.part(p, b).unwrap();
        let (p, b) = part(b"x", 1);
        assert!(matches!(a.part(p, b), Err(Fault::Limit { .. })));
    }
}
