//! The simulator's side of the C library: time, waiting and threads of simulated threads go to the scheduler.
//!
//! The standard library and every crate above it wait, sleep, look at the clock and start threads through a handful of functions
//! of the C library. This file defines functions of these names; the linker prefers them to the library's. A thread that
//! belongs to no simulation is passed on to the real function, found with `dlsym(RTLD_NEXT)`.
//! So the real drivers run unchanged in the simulator: there is no second implementation of them that could be right where they
//! are wrong. Included (with `#[path]`) by the programs that simulate, and by nothing else: no library and no program of the
//! product contains it.
#![allow(unsafe_code)] // The C library's interface is made of pointers.
#![allow(unreachable_pub)] // Who calls these functions is the linker's affair.

use std::ffi::{CStr, c_int, c_long, c_uint, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use multifd_tests::sim::schedule::{self, Key, Wake};

/// The time of day at simulated time 0: one moment in 2026, always the same.
const EPOCH_S: u64 = 1_790_000_000;

const NS: u64 = 1_000_000_000;

/// A function of the C library, looked up once.
struct Real {
    name: &'static CStr,
    at: AtomicPtr<c_void>,
}

impl Real {
    const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            at: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    fn get(&self) -> *mut c_void {
        let known = self.at.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name ends with a zero byte; RTLD_NEXT asks for the next library's definition.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if found.is_null() {
            // Nothing can be said here: saying needs these functions.
            std::process::abort();
        }
        self.at.store(found, Ordering::Relaxed);
        found
    }
}

/// Calls a real function by the type that the C library documents for it.
macro_rules! real {
    ($name:literal as $type:ty, $($argument:expr),*) => {{
        static REAL: Real = Real::new($name);
        // SAFETY: the symbol of this name in the C library has this type.
        let function = unsafe { std::mem::transmute::<*mut c_void, $type>(REAL.get()) };
        // SAFETY: the arguments are those that our caller passed under the same contract.
        unsafe { function($($argument),*) }
    }};
}

fn write_time(to: *mut libc::timespec, ns: u64) {
    let time = libc::timespec {
        tv_sec: i64::try_from(ns / NS).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % NS).unwrap_or(0),
    };
    // SAFETY: the caller of clock_gettime owns a timespec there.
    unsafe { to.write(time) };
}

fn read_time(from: *const libc::timespec) -> u64 {
    // SAFETY: the caller passes a valid timespec where the C library asks for one.
    let time = unsafe { from.read() };
    u64::try_from(time.tv_sec).unwrap_or(0) * NS + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Simulated time; the processor's own time of a thread stays real.
///
/// # Safety
/// As clock_gettime(2): `to` points to a timespec.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, to: *mut libc::timespec) -> c_int {
    if schedule::is_simulated() {
        match clock {
            libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_RAW | libc::CLOCK_BOOTTIME => {
                write_time(to, schedule::now());
                return 0;
            }
            libc::CLOCK_REALTIME => {
                write_time(to, EPOCH_S * NS + schedule::now());
                return 0;
            }
            _ => {}
        }
    }
    type Function = unsafe extern "C" fn(libc::clockid_t, *mut libc::timespec) -> c_int;
    real!(c"clock_gettime" as Function, clock, to)
}

/// Sleeps on simulated time.
///
/// # Safety
/// As clock_nanosleep(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_nanosleep(
    clock: libc::clockid_t,
    flags: c_int,
    wanted: *const libc::timespec,
    left: *mut libc::timespec,
) -> c_int {
    if schedule::is_simulated() {
        let ns = read_time(wanted);
        if flags & libc::TIMER_ABSTIME == 0 {
            schedule::sleep(ns);
        } else {
            schedule::sleep(ns.saturating_sub(schedule::now()));
        }
        return 0;
    }
    type Function = unsafe extern "C" fn(
        libc::clockid_t,
        c_int,
        *const libc::timespec,
        *mut libc::timespec,
    ) -> c_int;
    real!(c"clock_nanosleep" as Function, clock, flags, wanted, left)
}

/// Sleeps on simulated time.
///
/// # Safety
/// As nanosleep(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nanosleep(
    wanted: *const libc::timespec,
    left: *mut libc::timespec,
) -> c_int {
    if schedule::is_simulated() {
        schedule::sleep(read_time(wanted));
        return 0;
    }
    type Function = unsafe extern "C" fn(*const libc::timespec, *mut libc::timespec) -> c_int;
    real!(c"nanosleep" as Function, wanted, left)
}

/// In a simulation nobody else runs, so there is nobody to make room for; the network's operations are where threads change.
#[unsafe(no_mangle)]
pub extern "C" fn sched_yield() -> c_int {
    if schedule::is_simulated() {
        return 0;
    }
    type Function = unsafe extern "C" fn() -> c_int;
    real!(c"sched_yield" as Function,)
}

