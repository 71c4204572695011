//! Samples: at least one frame of every kind, with the values of the vectors of the same name in `tests/vectors/`.

use zerocopy::byteorder::little_endian::U32;

use crate::PAGE_BYTES;
use crate::code::{Phase, Reason};
use crate::digest::Digest;
use crate::frame::{
    Abort, Acks, Asks, BlobPart, Body, Commit, Config, Credit, Credits, Device, DeviceChunk,
    DeviceFlags, DeviceLoaded, DeviceMark, Devices, Final, Frame, GiveBack, GiveBackReason, Grant,
    GuestState, KeepAlive, Landed, LaneDown, LaneMark, Mark, Outcome, OutcomeState, Pages,
    Prepared, Progress, RawRun, Ready, Regions, RoundClosed, RoundEnd, Running, Section, SetupEnd,
    StreamCredit, StreamCredits, StreamData, StreamEnd, StreamEndKind, StreamOpen, StreamOutcome,
    Switchover, SwitchoverAck, VmState, Zeros,
};
use crate::id::{
    ChannelRef, DeviceId, Generation, Incarnation, LaneId, PageIndex, RegionId, Round, Sequence,
    StreamId, Token,
};
use crate::kind::Kind;
use crate::layout::{Layout, Region};
use crate::limits::BODY_BYTES_MAX_U64;
use crate::text::Text;

/// One frame as it travels.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The name of the vector with the same octets.
    pub name: &'static str,
    /// The frame's kind.
    pub kind: Kind,
    /// Header and table.
    pub head: Vec<u8>,
    /// The body, possibly empty.
    pub body: Vec<u8>,
}

/// All samples; every kind is among them.
#[must_use]
pub fn samples() -> Vec<Sample> {
    [
        set_up(),
        memory(),
        devices(),
        control(),
        ending(),
        carried(),
    ]
    .concat()
}

/// Encodes one sample.
fn sample<'a>(
    name: &'static str,
    sequence: u64,
    frame: impl Into<Frame<'a>>,
    body: &[u8],
) -> Sample {
    let frame = frame.into();
    let mut head = Vec::new();
    let measured = if body.is_empty() {
        Body::None
    } else {
        Body::Octets(body)
    };
    frame
        .encode(Sequence::new(sequence), measured, &mut head)
        .unwrap();
    Sample {
        name,
        kind: frame.kind(),
        head,
        body: body.to_vec(),
    }
}

/// Sixteen octets that count up.
fn counting(first: u8) -> [u8; 16] {
    core::array::from_fn(|index| first + u8::try_from(index).unwrap())
}

/// A part of a blob.
const fn part(kind: u32, version: u32, index: u32, part: u32, blob_bytes: u64) -> BlobPart {
    BlobPart {
        kind,
        version,
        index,
        part,
        blob_bytes,
    }
}

/// The two regions of the samples.
fn regions() -> [Region; 2] {
    let region = |id, guest_address, bytes| Region {
        id: RegionId::new(id),
        guest_address,
        bytes,
    };
    [region(0, 0, 0x10_0000), region(1, 0x1_0000_0000, 0x20_0000)]
}

/// Runs of those regions.
fn runs(wanted: &[(u32, u64, u32)]) -> Vec<RawRun> {
    let layout = Layout::new(regions()).unwrap();
    let run = |&(region, first, count): &(u32, u64, u32)| {
        layout
            .run(RegionId::new(region), PageIndex::new(first), count)
            .unwrap()
            .into()
    };
    wanted.iter().map(run).collect()
}

fn set_up() -> Vec<Sample> {
    let device = |id, flags, initial_bytes, state_bytes, chunk_bytes_max, name| {
        let (id, name) = (DeviceId::new(id), Text::new(name).unwrap());
        Device {
            id,
            flags,
            initial_bytes,
            state_bytes,
            chunk_bytes_max,
            name,
        }
        .into()
    };
    let regions = regions().map(Into::into);
    let devices = [
        device(
            0,
            DeviceFlags::KNOWN,
            1_048_576,
            104_857_600,
            1_048_576,
            "net0",
        ),
        device(1, DeviceFlags::NONE, 0, 65_536, 65_536, "rng"),
    ];
    let grant = Grant {
        ticket: Token::new(counting(0x20)),
        resume_secret: Token::new(counting(0x30)),
        lanes_max: 16,
        suspend_ms: 30_000,
        device_window_bytes: 33_554_432,
    };
    let last = Config {
        blob: part(7, 1, 63, 1, BODY_BYTES_MAX_U64 + 3),
    };
    let end = SetupEnd {
        configs: 1,
        regions: 2,
        devices: 2,
        lanes: 4,
        memory_bytes: 0x30_0000,
    };
    vec![
        sample("grant", 0, grant, b""),
        sample(
            "config",
            0,
            Config {
                blob: part(1, 2, 0, 0, 5),
            },
            b"hello",
        ),
        sample(
            "config-empty",
            1,
            Config {
                blob: part(1, 2, 1, 0, 0),
            },
            b"",
        ),
        sample("config-last-part", 2, last, b"end"),
        sample("regions", 1, Regions { regions: &regions }, b""),
        sample("devices", 2, Devices { devices: &devices }, b""),
        sample("devices-none", 2, Devices { devices: &[] }, b""),
        sample("setup_end", 3, end, b""),
        sample(
            "ready",
            1,
            Ready {
                lanes: 4,
                prepare_us: 12_345,
            },
            b"",
        ),
    ]
}

