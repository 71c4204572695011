//! The few moves that every decoder is made of: view octets as a raw structure, and refuse what is out of bounds.
//!
//! Nothing here copies a list or allocates. Raw structures have alignment 1, so a table may lie anywhere.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Malformed;
use crate::id::{DeviceId, LaneId, Round, StreamId};
use crate::kind::Kind;
use crate::limits;

/// What a raw structure must be so that octets can be viewed as it and it as octets.
pub(crate) trait Octets:
    FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned
{
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned> Octets for T {}

/// Views a table that is one raw structure and nothing else.
// SPEC: HEAD-6
pub(crate) fn whole<T: Octets>(kind: Kind, table: &[u8]) -> Result<&T, Malformed> {
    T::ref_from_bytes(table).map_err(|_| kind.table_error(table.len()))
}

/// Views the fixed part of a table and hands back the octets after it.
pub(crate) fn prefix<T: Octets>(kind: Kind, table: &[u8]) -> Result<(&T, &[u8]), Malformed> {
    T::ref_from_prefix(table).map_err(|_| kind.table_error(table.len()))
}

/// Views octets as exactly `count` entries; neither an octet less nor one more.
// SPEC: HEAD-6
pub(crate) fn entries<'a, T: Octets>(
    field: &'static str,
    octets: &'a [u8],
    count: u32,
) -> Result<&'a [T], Malformed> {
    <[T]>::ref_from_bytes_with_elems(octets, size(count)).map_err(|_| Malformed::Count {
        field,
        declared: u64::from(count),
        found: wide(octets.len().checked_div(size_of::<T>()).unwrap_or(0)),
    })
}

/// Refuses a reserved number that is not zero.
// SPEC: GEN-3
pub(crate) fn reserved(field: &'static str, value: u64) -> Result<(), Malformed> {
    if value == 0 {
        Ok(())
    } else {
        Err(Malformed::Reserved { field })
    }
}

/// Refuses reserved octets that are not zero.
// SPEC: GEN-3
pub(crate) fn reserved_octets(field: &'static str, octets: &[u8]) -> Result<(), Malformed> {
    if octets.iter().all(|octet| *octet == 0) {
        Ok(())
    } else {
        Err(Malformed::Reserved { field })
    }
}

/// Refuses a number outside `min..=max`.
pub(crate) fn between(
    field: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<(), Malformed> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(Malformed::Value { field, value })
    }
}

/// Refuses a count of things outside `min..=max`.
pub(crate) fn count(
    field: &'static str,
    value: u32,
    min: usize,
    max: usize,
) -> Result<(), Malformed> {
    between(field, u64::from(value), wide(min), wide(max))
}

/// A lane number within the limits.
// SPEC: LIMIT-9
pub(crate) fn lane(field: &'static str, value: u32) -> Result<LaneId, Malformed> {
    if size(value) < limits::LANES_MAX {
        Ok(LaneId::new(value))
    } else {
        Err(Malformed::Value {
            field,
            value: u64::from(value),
        })
    }
}

/// A device number within the limits.
// SPEC: LIMIT-8
pub(crate) fn device(field: &'static str, value: u32) -> Result<DeviceId, Malformed> {
    if size(value) < limits::DEVICES_MAX {
        Ok(DeviceId::new(value))
    } else {
        Err(Malformed::Value {
            field,
            value: u64::from(value),
        })
    }
}

/// A stream number within the limits.
// SPEC: LIMIT-18
pub(crate) fn stream(field: &'static str, value: u32) -> Result<StreamId, Malformed> {
    if size(value) < limits::STREAMS_MAX {
        Ok(StreamId::new(value))
    } else {
        Err(Malformed::Value {
            field,
            value: u64::from(value),
        })
    }
}

/// A round number within the limits.
// SPEC: LIMIT-16
pub(crate) fn round(field: &'static str, value: u32) -> Result<Round, Malformed> {
    between(field, u64::from(value), 0, u64::from(limits::ROUND_MAX))?;
    Ok(Round::new(value))
}

/// A number of pages that a guest can have.
// SPEC: LIMIT-15
pub(crate) fn pages(field: &'static str, value: u64) -> Result<(), Malformed> {
    between(field, value, 0, limits::MEMORY_PAGES_MAX)
}

/// A 32-bit number as a size in memory. On a host whose `usize` is narrower, a size that no limit allows.
pub(crate) fn size(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A size in memory as a 64-bit number.
pub(crate) fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// A size in memory as a 32-bit field; what does not fit becomes a value that every limit refuses.
pub(crate) fn narrow(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
