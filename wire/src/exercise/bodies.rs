//! One body per decoder. Each holds for any octets, or panics.

use crate::PAGE_BYTES_U64;
use crate::error::Malformed;
use crate::frame::{Body, Frame, RawRun};
use crate::header::{HEADER_BYTES, Header};
use crate::hello::{HELLO_BYTES, Hello};
use crate::hello_reply::{HELLO_REPLY_BYTES, HelloReply};
use crate::id::{PageIndex, RegionId, Sequence};
use crate::layout::{Layout, Region};
use crate::limits::{BODY_BYTES_MAX, MEMORY_PAGES_MAX, TABLE_BYTES_MAX};
use crate::negotiate::{self, Offer};

use super::seal::{check, reseal, reseal_hello};

/// Any octets as a hello: what is taken is encoded as it came, and every hello has an answer that can be read.
pub fn hello(data: &[u8]) {
    let Some(octets) = data.first_chunk::<HELLO_BYTES>() else {
        return;
    };
    let mut sealed = *octets;
    reseal_hello(&mut sealed);
    for octets in [*octets, sealed] {
        let reply = match Hello::decode(&octets) {
            Ok(hello) => {
                assert_eq!(hello.encode(), octets, "one encoding per value");
                let reply = negotiate::answer(&hello, &Offer::ALL);
                let agreed = negotiate::accept(&hello, &reply).is_ok();
                let accepted = matches!(reply, HelloReply::Accepted { .. });
                assert_eq!(
                    agreed, accepted,
                    "an acceptance of ours is accepted by the source"
                );
                reply
            }
            Err(error) => negotiate::refuse(&octets, &error, &Offer::ALL),
        };
        assert_eq!(
            HelloReply::decode(&reply.encode()),
            Ok(reply),
            "a reply of ours is read back"
        );
    }
}

/// Any octets as a reply: what is taken is encoded as it came.
pub fn hello_reply(data: &[u8]) {
    let Some(octets) = data.first_chunk::<HELLO_REPLY_BYTES>() else {
        return;
    };
    let mut sealed = *octets;
    reseal_hello(&mut sealed);
    for octets in [*octets, sealed] {
        if let Ok(reply) = HelloReply::decode(&octets) {
            assert_eq!(reply.encode(), octets, "one encoding per value");
        }
    }
}

/// Any octets as a header: what is taken is encoded as it came, and its lengths are within the limits.
pub fn header(data: &[u8]) {
    let Some(octets) = data.first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let mut sealed = *octets;
    let crc = crc32fast::hash(&sealed[..28]);
    sealed[28..].copy_from_slice(&crc.to_le_bytes());
    for octets in [*octets, sealed] {
        if let Ok(header) = Header::decode(&octets) {
            assert_eq!(header.encode(), octets, "one encoding per value");
            bounds(&header);
        }
    }
}

/// Any octets as one frame: what is taken is encoded as it came.
pub fn frame(data: &[u8]) {
    let _ = one(data);
    let Some(head_bytes) = head_bytes(data) else {
        return;
    };
    let mut sealed = data[..head_bytes].to_vec();
    let table_bytes = u32::try_from(head_bytes - HEADER_BYTES).unwrap();
    sealed[4..8].copy_from_slice(&table_bytes.to_le_bytes());
    reseal(&mut sealed);
    let _ = one(&sealed);
}

/// Any octets as all that a channel carried: reading ends with an error, at the end, or inside a frame, and each frame
/// that was taken is encoded as it came.
pub fn stream(data: &[u8]) {
    walk(data);
    let mut sealed = data.to_vec();
    let (mut at, mut sequence) = (0, 0_u64);
    while let Some(head_bytes) = head_bytes(&sealed[at..]) {
        let head = &mut sealed[at..at + head_bytes];
        head[8..16].copy_from_slice(&sequence.to_le_bytes());
        reseal(head);
        let body_bytes = usize::try_from(word(head, 16)).unwrap();
        at = at
            .saturating_add(head_bytes)
            .saturating_add(body_bytes)
            .min(sealed.len());
        sequence += 1;
    }
    walk(&sealed);
}

/// Any octets as a region table and runs: the layout takes what a plain model takes, and a run that it admits can be
/// found again. See the corpus for the form: a count, then `(id, address, bytes)`, then runs.
pub fn layout(data: &[u8]) {
    let Some((count, mut rest)) = data.split_first() else {
        return;
    };
    let mut regions = Vec::new();
    for _ in 0..*count {
        let Some((entry, after)) = rest.split_first_chunk::<20>() else {
            break;
        };
        rest = after;
        regions.push(Region {
            id: RegionId::new(word(entry, 0)),
            guest_address: long(entry, 4),
            bytes: long(entry, 12),
        });
    }
    let layout = Layout::new(regions.iter().copied());
    assert_eq!(
        layout.is_ok(),
        is_memory(&regions),
        "{regions:?} gave {layout:?}"
    );
    let Ok(layout) = layout else { return };
    assert!(layout.regions().eq(regions.iter().copied()));
    let (runs, _) = rest.as_chunks::<16>();
    runs.iter()
        .for_each(|octets| admit(&layout, &regions, zerocopy::transmute!(*octets)));
}

