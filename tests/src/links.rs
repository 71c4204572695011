//! Links between a source and a destination of the same process that a test can cut, keep down and bring back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::memory::pair;
use multifd_transport::{
    Address, Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, TcpOptions,
};
use multifd_wire::{ChannelRef, LaneId};

use crate::tapped::{Tap, Tapped};

/// Bytes that an in-memory channel holds.
const CHANNEL_BYTES: usize = 256 << 10;

/// All links to one destination. Cloning gives another handle to the same ones.
#[derive(Clone)]
pub struct Links {
    shared: Arc<Shared>,
}

struct Shared {
    destination: Mutex<rx::Handle>,
    open: Mutex<Vec<(ChannelRef, Closer)>>,
    /// Connections whose bytes vanish, once told so.
    holes: Mutex<Vec<(ChannelRef, Arc<AtomicBool>)>>,
    down: AtomicBool,
    /// Channels of which no new connection can be made.
    closed: Mutex<Vec<ChannelRef>>,
    hangs: AtomicBool,
    /// A bit on the control channel is to flip.
    flips: Arc<AtomicBool>,
    dialled: AtomicU64,
    /// Over TCP to this address, or in memory.
    address: Option<Address>,
}

impl Links {
    /// Links to this destination, all up.
    #[must_use]
    pub fn to(destination: rx::Handle) -> Self {
        Self::over(destination, None)
    }

    /// Links over TCP, to where the destination listens.
    #[must_use]
    pub fn over_tcp(destination: rx::Handle, address: Address) -> Self {
        Self::over(destination, Some(address))
    }

    fn over(destination: rx::Handle, address: Option<Address>) -> Self {
        Self {
            shared: Arc::new(Shared {
                destination: Mutex::new(destination),
                open: Mutex::default(),
                holes: Mutex::default(),
                down: AtomicBool::new(false),
                closed: Mutex::default(),
                hangs: AtomicBool::new(false),
                flips: Arc::default(),
                dialled: AtomicU64::new(0),
                address,
            }),
        }
    }

    /// What the source dials with.
    #[must_use]
    pub fn dial(&self) -> Box<dyn tx::Dial> {
        Box::new(self.clone())
    }

    /// Another destination answers from now on, as after a restart.
    pub fn lead_to(&self, destination: rx::Handle) {
        *self
            .shared
            .destination
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = destination;
    }

    /// Cuts every connection that this channel has or had.
    pub fn cut(&self, channel: ChannelRef) {
        self.cut_those(|open| open == channel);
    }

    /// Cuts a lane.
    pub fn cut_lane(&self, lane: u32) {
        self.cut(ChannelRef::Lane(LaneId::new(lane)));
    }

    /// What this lane's present connection is handed from now on vanishes, without a sign to either side.
    pub fn swallow_lane(&self, lane: u32) {
        let wanted = ChannelRef::Lane(LaneId::new(lane));
        let mut holes = self.holes();
        holes.retain(|(channel, hole)| {
            let swallow = *channel == wanted;
            if swallow {
                hole.store(true, Ordering::SeqCst);
            }
            !swallow
        });
    }

    fn holes(&self) -> std::sync::MutexGuard<'_, Vec<(ChannelRef, Arc<AtomicBool>)>> {
        self.shared
            .holes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// One bit of what the source says next on the control channel flips on its way.
    pub fn flip_control(&self) {
        self.shared.flips.store(true, Ordering::SeqCst);
    }

    /// Cuts all lanes.
    pub fn cut_lanes(&self) {
        self.cut_those(|open| open != ChannelRef::Control);
    }

    /// Cuts everything.
    pub fn cut_all(&self) {
        self.cut_those(|_| true);
    }

    fn cut_those(&self, which: impl Fn(ChannelRef) -> bool) {
        let mut open = self.open();
        open.retain(|(channel, closer)| {
            let cut = which(*channel);
            if cut {
                closer.shutdown();
            }
            !cut
        });
    }

