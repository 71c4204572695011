//! One end of a channel, driven by hand: frames, single bytes, lies. What a test breaks rules with.
//!
//! A [`Peer`] numbers its frames as it should unless told otherwise, and can say that it lives while the test does something
//! else. [`Craft`] makes frames that the encoder refuses to make.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use multifd_transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf};
use multifd_wire::frame::{Asks, KeepAlive};
use multifd_wire::{
    Body, ChannelRef, Frame, HEADER_BYTES, HELLO_BYTES, HELLO_REPLY_BYTES, Header, Hello,
    HelloReply, Kind, Phase, Reason, Sequence,
};

/// The longest that a peer waits for anything before it fails the test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One end of a channel.
pub struct Peer {
    out: Arc<Mutex<Out>>,
    rx: Box<dyn ReceiveHalf>,
    closer: Closer,
    saying: Vec<Saying>,
    /// The newest stamp, while it says that it lives.
    stamps: Option<Arc<AtomicU64>>,
}

struct Out {
    tx: Box<dyn SendHalf>,
    next: u64,
}

struct Saying {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// A frame that was read.
#[derive(Debug)]
pub struct Heard {
    header: Header,
    table: Vec<u8>,
    /// The body.
    pub body: Vec<u8>,
}

impl Heard {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.header.kind()
    }

    /// The frame itself.
    ///
    /// # Panics
    /// If it is malformed: the honest side sent it.
    #[must_use]
    pub fn frame(&self) -> Frame<'_> {
        Frame::decode(&self.header, &self.table).expect("the honest side sends well-formed frames")
    }
}

/// An ABORT that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Why.
    pub reason: Reason,
    /// When.
    pub phase: Phase,
    /// About which channel.
    pub channel: ChannelRef,
    /// In words.
    pub text: String,
}

impl Peer {
    /// Takes a channel over.
    #[must_use]
    pub fn new(channel: Box<dyn Channel>) -> Self {
        let (tx, rx, closer) = channel.split();
        Self {
            out: Arc::new(Mutex::new(Out { tx, next: 0 })),
            rx,
            closer,
            saying: Vec::new(),
            stamps: None,
        }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends bytes as they are. That the other side is gone already is not this side's concern.
    pub fn raw(&self, octets: &[u8]) {
        let mut out = self.out();
        out.tx.set_deadline(Some(Instant::now() + PATIENCE));
        let _ = out.tx.send(octets, &[]);
    }

    /// Sends a frame with the next number.
    pub fn send<'a>(&self, frame: impl Into<Frame<'a>>) {
        self.send_with(frame, Body::None, &[]);
    }