/// A PAGES frame whose pages are filled with one octet each.
fn pages(
    name: &'static str,
    sequence: u64,
    round: u32,
    wanted: &[(u32, u64, u32)],
    fill: &[u8],
) -> Sample {
    let contents: Vec<[u8; PAGE_BYTES]> = fill.iter().map(|octet| [*octet; PAGE_BYTES]).collect();
    let checksums: Vec<U32> = contents
        .iter()
        .map(|page| crc32fast::hash(page).into())
        .collect();
    let (round, runs) = (Round::new(round), runs(wanted));
    let frame = Pages {
        round,
        runs: &runs,
        checksums: &checksums,
    };
    sample(name, sequence, frame, contents.as_flattened())
}

fn memory() -> Vec<Sample> {
    let zeros = runs(&[(0, 0, 3), (1, 100, 412)]);
    let end = RoundEnd {
        round: Round::new(0),
        final_round: false,
        pages: 253,
        zero_pages: 515,
    };
    let last = RoundEnd {
        round: Round::new(crate::limits::ROUND_MAX),
        final_round: true,
        pages: 0,
        zero_pages: 0,
    };
    vec![
        pages("pages", 0, 0, &[(0, 3, 1)], &[0xa5]),
        pages(
            "pages-runs",
            9,
            7,
            &[(0, 1, 1), (1, 16, 2)],
            &[0x11, 0x22, 0x33],
        ),
        sample(
            "zeros",
            1,
            Zeros {
                round: Round::new(0),
                runs: &zeros,
            },
            b"",
        ),
        sample("round_end", 2, end, b""),
        sample("round_end-final", 1 << 40, last, b""),
    ]
}

fn devices() -> Vec<Sample> {
    let chunk = |device, section, index, offset| DeviceChunk {
        device: DeviceId::new(device),
        section,
        index,
        offset,
    };
    let mark = |device, mark, generation, index, offset| {
        let (device, generation) = (DeviceId::new(device), Generation::new(generation));
        DeviceMark {
            device,
            mark,
            generation,
            index,
            offset,
        }
    };
    let data: Vec<u8> = (0..16).collect();
    let last = chunk(255, Section::Config, 41, (1 << 48) - 1);
    vec![
        sample("device_chunk", 3, chunk(1, Section::Data, 0, 0), &data),
        sample("device_chunk-config", 3, last, b"\x7f"),
        sample(
            "device_mark-initial",
            4,
            mark(1, Mark::InitialEnd, 1, 1, 16),
            b"",
        ),
        sample(
            "device_mark-data",
            4,
            mark(0, Mark::DataEnd, 2, 9, 4096),
            b"",
        ),
        sample(
            "device_mark-config",
            4,
            mark(0, Mark::ConfigEnd, 0, 10, 4097),
            b"",
        ),
        sample(
            "device_mark-restart",
            4,
            mark(0, Mark::Restart, 0, 11, 1 << 48),
            b"",
        ),
    ]
}

/// How far a lane is.
const fn lane(lane: u32, incarnation: u32, frames: u64) -> LaneMark {
    LaneMark {
        lane: LaneId::new(lane),
        incarnation: Incarnation::new(incarnation),
        frames,
    }
}

