//! Each limit: the last value that is taken and the first that is not.

use multifd_wire::error::LayoutError;
use multifd_wire::exercise::reseal;
use multifd_wire::frame::{
    Abort, Acks, Credit, Credits, Device, DeviceFlags, Devices, Frame, GiveBack, GiveBackReason,
    Landed, LaneMark, Pages, RawCredit, RawDevice, RawLaneMark, RawRegion, RawRun, RawStreamCredit,
    Regions, StreamCredit, StreamCredits, Zeros, blob_parts,
};
use multifd_wire::header::HEADER_BYTES;
use multifd_wire::kind::{BodyShape, Kind};
use multifd_wire::limits::{
    BLOB_BYTES_MAX, BODY_BYTES_MAX, BODY_BYTES_MAX_U64, DEVICE_STREAM_BYTES_MAX, DEVICES_MAX,
    LANES_MAX, MEMORY_PAGES_MAX, PAGES_PER_FRAME_MAX, REGIONS_MAX, ROUND_MAX,
    RUNS_PER_GIVE_BACK_MAX, RUNS_PER_PAGES_MAX, RUNS_PER_ZEROS_MAX, STREAM_BYTES_MAX,
    STREAM_CREDITS_MAX, TABLE_BYTES_MAX, TEXT_BYTES_MAX,
};
use multifd_wire::{
    Body, ChannelRef, DeviceId, Incarnation, LaneId, Layout, Malformed, Misuse, PAGE_BYTES, Phase,
    Reason, Region, RegionId, Round, Sequence, StreamId, Text,
};
use zerocopy::byteorder::little_endian::{U32, U64};

use crate::support::{check_sealed, header_of, sample};

/// A number in a sample's table: the sample, offset and size of the field, the least and greatest value that is taken.
const NUMBERS: &[(&str, usize, usize, u64, u64)] = &[
    ("grant", 32, 4, 1, 256),
    ("config-empty", 8, 4, 0, 63),
    ("devices", 32, 8, 1, BODY_BYTES_MAX_U64),
    ("setup_end", 0, 4, 0, 64),
    ("setup_end", 4, 4, 1, 1024),
    ("setup_end", 8, 4, 0, 256),
    ("setup_end", 12, 4, 1, 256),
    ("setup_end", 16, 8, 4096, 1 << 52),
    ("ready", 0, 4, 1, 256),
    ("pages", 0, 4, 0, ROUND_MAX as u64),
    ("pages", 16, 4, 0, 1023),
    ("pages", 24, 8, 0, MEMORY_PAGES_MAX - 1),
    ("zeros", 0, 4, 0, ROUND_MAX as u64),
    ("zeros", 16, 4, 0, 1023),
    ("zeros", 24, 8, 0, MEMORY_PAGES_MAX - 1),
    ("round_end", 0, 4, 0, ROUND_MAX as u64),
    ("round_end", 8, 8, 0, MEMORY_PAGES_MAX),
    ("round_end", 16, 8, 0, MEMORY_PAGES_MAX),
    ("device_chunk", 0, 4, 0, 255),
    ("device_chunk", 4, 4, 0, 1),
    ("device_chunk", 16, 8, 0, DEVICE_STREAM_BYTES_MAX - 16),
    ("device_mark-initial", 0, 4, 0, 255),
    ("device_mark-initial", 4, 4, 1, 4),
    ("device_mark-initial", 8, 4, 1, u32::MAX as u64),
    ("device_mark-initial", 24, 8, 0, DEVICE_STREAM_BYTES_MAX),
    ("device_mark-data", 8, 4, 0, u32::MAX as u64),
    ("ack", 8, 4, 0, 255),
    ("give_back", 0, 4, 0, 255),
    ("give_back", 20, 4, 1, 1),
    ("give_back", 24, 4, 0, 1023),
    ("give_back", 28, 4, 1, 255),
    ("give_back", 32, 8, 0, MEMORY_PAGES_MAX - 1),
    ("round_closed", 0, 4, 0, ROUND_MAX as u64),
    ("round_closed", 8, 8, 0, MEMORY_PAGES_MAX),
    ("round_closed", 16, 8, 0, MEMORY_PAGES_MAX),
    ("round_closed", 40, 8, 0, MEMORY_PAGES_MAX),
    ("credit", 8, 4, 0, 255),
    ("switchover_ack", 0, 4, 0, 255),
    ("switchover_ack", 4, 4, 1, u32::MAX as u64),
    ("device_loaded", 0, 4, 0, 255),
    ("progress", 32, 4, 0, ROUND_MAX as u64),
    ("progress", 36, 4, 0, 256),
    ("keep_alive", 0, 8, 1, u64::MAX),
    ("lane_down", 0, 4, 0, 255),
    ("lane_down", 8, 4, 1, u32::MAX as u64),
    ("switchover", 0, 4, 0, ROUND_MAX as u64),
    ("final", 0, 4, 0, ROUND_MAX as u64),
    ("final", 4, 4, 0, 64),
    ("final", 16, 8, 1, MEMORY_PAGES_MAX),
    ("abort", 0, 4, 1, u32::MAX as u64),
    ("abort", 4, 4, 0, 7),
    ("abort", 8, 4, 0, 256),
    ("landed", 32, 4, 1, 255),
    ("outcome", 0, 4, 1, 4),
    ("stream_open", 0, 4, 0, 1023),
    ("stream_data", 0, 4, 0, 1023),
    ("stream_data", 8, 8, 0, STREAM_BYTES_MAX - 8),
    ("stream_credit", 8, 4, 0, 1023),
    ("stream_credit", 16, 8, 0, 65_604),
    ("stream_credit", 24, 8, 68, STREAM_BYTES_MAX),
    ("stream_end", 0, 4, 0, 1023),
    ("stream_end", 4, 4, 1, 2),
    ("stream_end", 8, 8, 0, STREAM_BYTES_MAX),
    ("stream_outcome", 0, 4, 1, 4),
];

