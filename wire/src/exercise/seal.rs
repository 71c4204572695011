//! Checksums put right, and a whole frame checked the way a reader checks it.

use crate::error::Malformed;
use crate::frame::Frame;
use crate::header::{HEADER_BYTES, Header};
use crate::layout::Layout;

/// Puts the checksums of a head (header and table, nothing after) right. The lengths in the header are left as they are.
pub fn reseal(head: &mut [u8]) {
    let (header, table) = head.split_at_mut(HEADER_BYTES);
    header[20..24].copy_from_slice(&crc32fast::hash(table).to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// Puts the checksum at the end of a hello or a reply right.
pub fn reseal_hello(octets: &mut [u8]) {
    let (covered, crc) = octets.split_at_mut(octets.len() - 4);
    crc.copy_from_slice(&crc32fast::hash(covered).to_le_bytes());
}

/// Checks the frame that `octets` begin with as a reader does, body and region table included, and hands back what
/// follows it. `None` when the octets end inside the frame.
///
/// # Errors
/// The first thing that is wrong.
#[allow(clippy::type_complexity)]
pub fn check(octets: &[u8]) -> Result<Option<(Header, Frame<'_>, &[u8])>, Malformed> {
    let Some((header, rest)) = octets.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let header = Header::decode(header)?;
    let Some((table, rest)) = rest.split_at_checked(header.table_bytes()) else {
        return Ok(None);
    };
    let frame = Frame::decode(&header, table)?;
    let Some((body, rest)) = rest.split_at_checked(header.body_bytes()) else {
        return Ok(None);
    };
    header.check_body(body)?;
    if let Frame::Regions(regions) = &frame {
        Layout::from_frame(regions)?;
    }
    Ok(Some((header, frame, rest)))
}
