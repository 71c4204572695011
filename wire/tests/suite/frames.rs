//! Truncation, reserved bits and damage are refused, for every kind, by one harness.

use multifd_wire::exercise::{check, reseal, reserved_bits, samples};
use multifd_wire::frame::{
    Acks, DeviceChunk, Grant, Landed, Pages, RawLaneMark, RawRun, Section, Switchover, Zeros,
};
use multifd_wire::header::HEADER_BYTES;
use multifd_wire::kind::BodyShape;
use multifd_wire::{
    Body, DeviceId, Frame, Header, Malformed, Misuse, PAGE_BYTES, Round, Sequence, Token,
};

use crate::support::{check_octets, check_sealed, header_of, octets_of, sample};

#[test]
fn each_sample_is_taken_and_encoded_as_it_came() {
    for sample in samples() {
        let octets = octets_of(&sample);
        let (header, frame, rest) = check(&octets).unwrap().unwrap();
        assert!(rest.is_empty());
        assert_eq!((header.kind(), frame.kind()), (sample.kind, sample.kind));
        let mut out = b"what was there before".to_vec();
        let body = if sample.body.is_empty() {
            Body::None
        } else {
            Body::Octets(&sample.body)
        };
        frame.encode(header.sequence(), body, &mut out).unwrap();
        assert_eq!(
            out,
            [b"what was there before", sample.head.as_slice()].concat()
        );
    }
}

#[test]
fn stream_that_ends_inside_a_frame_is_not_a_frame() {
    for sample in samples() {
        let octets = octets_of(&sample);
        for bytes in 0..octets.len() {
            assert_eq!(
                check(&octets[..bytes]),
                Ok(None),
                "{} cut to {bytes}",
                sample.name
            );
        }
    }
}

// SPEC: HEAD-6
#[test]
fn table_shorter_or_longer_than_the_header_says_is_refused() {
    for sample in samples() {
        let header = Header::decode(sample.head.first_chunk().unwrap()).unwrap();
        let table = &sample.head[HEADER_BYTES..];
        for bytes in 0..table.len() {
            let seen = Frame::decode(&header, &table[..bytes]);
            assert!(
                matches!(seen, Err(Malformed::TableBytes { .. })),
                "{}: {bytes}",
                sample.name
            );
        }
        let longer = [table, &[0]].concat();
        let seen = Frame::decode(&header, &longer);
        assert!(
            matches!(seen, Err(Malformed::TableBytes { .. })),
            "{}: longer",
            sample.name
        );
    }
}

// SPEC: HEAD-1, HEAD-6, HEAD-5
#[test]
fn truncated_table_with_right_checksums_is_refused_at_every_length() {
    for sample in samples() {
        for bytes in 0..sample.head.len() - HEADER_BYTES {
            let mut head = sample.head[..HEADER_BYTES + bytes].to_vec();
            head[4..8].copy_from_slice(&u32::try_from(bytes).unwrap().to_le_bytes());
            let seen = check_sealed(&head, &sample.body);
            assert!(
                seen.is_err(),
                "{} with a table of {bytes} octets was taken",
                sample.name
            );
        }
    }
}

// SPEC: HEAD-5, HEAD-6
#[test]
fn table_with_octets_after_its_end_is_refused() {
    for sample in samples() {
        for more in [1, 4, 8, 16, 32, 112] {
            let mut head = sample.head.clone();
            head.resize(head.len() + more, 0);
            let table_bytes = u32::try_from(head.len() - HEADER_BYTES).unwrap();
            head[4..8].copy_from_slice(&table_bytes.to_le_bytes());
            let seen = check_sealed(&head, &sample.body);
            assert!(
                seen.is_err(),
                "{} with {more} octets more was taken",
                sample.name
            );
        }
    }
}