    /// Sends a frame with a body and the next number.
    ///
    /// # Panics
    /// If the encoder refuses the frame: see [`Craft`] for those.
    pub fn send_with<'a>(&self, frame: impl Into<Frame<'a>>, body: Body<'_>, octets: &[u8]) {
        let mut out = self.out();
        let head = encode(out.next, frame, body);
        out.next += 1;
        out.tx.set_deadline(Some(Instant::now() + PATIENCE));
        let _ = out.tx.send(&head, &[IoSource::Bytes(octets)]);
    }

    /// Sends bytes in the place of a frame: `make` is told the number that the frame should have.
    pub fn instead(&self, make: impl FnOnce(u64) -> Vec<u8>) {
        let mut out = self.out();
        let octets = make(out.next);
        out.next += 1;
        out.tx.set_deadline(Some(Instant::now() + PATIENCE));
        let _ = out.tx.send(&octets, &[]);
    }

    /// Leaves out so many numbers.
    pub fn skip(&self, numbers: u64) {
        self.out().next += numbers;
    }

    /// Says that this side lives, every 50 ms from now on, until the peer is dropped or [`fall_silent`](Self::fall_silent).
    /// It then answers the questions that it [`hear`](Self::hear)s, too.
    pub fn keep_alive(&mut self) {
        let stamps = Arc::new(AtomicU64::new(0));
        self.stamps = Some(Arc::clone(&stamps));
        self.keep_saying(move |sequence| {
            let frame = KeepAlive {
                stamp_us: stamps.fetch_add(1, Ordering::Relaxed) + 1,
                echo_us: 0,
                held_us: 0,
                asks: Asks::Answer,
            };
            encode(sequence, frame, Body::None)
        });
    }

    /// Sends a frame made from the sequence number that it gets, every 50 ms from now on, until the peer is dropped or
    /// [`fall_silent`](Self::fall_silent).
    pub fn keep_saying(&mut self, mut encoded: impl FnMut(u64) -> Vec<u8> + Send + 'static) {
        let stop = Arc::new(AtomicBool::new(false));
        let (out, told) = (Arc::clone(&self.out), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            loop {
                let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
                if told.load(Ordering::Relaxed) {
                    return;
                }
                let frame = encoded(out.next);
                out.next += 1;
                out.tx.set_deadline(Some(Instant::now() + PATIENCE));
                if out.tx.send(&frame, &[]).is_err() {
                    return;
                }
                drop(out);
                std::thread::park_timeout(Duration::from_millis(50));
            }
        });
        self.saying.push(Saying { stop, thread });
    }

    /// No longer says that it lives, nor anything else by itself. The channel stays open.
    pub fn fall_silent(&mut self) {
        self.stamps = None;
        for saying in self.saying.drain(..) {
            saying.stop.store(true, Ordering::Relaxed);
            saying.thread.thread().unpark();
            let _ = saying.thread.join();
        }
    }

    /// Reads the next frame.
    ///
    /// # Errors
    /// How the channel ended, or that nothing came in time.
    ///
    /// # Panics
    /// If what came is no frame.
    pub fn hear(&mut self, patience: Duration) -> Result<Heard, ChannelError> {
        self.rx.set_deadline(Some(Instant::now() + patience));
        let mut octets = [0; HEADER_BYTES];
        self.rx.receive(&mut octets)?;
        self.rx.set_deadline(Some(Instant::now() + PATIENCE));
        let header = Header::decode(&octets).expect("the honest side sends well-formed headers");
        let mut table = vec![0; header.table_bytes()];
        self.rx.receive(&mut table)?;
        let mut body = vec![0; header.body_bytes()];
        self.rx.receive(&mut body)?;
        let heard = Heard {
            header,
            table,
            body,
        };
        if let (Some(stamps), Kind::KeepAlive) = (&self.stamps, heard.kind())
            && let Frame::KeepAlive(question) = heard.frame()
            && question.asks == Asks::Answer
        {
            self.send(KeepAlive {
                stamp_us: stamps.fetch_add(1, Ordering::Relaxed) + 1,
                echo_us: question.stamp_us,
                held_us: 0,
                asks: Asks::Nothing,
            });
        }
        Ok(heard)
    }

    /// Reads on to the next frame of a kind; what comes before it is forgotten.
    ///
    /// # Panics
    /// If the channel ends, an ABORT comes or nothing comes in time instead.
    pub fn hear_kind(&mut self, kind: Kind) -> Heard {
        self.hear_until(&[kind])
    }

    /// Reads on to the next frame of one of these kinds.
    ///
    /// # Panics
    /// As [`hear_kind`](Self::hear_kind).
    pub fn hear_until(&mut self, kinds: &[Kind]) -> Heard {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let heard = self
                .hear(left)
                .unwrap_or_else(|error| panic!("waited for {kinds:?}: {error}"));
            if kinds.contains(&heard.kind()) {
                return heard;
            }
            assert_ne!(
                heard.kind(),
                Kind::Abort,
                "waited for {kinds:?}: {:?}",
                heard.frame()
            );
        }
    }

    /// Reads on to the ABORT that the other side ends with, and closes.
    ///
    /// # Panics
    /// If the channel ends without one, or none comes in time.
    pub fn hear_abort(&mut self) -> Told {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let heard = self
                .hear(left)
                .unwrap_or_else(|error| panic!("the other side did not say why it ended: {error}"));
            if let Frame::Abort(abort) = heard.frame() {
                let told = Told {
                    reason: abort.reason,
                    phase: abort.phase,
                    channel: abort.channel,
                    text: abort.text.to_owned(),
                };
                self.cut();
                return told;
            }
        }
    }

    /// Reads all frames that still come; says how the channel ended.
    pub fn hear_the_end(&mut self) -> (Vec<Kind>, ChannelError) {
        let mut kinds = Vec::new();
        loop {
            match self.hear(PATIENCE) {
                Ok(heard) => kinds.push(heard.kind()),
                Err(error) => return (kinds, error),
            }
        }
    }

    /// Sends a hello and reads the answer.
    ///
    /// # Errors
    /// How the channel ended instead.
    ///
    /// # Panics
    /// If the answer is malformed.
    pub fn greet(&mut self, hello: &Hello) -> Result<HelloReply, ChannelError> {
        self.raw(&hello.encode());
        self.hear_reply()
    }

    /// Reads the answer to a hello.
    ///
    /// # Errors
    /// How the channel ended instead.
    ///
    /// # Panics
    /// If the answer is malformed.
    pub fn hear_reply(&mut self) -> Result<HelloReply, ChannelError> {
        self.rx.set_deadline(Some(Instant::now() + PATIENCE));
        let mut octets = [0; HELLO_REPLY_BYTES];
        self.rx.receive(&mut octets)?;
        Ok(HelloReply::decode(&octets).expect("the honest side sends well-formed replies"))
    }

    /// Reads a hello.
    ///
    /// # Panics
    /// If none comes in time, or it is malformed.
    pub fn hear_hello(&mut self) -> Hello {
        self.rx.set_deadline(Some(Instant::now() + PATIENCE));
        let mut octets = [0; HELLO_BYTES];
        self.rx.receive(&mut octets).expect("a hello");
        Hello::decode(&octets).expect("the honest side sends well-formed hellos")
    }

    /// Ends the stream in this direction, after what was sent; goes on reading.
    pub fn finish(&mut self) {
        self.fall_silent();
        let _ = self.out().tx.finish();
    }

    /// Ends the channel at once, in both directions.
    pub fn cut(&mut self) {
        self.closer.shutdown();
        self.fall_silent();
    }

    /// What ends the channel from another thread.
    #[must_use]
    pub fn closer(&self) -> Closer {
        self.closer.clone()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.fall_silent();
    }
}

