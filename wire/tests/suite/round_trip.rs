//! Arbitrary frames come back as they went.

use multifd_wire::exercise::check;
use multifd_wire::frame::{
    Abort, Acks, Asks, BlobPart, Commit, Config, Credit, Credits, Device, DeviceChunk, DeviceFlags,
    DeviceLoaded, DeviceMark, Devices, Final, Frame, GiveBack, GiveBackReason, Grant, GuestState,
    KeepAlive, Landed, LaneDown, LaneMark, Mark, Outcome, OutcomeState, Pages, Prepared, Progress,
    RawCredit, RawDevice, RawLaneMark, RawRegion, RawRun, RawStreamCredit, Ready, Regions,
    RoundClosed, RoundEnd, Running, Section, SetupEnd, StreamCredit, StreamCredits, StreamData,
    StreamEnd, StreamEndKind, StreamOpen, Switchover, SwitchoverAck, VmState, Zeros,
};
use multifd_wire::limits::{
    BODY_BYTES_MAX_U64, DEVICE_STREAM_BYTES_MAX, MEMORY_PAGES_MAX, ROUND_MAX, STREAM_BYTES_MAX,
    STREAMS_MAX,
};
use multifd_wire::{
    Body, ChannelRef, DeviceId, Digest, Generation, Header, Incarnation, LaneId, Layout,
    PAGE_BYTES, PageIndex, Phase, Reason, Region, RegionId, Round, Sequence, StreamId, Text, Token,
};
use proptest::prelude::*;
use zerocopy::byteorder::little_endian::{U32, U64};

/// Encodes a frame after something else, decodes it, and compares; once with the body's octets, once with its sum.
fn comes_back(frame: Frame<'_>, sequence: u64, body: &[u8]) -> Result<(), TestCaseError> {
    let sequence = Sequence::new(sequence);
    let mut octets = vec![0xee];
    frame
        .encode(sequence, Body::Octets(body), &mut octets)
        .unwrap();
    let head = octets[1..].to_vec();
    octets.extend_from_slice(body);
    let (header, seen, rest) = check(&octets[1..]).unwrap().unwrap();
    prop_assert_eq!(seen, frame);
    prop_assert_eq!(header.sequence(), sequence);
    prop_assert!(rest.is_empty());
    let crc = if matches!(frame, Frame::Pages(_)) {
        0
    } else {
        crc32fast::hash(body)
    };
    let mut again = Vec::with_capacity(head.len());
    let bytes = u32::try_from(body.len()).unwrap();
    frame
        .encode(sequence, Body::Sum { bytes, crc }, &mut again)
        .unwrap();
    prop_assert_eq!(&again, &head);
    prop_assert_eq!(again.capacity(), head.len());
    prop_assert_eq!(frame.head_bytes(), head.len());
    Ok(())
}

prop_compose! { fn round()(round in 0..=ROUND_MAX) -> Round { Round::new(round) } }
prop_compose! { fn lane()(lane in 0_u32..256) -> LaneId { LaneId::new(lane) } }
prop_compose! { fn device()(device in 0_u32..256) -> DeviceId { DeviceId::new(device) } }
prop_compose! { fn incarnation()(value: u32) -> Incarnation { Incarnation::new(value) } }
prop_compose! { fn token()(octets: [u8; 16], last in 1_u8..) -> Token {
    let [head @ .., _] = octets;
    let mut octets = [last; 16];
    octets[..15].copy_from_slice(&head);
    Token::new(octets)
} }
prop_compose! { fn reason()(code in 1_u32..) -> Reason { Reason::from_u32(code).unwrap() } }

fn pages() -> impl Strategy<Value = u64> {
    0..=MEMORY_PAGES_MAX
}

/// Runs of which no layout is asked.
fn runs(
    count: std::ops::Range<usize>,
    pages: std::ops::Range<u32>,
) -> impl Strategy<Value = Vec<RawRun>> {
    let run = (0_u32..1024, 0..MEMORY_PAGES_MAX, pages).prop_map(|(region, first, count)| RawRun {
        region: U32::new(region),
        count: U32::new(count),
        first: U64::new(first),
    });
    prop::collection::vec(run, count)
}

/// Frames of fixed size without a body.
fn fixed() -> impl Strategy<Value = Frame<'static>> {
    prop_oneof![set_up(), on_the_way(), about_devices(), ending()]
}

