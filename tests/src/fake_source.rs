//! A source that is driven by hand: it can make a whole migration by the rules, and break any of them at any step.
//!
//! Its guest has two regions of [`REGION_PAGES`] pages. A page's content is one byte repeated; the test says which.

use std::time::{Duration, Instant};

use multifd_transport::Channel;
use multifd_wire::digest::page_value;
use multifd_wire::frame::{
    Asks, Commit, Config, Device, DeviceChunk, DeviceFlags, DeviceMark, Devices, Final, Grant,
    GuestState, KeepAlive, LaneMark, Mark, Pages, RawDevice, RawRegion, RawRun, Regions, RoundEnd,
    SetupEnd, Switchover, VmState, Zeros, blob_parts,
};
use multifd_wire::{
    Body, DeviceId, Digest, Features, Frame, Generation, Hello, HelloReply, Incarnation, Kind,
    LaneId, Layout, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageValues, Reason, Region, RegionId,
    Round, SessionId, Text, Token,
};
use zerocopy::byteorder::little_endian::U32;

use crate::bounded::GRACE;
use crate::model::BLOB_KIND;
use crate::peer::Peer;

/// Pages in each of the two regions.
pub const REGION_PAGES: u64 = 64;

/// Makes a new connection to the destination.
pub type Connect<'d> = &'d (dyn Fn() -> Box<dyn Channel> + 'd);

/// The hand-driven source.
pub struct FakeSource<'d> {
    connect: Connect<'d>,
    /// The session's name.
    pub session: SessionId,
    /// The control channel.
    pub control: Peer,
    /// What the destination granted.
    pub grant: Grant,
    /// The features that were agreed on.
    pub features: Features,
    /// The data channels that joined.
    pub lanes: Vec<FakeLane>,
    /// The guest's memory.
    pub layout: Layout,
    /// The devices of its table; none unless a test sets them before the tables are sent.
    pub devices: Vec<RawDevice>,
    values: PageValues,
    digest: Digest,
}

/// A data channel and what it carried of the present round.
pub struct FakeLane {
    /// The channel.
    pub peer: Peer,
    /// Pages with content in this round.
    pub pages: u64,
    /// Zero pages in this round.
    pub zero_pages: u64,
}

/// The guest's memory.
///
/// # Panics
/// Never: it is a valid layout.
#[must_use]
pub fn layout() -> Layout {
    let region = |id: u32| Region {
        id: RegionId::new(id),
        guest_address: u64::from(id) << 32,
        bytes: REGION_PAGES * PAGE_BYTES_U64,
    };
    Layout::new([region(0), region(1)]).expect("a valid layout")
}

/// A run of the wire.
#[must_use]
pub fn run(region: u32, first: u64, count: u32) -> RawRun {
    RawRun {
        region: region.into(),
        count: count.into(),
        first: first.into(),
    }
}