/// The head of a frame.
///
/// # Panics
/// If the encoder refuses it.
#[must_use]
pub fn encode<'a>(sequence: u64, frame: impl Into<Frame<'a>>, body: Body<'_>) -> Vec<u8> {
    let mut head = Vec::new();
    frame
        .into()
        .encode(Sequence::new(sequence), body, &mut head)
        .expect("a frame that the format allows");
    head
}

/// A header with right checksums over whatever it says.
#[derive(Debug, Clone, Copy)]
pub struct Craft<'t> {
    /// The kind's code.
    pub kind: u16,
    /// The frame's number.
    pub sequence: u64,
    /// The table.
    pub table: &'t [u8],
    /// What the header says of the table's length; `None` says the truth.
    pub table_bytes: Option<u32>,
    /// What the header says of the body's length.
    pub body_bytes: u32,
    /// What the header says of the body's checksum.
    pub body_crc: u32,
    /// The reserved field.
    pub reserved: u16,
}

impl<'t> Craft<'t> {
    /// A frame without a body that says the truth about its table.
    #[must_use]
    pub fn new(kind: u16, sequence: u64, table: &'t [u8]) -> Self {
        Self {
            kind,
            sequence,
            table,
            table_bytes: None,
            body_bytes: 0,
            body_crc: 0,
            reserved: 0,
        }
    }

    /// Header and table as bytes.
    #[must_use]
    pub fn octets(&self) -> Vec<u8> {
        let table_bytes = self
            .table_bytes
            .unwrap_or_else(|| u32::try_from(self.table.len()).unwrap_or(u32::MAX));
        let mut octets = Vec::new();
        octets.extend(self.kind.to_le_bytes());
        octets.extend(self.reserved.to_le_bytes());
        octets.extend(table_bytes.to_le_bytes());
        octets.extend(self.sequence.to_le_bytes());
        octets.extend(self.body_bytes.to_le_bytes());
        octets.extend(crc32fast::hash(self.table).to_le_bytes());
        octets.extend(self.body_crc.to_le_bytes());
        octets.extend(crc32fast::hash(&octets).to_le_bytes());
        octets.extend(self.table);
        octets
    }
}

/// Changes bytes of a frame's table and makes its checksums right again: a lie that only its meaning gives away.
///
/// # Panics
/// If `head` has no such bytes.
#[must_use]
pub fn altered(mut head: Vec<u8>, table_offset: usize, octets: &[u8]) -> Vec<u8> {
    head[HEADER_BYTES + table_offset..][..octets.len()].copy_from_slice(octets);
    let table_crc = crc32fast::hash(&head[HEADER_BYTES..]).to_le_bytes();
    head[20..24].copy_from_slice(&table_crc);
    let header_crc = crc32fast::hash(&head[..28]).to_le_bytes();
    head[28..32].copy_from_slice(&header_crc);
    head
}
