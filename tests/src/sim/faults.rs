//! What can go wrong in a simulated migration: one table of faults with their rates, and when each of them happens.
//!
//! A plan is drawn from the seed: one fault at least, each with a trigger (a frame of a kind, the n-th frame of a channel, a
//! time) and a moment (before the frame, inside it, after it, or some time later). If none of them happened by the time of the
//! COMMIT, one happens there. So there is no migration without a fault.

use std::collections::BTreeSet;

use multifd_wire::{ChannelRef, HEADER_BYTES, HELLO_REPLY_BYTES, Kind};

use super::network::Link;
use crate::model::Random;

/// One of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Where the guest runs at first.
    Source,
    /// Where it is to go.
    Destination,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A data channel is reset.
    LaneReset,
    /// Nothing arrives on a data channel any more, and nobody is told.
    LaneSilent,
    /// A data channel ends in the middle of a frame, or between two.
    LaneTruncated,
    /// As for a data channel.
    ControlReset,
    /// As for a data channel.
    ControlSilent,
    /// As for a data channel.
    ControlTruncated,
    /// Every channel is reset.
    AllReset,
    /// Nothing arrives on any channel any more.
    AllSilent,
    /// A channel is held up for a while.
    Stall,
    /// Every channel is held up for a while.
    AllStall,
    /// A data channel gets slow.
    SlowLane,
    /// What is sent on a data channel arrives later from now on: channels overtake each other.
    LateLane,
    /// The guest writes pages while they are read.
    TornPages,
    /// A bit of a page is flipped.
    FlipPage,
    /// A bit of a device's chunk is flipped.
    FlipChunk,
    /// A bit of a head on a data channel is flipped.
    FlipLaneHead,
    /// A bit of what the source says on the control channel is flipped.
    FlipForth,
    /// A bit of what the destination says on the control channel is flipped.
    FlipBack,
    /// A bit of a hello or of the answer to it is flipped.
    FlipHello,
    /// The source's program dies.
    CrashSource,
    /// The destination's program dies.
    CrashDestination,
    /// The destination's program dies, and another one is started in its place.
    RestartDestination,
    /// Somebody else dials the destination: says nothing, or talks nonsense, or shows tickets and secrets that he made up.
    Stranger,
    /// The source's user stops it.
    CancelSource,
    /// The destination's user stops it.
    CancelDestination,
    /// A VMM says no.
    VmmRefuses,
    /// A device fails, or gives a byte that is not its own.
    DeviceFails,
    /// A frame of the source is changed, and its checksums are right.
    ForgeForth,
    /// A frame of the destination is changed, and its checksums are right.
    ForgeBack,
    /// From some time on no connection of one lane can be made, for a while or for good. Drawn apart from the others, for one
    /// of [`WAYS_CLOSED_IN`] migrations; it happens when the lane is dialled again.
    WayClosed,
    /// A program stands still for a while, with all its threads. Drawn apart from the others (`troubles.rs`), as is the next.
    Stopped,
    /// The VMM's thread at the destination never comes back.
    ThreadHangs,
}

/// In one of so many migrations with more than one lane, [`Fault::WayClosed`] is drawn.
pub const WAYS_CLOSED_IN: u64 = 4;

/// The one table: each fault with its weight among all.
pub const RATES: &[(Fault, u32)] = &[
    (Fault::LaneReset, 10),
    (Fault::LaneSilent, 5),
    (Fault::LaneTruncated, 6),
    (Fault::ControlReset, 8),
    (Fault::ControlSilent, 4),
    (Fault::ControlTruncated, 6),
    (Fault::AllReset, 5),
    (Fault::AllSilent, 3),
    (Fault::Stall, 6),
    (Fault::AllStall, 4),
    (Fault::SlowLane, 4),
    (Fault::LateLane, 6),
    (Fault::TornPages, 8),
    (Fault::FlipPage, 10),
    (Fault::FlipChunk, 4),
    (Fault::FlipLaneHead, 4),
    (Fault::FlipForth, 4),
    (Fault::FlipBack, 4),
    (Fault::FlipHello, 1),
    (Fault::CrashSource, 5),
    (Fault::CrashDestination, 6),
    (Fault::RestartDestination, 5),
    (Fault::Stranger, 5),
    (Fault::CancelSource, 5),
    (Fault::CancelDestination, 3),
    (Fault::VmmRefuses, 3),
    (Fault::DeviceFails, 6),
    (Fault::ForgeForth, 5),
    (Fault::ForgeBack, 5),
];