/// The name of the session that this test process makes next.
fn next_session() -> SessionId {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut octets = [0x5e; 16];
    octets[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    SessionId::new(octets)
}

impl<'d> FakeSource<'d> {
    /// Says hello, is accepted, and hears the grant. Says from now on that it lives.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn open(connect: Connect<'d>) -> Self {
        Self::open_with(connect, Features::NONE)
    }

    /// The same, and insists on features.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn open_with(connect: Connect<'d>, features: Features) -> Self {
        let session = next_session();
        let hello = Hello::start(session, features, Features::NONE);
        let mut control = Peer::new(connect());
        let mut reply = control.greet(&hello);
        // As an honest source: somebody else may be about to leave.
        let until = Instant::now() + GRACE;
        while matches!(&reply, Ok(HelloReply::Refused { reason, .. }) if *reason == Reason::Busy)
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(1));
            control = Peer::new(connect());
            reply = control.greet(&hello);
        }
        assert!(
            matches!(reply, Ok(HelloReply::Accepted { .. })),
            "{reply:?}"
        );
        let heard = control.hear_kind(Kind::Grant);
        let Frame::Grant(grant) = heard.frame() else {
            unreachable!("that kind was waited for")
        };
        control.keep_alive();
        let layout = layout();
        Self {
            connect,
            session,
            control,
            grant,
            features,
            lanes: Vec::new(),
            devices: Vec::new(),
            values: PageValues::new(&layout).expect("memory for 128 values"),
            digest: Digest::EMPTY,
            layout,
        }
    }

    /// A source whose lanes are open and for whom round 0 may begin.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn in_rounds(connect: Connect<'d>, lanes: u32) -> Self {
        Self::in_rounds_with(connect, lanes, Features::NONE)
    }

    /// The same, and insists on features.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn in_rounds_with(connect: Connect<'d>, lanes: u32, features: Features) -> Self {
        let mut source = Self::open_with(connect, features);
        source.send_tables(lanes);
        for lane in 0..lanes {
            source.join(lane);
        }
        source.control.hear_kind(Kind::Ready);
        source
    }

    /// The same with devices of these names, which send chunks of at most `chunk_bytes_max` bytes.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn with_devices(
        connect: Connect<'d>,
        lanes: u32,
        names: &[&str],
        chunk_bytes_max: u64,
    ) -> Self {
        let mut source = Self::open_with(connect, Features::DEVICE_STATE);
        let device = |(id, name): (u32, &&str)| {
            RawDevice::from(Device {
                id: DeviceId::new(id),
                flags: DeviceFlags::PRE_COPY.union(DeviceFlags::P2P),
                initial_bytes: 1,
                state_bytes: 1,
                chunk_bytes_max,
                name: Text::clip(name),
            })
        };
        source.devices = (0..).zip(names).map(device).collect();
        source.send_tables(lanes);
        for lane in 0..lanes {
            source.join(lane);
        }
        source.control.hear_kind(Kind::Ready);
        source
    }

    /// A chunk of a device, on a lane.
    ///
    /// # Panics
    /// If there is no such lane, or the format has no such chunk.
    pub fn chunk(&self, lane: usize, chunk: DeviceChunk, octets: &[u8]) {
        let body = Body::Octets(octets);
        self.lanes[lane].peer.send_with(chunk, body, octets);
    }

    /// Waits until so many frames of a lane are acknowledged: what comes after that comes after them on the other side too.
    ///
    /// # Panics
    /// If they are not in time.
    pub fn taken(&mut self, lane: u32, frames: u64) {
        loop {
            let heard = self.control.hear_kind(Kind::Ack);
            let Frame::Ack(marks) = heard.frame() else {
                unreachable!("that kind was waited for")
            };
            let of_lane = |mark: &LaneMark| mark.lane == LaneId::new(lane) && mark.frames >= frames;
            if marks.iter().any(|mark| of_lane(&mark)) {
                return;
            }
        }
    }

    /// A mark of device 0, on lane 0.
    ///
    /// # Panics
    /// If the format has no such mark.
    pub fn mark(&self, mark: Mark, generation: u32, index: u64, offset: u64) {
        self.lanes[0].peer.send(DeviceMark {
            device: DeviceId::new(0),
            mark,
            generation: Generation::new(generation),
            index,
            offset,
        });
    }

    /// A source that has sent round 0 and begun round 1 with its guest paused.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn in_switchover(connect: Connect<'d>) -> Self {
        let mut source = Self::in_rounds(connect, 1);
        source.round_zero();
        source.switchover(1);
        source.settle();
        source
    }

    /// A source to whom the destination has said that it is prepared.
    ///
    /// # Panics
    /// If the destination does not do its part.
    #[must_use]
    pub fn prepared(connect: Connect<'d>) -> Self {
        let mut source = Self::in_switchover(connect);
        source.last_round(1);
        source.control.hear_kind(Kind::Prepared);
        source
    }

    /// The configuration that the model machine wants.
    pub fn send_config(&self) {
        self.send_blob(b"model machine", 1, |blob| Frame::Config(Config { blob }));
    }

    fn send_blob(
        &self,
        octets: &[u8],
        version: u32,
        frame: impl Fn(multifd_wire::frame::BlobPart) -> Frame<'static>,
    ) {
        for (part, body) in blob_parts(BLOB_KIND, version, 0, octets).expect("a small blob") {
            self.control
                .send_with(frame(part), Body::Octets(body), body);
        }
    }

    /// The region table.
    pub fn send_regions(&self) {
        let regions: Vec<RawRegion> = self.layout.regions().map(RawRegion::from).collect();
        self.control.send(Regions { regions: &regions });
    }

    /// The device table.
    pub fn send_devices(&self) {
        self.control.send(Devices {
            devices: &self.devices,
        });
    }

    /// What SETUP_END says when everything was sent once.
    #[must_use]
    pub fn setup_end(&self, lanes: u32) -> SetupEnd {
        SetupEnd {
            configs: 1,
            regions: 2,
            devices: u32::try_from(self.devices.len()).unwrap_or(u32::MAX),
            lanes,
            memory_bytes: self.layout.pages_total().value() * PAGE_BYTES_U64,
        }
    }

    /// The whole set-up on the control channel.
    pub fn send_tables(&self, lanes: u32) {
        self.send_config();
        self.send_regions();
        self.send_devices();
        self.control.send(self.setup_end(lanes));
    }

    /// The hello of a data channel.
    #[must_use]
    pub fn join_hello(&self, lane: u32) -> Hello {
        let (id, first) = (LaneId::new(lane), Incarnation::new(0));
        Hello::join(self.session, self.grant.ticket, self.features, id, first)
    }

    /// The hello that resumes the session.
    #[must_use]
    pub fn resume_hello(&self) -> Hello {
        Hello::resume(self.session, self.grant.resume_secret, self.features)
    }

    /// Resumes the session over a new control channel, up to the grant. The lanes of before are forgotten, what they carried is
    /// not.
    ///
    /// # Panics
    /// If the destination does not do its part.
    pub fn resume(&mut self) {
        let (mut control, reply) = self.try_join(&self.resume_hello());
        assert!(matches!(reply, HelloReply::Accepted { .. }), "{reply:?}");
        let heard = control.hear_kind(Kind::Grant);
        let Frame::Grant(grant) = heard.frame() else {
            unreachable!("that kind was waited for")
        };
        control.keep_alive();
        self.grant = grant;
        self.control = control;
        self.lanes.clear();
    }

    /// Opens a lane again.
    ///
    /// # Panics
    /// If it is refused.
    pub fn rejoin(&mut self, lane: u32, incarnation: u32) {
        let hello = Hello {
            incarnation: Incarnation::new(incarnation),
            ..self.join_hello(lane)
        };
        let (peer, reply) = self.try_join(&hello);
        assert!(matches!(reply, HelloReply::Accepted { .. }), "{reply:?}");
        self.lanes.push(FakeLane {
            peer,
            pages: 0,
            zero_pages: 0,
        });
    }

    /// Opens a data channel with some hello.
    ///
    /// # Panics
    /// If the destination does not answer.
    #[must_use]
    pub fn try_join(&self, hello: &Hello) -> (Peer, HelloReply) {
        let mut peer = Peer::new((self.connect)());
        let reply = peer.greet(hello).expect("an answer to the hello");
        (peer, reply)
    }

    /// Opens a data channel.
    ///
    /// # Panics
    /// If it is refused.
    pub fn join(&mut self, lane: u32) {
        let (peer, reply) = self.try_join(&self.join_hello(lane));
        assert!(matches!(reply, HelloReply::Accepted { .. }), "{reply:?}");
        self.lanes.push(FakeLane {
            peer,
            pages: 0,
            zero_pages: 0,
        });
    }

    /// Another ticket than the one that was granted.
    #[must_use]
    pub fn other_ticket(&self) -> Token {
        let mut octets = self.grant.ticket.value();
        octets[15] ^= 1;
        Token::new(octets)
    }

    /// The bytes of a page with this content.
    #[must_use]
    pub fn content(octet: u8) -> Vec<u8> {
        vec![octet; PAGE_BYTES]
    }

    /// Sends one page of region 0, and counts it.
    ///
    /// # Panics
    /// If there is no such lane or page.
    pub fn page(&mut self, lane: usize, round: u32, page: u64, octet: u8) {
        self.page_as(lane, round, page, octet, &Self::content(octet));
    }

    /// The same, but what travels is something else than what the frame says.
    ///
    /// # Panics
    /// If there is no such lane or page.
    pub fn page_as(&mut self, lane: usize, round: u32, page: u64, octet: u8, travels: &[u8]) {
        let crc = crc32fast::hash(&Self::content(octet));
        let (run, place) = (run(0, page, 1), PageIndex::new(page));
        let admitted = self
            .layout
            .run(RegionId::new(0), place, 1)
            .expect("a page of region 0");
        self.digest
            .merge(self.values.replace(admitted, [page_value(crc)]));
        self.lanes[lane].pages += 1;
        let frame = Pages {
            round: Round::new(round),
            runs: &[run],
            checksums: &[U32::new(crc)],
        };
        self.lanes[lane].peer.send_with(frame, Body::Pages, travels);
    }

    /// Says that the pages of a run of region 1 are zero, and counts them.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn zeros(&mut self, lane: usize, round: u32, first: u64, count: u32) {
        self.lanes[lane].zero_pages += u64::from(count);
        self.lanes[lane].peer.send(Zeros {
            round: Round::new(round),
            runs: &[run(1, first, count)],
        });
    }

    /// The end mark that tells the truth.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn end_round(&mut self, lane: usize, round: u32, paused: bool) {
        let lane = &mut self.lanes[lane];
        lane.peer.send(RoundEnd {
            round: Round::new(round),
            final_round: paused,
            pages: lane.pages,
            zero_pages: lane.zero_pages,
        });
        (lane.pages, lane.zero_pages) = (0, 0);
    }

    /// Round 0: some content, some zeros, on every lane its mark. Hears that it was closed.
    ///
    /// # Panics
    /// If the destination does not close it.
    pub fn round_zero(&mut self) {
        for page in 0..8 {
            self.page(0, 0, page, 0x10 + u8::try_from(page).unwrap_or(0));
        }
        self.zeros(0, 0, 0, 64);
        for lane in 0..self.lanes.len() {
            self.end_round(lane, 0, false);
        }
        self.control.hear_kind(Kind::RoundClosed);
    }

    /// Waits until everything that was sent on the control channel so far was handled.
    ///
    /// # Panics
    /// If the destination does not answer.
    pub fn settle(&mut self) {
        const STAMP: u64 = u64::MAX / 3;
        self.control.send(KeepAlive {
            stamp_us: STAMP,
            echo_us: 0,
            held_us: 0,
            asks: Asks::Answer,
        });
        loop {
            let heard = self.control.hear_kind(Kind::KeepAlive);
            if matches!(heard.frame(), Frame::KeepAlive(alive) if alive.echo_us == STAMP) {
                return;
            }
        }
    }

    /// Says that the guest is paused.
    pub fn switchover(&self, round: u32) {
        self.control.send(Switchover {
            final_round: Round::new(round),
        });
    }

    /// The VM state that the model machine wants.
    pub fn send_state(&self) {
        self.send_blob(b"state", 2, |blob| Frame::VmState(VmState { blob }));
    }

    /// What FINAL says when it tells the truth.
    #[must_use]
    pub fn final_of(&self, round: u32) -> Final {
        Final {
            final_round: Round::new(round),
            states: 1,
            digest: self.digest,
            memory_pages: self.layout.pages_total().value(),
            guest: GuestState::Running,
        }
    }

    /// The digest over all pages as this side said that they are.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The paused round with one page, the state, and FINAL.
    pub fn last_round(&mut self, round: u32) {
        self.page(0, round, 9, 0x99);
        for lane in 0..self.lanes.len() {
            self.end_round(lane, round, true);
        }
        self.send_state();
        self.control.send(self.final_of(round));
    }

    /// COMMIT with the right digest.
    pub fn commit(&self) {
        self.control.send(Commit {
            digest: self.digest,
        });
    }

    /// Echoes the stamp that comes behind RUNNING.
    ///
    /// # Panics
    /// If none comes.
    pub fn say_goodbye(&mut self) {
        let heard = self.control.hear_kind(Kind::KeepAlive);
        if let Frame::KeepAlive(alive) = heard.frame() {
            self.control.send(KeepAlive {
                stamp_us: 1,
                echo_us: alive.stamp_us,
                held_us: 0,
                asks: Asks::Nothing,
            });
        }
    }

    /// From the beginning of `round` to the guest's start at the destination, by the rules.
    ///
    /// # Panics
    /// If the destination does not do its part.
    pub fn complete(&mut self, round: u32) {
        self.switchover(round);
        self.last_round(round);
        self.control.hear_kind(Kind::Prepared);
        self.commit();
        self.control.hear_kind(Kind::Running);
        self.say_goodbye();
        self.control.finish();
    }
}
