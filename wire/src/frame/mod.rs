//! Frames: one small file per kind, each with its octets, its checked type and what makes it malformed.
//!
//! ```text
//!   head = header (32) + table (header.table_bytes)          body (header.body_bytes), if the kind has one
//! ```
//!
//! A frame of fixed size is an owned plain struct. A list borrows the table's octets as raw entries, so decoding
//! allocates and copies nothing; the same borrowed slice is what encoding takes.
//! The rule: [`Frame::encode`] makes nothing that [`Frame::decode`] would refuse, because it asks it.

mod abort;
mod ack;
mod blob;
mod commit;
mod config;
mod credit;
mod device_chunk;
mod device_loaded;
mod device_mark;
mod devices;
mod final_;
mod give_back;
mod grant;
mod keep_alive;
mod landed;
mod lane_down;
mod lane_mark;
mod outcome;
mod pages;
mod prepared;
mod progress;
mod ready;
mod regions;
mod round_closed;
mod round_end;
mod run;
mod running;
mod setup_end;
mod stream_credit;
mod stream_data;
mod stream_end;
mod stream_open;
mod stream_outcome;
mod switchover;
mod switchover_ack;
mod table;
mod vm_state;
mod zeros;

pub use abort::Abort;
pub use ack::Acks;
pub use blob::{BlobPart, blob_parts};
pub use commit::Commit;
pub use config::Config;
pub use credit::{Credit, Credits, RawCredit};
pub use device_chunk::{DeviceChunk, Section};
pub use device_loaded::DeviceLoaded;
pub use device_mark::{DeviceMark, Mark};
pub use devices::{Device, DeviceFlags, Devices, RawDevice};
pub use final_::{Final, GuestState};
pub use give_back::{GiveBack, GiveBackReason};
pub use grant::Grant;
pub use keep_alive::{Asks, KeepAlive};
pub use landed::Landed;
pub use lane_down::LaneDown;
pub use lane_mark::{LaneMark, RawLaneMark};
pub use outcome::{Outcome, OutcomeState};
pub use pages::Pages;
pub use prepared::Prepared;
pub use progress::Progress;
pub use ready::Ready;
pub use regions::{RawRegion, Regions};
pub use round_closed::RoundClosed;
pub use round_end::RoundEnd;
pub use run::RawRun;
pub use running::Running;
pub use setup_end::SetupEnd;
pub use stream_credit::{RawStreamCredit, StreamCredit, StreamCredits};
pub use stream_data::StreamData;
pub use stream_end::{StreamEnd, StreamEndKind};
pub use stream_open::StreamOpen;
pub use stream_outcome::StreamOutcome;
pub use switchover::Switchover;
pub use switchover_ack::SwitchoverAck;
pub use vm_state::VmState;
pub use zeros::Zeros;

use crate::PAGE_BYTES;
use crate::code::Phase;
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::{HEADER_BYTES, Header};
use crate::id::Sequence;
use crate::kind::{
    BodyShape, ChannelKind, OPTIONAL, PAGES_SHAPE, Senders, Shape, UNKNOWN_SHAPE, fixed, kinds,
    list, with_body,
};
use crate::limits::{
    DEVICES_MAX, LANES_MAX, REGIONS_MAX, RUNS_PER_GIVE_BACK_MAX, RUNS_PER_ZEROS_MAX,
    STREAM_CREDITS_MAX, TEXT_BYTES_MAX,
};
use table::Table;

/// What follows a head, as the encoder has to know it. The body's octets themselves are sent by the caller.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// No body.
    None,
    /// These octets; their checksum is computed here (not for PAGES, whose checksums are in the table).
    Octets(&'a [u8]),
    /// So many octets with this CRC-32, computed by the caller; for PAGES the `crc` is 0.
    Sum {
        /// The body's size.
        bytes: u32,
        /// The body's CRC-32.
        crc: u32,
    },
    /// The pages that a PAGES frame names.
    Pages,
}

