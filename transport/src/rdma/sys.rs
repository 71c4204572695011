//! Verbs and the connection manager as values that safe code cannot misuse.
//!
//! Rule: memory that a device may reach belongs to the value that registered it ([`Mr`]), and is deregistered before it is unmapped. So
//! whatever addresses and keys are posted, a device reaches registered memory or refuses. What is created is destroyed in the order that
//! the libraries ask for, and nothing here waits without a bound.
#![allow(unsafe_code)] // Calls through a C interface have no safe form.

mod layout;
mod library;

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use socket2::SockAddr;

use self::layout::{
    ACCESS_LOCAL_WRITE, ACCESS_REMOTE_WRITE, CmEvent, CmId, CompletionChannel, ConnParam, Context,
    DeviceAttr, EventChannel, MemoryRegion, OP_POLL_CQ, OP_POST_RECV, OP_POST_SEND,
    OP_REQ_NOTIFY_CQ, PORT_SPACE_TCP, QPT_RC, QpCap, QpInit, Raw, RecvWr, SEND_SIGNALED, SendWr,
    WR_RDMA_WRITE, WR_SEND,
};
pub(crate) use self::layout::{Completion, Sge, WC_FLUSHED};
use self::library::{Functions, functions};
use crate::memory::GuestMemory;

/// Whether this host can do RDMA at all; if not, what is missing.
pub(crate) fn available() -> Result<(), String> {
    let lib = functions()?;
    let mut count = 0;
    // SAFETY: writes the count; the list is freed below.
    let list = unsafe { (lib.ibv_get_device_list)(&raw mut count) };
    if !list.is_null() {
        // SAFETY: what the call above returned, once.
        unsafe { (lib.ibv_free_device_list)(list) };
    }
    if list.is_null() || count == 0 {
        return Err(
            "this host has no RDMA device: `rdma link` shows them, `rdma link add rxe0 type rxe netdev eth0` makes one in software \
             (kernel modules rdma_rxe or siw, ib_uverbs)"
                .to_owned(),
        );
    }
    Events::new().map(drop).map_err(|error| {
        format!("the RDMA connection manager is not usable ({error}): load the kernel module rdma_ucm and see to the rights of /dev/infiniband/rdma_cm")
    })
}

fn lib() -> io::Result<&'static Functions> {
    functions().map_err(io::Error::other)
}