/// Of 100 plans so many have a further fault; of these again, and so on up to [`FAULTS_MAX`].
const FURTHER_PERCENT: u64 = 35;

/// The most faults of a plan.
const FAULTS_MAX: usize = 6;

/// Which channels a trigger looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Control,
    Lanes,
}

/// When a fault happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// At the n-th frame that is like this.
    Frame {
        from: Side,
        on: On,
        kind: Option<Kind>,
        hello: bool,
        left: u32,
    },
    /// At this time after the start, in ns.
    Time(u64),
    /// Not by itself.
    Never,
}

/// Where, seen from the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    After,
}

/// A fault of a plan.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) fault: Fault,
    when: When,
    moment: Moment,
    /// So long after its moment, in ns.
    pub(super) delay_ns: u64,
    pub(super) happened: bool,
}

/// A frame that a side hands to a channel.
#[derive(Debug, Clone, Copy)]
pub struct FrameSeen {
    /// Who sends.
    pub from: Side,
    /// On which channel.
    pub channel: ChannelRef,
    /// Its number on the channel in this direction; 0 is the hello, or the answer to it.
    pub number: u64,
    /// Its kind; none for a hello.
    pub kind: Option<Kind>,
    /// What an OUTCOME says (SPEC: ASK-2).
    pub outcome: Option<u32>,
    /// Device and index of a chunk.
    pub item: Option<(u32, u64)>,
    /// Bytes of header and table.
    pub head: u64,
    /// Bytes in all.
    pub bytes: u64,
}

/// A part of what is sent, with a checksum of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What a channel begins with.
    Hello,
    /// The answer to it.
    Reply,
    /// A frame's header.
    Header,
    /// A frame's table.
    Table,
    /// A frame's body; of PAGES, a page of it.
    Body,
}

impl FrameSeen {
    pub(super) fn new(
        from: Side,
        channel: ChannelRef,
        number: u64,
        head: &[u8],
        bytes: u64,
    ) -> Self {
        let code = head
            .first_chunk::<2>()
            .map(|code| u16::from_le_bytes(*code));
        let kind = code
            .filter(|_| number > 0)
            .and_then(|code| Kind::from_code(code).ok());
        // The answer to a hello that asks is followed by OUTCOME at once.
        let frame = if number == 0 {
            head.get(HELLO_REPLY_BYTES..).unwrap_or_default()
        } else {
            head
        };
        let is_outcome = frame.first_chunk::<2>() == Some(&Kind::Outcome.code().to_le_bytes());
        let state = frame
            .get(HEADER_BYTES..)
            .and_then(|table| table.first_chunk::<4>());
        let table = head.get(HEADER_BYTES..).unwrap_or_default();
        let item = table
            .first_chunk::<4>()
            .zip(table.get(8..).and_then(|rest| rest.first_chunk::<8>()))
            .filter(|_| kind == Some(Kind::DeviceChunk))
            .map(|(device, index)| (u32::from_le_bytes(*device), u64::from_le_bytes(*index)));
        Self {
            from,
            channel,
            number,
            kind,
            item,
            outcome: state
                .filter(|_| is_outcome)
                .map(|state| u32::from_le_bytes(*state)),
            head: head.len() as u64,
            bytes,
        }
    }

    /// What the byte belongs to, and the last byte that has to be read before a change of it can be found out.
    pub(super) fn part(&self, octet: u64) -> (Part, u64) {
        let (reply, header) = (HELLO_REPLY_BYTES as u64, HEADER_BYTES as u64);
        if self.number > 0 {
            return if octet < header {
                (Part::Header, header - 1)
            } else if octet < self.head {
                (Part::Table, self.head - 1)
            } else {
                (Part::Body, self.bytes - 1)
            };
        }
        match self.from {
            Side::Source => (Part::Hello, self.bytes - 1),
            Side::Destination if octet < reply => (Part::Reply, reply - 1),
            // OUTCOME follows the answer to who asks.
            Side::Destination if octet < reply + header => (Part::Header, reply + header - 1),
            Side::Destination => (Part::Table, self.bytes - 1),
        }
    }