kinds! {
    Grant         = 0x0001, "GRANT",          Destination, Control, [Setup], fixed(64);
    Config        = 0x0002, "CONFIG",         Source,      Control, [Setup], with_body(fixed(32), 0);
    Regions       = 0x0003, "REGIONS",        Source,      Control, [Setup], list(8, 32, 1, REGIONS_MAX);
    Devices       = 0x0004, "DEVICES",        Source,      Control, [Setup], list(8, 112, 0, DEVICES_MAX);
    SetupEnd      = 0x0005, "SETUP_END",      Source,      Control, [Setup], fixed(32);
    Ready         = 0x0006, "READY",          Destination, Control, [Setup], fixed(16);
    Pages         = 0x0010, "PAGES",          Source,      Data,    [Rounds, Switchover], PAGES_SHAPE;
    Zeros         = 0x0011, "ZEROS",          Source,      Data,    [Rounds, Switchover], list(16, 16, 1, RUNS_PER_ZEROS_MAX);
    RoundEnd      = 0x0012, "ROUND_END",      Source,      Data,    [Rounds, Switchover], fixed(32);
    DeviceChunk   = 0x0013, "DEVICE_CHUNK",   Source,      Data,    [Rounds, Switchover], with_body(fixed(32), 1);
    DeviceMark    = 0x0014, "DEVICE_MARK",    Source,      Data,    [Rounds, Switchover], fixed(32);
    Ack           = 0x0020, "ACK",            Destination, Control, [Rounds, Switchover], list(8, 16, 1, LANES_MAX);
    GiveBack      = 0x0021, "GIVE_BACK",      Destination, Control, [Setup, Rounds, Switchover], list(24, 16, 1, RUNS_PER_GIVE_BACK_MAX);
    RoundClosed   = 0x0022, "ROUND_CLOSED",   Destination, Control, [Rounds, Switchover], fixed(48);
    Credit        = 0x0023, "CREDIT",         Destination, Control, [Rounds, Switchover], list(8, 16, 1, DEVICES_MAX);
    SwitchoverAck = 0x0024, "SWITCHOVER_ACK", Destination, Control, [Rounds, Switchover], fixed(24);
    DeviceLoaded  = 0x0025, "DEVICE_LOADED",  Destination, Control, [Rounds, Switchover], fixed(32);
    KeepAlive     = 0x0027, "KEEP_ALIVE",     Both,        Control, [Setup, Rounds, Switchover, Commit, Carrying], fixed(32);
    LaneDown      = 0x0028, "LANE_DOWN",      Both,        Control, [Setup, Rounds, Switchover, Commit], fixed(16);
    Switchover    = 0x0030, "SWITCHOVER",     Source,      Control, [Rounds, Switchover, Commit], fixed(16);
    VmState       = 0x0031, "VM_STATE",       Source,      Control, [Switchover], with_body(fixed(32), 0);
    Final         = 0x0032, "FINAL",          Source,      Control, [Switchover, Commit], fixed(40);
    Prepared      = 0x0033, "PREPARED",       Destination, Control, [Switchover], fixed(40);
    Commit        = 0x0034, "COMMIT",         Source,      Control, [Commit], fixed(8);
    Running       = 0x0035, "RUNNING",        Destination, Control, [Commit], fixed(32);
    Abort         = 0x0036, "ABORT",          Both,        Control, [Setup, Rounds, Switchover, Commit, Carrying], list(16, 1, 0, TEXT_BYTES_MAX);
    Landed        = 0x0040, "LANDED",         Destination, Control, [Setup], list(16, 16, 0, LANES_MAX);
    Outcome       = 0x0042, "OUTCOME",        Destination, Control, [Setup], fixed(16);
    StreamOpen    = 0x0050, "STREAM_OPEN",    Source,      Control, [Carrying], fixed(16);
    StreamData    = 0x0051, "STREAM_DATA",    Both,        Data,    [Carrying], with_body(fixed(16), 1);
    StreamCredit  = 0x0052, "STREAM_CREDIT",  Both,        Control, [Carrying], list(8, 24, 1, STREAM_CREDITS_MAX);
    StreamEnd     = 0x0053, "STREAM_END",     Both,        Control, [Carrying], fixed(16);
    StreamOutcome = 0x0054, "STREAM_OUTCOME", Both,        Control, [Carrying], fixed(16);
    Progress      = 0x8026, "PROGRESS",       Destination, Control, [Rounds, Switchover, Commit], fixed(48);
}

