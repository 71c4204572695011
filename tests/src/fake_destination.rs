//! A destination that is driven by hand: it can take a whole guest by the rules, and break any of them at any step.
//!
//! It lands nothing: of the pages it keeps only what the digest needs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use multifd_transport::{Address, Channel, Listener, TcpOptions};
use multifd_wire::digest::page_value;
use multifd_wire::frame::{
    Acks, GiveBack, GiveBackReason, Grant, LaneMark, Prepared, RawLaneMark, RawRun, Ready, Running,
};
use multifd_wire::{
    Body, Digest, Features, Frame, HelloReply, Incarnation, Intent, Kind, LaneId, Layout,
    PageValues, Sequence, SessionId, Token, VERSION,
};

use crate::peer::{PATIENCE, Peer, encode};

/// The hand-driven destination.
pub struct FakeDestination {
    listener: Listener,
    /// Where it listens.
    pub address: Address,
}

/// A session that it has accepted.
pub struct Taking {
    /// The features that were agreed on.
    pub features: Features,
    /// The control channel.
    pub control: Peer,
    /// The session's name.
    pub session: SessionId,
    /// The lanes that joined, in whatever order, until [`Taking::read_lanes`].
    pub lanes: BTreeMap<LaneId, Peer>,
    listener: Listener,
    layout: Option<Layout>,
    readers: Vec<JoinHandle<Peer>>,
    closers: Vec<multifd_transport::Closer>,
    landed: Option<Arc<Landed>>,
}

/// What the pages that were read amount to.
struct Landed {
    layout: Layout,
    values: PageValues,
    digest: Mutex<Digest>,
    /// Frames that were read, of each lane.
    frames: BTreeMap<LaneId, AtomicU64>,
}

impl Default for FakeDestination {
    fn default() -> Self {
        Self::listen()
    }
}

impl FakeDestination {
    /// Listens on a free TCP port of this host.
    ///
    /// # Panics
    /// If it can't.
    #[must_use]
    pub fn listen() -> Self {
        let address = "127.0.0.1:0".parse().expect("an address");
        let listener = Listener::bind(&address, &TcpOptions::default()).expect("a free port");
        let address = listener.local_address().clone();
        Self { listener, address }
    }

    /// The next connection.
    ///
    /// # Panics
    /// If none comes in time.
    #[must_use]
    pub fn accept(&self) -> Box<dyn Channel> {
        let deadline = Instant::now() + PATIENCE;
        self.listener
            .accept(Some(deadline))
            .expect("the source connects")
            .0
    }

    /// Accepts the control channel's hello; sends nothing after it.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn welcome(self) -> Taking {
        self.welcome_with(Features::NONE)
    }

    /// The same, and agrees to features.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn welcome_with(self, features: Features) -> Taking {
        let mut control = Peer::new(self.accept());
        let hello = control.hear_hello();
        control.raw(&accepted_with(hello.session, features).encode());
        Taking {
            features,
            control,
            session: hello.session,
            lanes: BTreeMap::new(),
            listener: self.listener,
            layout: None,
            readers: Vec::new(),
            closers: Vec::new(),
            landed: None,
        }
    }

    /// Up to the end of set-up: the tables were read, the lanes have joined, READY was not sent.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn set_up(self) -> Taking {
        let mut taking = self.welcome();
        taking.grant();
        taking.control.keep_alive();
        taking.hear_tables();
        taking.accept_lane();
        taking
    }

    /// In round 0 of a session that is kept without channels.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn keeping_in_rounds(self) -> Taking {
        let mut taking = self.welcome_with(Features::RESUME);
        taking.grant();
        taking.control.keep_alive();
        taking.hear_tables();
        taking.accept_lane();
        taking.ready(1);
        taking.read_lanes();
        taking.hear_pages();
        taking
    }

    /// In round 0: READY was sent, the one lane is read, and the first pages came.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn in_rounds(self) -> Taking {
        let mut taking = self.set_up();
        taking.ready(1);
        taking.read_lanes();
        taking.hear_pages();
        taking
    }

    /// Up to FINAL, which was read, and all pages before it as well.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn at_final(self) -> (Taking, Digest) {
        let mut taking = self.in_rounds();
        let digest = taking.hear_final();
        (taking, digest)
    }

    /// Up to COMMIT, which was read.
    ///
    /// # Panics
    /// If the source does not do its part.
    #[must_use]
    pub fn committed(self) -> Taking {
        let (mut taking, digest) = self.at_final();
        taking.control.send(prepared(digest));
        taking.control.hear_kind(Kind::Commit);
        taking
    }
}