/// The result of a call that returns -1 and sets `errno`.
fn check(result: c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Happened {
    AddressResolved,
    RouteResolved,
    Request,
    Established,
    Disconnected,
    Rejected,
    /// An error, or something that this crate does not know.
    Other(u32),
}

/// Events of connections: a descriptor to poll.
pub(crate) struct Events {
    lib: &'static Functions,
    raw: NonNull<EventChannel>,
}

// SAFETY: librdmacm's objects may be used from any thread; calls that change one object are made under the callers' locks.
unsafe impl Send for Events {}
// SAFETY: as above.
unsafe impl Sync for Events {}

/// One event, acknowledged already.
pub(crate) struct Event {
    pub(crate) happened: Happened,
    pub(crate) status: i32,
    /// For a request: what the peer sent along, and the new connection.
    pub(crate) private: Vec<u8>,
    pub(crate) request: Option<RawRequest>,
}

/// A connection that somebody asks for; rejected if it is dropped.
pub(crate) struct RawRequest {
    lib: &'static Functions,
    id: NonNull<CmId>,
}

// SAFETY: as for Events.
unsafe impl Send for RawRequest {}

impl Drop for RawRequest {
    fn drop(&mut self) {
        // SAFETY: an id that a request gave and nobody took; rejected and destroyed once.
        unsafe { (self.lib.rdma_reject)(self.id.as_ptr(), ptr::null(), 0) };
        // SAFETY: as above.
        unsafe { (self.lib.rdma_destroy_id)(self.id.as_ptr()) };
    }
}

impl Events {
    pub(crate) fn new() -> io::Result<Self> {
        let lib = lib()?;
        // SAFETY: no arguments; destroyed on drop.
        let raw = unsafe { (lib.rdma_create_event_channel)() };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        let events = Self { lib, raw };
        set_nonblocking(events.as_fd())?;
        Ok(events)
    }

    /// The next event, if there is one.
    pub(crate) fn next(&self) -> io::Result<Option<Event>> {
        let mut raw: *mut CmEvent = ptr::null_mut();
        // SAFETY: the channel lives; its descriptor does not block.
        let result = unsafe { (self.lib.rdma_get_cm_event)(self.raw.as_ptr(), &raw mut raw) };
        if let Err(error) = check(result) {
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: the call succeeded, so `raw` is an event that lives until it is acknowledged below.
        let event = unsafe { &*raw };
        let happened = match event.event {
            0 => Happened::AddressResolved,
            2 => Happened::RouteResolved,
            4 => Happened::Request,
            8 => Happened::Rejected,
            9 => Happened::Established,
            10 => Happened::Disconnected,
            other => Happened::Other(other),
        };
        let private = match happened {
            Happened::Request if !event.conn.private_data.is_null() => {
                let len = usize::from(event.conn.private_data_len);
                // SAFETY: for a request the member `conn` is the valid one, and its data lives as long as the event.
                unsafe { std::slice::from_raw_parts(event.conn.private_data, len) }.to_vec()
            }
            _ => Vec::new(),
        };
        let request = NonNull::new(event.id)
            .filter(|_| happened == Happened::Request)
            .map(|id| RawRequest { lib: self.lib, id });
        let status = event.status;
        // SAFETY: what the call above gave, acknowledged once; nothing refers to it any more.
        unsafe { (self.lib.rdma_ack_cm_event)(raw) };
        Ok(Some(Event {
            happened,
            status,
            private,
            request,
        }))
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open while the channel lives.
        let fd = unsafe { self.raw.as_ref() }.fd;
        // SAFETY: as above; the borrow ends with self.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; ids on it are gone, since they own a share of it.
        unsafe { (self.lib.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

/// The words of librdmacm for an event.
pub(crate) fn describe(event: u32) -> String {
    let Ok(lib) = functions() else {
        return format!("event {event}");
    };
    // SAFETY: takes any number.
    let text = unsafe { (lib.rdma_event_str)(event) };
    // SAFETY: a constant string of the library, which is never closed.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

/// The words of libibverbs for the status of a completion.
pub(crate) fn describe_status(status: u32) -> String {
    let Ok(lib) = functions() else {
        return format!("status {status}");
    };
    // SAFETY: takes any number.
    let text = unsafe { (lib.ibv_wc_status_str)(status) };
    // SAFETY: a constant string of the library, which is never closed.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{} (status {status})", text.to_string_lossy())
}

/// A connection's end, before or after it is connected.
pub(crate) struct Id {
    lib: &'static Functions,
    raw: NonNull<CmId>,
    events: Arc<Events>,
    has_qp: bool,
}

// SAFETY: as for Events.
unsafe impl Send for Id {}
// SAFETY: as for Events; the calls that take &self are safe from any thread.
unsafe impl Sync for Id {}

impl Id {
    pub(crate) fn new(events: Arc<Events>) -> io::Result<Self> {
        let lib = lib()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the event channel lives, and longer than the id, which owns a share of it.
        let result = unsafe {
            (lib.rdma_create_id)(
                events.raw.as_ptr(),
                &raw mut raw,
                ptr::null_mut(),
                PORT_SPACE_TCP,
            )
        };
        check(result)?;
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Self {
            lib,
            raw,
            events,
            has_qp: false,
        })
    }

    /// The end of a request, with events of its own.
    pub(crate) fn from_request(request: RawRequest) -> io::Result<Self> {
        let events = Arc::new(Events::new()?);
        // SAFETY: the id is nobody else's, and its request was acknowledged, so this does not wait.
        let result =
            unsafe { (request.lib.rdma_migrate_id)(request.id.as_ptr(), events.raw.as_ptr()) };
        check(result)?;
        let (lib, raw) = (request.lib, request.id);
        mem::forget(request);
        Ok(Self {
            lib,
            raw,
            events,
            has_qp: false,
        })
    }

    pub(crate) fn events(&self) -> &Arc<Events> {
        &self.events
    }

    pub(crate) fn bind_and_listen(&self, address: SocketAddr, backlog: c_int) -> io::Result<()> {
        let address = SockAddr::from(address);
        // SAFETY: an address of a known family, only read.
        let result = unsafe {
            (self.lib.rdma_bind_addr)(
                self.raw.as_ptr(),
                address.as_ptr().cast::<c_void>().cast_mut(),
            )
        };
        check(result)?;
        // SAFETY: the id is bound.
        check(unsafe { (self.lib.rdma_listen)(self.raw.as_ptr(), backlog) })
    }

    pub(crate) fn resolve_address(&self, target: SocketAddr, at_most: Duration) -> io::Result<()> {
        let target = SockAddr::from(target);
        let target = target.as_ptr().cast::<c_void>().cast_mut();
        // SAFETY: an address of a known family, only read; no source address is given.
        check(unsafe {
            (self.lib.rdma_resolve_addr)(
                self.raw.as_ptr(),
                ptr::null_mut(),
                target,
                millis(at_most),
            )
        })
    }

    pub(crate) fn resolve_route(&self, at_most: Duration) -> io::Result<()> {
        // SAFETY: the id is alive.
        check(unsafe { (self.lib.rdma_resolve_route)(self.raw.as_ptr(), millis(at_most)) })
    }

    pub(crate) fn connect(&self, private: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(private);
        // SAFETY: the parameters and what they point to live during the call, which copies them.
        check(unsafe { (self.lib.rdma_connect)(self.raw.as_ptr(), &raw mut parameters) })
    }

    pub(crate) fn accept(&self, private: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(private);
        // SAFETY: as in `connect`.
        check(unsafe { (self.lib.rdma_accept)(self.raw.as_ptr(), &raw mut parameters) })
    }

    /// Ends the connection; what was posted completes as flushed. May be called at any time, from any thread, and does not wait.
    pub(crate) fn disconnect(&self) {
        // SAFETY: the id is alive. That it fails means that there was no connection, or is none any more.
        unsafe { (self.lib.rdma_disconnect)(self.raw.as_ptr()) };
    }

    /// This side's address and the peer's, as far as they are known.
    pub(crate) fn addresses(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        // SAFETY: the id is alive, and its start is laid out as CmId.
        let id = unsafe { self.raw.as_ref() };
        (address(&id.source), address(&id.target))
    }

    fn device(&self) -> io::Result<NonNull<Context>> {
        // SAFETY: as in `addresses`.
        let verbs = unsafe { self.raw.as_ref() }.verbs;
        NonNull::new(verbs)
            .ok_or_else(|| io::Error::other("no RDMA device serves this address (see `rdma link`)"))
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        if self.has_qp {
            // SAFETY: made by `Endpoint::new` on this id, destroyed once.
            unsafe { (self.lib.rdma_destroy_qp)(self.raw.as_ptr()) };
        }
        // SAFETY: this value's own id, destroyed once; all its events were acknowledged in `next`.
        unsafe { (self.lib.rdma_destroy_id)(self.raw.as_ptr()) };
    }
}

fn parameters(private: &[u8]) -> ConnParam {
    ConnParam {
        private_data: private.as_ptr(),
        private_data_len: u8::try_from(private.len()).unwrap_or(0),
        responder_resources: 0,
        initiator_depth: 0,
        flow_control: 0,
        // The most that there is: packets are repeated for some seconds before a connection is given up.
        retry_count: 7,
        // 7 would mean without end: a peer that posts no buffers breaks the agreement about credit.
        rnr_retry_count: 6,
        srq: 0,
        qp_num: 0,
    }
}

fn millis(time: Duration) -> c_int {
    c_int::try_from(time.as_millis()).unwrap_or(c_int::MAX)
}

fn address(storage: &[u8; 128]) -> Option<SocketAddr> {
    let octets = |at: usize, len: usize| storage.get(at..at + len);
    let family = u16::from_ne_bytes(octets(0, 2)?.try_into().ok()?);
    let port = u16::from_be_bytes(octets(2, 2)?.try_into().ok()?);
    let ip = match c_int::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = octets(4, 4)?.try_into().ok()?;
            IpAddr::V4(Ipv4Addr::from(octets))
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = octets(8, 16)?.try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(octets))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// A protection domain: what is registered in one is reached through queue pairs of the same.
pub(crate) struct Pd {
    lib: &'static Functions,
    raw: NonNull<c_void>,
    device: NonNull<Context>,
}

// SAFETY: verbs objects may be used from any thread.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    /// A domain on the device that serves this connection.
    pub(crate) fn new(id: &Id) -> io::Result<Self> {
        let (lib, device) = (id.lib, id.device()?);
        // SAFETY: librdmacm keeps devices open for the life of the process.
        let raw = unsafe { (lib.ibv_alloc_pd)(device.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { lib, raw, device })
    }

    /// Whether it is on the device that serves this connection.
    pub(crate) fn serves(&self, id: &Id) -> bool {
        id.device().is_ok_and(|device| device == self.device)
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once; memory and queue pairs in it own a share of it and are gone.
        unsafe { (self.lib.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// Who may write registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nobody: it is sent from.
    ReadHere,
    /// This side's device, when something is received into it.
    WrittenHere,
    /// The peer as well, with the key.
    WrittenByPeer,
}

/// Registered memory. The device reaches it until this value is dropped, and it stays mapped until then.
pub(crate) struct Mr {
    raw: NonNull<MemoryRegion>,
    pd: Arc<Pd>,
    _memory: GuestMemory,
}

// SAFETY: verbs objects may be used from any thread.
unsafe impl Send for Mr {}
// SAFETY: as above; a shared Mr is only asked for its keys.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers a part of a region, which must lie inside it.
    pub(crate) fn new(
        pd: &Arc<Pd>,
        memory: &GuestMemory,
        region_index: u32,
        offset: u64,
        bytes: u64,
        access: Access,
    ) -> io::Result<Self> {
        let span = memory
            .span(region_index, offset, bytes)
            .map_err(io::Error::other)?;
        let flags = match access {
            Access::ReadHere => 0,
            Access::WrittenHere => ACCESS_LOCAL_WRITE,
            Access::WrittenByPeer => ACCESS_LOCAL_WRITE | ACCESS_REMOTE_WRITE,
        };
        // SAFETY: the span is mapped, and stays so while this value owns a share of the memory. Writing it by a device is acceptable
        // by GuestMemory's own contract.
        let raw = unsafe {
            (pd.lib.ibv_reg_mr)(pd.raw.as_ptr(), span.as_ptr().cast(), span.len(), flags)
        };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Self {
            raw,
            pd: Arc::clone(pd),
            _memory: memory.clone(),
        })
    }

    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: alive until drop.
        unsafe { self.raw.as_ref() }.lkey
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: alive until drop.
        unsafe { self.raw.as_ref() }.rkey
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once. Work that still refers to it fails with a protection error.
        unsafe { (self.pd.lib.ibv_dereg_mr)(self.raw.as_ptr()) };
    }
}

/// How much may be posted at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depth {
    pub(crate) sends: u32,
    pub(crate) receives: u32,
    /// Pieces of memory in one send.
    pub(crate) pieces: u32,
}

/// A queue pair with its completion queue, on a connection.
pub(crate) struct Endpoint {
    /// First to go: it destroys the queue pair.
    id: Id,
    cq: CompletionQueue,
    depth: Depth,
    _pd: Arc<Pd>,
}

struct CompletionQueue {
    lib: &'static Functions,
    raw: NonNull<c_void>,
    channel: NonNull<CompletionChannel>,
    device: NonNull<Context>,
}

// SAFETY: verbs objects may be used from any thread; polling and posting happen under the caller's lock (&mut or a mutex).
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    fn new(pd: &Pd, entries: u32) -> io::Result<Self> {
        let (lib, device) = (pd.lib, pd.device);
        // SAFETY: the device is open for the life of the process.
        let channel = unsafe { (lib.ibv_create_comp_channel)(device.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(io::Error::last_os_error)?;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: the channel was just made; vector 0 always exists.
        let raw = unsafe {
            (lib.ibv_create_cq)(
                device.as_ptr(),
                entries,
                ptr::null_mut(),
                channel.as_ptr(),
                0,
            )
        };
        let Some(raw) = NonNull::new(raw) else {
            let error = io::Error::last_os_error();
            // SAFETY: made above, nothing uses it.
            unsafe { (lib.ibv_destroy_comp_channel)(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self {
            lib,
            raw,
            channel,
            device,
        };
        set_nonblocking(queue.as_fd())?;
        Ok(queue)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: alive until drop.
        let fd = unsafe { self.channel.as_ref() }.fd;
        // SAFETY: open until drop; the borrow ends with self.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: made in `new`; the queue pair is gone and every event was acknowledged, so this does not wait.
        unsafe { (self.lib.ibv_destroy_cq)(self.raw.as_ptr()) };
        // SAFETY: made in `new`; its queue is gone.
        unsafe { (self.lib.ibv_destroy_comp_channel)(self.channel.as_ptr()) };
    }
}

/// The device's function at `index` of its table.
///
/// # Safety
/// `T` must be the type that the header gives to that member.
unsafe fn operation<T: Copy>(device: NonNull<Context>, index: usize) -> T {
    const { assert!(size_of::<T>() == size_of::<Raw>()) };
    // SAFETY: the device is open for the life of the process, and its table is filled.
    let raw = unsafe { device.as_ref() }.ops[index];
    // SAFETY: a function pointer of this type, by this function's contract.
    unsafe { mem::transmute_copy(&raw) }
}

impl Endpoint {
    /// Makes a queue pair on a connection that is not connected yet.
    pub(crate) fn new(mut id: Id, pd: &Arc<Pd>, wanted: Depth) -> io::Result<Self> {
        let mut limits = MaybeUninit::<DeviceAttr>::zeroed();
        // SAFETY: writes a structure of that size.
        let result = unsafe { (pd.lib.ibv_query_device)(pd.device.as_ptr(), limits.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: zeroed, and then written by the call.
        let limits = unsafe { limits.assume_init() };
        let at_most = |wanted: u32, limit: c_int| wanted.min(u32::try_from(limit).unwrap_or(0));
        let depth = Depth {
            sends: at_most(wanted.sends, limits.max_qp_wr),
            receives: at_most(wanted.receives, limits.max_qp_wr),
            pieces: at_most(wanted.pieces, limits.max_sge),
        };
        if depth.receives < wanted.receives || depth.sends < SENDS_MIN || depth.pieces == 0 {
            return Err(io::Error::other("the RDMA device's queues are too short"));
        }
        let cq = CompletionQueue::new(pd, at_most(depth.sends + depth.receives, limits.max_cqe))?;
        let mut init = QpInit {
            qp_context: ptr::null_mut(),
            send_cq: cq.raw.as_ptr(),
            recv_cq: cq.raw.as_ptr(),
            srq: ptr::null_mut(),
            cap: QpCap {
                max_send_wr: depth.sends,
                max_recv_wr: depth.receives,
                max_send_sge: depth.pieces,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the domain and the queue are on the id's device and outlive the queue pair (fields of this value, in that order).
        check(unsafe { (id.lib.rdma_create_qp)(id.raw.as_ptr(), pd.raw.as_ptr(), &raw mut init) })?;
        id.has_qp = true;
        Ok(Self {
            id,
            cq,
            depth,
            _pd: Arc::clone(pd),
        })
    }

    pub(crate) fn id(&self) -> &Id {
        &self.id
    }

    pub(crate) fn depth(&self) -> Depth {
        self.depth
    }

    /// The descriptor that is ready when something completed after [`arm`](Self::arm).
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.cq.as_fd()
    }

    fn qp(&self) -> Raw {
        // SAFETY: the id is alive, and its start is laid out as CmId.
        unsafe { self.id.raw.as_ref() }.qp
    }

    /// Posts a buffer for one message of the peer.
    pub(crate) fn post_receive(&mut self, id: u64, mut piece: Sge) -> io::Result<()> {
        let mut work = RecvWr {
            id,
            next: ptr::null_mut(),
            sg_list: &raw mut piece,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: this member's type in the header.
        let post: unsafe extern "C" fn(Raw, *mut RecvWr, *mut *mut RecvWr) -> c_int =
            unsafe { operation(self.cq.device, OP_POST_RECV) };
        // SAFETY: the queue pair lives; the work and its piece live during the call, which copies them.
        let result = unsafe { post(self.qp(), &raw mut work, &raw mut bad) };
        posted(result)
    }

    /// Posts a write to the peer's memory, without a completion unless it fails or `signaled` is set.
    pub(crate) fn post_write(
        &mut self,
        id: u64,
        pieces: &[Sge],
        remote_address: u64,
        rkey: u32,
        signaled: Signaled,
    ) -> io::Result<()> {
        self.post(id, pieces, WR_RDMA_WRITE, remote_address, rkey, signaled)
    }

    /// Posts a message to the peer; it completes.
    pub(crate) fn post_send(&mut self, id: u64, piece: Sge) -> io::Result<()> {
        self.post(id, &[piece], WR_SEND, 0, 0, Signaled::Yes)
    }

    fn post(
        &mut self,
        id: u64,
        pieces: &[Sge],
        opcode: u32,
        remote_address: u64,
        rkey: u32,
        signaled: Signaled,
    ) -> io::Result<()> {
        let mut work = SendWr {
            id,
            next: ptr::null_mut(),
            sg_list: pieces.as_ptr().cast_mut(),
            num_sge: c_int::try_from(pieces.len()).unwrap_or(c_int::MAX),
            opcode,
            flags: match signaled {
                Signaled::Yes => SEND_SIGNALED,
                Signaled::No => 0,
            },
            imm: 0,
            remote_address,
            rkey,
            rest: [0; 19],
        };
        let mut bad = ptr::null_mut();
        // SAFETY: this member's type in the header.
        let post: unsafe extern "C" fn(Raw, *mut SendWr, *mut *mut SendWr) -> c_int =
            unsafe { operation(self.cq.device, OP_POST_SEND) };
        // SAFETY: the queue pair lives; the work and its pieces live during the call, which copies them and only reads the pieces.
        let result = unsafe { post(self.qp(), &raw mut work, &raw mut bad) };
        posted(result)
    }

    /// Takes completions; returns how many of `to` were filled.
    pub(crate) fn poll(&mut self, to: &mut [Completion]) -> io::Result<usize> {
        // SAFETY: this member's type in the header.
        let poll: unsafe extern "C" fn(Raw, c_int, *mut Completion) -> c_int =
            unsafe { operation(self.cq.device, OP_POLL_CQ) };
        let room = c_int::try_from(to.len()).unwrap_or(c_int::MAX);
        // SAFETY: the queue lives, and there is room for that many.
        let count = unsafe { poll(self.cq.raw.as_ptr(), room, to.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| io::Error::other("the completion queue failed"))
    }

    /// Makes the descriptor ready at the next completion, after taking notice of events that there were.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel lives and does not block.
        while unsafe {
            (self.cq.lib.ibv_get_cq_event)(
                self.cq.channel.as_ptr(),
                &raw mut queue,
                &raw mut context,
            )
        } == 0
        {
            // SAFETY: one event of this queue, the only one on its channel.
            unsafe { (self.cq.lib.ibv_ack_cq_events)(self.cq.raw.as_ptr(), 1) };
        }
        // SAFETY: this member's type in the header.
        let notify: unsafe extern "C" fn(Raw, c_int) -> c_int =
            unsafe { operation(self.cq.device, OP_REQ_NOTIFY_CQ) };
        // SAFETY: the queue lives; for every completion, not only marked ones.
        posted(unsafe { notify(self.cq.raw.as_ptr(), 0) })
    }
}

/// Fewer sends than this at a time cannot carry a message with its landing.
const SENDS_MIN: u32 = 32;

/// Whether work leaves a completion when it succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signaled {
    Yes,
    No,
}

/// The result of a call that returns an error number.
fn posted(result: c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        number => Err(io::Error::from_raw_os_error(number.abs())),
    }
}

/// A descriptor that one thread makes ready to wake another.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn ring(&self) {
        let one = 1_u64;
        // SAFETY: eight bytes that live during the call. That it fails means that it rings already.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    pub(crate) fn silence(&self) {
        let mut count = 0_u64;
        // SAFETY: room for eight bytes. That it fails means that it did not ring.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors is ready to be read, a signal comes, or the time is over.
pub(crate) fn wait_any(fds: &[BorrowedFd<'_>; 3], at_most: Option<Duration>) -> io::Result<()> {
    let mut entries = fds.map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    let time = at_most.map(|time| libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    let time = time.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: three entries and, unless null, one timespec, alive during the call; no signal mask.
    let result = unsafe { libc::ppoll(entries.as_mut_ptr(), 3, time, ptr::null()) };
    if result >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

/// The soft limit on locked memory in bytes; `None` if there is none.
pub(crate) fn locked_bytes_max() -> Option<u64> {
    let mut limit = MaybeUninit::<libc::rlimit>::zeroed();
    // SAFETY: writes a structure of that size.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, limit.as_mut_ptr()) };
    // SAFETY: zeroed, and written if the call succeeded.
    let limit = unsafe { limit.assume_init() };
    (result == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: reads and changes flags of an open descriptor.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
