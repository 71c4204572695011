//! The frame around a guest's processor state, the same for both kinds.
//!
//! ```text
//!    0 magic[8] "MFDSTAT\n"    8 u32 version (1)    12 u32 kind (1 KVM, 2 process)
//!   16 u32 vcpus              20 u32 reserved (0)   24 u64 bytes of the records that follow
//!   32 records, one for each virtual CPU, in order: see `vcpu_state` and `process`
//! ```
//!
//! Little-endian. The state fits only a guest of the same kind with as many virtual CPUs; the memory it belongs to
//! travels apart from it.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::codec::{Reader, put};
use crate::error::{Error, Result};
use crate::guest::Kind;

const MAGIC: [u8; 8] = *b"MFDSTAT\n";

/// Raised whenever a record changes.
const VERSION: u32 = 1;

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: u32,
    kind: u32,
    vcpus: u32,
    reserved: u32,
    record_bytes: u64,
}

/// The bytes of a state with these records.
pub(crate) fn encode(kind: Kind, vcpus: u32, records: &[u8]) -> Vec<u8> {
    let head = RawHead {
        magic: MAGIC,
        version: VERSION,
        kind: kind.code(),
        vcpus,
        reserved: 0,
        record_bytes: records.len() as u64,
    };
    let mut octets = Vec::with_capacity(size_of::<RawHead>() + records.len());
    put(&mut octets, &head);
    octets.extend_from_slice(records);
    octets
}

/// A reader of the records of a state for a guest of this kind and this many virtual CPUs.
///
/// # Errors
/// [`Error::Malformed`] for what no guest wrote, [`Error::Incompatible`] for another guest's state.
pub(crate) fn open(octets: &[u8], kind: Kind, vcpus: u32) -> Result<Reader<'_>> {
    let mut reader = Reader::new("processor state", octets);
    let head: RawHead = reader.take()?;
    reader.expect("magic", head.magic, MAGIC)?;
    reader.expect("version", head.version, VERSION)?;
    reader.expect("reserved field", head.reserved, 0)?;
    let Some(found) = Kind::from_code(head.kind) else {
        return Err(reader.malformed(format!("kind {} is not known", head.kind)));
    };
    if found != kind || head.vcpus != vcpus {
        let detail = format!(
            "the state is that of a {found} guest with {} vCPUs, and this is a {kind} guest with {vcpus}: \
             build it from the source's configuration",
            head.vcpus
        );
        return Err(Error::Incompatible { detail });
    }
    let record_bytes = (octets.len() - size_of::<RawHead>()) as u64;
    reader.expect("length of the records", record_bytes, head.record_bytes)?;
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_what_it_encodes() {
        let octets = encode(Kind::Process, 3, &[7; 24]);
        let mut reader = open(&octets, Kind::Process, 3).unwrap();
        assert_eq!(reader.take::<[u8; 24]>().unwrap(), [7; 24]);
        reader.finish().unwrap();
    }

    #[test]
    fn refuses_every_truncation_an_octet_more_and_each_wrong_field() {
        let octets = encode(Kind::Kvm, 2, &[7; 24]);
        for length in 0..octets.len() {
            assert_eq!(
                open(&octets[..length], Kind::Kvm, 2).unwrap_err().code(),
                "guest-malformed",
                "{length}"
            );
        }
        let longer = [&octets[..], &[0]].concat();
        assert_eq!(
            open(&longer, Kind::Kvm, 2).unwrap_err().code(),
            "guest-malformed"
        );
        for offset in [0, 8, 13, 20, 24] {
            let mut wrong = octets.clone();
            wrong[offset] ^= 0x40;
            assert_eq!(
                open(&wrong, Kind::Kvm, 2).unwrap_err().code(),
                "guest-malformed",
                "{offset}"
            );
        }
    }

    #[test]
    fn refuses_another_kind_and_another_number_of_vcpus() {
        let octets = encode(Kind::Kvm, 2, &[]);
        for (kind, vcpus) in [(Kind::Process, 2), (Kind::Kvm, 1)] {
            let error = open(&octets, kind, vcpus).unwrap_err();
            assert_eq!(error.code(), "guest-incompatible");
            assert!(
                error.to_string().contains("KVM guest with 2 vCPUs"),
                "{error}"
            );
        }
    }
}