/// Futexes of simulated threads wait in the scheduler; so do, above them, locks, condition variables and parked threads.
///
/// # Safety
/// As syscall(2). The C library's function takes any number of arguments; on x86-64 six registers carry all that a call can have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if schedule::is_simulated() {
        if number == libc::SYS_futex {
            return futex(a as usize, b as c_int, c as u32, d as *const libc::timespec);
        }
        if number == libc::SYS_getrandom {
            fill_random(a as *mut u8, b as usize);
            return b;
        }
    }
    type Function =
        unsafe extern "C" fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long;
    real!(c"syscall" as Function, number, a, b, c, d, e, f)
}

fn futex(word: usize, operation: c_int, value: u32, time: *const libc::timespec) -> c_long {
    let error = |number: c_int| {
        // SAFETY: asks for an address and has no conditions.
        let to = unsafe { libc::__errno_location() };
        // SAFETY: the address of this thread's own error number is valid as long as the thread lives.
        unsafe { to.write(number) };
        -1
    };
    match operation & !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME) {
        kind @ (libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET) => {
            // SAFETY: the caller of a futex operation passes the address of a live, aligned 32-bit word.
            let found = unsafe { std::sync::atomic::AtomicU32::from_ptr(word as *mut u32) }
                .load(Ordering::SeqCst);
            if found != value {
                return error(libc::EAGAIN);
            }
            let deadline = (!time.is_null()).then(|| {
                let time = read_time(time);
                // FUTEX_WAIT waits for a time, FUTEX_WAIT_BITSET until one (futex(2)).
                if kind == libc::FUTEX_WAIT {
                    schedule::now() + time
                } else {
                    time
                }
            });
            match schedule::block(Key::Word(word), deadline) {
                Wake::Woken => 0,
                Wake::TimedOut => error(libc::ETIMEDOUT),
            }
        }
        libc::FUTEX_WAKE | libc::FUTEX_WAKE_BITSET => {
            schedule::wake(Key::Word(word), value as usize) as c_long
        }
        _ => error(libc::ENOSYS),
    }
}

fn fill_random(to: *mut u8, bytes: usize) {
    for at in 0..bytes {
        let octet = schedule::random_u64() as u8;
        // SAFETY: the caller of getrandom owns `bytes` bytes from `to` on.
        let to = unsafe { to.add(at) };
        // SAFETY: as above.
        unsafe { to.write(octet) };
    }
}

/// Random bytes of the seed.
///
/// # Safety
/// As getrandom(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(to: *mut c_void, bytes: usize, flags: c_uint) -> isize {
    if schedule::is_simulated() {
        fill_random(to.cast(), bytes);
        return isize::try_from(bytes).unwrap_or(isize::MAX);
    }
    type Function = unsafe extern "C" fn(*mut c_void, usize, c_uint) -> isize;
    real!(c"getrandom" as Function, to, bytes, flags)
}

type Body = extern "C" fn(*mut c_void) -> *mut c_void;

/// What a simulated thread is started with.
struct Start {
    id: u32,
    body: Body,
    argument: *mut c_void,
}

extern "C" fn trampoline(start: *mut c_void) -> *mut c_void {
    // SAFETY: `pthread_create` below made it from a Box and gave it to this thread alone.
    let start = unsafe { Box::from_raw(start.cast::<Start>()) };
    schedule::enter(start.id);
    let result = (start.body)(start.argument);
    schedule::leave();
    result
}

type Create = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    Body,
    *mut c_void,
) -> c_int;

/// A thread that a simulated thread starts is a simulated thread.
///
/// # Safety
/// As pthread_create(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    handle: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    body: Body,
    argument: *mut c_void,
) -> c_int {
    if !schedule::is_simulated() {
        return real!(
            c"pthread_create" as Create,
            handle,
            attributes,
            body,
            argument
        );
    }
    let id = schedule::announce();
    let start = Box::into_raw(Box::new(Start { id, body, argument }));
    let result = real!(
        c"pthread_create" as Create,
        handle,
        attributes,
        trampoline,
        start.cast()
    );
    if result == 0 {
        // SAFETY: the call above succeeded, so it has written the handle.
        schedule::known_as(id, unsafe { handle.read() });
    } else {
        schedule::withdraw(id);
        // SAFETY: no thread was started, so it still belongs to this one.
        drop(unsafe { Box::from_raw(start) });
    }
    result
}

/// Waits for the end in the scheduler first; the real wait is then for a thread that is about to end.
///
/// # Safety
/// As pthread_join(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_join(handle: libc::pthread_t, result: *mut *mut c_void) -> c_int {
    if schedule::is_simulated() {
        let _ = schedule::join(handle);
    }
    type Function = unsafe extern "C" fn(libc::pthread_t, *mut *mut c_void) -> c_int;
    real!(c"pthread_join" as Function, handle, result)
}