/// Reads a sample after one of its numbers was changed.
fn with_number(name: &str, offset: usize, bytes: usize, value: u64) -> Result<(), Malformed> {
    let sample = sample(name);
    let mut head = sample.head;
    let at = HEADER_BYTES + offset;
    head[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    check_sealed(&head, &sample.body)
}

#[test]
fn each_number_is_taken_at_its_bounds_and_refused_past_them() {
    for &(name, offset, bytes, least, greatest) in NUMBERS {
        let read = |value| with_number(name, offset, bytes, value);
        assert_eq!(read(least), Ok(()), "{name} at {offset}: {least}");
        assert_eq!(read(greatest), Ok(()), "{name} at {offset}: {greatest}");
        let widest = if bytes == 4 {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        };
        let mut past = vec![];
        past.extend(least.checked_sub(1));
        past.extend(greatest.checked_add(1).filter(|past| *past <= widest));
        for value in past {
            assert!(
                read(value).is_err(),
                "{name} at {offset}: {value} was taken"
            );
        }
    }
}

#[test]
fn abort_about_no_channel_is_taken() {
    assert_eq!(with_number("abort", 8, 4, u64::from(u32::MAX)), Ok(()));
    assert!(with_number("abort", 8, 4, u64::from(u32::MAX) - 1).is_err());
}

// SPEC: HEAD-5, LIMIT-1
#[test]
fn header_takes_the_table_lengths_of_its_kind_and_no_others() {
    for kind in Kind::ALL {
        let shape = kind.shape();
        let body = shape.body.min();
        let table = |bytes| header_of(kind.code(), bytes, body).map(|header| header.table_bytes());
        assert_eq!(table(shape.table_min), Ok(shape.table_min), "{kind}");
        assert_eq!(table(shape.table_max), Ok(shape.table_max), "{kind}");
        assert!(shape.table_max <= TABLE_BYTES_MAX, "{kind}");
        let mut wrong = vec![shape.table_max + 1, shape.table_max + shape.table_step];
        wrong.extend([TABLE_BYTES_MAX + 1, u32::MAX as usize]);
        wrong.extend(shape.table_min.checked_sub(1));
        wrong.extend((1..shape.table_step).map(|odd| shape.table_min + odd));
        for bytes in wrong {
            let seen = table(bytes);
            assert!(
                matches!(seen, Err(Malformed::TableBytes { .. })),
                "{kind}: {bytes} gave {seen:?}"
            );
        }
    }
}

// SPEC: HEAD-5, LIMIT-2
#[test]
fn header_takes_the_body_lengths_of_its_kind_and_no_others() {
    for kind in Kind::ALL {
        let shape = kind.shape();
        let body = |bytes| header_of(kind.code(), shape.table_min, bytes).map(|h| h.body_bytes());
        assert_eq!(body(shape.body.min()), Ok(shape.body.min()), "{kind}");
        assert_eq!(body(shape.body.max()), Ok(shape.body.max()), "{kind}");
        let mut wrong = vec![shape.body.max() + 1, u32::MAX as usize];
        wrong.extend(shape.body.min().checked_sub(1));
        if shape.body == BodyShape::Pages {
            wrong.extend([
                PAGE_BYTES + 1,
                PAGE_BYTES * 3 / 2,
                shape.body.max() + PAGE_BYTES,
            ]);
        }
        for bytes in wrong {
            let seen = body(bytes);
            assert!(
                matches!(seen, Err(Malformed::BodyBytes { .. })),
                "{kind}: {bytes} gave {seen:?}"
            );
        }
    }
}

// SPEC: LIMIT-1, LIMIT-2
#[test]
fn unknown_optional_kind_keeps_the_general_limits() {
    assert!(header_of(0xfffe, TABLE_BYTES_MAX, BODY_BYTES_MAX).is_ok());
    assert!(header_of(0xfffe, TABLE_BYTES_MAX + 1, 0).is_err());
    assert!(header_of(0xfffe, 0, BODY_BYTES_MAX + 1).is_err());
}

/// Encodes a list of `max` entries, which a reader must take, and one of `max + 1`, which the encoder must refuse; then
/// gives a reader the octets of the longer one all the same.
fn list<'a>(max: usize, past: impl Into<Frame<'a>>, full: impl Into<Frame<'a>>, entry: usize) {
    let (past, full) = (past.into(), full.into());
    let kind = full.kind();
    let pages = matches!(full, Frame::Pages(_));
    let body = || if pages { Body::Pages } else { Body::None };
    let mut head = Vec::new();
    let seen = past.encode(Sequence::FIRST, body(), &mut head);
    assert_eq!(
        seen,
        Err(Misuse::TooMany {
            kind,
            count: max + 1,
            max
        })
    );
    assert!(head.is_empty());
    full.encode(Sequence::FIRST, body(), &mut head).unwrap();
    let body_bytes = if pages { BODY_BYTES_MAX } else { 0 };
    assert_eq!(check_sealed(&head, &vec![0; body_bytes]), Ok(()), "{kind}");
    // The list with one entry more, as a careless peer would send it: the last entry twice.
    let last = head[head.len() - entry..].to_vec();
    head.extend_from_slice(&last);
    let table_bytes = u32::try_from(head.len() - HEADER_BYTES).unwrap();
    head[4..8].copy_from_slice(&table_bytes.to_le_bytes());
    let refused = check_sealed(&head, &vec![0; body_bytes]);
    assert!(
        matches!(
            refused,
            Err(Malformed::TableBytes { .. } | Malformed::Count { .. })
        ),
        "{kind} gave {refused:?}"
    );
}