fn set_up() -> impl Strategy<Value = Frame<'static>> {
    let grant = (token(), token(), 1_u32..=256, any::<u32>(), any::<u64>()).prop_map(
        |(ticket, resume_secret, lanes_max, suspend_ms, device_window_bytes)| {
            Grant {
                ticket,
                resume_secret,
                lanes_max,
                suspend_ms,
                device_window_bytes,
            }
            .into()
        },
    );
    let end = (
        0_u32..=64,
        1_u32..=1024,
        0_u32..=256,
        1_u32..=256,
        1..=MEMORY_PAGES_MAX,
    )
        .prop_map(|(configs, regions, devices, lanes, pages)| {
            SetupEnd {
                configs,
                regions,
                devices,
                lanes,
                memory_bytes: pages * 4096,
            }
            .into()
        });
    let ready = (1_u32..=256, any::<u64>())
        .prop_map(|(lanes, prepare_us)| Ready { lanes, prepare_us }.into());
    prop_oneof![grant, end, ready]
}

fn on_the_way() -> impl Strategy<Value = Frame<'static>> {
    let end = (round(), any::<bool>(), pages(), pages()).prop_map(
        |(round, final_round, pages, zero_pages)| {
            RoundEnd {
                round,
                final_round,
                pages,
                zero_pages,
            }
            .into()
        },
    );
    let closed = (
        round(),
        pages(),
        pages(),
        any::<u64>(),
        any::<u64>(),
        pages(),
    )
        .prop_map(
            |(round, pages, zero_pages, digest, elapsed_us, damaged_pages)| {
                let digest = Digest::new(digest);
                RoundClosed {
                    round,
                    pages,
                    zero_pages,
                    digest,
                    elapsed_us,
                    damaged_pages,
                }
                .into()
            },
        );
    let progress = (
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        round(),
        0_u32..=256,
    )
        .prop_map(|(landed_bytes, zero_pages, frames, cpu_us, round, lanes)| {
            Progress {
                landed_bytes,
                zero_pages,
                frames,
                cpu_us,
                round,
                lanes,
            }
            .into()
        });
    let asks = prop_oneof![Just(Asks::Answer), Just(Asks::Nothing)];
    let alive = (1_u64.., any::<u64>(), any::<u64>(), asks).prop_map(
        |(stamp_us, echo_us, held_us, asks)| {
            KeepAlive {
                stamp_us,
                echo_us,
                held_us: if echo_us == 0 { 0 } else { held_us },
                asks,
            }
            .into()
        },
    );
    let down = (lane(), incarnation(), reason()).prop_map(|(lane, incarnation, reason)| {
        LaneDown {
            lane,
            incarnation,
            reason,
        }
        .into()
    });
    prop_oneof![end, closed, progress, alive, down]
}

fn about_devices() -> impl Strategy<Value = Frame<'static>> {
    let marks = prop_oneof![
        Just(Mark::DataEnd),
        Just(Mark::ConfigEnd),
        Just(Mark::Restart)
    ];
    let any_mark = prop_oneof![(Just(Mark::InitialEnd), 1_u32..), (marks, any::<u32>()),];
    let mark = (
        device(),
        any_mark,
        any::<u64>(),
        0..=DEVICE_STREAM_BYTES_MAX,
    )
        .prop_map(|(device, (mark, generation), index, offset)| {
            let generation = Generation::new(generation);
            DeviceMark {
                device,
                mark,
                generation,
                index,
                offset,
            }
            .into()
        });
    let ack = (device(), 1_u32.., any::<u64>(), any::<u64>()).prop_map(
        |(device, generation, bytes, load_us)| {
            let generation = Generation::new(generation);
            SwitchoverAck {
                device,
                generation,
                bytes,
                load_us,
            }
            .into()
        },
    );
    let loaded = (device(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(device, bytes, load_us, config_us)| {
            DeviceLoaded {
                device,
                bytes,
                load_us,
                config_us,
            }
            .into()
        },
    );
    prop_oneof![mark, ack, loaded]
}

fn ending() -> impl Strategy<Value = Frame<'static>> {
    let switchover = round().prop_map(|final_round| Switchover { final_round }.into());
    let guest = prop_oneof![Just(GuestState::Running), Just(GuestState::Paused)];
    let last = (
        round(),
        0_u32..=64,
        any::<u64>(),
        1..=MEMORY_PAGES_MAX,
        guest,
    )
        .prop_map(|(final_round, states, digest, memory_pages, guest)| {
            Final {
                final_round,
                states,
                digest: Digest::new(digest),
                memory_pages,
                guest,
            }
            .into()
        });
    let prepared = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(digest, wait_us, load_us, verify_us)| {
            Prepared {
                digest: Digest::new(digest),
                wait_us,
                load_us,
                verify_us,
            }
            .into()
        },
    );
    let commit = any::<u64>().prop_map(|digest| {
        Commit {
            digest: Digest::new(digest),
        }
        .into()
    });
    let running =
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(resume_us, cpu_us, landed_bytes)| {
            Running {
                resume_us,
                cpu_us,
                landed_bytes,
            }
            .into()
        });
    let outcome =
        prop::sample::select(OutcomeState::ALL).prop_map(|state| Outcome { state }.into());
    prop_oneof![switchover, last, prepared, commit, running, outcome]
}