/// Defines [`Frame`] and its dispatch from one list of kinds.
macro_rules! frames {
    ($($kind:ident($frame:ty);)*) => {
        /// A checked frame of any kind; lists borrow the table that they were decoded from.
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub enum Frame<'a> {
            $(#[doc = concat!("See [`", stringify!($kind), "`](Kind::", stringify!($kind), ").")] $kind($frame),)*
            /// A frame of a kind that this version does not know and may skip, with the kind's code.
            Skipped(u16),
        }

        impl<'a> Frame<'a> {
            /// The frame's kind.
            #[must_use]
            pub const fn kind(&self) -> Kind {
                match self {
                    $(Self::$kind(_) => Kind::$kind,)*
                    Self::Skipped(code) => Kind::OptionalUnknown(*code),
                }
            }

            /// Reads a table of the right length and checksum.
            fn read(header: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
                match header.kind() {
                    $(Kind::$kind => Table::read(header, table).map(Self::$kind),)*
                    Kind::OptionalUnknown(code) => Ok(Self::Skipped(code)),
                }
            }

            /// How long the table is.
            fn table_bytes(&self) -> usize {
                match self {
                    $(Self::$kind(frame) => Table::bytes(frame),)*
                    Self::Skipped(_) => 0,
                }
            }

            /// Appends the table.
            fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
                match self {
                    $(Self::$kind(frame) => frame.write(out),)*
                    Self::Skipped(_) => Err(Misuse::Skipped),
                }
            }
        }

        $(impl<'a> From<$frame> for Frame<'a> {
            fn from(frame: $frame) -> Self {
                Self::$kind(frame)
            }
        })*
    };
}

frames! {
    Grant(Grant);
    Config(Config);
    Regions(Regions<'a>);
    Devices(Devices<'a>);
    SetupEnd(SetupEnd);
    Ready(Ready);
    Pages(Pages<'a>);
    Zeros(Zeros<'a>);
    RoundEnd(RoundEnd);
    DeviceChunk(DeviceChunk);
    DeviceMark(DeviceMark);
    Ack(Acks<'a>);
    GiveBack(GiveBack<'a>);
    RoundClosed(RoundClosed);
    Credit(Credits<'a>);
    SwitchoverAck(SwitchoverAck);
    DeviceLoaded(DeviceLoaded);
    KeepAlive(KeepAlive);
    LaneDown(LaneDown);
    Switchover(Switchover);
    VmState(VmState);
    Final(Final);
    Prepared(Prepared);
    Commit(Commit);
    Running(Running);
    Abort(Abort<'a>);
    Landed(Landed<'a>);
    Outcome(Outcome);
    StreamOpen(StreamOpen);
    StreamData(StreamData);
    StreamCredit(StreamCredits<'a>);
    StreamEnd(StreamEnd);
    StreamOutcome(StreamOutcome);
    Progress(Progress);
}

impl<'a> Frame<'a> {
    /// Checks a table against its header: length and checksum, then everything inside it.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong; nothing of the frame may be used.
    // SPEC: HEAD-6
    pub fn decode(header: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        header.check_table(table)?;
        Self::read(header, table)
    }

    /// How many bytes [`encode`](Self::encode) appends: the header and the table.
    #[must_use]
    pub fn head_bytes(&self) -> usize {
        HEADER_BYTES.saturating_add(self.table_bytes())
    }

    /// Appends the head (header and table) of this frame to `out`; the body is sent after it by the caller.
    ///
    /// Allocates nothing when `out` has room. On an error `out` is as it was.
    ///
    /// # Errors
    /// [`Misuse`] when the peer would refuse the frame, or when `body` is not of this kind.
    pub fn encode(
        &self,
        sequence: Sequence,
        body: Body<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Misuse> {
        let start = out.len();
        let done = self.append(sequence, body, out);
        if done.is_err() {
            out.truncate(start);
        }
        done
    }

    /// Appends a place for the header, then the table, then asks the decoder, then fills the place.
    fn append(&self, sequence: Sequence, body: Body<'_>, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let kind = self.kind();
        let (body_bytes, body_crc) = self.measure(body)?;
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        self.write(out)?;
        let (place, table) = out
            .get_mut(start..)
            .and_then(|head| head.split_first_chunk_mut::<HEADER_BYTES>())
            .ok_or(Misuse::Body { kind })?;
        let header = Header::new(kind, sequence, table, body_bytes, body_crc)?;
        Frame::read(&header, table)?;
        *place = header.encode();
        Ok(())
    }

    /// The size and checksum that the header says of this body.
    // SPEC: HEAD-7, PAGES-5
    fn measure(&self, body: Body<'_>) -> Result<(u32, u32), Misuse> {
        let kind = self.kind();
        let summed = kind.shape().body != BodyShape::Pages;
        match (body, self) {
            (Body::None, _) => Ok((0, 0)),
            (Body::Octets(octets), _) => {
                let crc = if summed { crc32fast::hash(octets) } else { 0 };
                Ok((codec::narrow(octets.len()), crc))
            }
            (Body::Sum { bytes, crc }, _) => Ok((bytes, crc)),
            (Body::Pages, Self::Pages(pages)) => Ok((
                codec::narrow(pages.checksums.len().saturating_mul(PAGE_BYTES)),
                0,
            )),
            (Body::Pages, _) => Err(Misuse::Body { kind }),
        }
    }
}