/// `count` runs of one page each, all different.
fn runs(count: usize) -> Vec<RawRun> {
    let run = |first| RawRun {
        region: U32::new(0),
        count: U32::new(1),
        first: U64::new(first),
    };
    (0..count as u64).map(|index| run(index * 2)).collect()
}

/// `count` lanes, rising.
fn marks(count: usize) -> Vec<RawLaneMark> {
    let mark = |lane| LaneMark {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(0),
        frames: 1,
    };
    (0..count as u32).map(|lane| mark(lane).into()).collect()
}

// SPEC: LIMIT-4, LIMIT-5, LIMIT-6
#[test]
fn lists_of_runs_end_at_their_limits() {
    let round = Round::new(0);
    let zeros = runs(RUNS_PER_ZEROS_MAX + 1);
    list(
        RUNS_PER_ZEROS_MAX,
        Zeros {
            round,
            runs: &zeros,
        },
        Zeros {
            round,
            runs: &zeros[1..],
        },
        16,
    );
    let back = runs(RUNS_PER_GIVE_BACK_MAX + 1);
    let back = |from: usize| GiveBack {
        lane: LaneId::new(0),
        incarnation: Incarnation::new(0),
        sequence: Sequence::FIRST,
        reason: GiveBackReason::Checksum,
        runs: &back[from..],
    };
    list(RUNS_PER_GIVE_BACK_MAX, back(0), back(1), 16);
    let pages = runs(RUNS_PER_PAGES_MAX + 1);
    let checksums = [U32::new(0); PAGES_PER_FRAME_MAX];
    let pages = |from: usize| Pages {
        round,
        runs: &pages[from..],
        checksums: &checksums,
    };
    list(RUNS_PER_PAGES_MAX, pages(0), pages(1), 16);
}

