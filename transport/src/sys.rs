//! The system calls of the socket kinds, and the lists of memory that they take.
//!
//! Rule: a list of memory borrows everything that it points to, so that no call can see memory that is gone. Nothing here
//! decides anything: retries, deadlines and errors are the callers' business.
#![allow(unsafe_code)] // System calls that take raw memory have no safe form.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::time::Duration;

use crate::memory::Span;

/// The most entries that one call takes: the kernel's `UIO_MAXIOV`.
pub(crate) const IO_VECS_MAX: usize = 1024;

/// Room for one list of memory, kept between calls so that none of them allocates.
pub(crate) struct Scratch {
    list: Vec<libc::iovec>,
}

// SAFETY: the addresses in the list are used only through a SendList or LandingList, which borrow what they point to. Between
// calls they are dead numbers.
unsafe impl Send for Scratch {}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            list: Vec::with_capacity(IO_VECS_MAX),
        }
    }

    /// An empty list of memory to send from.
    pub(crate) fn send_list<'d>(&mut self) -> SendList<'_, 'd> {
        SendList(self.list())
    }

    /// An empty list of memory to receive into.
    pub(crate) fn landing_list<'d>(&mut self) -> LandingList<'_, 'd> {
        LandingList(self.list())
    }

    fn list<'d>(&mut self) -> List<'_, 'd> {
        self.list.clear();
        List {
            list: &mut self.list,
            first: 0,
            data: PhantomData,
        }
    }
}

/// Memory to send from, which lives for 'd.
pub(crate) struct SendList<'s, 'd>(List<'s, 'd>);

/// Memory to receive into, which lives for 'd and is nobody else's to use.
pub(crate) struct LandingList<'s, 'd>(List<'s, 'd>);

struct List<'s, 'd> {
    list: &'s mut Vec<libc::iovec>,
    /// Entries before this one are done.
    first: usize,
    data: PhantomData<&'d mut [u8]>,
}

impl<'d> SendList<'_, 'd> {
    pub(crate) fn push_octets(&mut self, octets: &'d [u8]) {
        self.0.push(octets.as_ptr().cast_mut(), octets.len());
    }

    pub(crate) fn push_span(&mut self, span: Span<'d>) {
        self.0.push_span(span);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0.is_full()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.is_done()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Bytes that are not done.
    pub(crate) fn bytes(&self) -> u64 {
        self.0
            .list
            .iter()
            .skip(self.0.first)
            .map(|entry| entry.iov_len as u64)
            .sum()
    }

    /// The first `count` bytes are done.
    pub(crate) fn advance(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// One `sendmsg`; returns how many bytes the kernel took.
    ///
    /// `more`: the kernel may keep a last piece that fills no packet until the next call.
    pub(crate) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        blocking: Blocking,
        more: bool,
    ) -> io::Result<usize> {
        let more = if more { libc::MSG_MORE } else { 0 };
        let message = self.0.message();
        // SAFETY: `message` holds a list of entries, each readable for 'd, and the kernel only reads them.
        let result = unsafe {
            libc::sendmsg(
                fd.as_raw_fd(),
                &raw const message,
                blocking.flags() | libc::MSG_NOSIGNAL | more,
            )
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl<'d> LandingList<'_, 'd> {
    pub(crate) fn push_octets(&mut self, octets: &'d mut [u8]) {
        self.0.push(octets.as_mut_ptr(), octets.len());
    }

    pub(crate) fn push_span(&mut self, span: Span<'d>) {
        self.0.push_span(span);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0.is_full()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.is_done()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The first `count` bytes are done.
    pub(crate) fn advance(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// One `recvmsg`; returns how many bytes landed, 0 at the end of the stream.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, blocking: Blocking) -> io::Result<usize> {
        let mut message = self.0.message();
        // SAFETY: `message` holds a list of entries, each writable for 'd: private ones are borrowed mutably, guest ones may be
        // written by contract.
        let result = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, blocking.flags()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl<'d> List<'_, 'd> {
    /// Adds a span; one that continues the entry before it in memory makes that entry longer.
    fn push_span(&mut self, span: Span<'d>) {
        let start = span.as_ptr();
        match self.list.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start => {
                last.iov_len += span.len()
            }
            _ => self.push(start, span.len()),
        }
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        if len > 0 {
            debug_assert!(!self.is_full(), "callers ask first");
            self.list.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
        }
    }

    fn is_full(&self) -> bool {
        self.list.len() >= IO_VECS_MAX
    }

    fn is_done(&self) -> bool {
        self.first == self.list.len()
    }

    fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(entry) = self.list.get_mut(self.first) {
            if count < entry.iov_len {
                entry.iov_base = entry.iov_base.cast::<u8>().wrapping_add(count).cast();
                entry.iov_len -= count;
                return;
            }
            count -= entry.iov_len;
            self.first += 1;
        }
        debug_assert_eq!(count, 0, "the kernel moves no more than was listed");
    }

    fn message(&mut self) -> libc::msghdr {
        let entries = self.list.get_mut(self.first..).unwrap_or_default();
        libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: entries.as_mut_ptr(),
            msg_iovlen: entries.len() as _,
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }
}

/// Whether a call may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blocking {
    /// Until something moves, or the socket's own time limit.
    Yes,
    /// Not at all.
    No,
}

impl Blocking {
    fn flags(self) -> libc::c_int {
        match self {
            Self::Yes => 0,
            Self::No => libc::MSG_DONTWAIT,
        }
    }
}

/// What to wait for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ready {
    /// Bytes to receive, or a connection to accept.
    Receive,
    /// Room to send.
    Send,
}