// SPEC: GEN-3, HEAD-3
#[test]
fn each_reserved_bit_of_a_table_is_refused() {
    let mut bits = 0;
    for sample in samples() {
        for (offset, bit) in reserved_bits(sample.kind, sample.head.len() - HEADER_BYTES) {
            let mut head = sample.head.clone();
            head[HEADER_BYTES + offset] |= bit;
            let seen = check_sealed(&head, &sample.body);
            let reserved = matches!(seen, Err(Malformed::Reserved { .. }));
            assert!(
                reserved,
                "{}: octet {offset}, bit {bit:#x} gave {seen:?}",
                sample.name
            );
            bits += 1;
        }
    }
    assert!(bits > 2000, "only {bits} reserved bits were tried");
}

// SPEC: HEAD-3
#[test]
fn each_reserved_bit_of_a_header_is_refused() {
    for sample in samples() {
        for bit in 0..16 {
            let mut head = sample.head.clone();
            head[2 + bit / 8] |= 1 << (bit % 8);
            let seen = check_sealed(&head, &sample.body);
            assert_eq!(
                seen,
                Err(Malformed::Reserved {
                    field: "header.reserved"
                }),
                "{}",
                sample.name
            );
        }
    }
}

// SPEC: HEAD-2, HEAD-6, HEAD-7, PAGES-5
#[test]
fn each_flipped_bit_is_seen() {
    for sample in samples() {
        let octets = octets_of(&sample);
        let pages = sample.kind.shape().body == BodyShape::Pages;
        let covered = if pages {
            sample.head.len()
        } else {
            octets.len()
        };
        for bit in 0..covered * 8 {
            let mut damaged = octets.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let seen = check(&damaged);
            assert!(seen.is_err(), "{}: bit {bit} flipped unseen", sample.name);
        }
    }
}

// SPEC: PAGES-6
#[test]
fn damaged_page_is_named_by_its_checksum() {
    let mut octets = octets_of(&sample("pages-runs"));
    let second = octets.len() - 2 * PAGE_BYTES;
    octets[second] ^= 1;
    let (_, frame, _) = check(&octets).unwrap().unwrap();
    let Frame::Pages(pages) = frame else {
        panic!("not PAGES")
    };
    let body = &octets[octets.len() - 3 * PAGE_BYTES..];
    let whole: Vec<bool> = body
        .chunks(PAGE_BYTES)
        .zip(pages.checksums)
        .map(|(page, checksum)| crc32fast::hash(page) == checksum.get())
        .collect();
    assert_eq!(whole, [true, false, true]);
}

#[test]
fn table_is_read_at_any_alignment() {
    for sample in samples() {
        let octets = octets_of(&sample);
        for shift in 0..8 {
            let mut moved = vec![0; shift];
            moved.extend_from_slice(&octets);
            check_octets(&moved[shift..]).unwrap_or_else(|e| panic!("{}: {e}", sample.name));
        }
    }
}

// SPEC: HEAD-7
#[test]
fn checksum_of_a_body_that_is_not_there_is_refused() {
    for sample in samples().iter().filter(|sample| sample.body.is_empty()) {
        let mut head = sample.head.clone();
        head[24] = 1;
        let seen = check_sealed(&head, &[]);
        let refused = Malformed::Value {
            field: "header.body_crc",
            value: 1,
        };
        assert_eq!(seen, Err(refused), "{}", sample.name);
    }
}

// SPEC: EXT-1
#[test]
fn each_unknown_mandatory_kind_is_refused_with_its_code() {
    let known: Vec<u16> = multifd_wire::Kind::ALL
        .iter()
        .map(|kind| kind.code())
        .collect();
    for code in (0..0x8000).filter(|code| !known.contains(code)) {
        assert_eq!(header_of(code, 0, 0), Err(Malformed::UnknownKind { code }));
    }
}

// SPEC: EXT-2
#[test]
fn each_unknown_optional_kind_can_be_skipped() {
    let known: Vec<u16> = multifd_wire::Kind::ALL
        .iter()
        .map(|kind| kind.code())
        .collect();
    for code in (0x8000..=0xffff).filter(|code| !known.contains(code)) {
        let header = header_of(code, 0, 0).unwrap();
        assert_eq!(Frame::decode(&header, &[]), Ok(Frame::Skipped(code)));
    }
}