/// One run against a plain model of what lies inside a region.
fn admit(layout: &Layout, regions: &[Region], raw: RawRun) {
    let index = usize::try_from(raw.region.get()).unwrap();
    let pages = regions
        .get(index)
        .map(|region| u128::from(region.bytes / PAGE_BYTES_U64));
    let end = u128::from(raw.first.get()) + u128::from(raw.count.get());
    let inside = raw.count.get() > 0 && pages.is_some_and(|pages| end <= pages);
    let admitted = layout.admit(&raw);
    assert_eq!(admitted.is_ok(), inside, "{raw:?} gave {admitted:?}");
    let Ok(run) = admitted else { return };
    assert_eq!(RawRun::from(run), raw);
    assert_eq!(layout.run(run.region(), run.first(), run.count()), Ok(run));
    let range = layout.global_index(run);
    assert_eq!(range.end - range.start, u64::from(run.count()));
    assert!(range.end <= layout.pages_total().value());
    let last = PageIndex::new(run.first().value() + u64::from(run.count()) - 1);
    assert_eq!(
        layout.locate(range.start),
        Some((run.region(), run.first()))
    );
    assert_eq!(layout.locate(range.end - 1), Some((run.region(), last)));
    let (head, rest) = run.split_at(run.count() / 2);
    assert_eq!(
        head.count() + rest.map_or(0, |rest| rest.count()),
        run.count()
    );
}

/// What a region table must be, said without cleverness.
fn is_memory(regions: &[Region]) -> bool {
    let end = |region: &Region| u128::from(region.guest_address) + u128::from(region.bytes);
    let aligned = |value: u64| value.is_multiple_of(PAGE_BYTES_U64);
    let pages: u128 = regions
        .iter()
        .map(|r| u128::from(r.bytes / PAGE_BYTES_U64))
        .sum();
    let each = regions.iter().zip(0_u32..).all(|(region, index)| {
        region.id.value() == index
            && region.bytes > 0
            && aligned(region.bytes)
            && aligned(region.guest_address)
            && end(region) <= u128::from(u64::MAX)
    });
    let apart = regions.iter().enumerate().all(|(index, a)| {
        regions
            .iter()
            .skip(index + 1)
            .all(|b| end(a) <= u128::from(b.guest_address) || end(b) <= u128::from(a.guest_address))
    });
    !regions.is_empty() && each && apart && pages <= u128::from(MEMORY_PAGES_MAX)
}

/// Reads frames until the end, an error, or an unfinished frame.
fn walk(mut data: &[u8]) {
    let mut sequence = Sequence::FIRST;
    while let Ok(Some(rest)) = one(data) {
        let header = Header::decode(data.first_chunk().unwrap()).unwrap();
        if header.check_sequence(sequence).is_err() {
            return;
        }
        sequence = sequence.next();
        assert!(
            rest.len() + HEADER_BYTES <= data.len(),
            "each frame takes octets"
        );
        data = rest;
    }
}

/// Reads one frame; what is taken is encoded as it came.
fn one(data: &[u8]) -> Result<Option<&[u8]>, Malformed> {
    // The body is not needed to judge a head, so a head is judged even where the body is missing.
    if let Some((header, table)) = data.split_first_chunk::<HEADER_BYTES>() {
        let header = Header::decode(header)?;
        bounds(&header);
        if let Some(table) = table.get(..header.table_bytes()) {
            let frame = Frame::decode(&header, table)?;
            encodes_as_it_came(&header, &frame, &data[..HEADER_BYTES + table.len()]);
        }
    }
    Ok(check(data)?.map(|(_, _, rest)| rest))
}

/// A decoded frame gives its own octets back.
fn encodes_as_it_came(header: &Header, frame: &Frame<'_>, head: &[u8]) {
    assert_eq!(header.kind(), frame.kind());
    let mut out = Vec::new();
    let bytes = u32::try_from(header.body_bytes()).unwrap();
    let body = Body::Sum {
        bytes,
        crc: header.body_crc(),
    };
    match (frame, frame.encode(header.sequence(), body, &mut out)) {
        (Frame::Skipped(_), result) => assert!(result.is_err() && out.is_empty()),
        (_, result) => {
            result.unwrap();
            assert_eq!(out, head, "one encoding per value");
        }
    }
}

/// No length leaves a header that is not within the limits.
fn bounds(header: &Header) {
    assert!(header.table_bytes() <= TABLE_BYTES_MAX);
    assert!(header.body_bytes() <= BODY_BYTES_MAX);
}

/// The size of the head that octets begin with, as far as there are octets; `None` without a whole header.
fn head_bytes(data: &[u8]) -> Option<usize> {
    let header = data.first_chunk::<HEADER_BYTES>()?;
    let table_bytes = usize::try_from(word(header, 4)).unwrap();
    Some(HEADER_BYTES.saturating_add(table_bytes).min(data.len()))
}

/// A 32-bit number at an offset.
fn word(octets: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(octets[at..at + 4].try_into().unwrap())
}

/// A 64-bit number at an offset.
fn long(octets: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(octets[at..at + 8].try_into().unwrap())
}