impl Ready {
    fn events(self) -> libc::c_short {
        match self {
            Self::Receive => libc::POLLIN,
            Self::Send => libc::POLLOUT,
        }
    }
}

/// Waits until the descriptor is ready, or failed, or the time is over: the caller finds out which by trying. A signal ends the
/// wait early. Returns whether it is ready or failed.
pub(crate) fn wait(
    fd: BorrowedFd<'_>,
    ready: Ready,
    at_most: Option<Duration>,
) -> io::Result<bool> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: ready.events(),
        revents: 0,
    };
    let time = at_most.map(timespec);
    let time = time.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: one pollfd and, unless null, one timespec, both alive during the call; no signal mask is given.
    let result = unsafe { libc::ppoll(&raw mut entry, 1, time, ptr::null()) };
    if result >= 0 {
        return Ok(result > 0);
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        error => Err(error),
    }
}

/// Waits until some of the descriptors are ready, or failed, or the time is over; gives their indices in rising order. A signal ends
/// the wait early.
pub(crate) fn wait_for_some(
    fds: &[BorrowedFd<'_>],
    ready: Ready,
    at_most: Duration,
) -> io::Result<Vec<usize>> {
    let mut entries: Vec<_> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: ready.events(),
            revents: 0,
        })
        .collect();
    let time = timespec(at_most);
    let count = entries.len() as libc::nfds_t;
    // SAFETY: as many pollfds as are told, and one timespec, all alive during the call; no signal mask is given.
    let result = unsafe { libc::ppoll(entries.as_mut_ptr(), count, &raw const time, ptr::null()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok(Vec::new()),
            _ => Err(error),
        };
    }
    let ready = entries
        .iter()
        .enumerate()
        .filter(|(_, entry)| entry.revents != 0);
    Ok(ready.map(|(index, _)| index).collect())
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// Asks the kernel to wake a receiver only when this many bytes wait (`SO_RCVLOWAT`, socket(7)), or the stream ended. A wish: a
/// kernel that does not grant it wakes too often, no more, so its answer is not looked at.
pub(crate) fn set_low_water(fd: BorrowedFd<'_>, bytes: i32) {
    // SAFETY: one int, alive during the call, of the length given.
    let _ = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
}

/// What the kernel holds of it, for tests.
#[cfg(test)]
pub(crate) fn low_water(fd: BorrowedFd<'_>) -> i32 {
    let mut bytes = 0_i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: one int and its length, both alive during the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw mut bytes).cast(),
            &raw mut len,
        )
    };
    assert_eq!(result, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, RegionLayout};

    fn lengths(list: &SendList<'_, '_>) -> Vec<usize> {
        list.0
            .list
            .iter()
            .skip(list.0.first)
            .map(|entry| entry.iov_len)
            .collect()
    }

    #[test]
    fn neighbours_in_guest_memory_become_one_entry() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 1 << 16,
        }])
        .unwrap();
        let span = |offset, len| memory.span(0, offset, len).unwrap();
        let mut scratch = Scratch::new();
        let mut list = scratch.send_list();
        for part in [
            span(0, 10),
            span(10, 5),
            span(16, 4),
            span(20, 0),
            span(20, 1),
            span(0, 3),
            span(3, 1),
        ] {
            list.push_span(part);
        }
        list.push_octets(&[]);
        list.push_octets(b"ab");
        assert_eq!(lengths(&list), [15, 5, 4, 2]);
        assert_eq!(list.bytes(), 26);
    }

    #[test]
    fn advancing_leaves_exactly_what_is_not_done() {
        let octets: Vec<u8> = (0..100).collect();
        let pieces = [3_usize, 1, 40, 7, 49];
        for done in 0..=100 {
            let mut scratch = Scratch::new();
            let mut list = scratch.send_list();
            let mut at = 0;
            for piece in pieces {
                list.push_octets(&octets[at..at + piece]);
                at += piece;
            }
            // In two steps, so that the second begins in the middle of an entry.
            list.advance(done / 3);
            list.advance(done - done / 3);
            assert_eq!(
                (list.bytes(), list.is_done()),
                (100 - done as u64, done == 100)
            );
            if let Some(entry) = list.0.list.get(list.0.first) {
                let start = entry.iov_base as usize - octets.as_ptr() as usize;
                assert_eq!(start, done, "the next byte to send");
            }
        }
    }

    #[test]
    fn a_list_is_full_at_what_the_kernel_takes() {
        let mut scratch = Scratch::new();
        let mut list = scratch.send_list();
        for _ in 0..IO_VECS_MAX {
            assert!(!list.is_full());
            list.push_octets(b"x");
        }
        assert!(list.is_full());
        let capacity = list.0.list.capacity();
        list.clear();
        assert!(list.is_done() && !list.is_full());
        assert_eq!(
            list.0.list.capacity(),
            capacity,
            "room is kept between calls"
        );
        // SAFETY: sysconf reads a constant of the system.
        let kernel = unsafe { libc::sysconf(libc::_SC_IOV_MAX) };
        assert_eq!(kernel, IO_VECS_MAX as i64);
    }
}