#[test]
fn skipped_frame_cannot_be_encoded() {
    let mut out = vec![1, 2, 3];
    let seen = Frame::Skipped(0xfffe).encode(Sequence::FIRST, Body::None, &mut out);
    assert_eq!(
        (seen, out.as_slice()),
        (Err(Misuse::Skipped), [1, 2, 3].as_slice())
    );
}

#[test]
fn body_that_a_kind_does_not_have_is_refused_and_leaves_the_buffer_as_it_was() {
    for sample in samples()
        .iter()
        .filter(|sample| sample.kind.shape().body == BodyShape::None)
    {
        let octets = octets_of(sample);
        let (header, frame, _) = check(&octets).unwrap().unwrap();
        for body in [
            Body::Octets(b"x"),
            Body::Sum { bytes: 1, crc: 1 },
            Body::Pages,
        ] {
            let mut out = vec![7];
            let seen = frame.encode(header.sequence(), body, &mut out);
            assert!(seen.is_err(), "{} took {body:?}", sample.name);
            assert_eq!(out, [7], "{}", sample.name);
        }
    }
}

/// Encodes a frame that must be refused, into a buffer that must stay as it was.
fn refused<'a>(frame: impl Into<Frame<'a>>, body: Body<'_>) -> Misuse {
    let (frame, mut out) = (frame.into(), vec![7]);
    let seen = frame.encode(Sequence::FIRST, body, &mut out);
    assert_eq!(out, [7], "{frame:?}");
    seen.expect_err("the encoder took what no decoder takes")
}

#[test]
fn encoder_refuses_what_the_decoder_would() {
    let round = Round::new(u32::MAX);
    let run = |count: u32| {
        [RawRun {
            region: 0.into(),
            count: count.into(),
            first: 0.into(),
        }]
    };
    let mark = |lane: u32| RawLaneMark {
        lane: lane.into(),
        incarnation: 0.into(),
        frames: 0.into(),
    };
    let grant = Grant {
        ticket: Token::NONE,
        resume_secret: Token::new([1; 16]),
        lanes_max: 1,
        suspend_ms: 0,
        device_window_bytes: 0,
    };
    let chunk = DeviceChunk {
        device: DeviceId::new(0),
        section: Section::Data,
        index: 0,
        offset: 0,
    };
    let two = run(2);
    let pages = |checksums| Pages {
        round: Round::new(0),
        runs: &two,
        checksums,
    };
    for (seen, code) in [
        (refused(grant, Body::None), "wire.malformed.value"),
        (
            refused(Switchover { final_round: round }, Body::None),
            "wire.malformed.value",
        ),
        (
            refused(Acks { lanes: &[] }, Body::None),
            "wire.malformed.table-bytes",
        ),
        (
            refused(
                Zeros {
                    round: Round::new(0),
                    runs: &run(0),
                },
                Body::None,
            ),
            "wire.malformed.value",
        ),
        (refused(chunk, Body::None), "wire.malformed.body-bytes"),
        (
            refused(pages(&[1.into()]), Body::Pages),
            "wire.malformed.count",
        ),
        (
            refused(
                pages(&[1.into(); 2]),
                Body::Sum {
                    bytes: 8192,
                    crc: 1,
                },
            ),
            "wire.malformed.value",
        ),
        (
            refused(
                pages(&[1.into(); 2]),
                Body::Sum {
                    bytes: 4096,
                    crc: 0,
                },
            ),
            "wire.malformed.body-bytes",
        ),
        (
            refused(
                Landed {
                    rounds_closed: 0,
                    lanes: &[mark(1), mark(1)],
                },
                Body::None,
            ),
            "wire.malformed.value",
        ),
        (
            refused(
                Acks {
                    lanes: &[mark(256)],
                },
                Body::None,
            ),
            "wire.malformed.value",
        ),
    ] {
        let Misuse::WouldBeRefused(error) = seen else {
            panic!("{seen}")
        };
        assert_eq!(error.code(), code, "{error}");
    }
}

#[test]
fn reseal_changes_nothing_where_nothing_is_wrong() {
    for sample in samples() {
        let mut head = sample.head.clone();
        reseal(&mut head);
        assert_eq!(head, sample.head, "{}", sample.name);
    }
}