impl Taking {
    /// Grants four lanes.
    pub fn grant(&self) {
        self.control.send(Grant {
            ticket: Token::new([7; 16]),
            resume_secret: Token::new([8; 16]),
            lanes_max: 4,
            suspend_ms: if self.features == Features::RESUME {
                10_000
            } else {
                0
            },
            device_window_bytes: 0,
        });
    }

    /// Takes the source's next control channel, which has to resume the session, up to the end of set-up with its lane.
    ///
    /// # Panics
    /// If the source does not do its part.
    pub fn resumed(&mut self) {
        let mut control = Peer::new(self.accept());
        let hello = control.hear_hello();
        assert_eq!(
            (hello.intent, hello.session, hello.token),
            (Intent::Resume, self.session, Token::new([8; 16]))
        );
        control.raw(&accepted_with(self.session, self.features).encode());
        self.control = control;
        self.grant();
        self.control.keep_alive();
        self.hear_tables();
        self.accept_lane();
    }

    /// Reads the set-up to its end.
    ///
    /// # Panics
    /// If the source does not do its part.
    pub fn hear_tables(&mut self) {
        let regions = self.control.hear_kind(Kind::Regions);
        let Frame::Regions(regions) = regions.frame() else {
            unreachable!("that kind was waited for")
        };
        self.layout = Some(Layout::from_frame(&regions).expect("a valid layout"));
        self.control.hear_kind(Kind::SetupEnd);
    }

    /// The next connection, which has to be a data channel, accepted.
    ///
    /// # Panics
    /// If the source does not do its part.
    pub fn accept_lane(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let accepted_channel = self.listener.accept(Some(deadline));
        let mut lane = Peer::new(accepted_channel.expect("the source dials its lane").0);
        let hello = lane.hear_hello();
        assert_eq!(hello.session, self.session);
        lane.raw(&accepted_with(self.session, self.features).encode());
        self.closers.push(lane.closer());
        self.lanes.insert(hello.lane, lane);
    }

    /// The next connection, whatever it is for.
    ///
    /// # Panics
    /// If none comes in time.
    #[must_use]
    pub fn accept(&self) -> Box<dyn Channel> {
        let deadline = Instant::now() + PATIENCE;
        self.listener
            .accept(Some(deadline))
            .expect("the source connects")
            .0
    }

    /// Says READY for so many lanes.
    pub fn ready(&self, lanes: u32) {
        self.control.send(Ready {
            lanes,
            prepare_us: 1,
        });
    }

    /// Gives back pages, as if their checksum had failed in the first frame of a lane.
    pub fn give_back(&self, lane: u32, run: RawRun) {
        self.control.send(GiveBack {
            lane: LaneId::new(lane),
            incarnation: Incarnation::new(0),
            sequence: Sequence::new(0),
            reason: GiveBackReason::Checksum,
            runs: &[run],
        });
    }

    /// Reads the lanes from now on, in threads of their own.
    ///
    /// # Panics
    /// If the tables were not read.
    pub fn read_lanes(&mut self) {
        let layout = self.layout.clone().expect("the tables were read");
        let landed = Arc::new(Landed {
            values: PageValues::new(&layout).expect("memory for the values"),
            digest: Mutex::new(Digest::EMPTY),
            frames: self
                .lanes
                .keys()
                .map(|lane| (*lane, AtomicU64::new(0)))
                .collect(),
            layout,
        });
        self.landed = Some(Arc::clone(&landed));
        for (lane, mut peer) in std::mem::take(&mut self.lanes) {
            let landed = Arc::clone(&landed);
            self.readers.push(std::thread::spawn(move || {
                while let Ok(heard) = peer.hear(Duration::from_secs(60)) {
                    landed.take(&heard.frame());
                    landed.frames[&lane].fetch_add(1, Ordering::SeqCst);
                }
                peer
            }));
        }
    }