// SPEC: LIMIT-3
#[test]
fn pages_of_one_frame_end_at_their_limit() {
    let round = Round::new(0);
    let run = |count| {
        [RawRun {
            region: U32::new(0),
            count: U32::new(count),
            first: U64::new(0),
        }]
    };
    let checksums = [U32::new(0); PAGES_PER_FRAME_MAX + 1];
    let past = Pages {
        round,
        runs: &run(257),
        checksums: &checksums,
    };
    list(
        PAGES_PER_FRAME_MAX,
        past,
        Pages {
            round,
            runs: &run(256),
            checksums: &checksums[1..],
        },
        4,
    );
}

// SPEC: LIMIT-9
#[test]
fn lists_of_lanes_end_at_their_limit() {
    let lanes = marks(LANES_MAX + 1);
    list(
        LANES_MAX,
        Acks { lanes: &lanes },
        Acks {
            lanes: &lanes[..LANES_MAX],
        },
        16,
    );
    let landed = |count: usize| Landed {
        rounds_closed: 0,
        lanes: &lanes[..count],
    };
    list(LANES_MAX, landed(LANES_MAX + 1), landed(LANES_MAX), 16);
}

// SPEC: LIMIT-7
#[test]
fn regions_end_at_their_limit() {
    let region = |index: u32| Region {
        id: RegionId::new(index),
        guest_address: u64::from(index) * 8192,
        bytes: 4096,
    };
    let regions: Vec<Region> = (0..1025).map(region).collect();
    let raw: Vec<RawRegion> = regions
        .iter()
        .map(|region| RawRegion::from(*region))
        .collect();
    let frame = |count: usize| Regions {
        regions: &raw[..count],
    };
    list(REGIONS_MAX, frame(REGIONS_MAX + 1), frame(REGIONS_MAX), 32);
    assert!(Layout::new(regions[..REGIONS_MAX].iter().copied()).is_ok());
    let past = Layout::new(regions);
    assert_eq!(
        past,
        Err(LayoutError::Regions {
            count: REGIONS_MAX + 1
        })
    );
    assert_eq!(Layout::new([]), Err(LayoutError::Regions { count: 0 }));
}

/// A plain device with this number and name.
fn device(id: u32, name: &str) -> RawDevice {
    let (id, name) = (DeviceId::new(id), Text::new(name).unwrap());
    let flags = DeviceFlags::NONE;
    Device {
        id,
        flags,
        initial_bytes: 0,
        state_bytes: 0,
        chunk_bytes_max: 1,
        name,
    }
    .into()
}

// SPEC: LIMIT-8
#[test]
fn devices_end_at_their_limit() {
    let raw: Vec<RawDevice> = (0..257)
        .map(|id| device(id, &format!("device {id}")))
        .collect();
    let frame = |count: usize| Devices {
        devices: &raw[..count],
    };
    list(DEVICES_MAX, frame(DEVICES_MAX + 1), frame(DEVICES_MAX), 112);
    let credit = |id| {
        RawCredit::from(Credit {
            device: DeviceId::new(id),
            offset_max: 1,
        })
    };
    let raw: Vec<RawCredit> = (0..257).map(credit).collect();
    let frame = |count: usize| Credits {
        credits: &raw[..count],
    };
    list(DEVICES_MAX, frame(DEVICES_MAX + 1), frame(DEVICES_MAX), 16);
}

// SPEC: LIMIT-20
#[test]
fn credits_of_streams_end_at_their_limit() {
    let credit = |id| {
        RawStreamCredit::from(StreamCredit {
            stream: StreamId::new(id),
            received: 0,
            offset_max: 1,
        })
    };
    let raw: Vec<RawStreamCredit> = (0..257).map(credit).collect();
    let frame = |count: usize| StreamCredits {
        credits: &raw[..count],
    };
    let max = STREAM_CREDITS_MAX;
    list(max, frame(max + 1), frame(max), 24);
}

