//! What a process has open before and after. One test in a process of its own: others would open descriptors meanwhile.

use std::time::{Duration, Instant};

use multifd_transport::conformance::{Kind, no_descriptor_stays_open};
use multifd_transport::{Channel, ListenError, Listener, TcpOptions, connect, memory, unix};

#[test]
fn nothing_stays_open_and_exhaustion_passes() {
    no_descriptor_stays_open(Kind {
        name: "in memory",
        pair: || memory::pair(4_099),
    });
    no_descriptor_stays_open(Kind {
        name: "unix",
        pair: || unix::pair().expect("a socket pair"),
    });
    no_descriptor_stays_open(Kind {
        name: "tcp",
        pair: tcp,
    });
    exhaustion_is_named_and_passes();
}

fn tcp() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let options = TcpOptions::default();
    let listener =
        Listener::bind(&"127.0.0.1:0".parse().expect("an address"), &options).expect("a port");
    let dialled = connect(
        listener.local_address(),
        &options,
        Instant::now() + Duration::from_secs(10),
    )
    .expect("connect");
    (dialled, listener.accept(None).expect("accept").0)
}

/// With no descriptor left, accepting says so, and works again when there is one.
fn exhaustion_is_named_and_passes() {
    let options = TcpOptions::default();
    let listener =
        Listener::bind(&"127.0.0.1:0".parse().expect("an address"), &options).expect("a port");
    let _dialled = connect(
        listener.local_address(),
        &options,
        Instant::now() + Duration::from_secs(10),
    )
    .expect("connect");
    let held = exhaust();
    let error = listener.accept(None).err().expect("no descriptor is left");
    assert!(matches!(error, ListenError::Exhausted(_)), "{error}");
    drop(held);
    listener.accept(None).expect("the connection waited");
}

/// Takes every descriptor that this process may have.
fn exhaust() -> Vec<std::fs::File> {
    let limit = rlimit_to(256);
    let held: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok())
        .take(limit)
        .collect();
    assert!(held.len() < limit, "the limit works");
    held
}

/// Lowers the limit on descriptors, so that exhausting them takes few.
#[expect(unsafe_code, reason = "a limit can be set only by a system call")]
fn rlimit_to(limit: usize) -> usize {
    let value = libc::rlimit {
        rlim_cur: limit as libc::rlim_t,
        rlim_max: limit as libc::rlim_t,
    };
    // SAFETY: reads one rlimit structure that lives during the call.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const value) };
    assert_eq!(result, 0, "setrlimit");
    limit
}