    fn on(&self) -> On {
        match self.channel {
            ChannelRef::Lane(_) => On::Lanes,
            _ => On::Control,
        }
    }
}

/// A changed frame whose checksums are right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forgery {
    /// A byte of the table has another value.
    Table { at: u64, value: u8 },
    /// The frame is of another kind.
    Kind(Kind),
    /// The sequence is another one.
    Sequence(u64),
    /// It comes twice.
    Twice,
    /// It does not come.
    Never,
}

/// What becomes of a frame on its way.
#[derive(Debug, Clone, Default)]
pub struct FrameFate {
    /// Bits that are flipped, counted from the first byte of the frame.
    pub(super) flips: Vec<u64>,
    /// Bytes of the frame with which a flipped bit can be found out, and the bit's number.
    pub(super) marks: Vec<(u64, usize)>,
    /// The connection breaks when so many bytes of it are on the way.
    pub(super) cut_at: Option<u64>,
    /// With a reset; otherwise with an orderly end.
    pub(super) reset: bool,
    pub(super) forgery: Option<Forgery>,
    /// The guest writes the pages while they are read.
    pub(super) torn: bool,
    /// It is the source's COMMIT.
    pub(super) commits: bool,
}

impl FrameFate {
    /// Flips the bits that lie in this piece of the frame.
    pub(super) fn damage(&self, begin: u64, octets: &mut [u8]) {
        for bit in &self.flips {
            let at = (bit / 8)
                .checked_sub(begin)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(octet) = at.and_then(|at| octets.get_mut(at)) {
                *octet ^= 1 << (bit % 8);
            }
        }
    }

    /// The marks among `count` bytes of the frame from `begin` on, by their place among these.
    pub(super) fn marks_in(&self, begin: u64, count: usize) -> Vec<(usize, usize)> {
        self.marks
            .iter()
            .filter_map(|(octet, flip)| {
                let place = usize::try_from(octet.checked_sub(begin)?).ok()?;
                (place < count).then_some((place, *flip))
            })
            .collect()
    }

    /// Breaks the connection.
    pub(super) fn cut(&self, link: &Link, end: impl FnOnce()) {
        if self.reset {
            link.reset();
        } else {
            end();
        }
    }

    /// The head, or what was made of it.
    pub(super) fn heads(&self, head: &[u8]) -> Vec<Head> {
        let mut head = head.to_vec();
        match self.forgery {
            None => {}
            Some(Forgery::Never) => return Vec::new(),
            Some(Forgery::Twice) => return vec![Head(head.clone()), Head(head)],
            Some(Forgery::Kind(kind)) => head[..2].copy_from_slice(&kind.code().to_le_bytes()),
            Some(Forgery::Sequence(sequence)) => {
                head[8..16].copy_from_slice(&sequence.to_le_bytes());
            }
            Some(Forgery::Table { at, value }) => {
                if let Some(octet) = usize::try_from(at).ok().and_then(|at| head.get_mut(at)) {
                    *octet = value;
                }
            }
        }
        if self.forgery.is_some() {
            reseal(&mut head);
        }
        vec![Head(head)]
    }
}

/// Bytes that go out as a head.
pub(super) struct Head(Vec<u8>);

impl Head {
    pub(super) fn into_octets(self) -> Vec<u8> {
        self.0
    }
}