    /// Whether new connections are refused.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
    }

    /// Whether new connections of this lane are refused; the one that it has is left alone.
    pub fn set_way_closed(&self, lane: u32, closed: bool) {
        let lane = ChannelRef::Lane(LaneId::new(lane));
        let mut all = self.closed();
        all.retain(|other| *other != lane);
        if closed {
            all.push(lane);
        }
    }

    fn closed(&self) -> std::sync::MutexGuard<'_, Vec<ChannelRef>> {
        self.shared
            .closed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether dialling does not return, whatever the deadline.
    pub fn set_hanging(&self, hangs: bool) {
        self.shared.hangs.store(hangs, Ordering::SeqCst);
    }

    /// Cuts everything and refuses new connections until [`set_down`](Self::set_down).
    pub fn take_down(&self) {
        self.set_down(true);
        self.cut_all();
    }

    /// Connections that were made.
    #[must_use]
    pub fn dialled(&self) -> u64 {
        self.shared.dialled.load(Ordering::SeqCst)
    }

    fn open(&self) -> std::sync::MutexGuard<'_, Vec<(ChannelRef, Closer)>> {
        self.shared
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl tx::Dial for Links {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        while self.shared.hangs.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.shared.down.load(Ordering::SeqCst) {
            return Err("the link is down".into());
        }
        if self.closed().contains(&channel) {
            return Err("this way is closed".into());
        }
        let (ours, theirs) = match &self.shared.address {
            None => {
                let (ours, theirs) = pair(CHANNEL_BYTES);
                (ours, Some(theirs))
            }
            Some(address) => {
                let options = TcpOptions::default();
                (
                    multifd_transport::connect(address, &options, deadline)?,
                    None,
                )
            }
        };
        let hole = Arc::new(AtomicBool::new(false));
        self.holes().push((channel, Arc::clone(&hole)));
        let control = channel == ChannelRef::Control;
        let flips = control.then(|| Arc::clone(&self.shared.flips));
        let ours = Split::new(ours, hole, flips);
        self.open().push((channel, ours.closer.clone()));
        self.shared.dialled.fetch_add(1, Ordering::SeqCst);
        if let Some(theirs) = theirs {
            let destination = self
                .shared
                .destination
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            destination.offer(theirs)?;
        }
        // The link may have gone down meanwhile, and the cut not have seen this connection.
        if self.shared.down.load(Ordering::SeqCst) {
            self.cut_all();
        }
        Ok(Box::new(ours))
    }
}

/// A channel that was split early, so that its closer is known.
struct Split {
    tx: Box<dyn SendHalf>,
    rx: Box<dyn ReceiveHalf>,
    closer: Closer,
    name: String,
}

impl Split {
    fn new(
        channel: Box<dyn Channel>,
        hole: Arc<AtomicBool>,
        flips: Option<Arc<AtomicBool>>,
    ) -> Self {
        let name = channel.describe();
        let (tx, rx, closer) = channel.split();
        Self {
            tx: Box::new(Tapped::new(tx, Leaky { hole, flips })),
            rx,
            closer,
            name,
        }
    }
}

impl Channel for Split {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        (self.tx, self.rx, self.closer)
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}

/// Can be told to lose everything, or to change a bit.
struct Leaky {
    hole: Arc<AtomicBool>,
    flips: Option<Arc<AtomicBool>>,
}

impl Tap for Leaky {
    fn send(
        &mut self,
        half: &mut dyn SendHalf,
        head: &[u8],
        body: &[IoSource<'_>],
    ) -> Result<(), ChannelError> {
        if self.hole.load(Ordering::SeqCst) {
            return Ok(());
        }
        let flips = |flips: &Arc<AtomicBool>| flips.swap(false, Ordering::SeqCst);
        if self.flips.as_ref().is_some_and(flips) {
            let mut changed = head.to_vec();
            if let Some(octet) = changed.last_mut() {
                *octet ^= 1;
            }
            return half.send(&changed, body);
        }
        half.send(head, body)
    }

    fn swallows(&self) -> bool {
        self.hole.load(Ordering::SeqCst)
    }
}