proptest! {
    #[test]
    fn fixed_frames_come_back(frame in fixed(), sequence: u64) {
        comes_back(frame, sequence, &[])?;
    }

    #[test]
    fn pages_come_back(
        round in round(),
        runs in runs(1..8, 1..30),
        fill: u64,
        sequence: u64,
    ) {
        let pages: u32 = runs.iter().map(|run| run.count.get()).sum();
        let checksums: Vec<U32> = (0..pages).map(|page| U32::new(page ^ fill as u32)).collect();
        let body = vec![fill as u8; checksums.len() * PAGE_BYTES];
        let frame = Pages { round, runs: &runs, checksums: &checksums };
        comes_back(frame.into(), sequence, &body)?;
        let (mut named, mut given) = (Vec::new(), Vec::new());
        Frame::from(frame).encode(Sequence::FIRST, Body::Pages, &mut named).unwrap();
        Frame::from(frame).encode(Sequence::FIRST, Body::Octets(&body), &mut given).unwrap();
        prop_assert_eq!(named, given);
    }

    #[test]
    fn zeros_come_back(round in round(), runs in runs(1..300, 1..u32::MAX), sequence: u64) {
        let zeros = Zeros { round, runs: &runs };
        let pages: u64 = runs.iter().map(|run| u64::from(run.count.get())).sum();
        prop_assert_eq!(zeros.page_count(), pages);
        comes_back(zeros.into(), sequence, &[])?;
    }

    #[test]
    fn give_backs_come_back(
        lane in lane(),
        incarnation in incarnation(),
        frame: u64,
        runs in runs(1..9, 1..29),
    ) {
        let sequence = Sequence::new(frame);
        let reason = GiveBackReason::Checksum;
        let back = GiveBack { lane, incarnation, sequence, reason, runs: &runs };
        comes_back(back.into(), frame, &[])?;
    }

    #[test]
    fn regions_come_back_and_make_the_same_layout(gaps in prop::collection::vec((0_u64..9, 1_u64..9), 1..40)) {
        let mut end = 0;
        let mut regions = Vec::new();
        for (id, (gap, pages)) in (0_u32..).zip(gaps) {
            let region = Region {
                id: RegionId::new(id),
                guest_address: end + gap * 4096,
                bytes: pages * 4096,
            };
            end = region.guest_address + region.bytes;
            regions.push(region);
        }
        let raw: Vec<RawRegion> = regions.iter().map(|region| RawRegion::from(*region)).collect();
        let frame = Regions { regions: &raw };
        comes_back(frame.into(), 0, &[])?;
        let layout = Layout::from_frame(&frame).unwrap();
        prop_assert_eq!(&layout, &Layout::new(regions.clone()).unwrap());
        prop_assert!(layout.regions().eq(regions));
        let all = layout.run(RegionId::new(0), PageIndex::new(0), 1).unwrap();
        prop_assert_eq!(layout.admit(&RawRun::from(all)), Ok(all));
    }

    #[test]
    fn devices_come_back(
        sizes in prop::collection::vec((0_u32..16, any::<u64>(), any::<u64>(), 1..=BODY_BYTES_MAX_U64, "[^\\p{C}\\p{Zl}\\p{Zp}]{0,12}"), 0..20),
    ) {
        let devices: Vec<Device> = (0_u32..)
            .zip(sizes)
            .map(|(id, (flags, initial_bytes, state_bytes, chunk_bytes_max, name))| {
                let pre_copy = flags & 1 == 1;
                Device {
                    id: DeviceId::new(id),
                    flags: DeviceFlags::new(if pre_copy { flags } else { flags & !4 }).unwrap(),
                    initial_bytes: if pre_copy { initial_bytes } else { 0 },
                    state_bytes,
                    chunk_bytes_max,
                    name: Text::new(&format!("{id}{name}")).unwrap(),
                }
            })
            .collect();
        // Two names may still be equal: "1" + "1x" and "11" + "x".
        let mut names: Vec<_> = devices.iter().map(|device| device.name.to_string()).collect();
        names.sort();
        names.dedup();
        prop_assume!(names.len() == devices.len());
        let raw: Vec<RawDevice> = devices.iter().map(|device| RawDevice::from(*device)).collect();
        let frame = Devices { devices: &raw };
        comes_back(frame.into(), 1, &[])?;
        let seen: Result<Vec<Device>, _> = frame.iter().collect();
        prop_assert_eq!(seen, Ok(devices));
    }

    #[test]
    fn acks_and_landed_come_back(
        lanes in prop::collection::btree_map(0_u32..256, (any::<u32>(), any::<u64>()), 1..60),
        rounds_closed: u32,
    ) {
        let marks: Vec<LaneMark> = lanes
            .iter()
            .map(|(lane, (incarnation, frames))| LaneMark {
                lane: LaneId::new(*lane),
                incarnation: Incarnation::new(*incarnation),
                frames: *frames,
            })
            .collect();
        let raw: Vec<RawLaneMark> = marks.iter().map(|mark| RawLaneMark::from(*mark)).collect();
        let (acks, landed) = (Acks { lanes: &raw }, Landed { rounds_closed, lanes: &raw });
        comes_back(acks.into(), 2, &[])?;
        comes_back(landed.into(), 3, &[])?;
        prop_assert!(acks.iter().eq(marks.iter().copied()));
        prop_assert!(landed.iter().eq(marks));
    }

    #[test]
    fn credits_come_back(credits in prop::collection::vec((device(), any::<u64>()), 1..60)) {
        let credits: Vec<Credit> =
            credits.into_iter().map(|(device, offset_max)| Credit { device, offset_max }).collect();
        let raw: Vec<RawCredit> = credits.iter().map(|credit| RawCredit::from(*credit)).collect();
        let frame = Credits { credits: &raw };
        comes_back(frame.into(), 4, &[])?;
        prop_assert!(frame.iter().eq(credits));
    }

    #[test]
    fn carried_streams_come_back(
        stream in 0..STREAMS_MAX as u32,
        offset in 0..STREAM_BYTES_MAX - 2000,
        more in 0_u64..2000,
        clean: bool,
        body in prop::collection::vec(any::<u8>(), 1..2000),
    ) {
        let stream = StreamId::new(stream);
        let how = if clean { StreamEndKind::Clean } else { StreamEndKind::Reset };
        comes_back(StreamOpen { stream }.into(), 4, &[])?;
        comes_back(StreamData { stream, offset }.into(), 5, &body)?;
        comes_back(StreamEnd { stream, how, offset }.into(), 6, &[])?;
        let credit = StreamCredit { stream, received: offset, offset_max: offset + more };
        let raw = [RawStreamCredit::from(credit)];
        let frame = StreamCredits { credits: &raw };
        comes_back(frame.into(), 7, &[])?;
        prop_assert!(frame.iter().eq([credit]));
    }

    #[test]
    fn blobs_come_back(
        kind: u32,
        version: u32,
        index in 0_u32..64,
        last in prop::collection::vec(any::<u8>(), 0..2000),
        part in 0_u32..16,
    ) {
        prop_assume!(part == 0 || !last.is_empty());
        let blob_bytes = u64::from(part) * BODY_BYTES_MAX_U64 + last.len() as u64;
        let blob = BlobPart { kind, version, index, part, blob_bytes };
        prop_assert!(blob.is_last());
        comes_back(Config { blob }.into(), 5, &last)?;
        comes_back(VmState { blob }.into(), 6, &last)?;
    }

    #[test]
    fn device_chunks_come_back(
        device in device(),
        config: bool,
        index: u64,
        offset in 0..DEVICE_STREAM_BYTES_MAX - 2000,
        body in prop::collection::vec(any::<u8>(), 1..2000),
    ) {
        let section = if config { Section::Config } else { Section::Data };
        comes_back(DeviceChunk { device, section, index, offset }.into(), 7, &body)?;
    }

    #[test]
    fn aborts_come_back(
        reason in reason(),
        phase in prop::sample::select(Phase::ALL),
        channel in prop_oneof![Just(ChannelRef::None), Just(ChannelRef::Control), lane().prop_map(ChannelRef::Lane)],
        text in ".{0,200}",
    ) {
        let text = Text::<512>::clip(&text);
        let abort = Abort { reason, phase, channel, text: text.as_str() };
        comes_back(abort.into(), 8, &[])?;
    }

    #[test]
    fn frames_one_after_another_are_read_one_after_another(frames in prop::collection::vec(fixed(), 0..20)) {
        let mut octets = Vec::new();
        let mut sequence = Sequence::FIRST;
        for frame in &frames {
            frame.encode(sequence, Body::None, &mut octets).unwrap();
            sequence = sequence.next();
        }
        let mut rest = octets.as_slice();
        let mut due = Sequence::FIRST;
        for frame in frames {
            let (header, seen, after): (Header, Frame<'_>, &[u8]) = check(rest).unwrap().unwrap();
            prop_assert_eq!(seen, frame);
            prop_assert!(header.check_sequence(due).is_ok());
            prop_assert!(header.check_sequence(due.next()).is_err());
            due = due.next();
            rest = after;
        }
        prop_assert!(rest.is_empty());
    }
}