fn control() -> Vec<Sample> {
    let acks = [lane(0, 0, 17).into(), lane(255, 2, 1 << 33).into()];
    let back = runs(&[(0, 3, 1), (1, 18, 1)]);
    let back = GiveBack {
        lane: LaneId::new(2),
        incarnation: Incarnation::new(1),
        sequence: Sequence::new(99),
        reason: GiveBackReason::Checksum,
        runs: &back,
    };
    let closed = RoundClosed {
        round: Round::new(0),
        pages: 253,
        zero_pages: 515,
        digest: Digest::new(0x0123_4567_89ab_cdef),
        elapsed_us: 2_500_000,
        damaged_pages: 2,
    };
    let credit = |device, offset_max| {
        Credit {
            device: DeviceId::new(device),
            offset_max,
        }
        .into()
    };
    let credits = [credit(0, 67_108_864), credit(1, 65_536)];
    let (device, generation) = (DeviceId::new(0), Generation::new(1));
    let ack = SwitchoverAck {
        device,
        generation,
        bytes: 1_048_576,
        load_us: 2200,
    };
    let device = DeviceId::new(1);
    let loaded = DeviceLoaded {
        device,
        bytes: 65_536,
        load_us: 800,
        config_us: 90,
    };
    let progress = Progress {
        landed_bytes: 1_036_288,
        zero_pages: 515,
        frames: 18,
        cpu_us: 6400,
        round: Round::new(1),
        lanes: 4,
    };
    let down = LaneDown {
        lane: LaneId::new(3),
        incarnation: Incarnation::new(1),
        reason: Reason::ChannelsLost,
    };
    vec![
        sample("ack", 5, Acks { lanes: &acks }, b""),
        sample("give_back", 6, back, b""),
        sample("round_closed", 7, closed, b""),
        sample("credit", 8, Credits { credits: &credits }, b""),
        sample("switchover_ack", 9, ack, b""),
        sample("device_loaded", 10, loaded, b""),
        sample("progress", 11, progress, b""),
        sample(
            "keep_alive",
            12,
            KeepAlive {
                stamp_us: 1_000_001,
                echo_us: 999_000,
                held_us: 250,
                asks: Asks::Nothing,
            },
            b"",
        ),
        sample(
            "keep_alive-asks",
            12,
            KeepAlive {
                stamp_us: 1,
                echo_us: 0,
                held_us: 0,
                asks: Asks::Answer,
            },
            b"",
        ),
        sample("lane_down", 13, down, b""),
    ]
}

fn ending() -> Vec<Sample> {
    let digest = Digest::new(0xfedc_ba98_7654_3210);
    let final_round = Round::new(6);
    let last = Final {
        final_round,
        states: 1,
        digest,
        memory_pages: 768,
        guest: GuestState::Running,
    };
    let paused = Final {
        guest: GuestState::Paused,
        ..last
    };
    let prepared = Prepared {
        digest,
        wait_us: 10,
        load_us: 20,
        verify_us: 30,
    };
    let running = Running {
        resume_us: 150,
        cpu_us: 7000,
        landed_bytes: 3_145_728,
    };
    let abort = Abort {
        reason: Reason::DeviceRefused,
        phase: Phase::Switchover,
        channel: ChannelRef::Lane(LaneId::new(3)),
        text: "net0: state refused – näher?",
    };
    let bare = Abort {
        reason: Reason::Cancelled,
        phase: Phase::Rounds,
        channel: ChannelRef::None,
        text: "",
    };
    let lanes = [lane(0, 0, 120).into(), lane(1, 2, 77).into()];
    vec![
        sample("switchover", 14, Switchover { final_round }, b""),
        sample(
            "vm_state",
            15,
            VmState {
                blob: part(3, 1, 0, 0, 8),
            },
            b"cpu-zero",
        ),
        sample("final", 16, last, b""),
        sample("final-paused", 16, paused, b""),
        sample("prepared", 17, prepared, b""),
        sample("commit", 18, Commit { digest }, b""),
        sample("running", 19, running, b""),
        sample("abort", 20, abort, b""),
        sample("abort-bare", 20, bare, b""),
        sample(
            "landed",
            2,
            Landed {
                rounds_closed: 3,
                lanes: &lanes,
            },
            b"",
        ),
        sample(
            "landed-nothing",
            2,
            Landed {
                rounds_closed: 0,
                lanes: &[],
            },
            b"",
        ),
        sample(
            "outcome",
            0,
            Outcome {
                state: OutcomeState::Running,
            },
            b"",
        ),
    ]
}

fn carried() -> Vec<Sample> {
    let stream = StreamId::new;
    let credit = |number, received, offset_max| {
        StreamCredit {
            stream: stream(number),
            received,
            offset_max,
        }
        .into()
    };
    let credits = [credit(0, 68, 65_604), credit(1023, 1 << 40, (1 << 40) + 1)];
    let data = |number, offset| StreamData {
        stream: stream(number),
        offset,
    };
    let end = |number, how, offset| StreamEnd {
        stream: stream(number),
        how,
        offset,
    };
    vec![
        sample("stream_open", 1, StreamOpen { stream: stream(9) }, b""),
        sample("stream_data", 2, data(0, 0), b"QEVM\0\0\0\x03"),
        sample("stream_data-last", 3, data(1023, (1 << 56) - 1), b"\x7f"),
        sample("stream_credit", 4, StreamCredits { credits: &credits }, b""),
        sample("stream_end", 5, end(0, StreamEndKind::Clean, 1 << 56), b""),
        sample("stream_end-reset", 6, end(7, StreamEndKind::Reset, 0), b""),
        sample(
            "stream_outcome",
            7,
            StreamOutcome {
                state: OutcomeState::Running,
            },
            b"",
        ),
    ]
}