/// Puts the checksums of a head right (SPEC: HEAD-2, HEAD-6).
fn reseal(head: &mut [u8]) {
    if head.len() < HEADER_BYTES {
        return;
    }
    let (header, table) = head.split_at_mut(HEADER_BYTES);
    header[20..24].copy_from_slice(&crc32fast::hash(table).to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// What is to go wrong in one migration.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    pub(super) faults: Vec<Planned>,
    /// Bits of pages that are still to be flipped, beside the faults.
    storm: u64,
}

/// Control frames that a trigger may name.
const FORTH: &[Kind] = &[
    Kind::Config,
    Kind::Regions,
    Kind::Devices,
    Kind::SetupEnd,
    Kind::Switchover,
    Kind::VmState,
    Kind::Final,
    Kind::Commit,
    Kind::Commit,
    Kind::LaneDown,
];

/// As [`FORTH`], from the destination.
const BACK: &[Kind] = &[
    Kind::Grant,
    Kind::Ready,
    Kind::Ack,
    Kind::RoundClosed,
    Kind::RoundClosed,
    Kind::Prepared,
    Kind::Prepared,
    Kind::Running,
    Kind::Running,
    Kind::GiveBack,
    Kind::LaneDown,
    Kind::Landed,
    Kind::Credit,
    Kind::SwitchoverAck,
    Kind::DeviceLoaded,
    Kind::DeviceLoaded,
];

impl Plan {
    /// A plan of the table's faults.
    #[must_use]
    pub fn draw(random: &mut Random) -> Self {
        let mut plan = Self::default();
        loop {
            plan.faults.push(Planned::draw(draw_fault(random), random));
            if plan.faults.len() == FAULTS_MAX || random.below(100) >= FURTHER_PERCENT {
                return plan;
            }
        }
    }

    /// Only flips: many in pages, some elsewhere on data channels, and in half of all plans one that ends the migration, or may.
    #[must_use]
    pub fn flips(random: &mut Random) -> Self {
        let mut plan = Self {
            storm: [20, 80, 200][random.below(3) as usize],
            ..Self::default()
        };
        for fault in [Fault::FlipLaneHead, Fault::FlipChunk] {
            for _ in 0..random.below(3) {
                plan.faults.push(Planned::draw(fault, random));
            }
        }
        let last = [Fault::FlipForth, Fault::FlipBack, Fault::FlipHello];
        if let Some(fault) = last.get(random.below(6) as usize) {
            plan.faults.push(Planned::draw(*fault, random));
        }
        plan
    }

    /// Bits of a body of pages that are flipped, if any.
    pub(super) fn storm_over(&mut self, seen: &FrameSeen, random: &mut Random) -> Vec<u64> {
        let is_pages = seen.kind == Some(Kind::Pages) && seen.bytes > seen.head;
        if self.storm == 0 || !is_pages || random.below(2) == 0 {
            return Vec::new();
        }
        let count = (1 + random.below(8)).min(self.storm);
        self.storm -= count;
        let (from, bits) = (seen.head * 8, (seen.bytes - seen.head) * 8);
        let flips: BTreeSet<u64> = (0..count).map(|_| from + random.below(bits)).collect();
        flips.into_iter().collect()
    }

    /// No fault at all.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Times at which something happens, whatever is sent.
    pub(super) fn times(&self) -> Vec<(u64, usize)> {
        let mut times: Vec<(u64, usize)> = self
            .faults
            .iter()
            .enumerate()
            .filter_map(|(index, planned)| match planned.when {
                When::Time(at) => Some((at, index)),
                When::Frame { .. } | When::Never => None,
            })
            .collect();
        times.sort_unstable();
        times
    }

    /// The faults whose trigger this frame is.
    pub(super) fn triggered(&mut self, seen: &FrameSeen, moment: Moment) -> Vec<usize> {
        let mut hit = Vec::new();
        for (index, planned) in self.faults.iter_mut().enumerate() {
            if !planned.happened && planned.moment == moment && planned.fits(seen) {
                planned.happened = true;
                hit.push(index);
            }
        }
        hit
    }
}

fn draw_fault(random: &mut Random) -> Fault {
    let total: u32 = RATES.iter().map(|(_, weight)| weight).sum();
    let mut at = random.below(total.into());
    for (fault, weight) in RATES {
        match at.checked_sub(u64::from(*weight)) {
            Some(left) => at = left,
            None => return *fault,
        }
    }
    Fault::ControlReset
}

/// Mostly small, sometimes large.
fn skewed(random: &mut Random, below: u64) -> u64 {
    let most = random.below(below) + 1;
    random.below(most)
}

impl Planned {
    pub(super) fn draw(fault: Fault, random: &mut Random) -> Self {
        let frame = |from, on, kind, hello, left| When::Frame {
            from,
            on,
            kind,
            hello,
            left,
        };
        let side = |random: &mut Random| {
            if random.below(2) == 0 {
                Side::Source
            } else {
                Side::Destination
            }
        };
        let some_control = |random: &mut Random, from: Side| {
            let kinds = if from == Side::Source { FORTH } else { BACK };
            let kind = kinds[random.below(kinds.len() as u64) as usize];
            let left = if random.below(4) == 0 {
                skewed(random, 4) as u32
            } else {
                0
            };
            frame(from, On::Control, Some(kind), false, left)
        };
        let mut moment = if random.below(2) == 0 {
            Moment::Before
        } else {
            Moment::After
        };
        let when = match fault {
            Fault::LaneReset
            | Fault::LaneSilent
            | Fault::LaneTruncated
            | Fault::SlowLane
            | Fault::LateLane => frame(
                Side::Source,
                On::Lanes,
                match random.below(8) {
                    0 | 1 => Some(Kind::RoundEnd),
                    2 => Some(Kind::DeviceChunk),
                    3 => Some(Kind::DeviceMark),
                    _ => None,
                },
                false,
                skewed(random, 24) as u32,
            ),
            Fault::TornPages | Fault::FlipPage => frame(
                Side::Source,
                On::Lanes,
                Some(Kind::Pages),
                false,
                skewed(random, 40) as u32,
            ),
            Fault::FlipChunk => frame(
                Side::Source,
                On::Lanes,
                Some(Kind::DeviceChunk),
                false,
                skewed(random, 16) as u32,
            ),
            // What it does is the device's own affair: drawn with it.
            Fault::DeviceFails => When::Never,
            Fault::FlipLaneHead => frame(
                Side::Source,
                On::Lanes,
                None,
                false,
                skewed(random, 40) as u32,
            ),
            // Of a kind that is named, or whatever comes.
            Fault::FlipForth | Fault::FlipBack => {
                let from = if fault == Fault::FlipForth {
                    Side::Source
                } else {
                    Side::Destination
                };
                if random.below(2) == 0 {
                    some_control(random, from)
                } else {
                    frame(from, On::Control, None, false, skewed(random, 24) as u32)
                }
            }
            Fault::FlipHello => {
                let on = if random.below(2) == 0 {
                    On::Control
                } else {
                    On::Lanes
                };
                frame(side(random), on, None, true, 0)
            }
            Fault::ForgeForth if random.below(2) == 0 => frame(
                Side::Source,
                On::Lanes,
                match random.below(6) {
                    0 => Some(Kind::DeviceChunk),
                    1 => Some(Kind::DeviceMark),
                    _ => None,
                },
                false,
                skewed(random, 40) as u32,
            ),
            Fault::ForgeForth => some_control(random, Side::Source),
            Fault::ForgeBack => some_control(random, Side::Destination),
            _ => match random.below(20) {
                0..12 => {
                    let from = side(random);
                    some_control(random, from)
                }
                12..16 => frame(
                    Side::Source,
                    On::Lanes,
                    None,
                    false,
                    skewed(random, 60) as u32,
                ),
                16 => frame(side(random), On::Lanes, None, true, 0),
                _ => {
                    let most = [1_000_000, 10_000_000, 100_000_000, 1_000_000_000]
                        [random.below(4) as usize];
                    When::Time(random.below(most))
                }
            },
        };
        if matches!(
            fault,
            Fault::TornPages
                | Fault::FlipPage
                | Fault::FlipChunk
                | Fault::FlipLaneHead
                | Fault::FlipForth
                | Fault::FlipBack
                | Fault::FlipHello
                | Fault::ForgeForth
                | Fault::ForgeBack
                | Fault::LaneTruncated
                | Fault::ControlTruncated
        ) {
            moment = Moment::Before;
        }
        let delay_ns = match random.below(4) {
            0 => random.below(3_000_000),
            1 => random.below(60_000_000),
            _ => 0,
        };
        Self {
            fault,
            when,
            moment,
            delay_ns: if moment == Moment::After { delay_ns } else { 0 },
            happened: false,
        }
    }

    fn fits(&mut self, seen: &FrameSeen) -> bool {
        let When::Frame {
            from,
            on,
            kind,
            hello,
            left,
        } = &mut self.when
        else {
            return false;
        };
        let fits = *from == seen.from
            && *on == seen.on()
            && *hello == (seen.number == 0)
            && (kind.is_none() || *kind == seen.kind)
            // A flip in a body needs one.
            && (!matches!(self.fault, Fault::FlipPage | Fault::FlipChunk) || seen.bytes > seen.head);
        if fits && *left > 0 {
            *left -= 1;
            return false;
        }
        fits
    }
}