    /// Reads on to the FINAL whose digest is that of the pages that were read: earlier ones belong to rounds that were not
    /// the last.
    ///
    /// # Panics
    /// If none comes in time.
    pub fn hear_final(&mut self) -> Digest {
        let heard = self.control.hear_kind(Kind::Final);
        let Frame::Final(last) = heard.frame() else {
            unreachable!("that kind was waited for")
        };
        let landed = self.landed.as_ref().expect("the lanes are read");
        let since = Instant::now();
        while landed.digest() != last.digest {
            assert!(
                since.elapsed() < PATIENCE,
                "the pages do not amount to FINAL's digest"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        last.digest
    }

    /// Waits for the first pages: the source is in round 0 now.
    ///
    /// # Panics
    /// If none come in time.
    pub fn hear_pages(&self) {
        let landed = self.landed.as_ref().expect("the lanes are read");
        let since = Instant::now();
        while landed.digest() == Digest::EMPTY {
            assert!(since.elapsed() < PATIENCE, "no pages come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Acknowledges what is read from the lanes, again and again, for as long as the control channel says anything by itself.
    ///
    /// # Panics
    /// If the lanes are not read.
    pub fn keep_acknowledging(&mut self) {
        let landed = Arc::clone(self.landed.as_ref().expect("the lanes are read"));
        self.control.keep_saying(move |sequence| {
            let marks: Vec<RawLaneMark> = landed
                .frames
                .iter()
                .map(|(lane, frames)| {
                    RawLaneMark::from(LaneMark {
                        lane: *lane,
                        incarnation: Incarnation::new(0),
                        frames: frames.load(Ordering::SeqCst),
                    })
                })
                .collect();
            encode(sequence, Acks { lanes: &marks }, Body::None)
        });
    }

    /// Ends all lanes.
    pub fn cut_lanes(&self) {
        for closer in &self.closers {
            closer.shutdown();
        }
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.cut_lanes();
        self.control.cut();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Landed {
    fn take(&self, frame: &Frame<'_>) {
        match frame {
            Frame::Pages(pages) => {
                let mut values = pages.checksums.iter().map(|crc| page_value(crc.get()));
                for raw in pages.runs {
                    let run = self.layout.admit(raw).expect("inside its region");
                    self.merge(self.values.replace(run, values.by_ref().take(run.pages())));
                }
            }
            Frame::Zeros(zeros) => {
                for raw in zeros.runs {
                    let run = self.layout.admit(raw).expect("inside its region");
                    self.merge(self.values.clear(run));
                }
            }
            _ => {}
        }
    }

    fn merge(&self, delta: Digest) {
        let mut digest = self.digest.lock().unwrap_or_else(PoisonError::into_inner);
        digest.merge(delta);
    }

    fn digest(&self) -> Digest {
        *self.digest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer that accepts a hello.
#[must_use]
pub fn accepted(session: SessionId) -> HelloReply {
    accepted_with(session, Features::NONE)
}

/// The same, with features.
#[must_use]
pub fn accepted_with(session: SessionId, features: Features) -> HelloReply {
    HelloReply::accepted(VERSION, features, session)
}

/// PREPARED with this digest.
#[must_use]
pub fn prepared(digest: Digest) -> Prepared {
    Prepared {
        digest,
        wait_us: 1,
        load_us: 1,
        verify_us: 1,
    }
}

/// RUNNING.
#[must_use]
pub fn running() -> Running {
    Running {
        resume_us: 1,
        cpu_us: 1,
        landed_bytes: 1,
    }
}