// SPEC: LIMIT-14
#[test]
fn device_name_ends_at_its_limit() {
    let full = device(0, &"n".repeat(64));
    let mut head = Vec::new();
    let frame = Frame::Devices(Devices { devices: &[full] });
    frame
        .encode(Sequence::FIRST, Body::None, &mut head)
        .unwrap();
    assert_eq!(check_sealed(&head, &[]), Ok(()));
    // The size of the name lies after count (8), id and flags (8) and three sizes (24).
    head[HEADER_BYTES + 40] = 65;
    assert!(check_sealed(&head, &[]).is_err());
    assert!(Text::<64>::new(&"n".repeat(65)).is_err());
}

// SPEC: LIMIT-12
#[test]
fn text_of_an_abort_ends_at_its_limit() {
    let text = "t".repeat(TEXT_BYTES_MAX + 1);
    let abort = |text| Abort {
        reason: Reason::Internal,
        phase: Phase::Rounds,
        channel: ChannelRef::Control,
        text,
    };
    list(TEXT_BYTES_MAX, abort(&text), abort(&text[1..]), 1);
}

// SPEC: LIMIT-10, BLOB-2
#[test]
fn blob_ends_at_its_limit() {
    let octets = vec![0; BLOB_BYTES_MAX as usize + 1];
    assert!(matches!(
        blob_parts(1, 1, 0, &octets),
        Err(Misuse::Blob { .. })
    ));
    let parts: Vec<_> = blob_parts(1, 1, 0, &octets[1..]).unwrap().collect();
    assert_eq!(parts.len(), 16);
    for (index, (part, body)) in parts.iter().enumerate() {
        let mut head = Vec::new();
        let frame = Frame::Config(multifd_wire::frame::Config { blob: *part });
        frame
            .encode(Sequence::FIRST, Body::Octets(body), &mut head)
            .unwrap();
        assert_eq!(check_sealed(&head, body), Ok(()), "part {index}");
        assert_eq!(part.is_last(), index == 15);
    }
    assert!(with_number("config-empty", 16, 8, BLOB_BYTES_MAX + 1).is_err());
}

// SPEC: BLOB-2, BLOB-3
#[test]
fn blob_is_cut_into_full_parts_and_a_rest() {
    for bytes in [
        0,
        1,
        BODY_BYTES_MAX - 1,
        BODY_BYTES_MAX,
        BODY_BYTES_MAX + 1,
        3 * BODY_BYTES_MAX,
    ] {
        let octets = vec![9; bytes];
        let parts: Vec<_> = blob_parts(1, 1, 0, &octets).unwrap().collect();
        assert_eq!(
            parts.len(),
            bytes.div_ceil(BODY_BYTES_MAX).max(1),
            "{bytes}"
        );
        let mut offset = 0;
        for (part, body) in &parts {
            assert_eq!(part.offset(), offset);
            assert_eq!(part.part_bytes(), body.len() as u64);
            assert_eq!(part.is_last(), offset + body.len() as u64 == bytes as u64);
            offset += body.len() as u64;
        }
        assert_eq!(offset, bytes as u64);
    }
}

// SPEC: HEAD-6
#[test]
fn count_that_differs_from_the_entries_is_refused() {
    for (name, offset) in [
        ("regions", 0),
        ("devices", 0),
        ("devices-none", 0),
        ("pages", 4),
        ("pages", 8),
        ("pages-runs", 4),
        ("zeros", 4),
        ("zeros", 8),
        ("ack", 0),
        ("give_back", 16),
        ("credit", 0),
        ("landed", 4),
        ("abort", 12),
    ] {
        let sample = sample(name);
        let at = HEADER_BYTES + offset;
        let count = u32::from_le_bytes(sample.head[at..at + 4].try_into().unwrap());
        let wrong = [
            count.wrapping_add(1),
            count.wrapping_sub(1),
            0x0100_0000,
            u32::MAX,
        ];
        for value in wrong.into_iter().filter(|value| *value != count) {
            let mut head = sample.head.clone();
            head[at..at + 4].copy_from_slice(&value.to_le_bytes());
            reseal(&mut head);
            assert!(
                check_sealed(&head, &sample.body).is_err(),
                "{name}: {value} was taken"
            );
        }
    }
}
