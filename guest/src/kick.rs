//! How a vCPU thread is got out of `KVM_RUN`.
//!
//! Two things are needed. The byte `immediate_exit` in the page that the kernel shares with us makes the *next*
//! `KVM_RUN` return at once; a signal makes the *present* one return. Setting the byte first and sending the signal
//! second leaves no gap: a thread that is about to enter sees the byte, one that is inside gets the signal.
//!
//! The byte is written through a second mapping of that page, because the first one belongs to [`VcpuFd`], which
//! makes exclusive references to it.
//!
//! The signal is a real-time one whose handler does nothing. It is chosen once for the process: the first one above
//! `SIGRTMIN` that nobody handles or ignores, and it is never given back.
#![allow(unsafe_code)] // maps a page that the kernel shares, installs a signal handler, signals a thread

use std::mem::{self, offset_of};
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::config::PAGE_BYTES;
use crate::error::{Error, Result};

/// Gets one vCPU out of `KVM_RUN`.
#[derive(Debug)]
pub(crate) struct Kick {
    page: NonNull<u8>,
    signal: libc::c_int,
}

// SAFETY: the page is ours until drop, and only one byte of it is accessed, atomically.
unsafe impl Send for Kick {}
// SAFETY: as for Send.
unsafe impl Sync for Kick {}

impl Kick {
    /// The kick of `vcpu`.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the page cannot be mapped or no signal is free.
    pub(crate) fn new(vcpu: &VcpuFd) -> Result<Self> {
        let signal = kick_signal()?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let descriptor = vcpu.as_raw_fd();
        // SAFETY: a new shared mapping of the first page of the vCPU's descriptor, at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE_BYTES as usize,
                protection,
                libc::MAP_SHARED,
                descriptor,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(Error::last_os("mmap(kvm_run)"));
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| Error::last_os("mmap(kvm_run)"))?;
        Ok(Self { page, signal })
    }

    /// Makes the next `KVM_RUN` return at once, and every one after it.
    pub(crate) fn arm(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Lets `KVM_RUN` run again.
    pub(crate) fn disarm(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Arms, and makes a present `KVM_RUN` of `thread` return.
    pub(crate) fn kick<T>(&self, thread: &JoinHandle<T>) {
        self.arm();
        // SAFETY: a thread that was not joined yet has a valid pthread_t. It answers ESRCH if the thread has ended,
        // which is as good.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), self.signal) };
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the offset is inside the mapped page.
        let octet = unsafe { self.page.add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: one byte needs no alignment, it is mapped as long as self lives, and through this mapping nobody
        // accesses it otherwise.
        unsafe { AtomicU8::from_ptr(octet.as_ptr()) }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no reference into it outlives self.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_BYTES as usize) };
    }
}

/// Lets this thread be kicked, whatever signals its creator had blocked.
pub(crate) fn unblock_kick() -> Result<()> {
    let signal = kick_signal()?;
    // SAFETY: an all-zero sigset_t is a valid value to be overwritten.
    let mut set = unsafe { mem::zeroed() };
    // SAFETY: `set` is ours.
    unsafe { libc::sigemptyset(&mut set) };
    // SAFETY: `set` is ours and initialised, the signal is one of the kernel's.
    unsafe { libc::sigaddset(&mut set, signal) };
    // SAFETY: changes only the mask of the calling thread; the old mask is not asked for.
    let answer = unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut()) };
    if answer == 0 {
        Ok(())
    } else {
        Err(Error::last_os("pthread_sigmask"))
    }
}

/// The signal of this process, with its handler installed.
fn kick_signal() -> Result<libc::c_int> {
    static SIGNAL: OnceLock<Option<libc::c_int>> = OnceLock::new();
    let signal =
        *SIGNAL.get_or_init(|| (libc::SIGRTMIN() + 1..=libc::SIGRTMAX()).find(|s| claim(*s)));
    signal.ok_or(Error::Misuse {
        advice: "leave one real-time signal unhandled: the guest needs it to stop vCPUs",
    })
}

/// Installs the empty handler for `signal`, if nobody else has one.
fn claim(signal: libc::c_int) -> bool {
    // SAFETY: all-zero is a valid sigaction: default handler, no flags, empty mask.
    let mut old: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: asks only, into a structure of ours.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &mut old) };
    if asked != 0 || old.sa_sigaction != libc::SIG_DFL {
        return false;
    }
    // SAFETY: as above. No SA_RESTART: interrupting is the purpose.
    let mut new: libc::sigaction = unsafe { mem::zeroed() };
    new.sa_sigaction = do_nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the handler has the type for flags without SA_SIGINFO, does nothing and so is async-signal-safe.
    unsafe { libc::sigaction(signal, &new, ptr::null_mut()) == 0 }
}

extern "C" fn do_nothing(_signal: libc::c_int) {}
