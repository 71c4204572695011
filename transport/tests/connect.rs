//! Connecting and listening: addresses, deadlines, refusals, options, and the path of a Unix socket.
#![allow(clippy::print_stderr)] // says what is skipped

use std::fs;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use multifd_transport::{
    Address, Channel, ChannelError, ChannelOptions, ConnectError, KeepAlive, ListenError, Listener,
    TcpOptions, connect,
};
use socket2::{Domain, SockRef, Socket, Type};

const LATE_MAX: Duration = Duration::from_secs(5);

fn soon() -> Instant {
    Instant::now() + LATE_MAX
}

fn listen(address: &str) -> Listener {
    Listener::bind(
        &address.parse().expect("an address"),
        &TcpOptions::default(),
    )
    .expect("a free address")
}

/// A path that no other test uses.
fn path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "multifd-connect-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    std::env::temp_dir().join(name)
}

fn failure<T>(result: Result<T, ConnectError>) -> ConnectError {
    result.err().expect("no connection")
}

// SPEC: BELOW-1
#[test]
fn tcp_says_both_ends_and_carries_octets() {
    let listener = listen("127.0.0.1:0");
    let address = listener.local_address().to_string();
    let port = address
        .strip_prefix("tcp:127.0.0.1:")
        .expect("the address that was bound");
    assert_ne!(port, "0", "the port that was chosen");
    let dialled =
        connect(listener.local_address(), &TcpOptions::default(), soon()).expect("a connection");
    let (accepted, peer) = listener.accept(Some(soon())).expect("the connection");
    assert_eq!(dialled.describe(), format!("tcp {peer} → 127.0.0.1:{port}"));
    assert_eq!(
        accepted.describe(),
        format!("tcp 127.0.0.1:{port} → {peer}")
    );
    carries(dialled, accepted);
}

fn carries(left: Box<dyn Channel>, right: Box<dyn Channel>) {
    let ((mut send, _, _), (_, mut receive, _)) = (left.split(), right.split());
    send.send(b"hello", &[]).expect("send");
    let mut octets = [0; 5];
    receive.receive(&mut octets).expect("receive");
    assert_eq!(&octets, b"hello");
}

#[test]
fn a_name_is_tried_at_each_of_its_addresses() {
    // Listening on one family only: a name with both addresses must be tried until the one that listens.
    let listener = listen("127.0.0.1:0");
    let Address::Tcp(target) = listener.local_address() else {
        panic!("a TCP address")
    };
    let name: Address = format!("localhost:{}", target.port())
        .parse()
        .expect("an address");
    let dialled = connect(&name, &TcpOptions::default(), soon()).expect("a connection");
    let (accepted, _) = listener.accept(Some(soon())).expect("the connection");
    carries(dialled, accepted);
}

#[test]
fn refusal_names_the_address_and_the_reason() {
    // Bound but not listening: nobody else can take the port meanwhile.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket
        .bind(
            &"127.0.0.1:0"
                .parse::<std::net::SocketAddr>()
                .expect("an address")
                .into(),
        )
        .expect("a port");
    let bound = socket
        .local_addr()
        .expect("an address")
        .as_socket()
        .expect("an internet address");
    let error = failure(connect(&bound.into(), &TcpOptions::default(), soon()));
    assert!(
        matches!(&error, ConnectError::Refused { attempts, .. } if attempts.len() == 1),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains(&format!(
            "cannot connect to {bound}: {bound}: Connection refused"
        )),
        "{text}"
    );
    assert_eq!(error.code(), "connect-refused");
}

#[test]
fn a_peer_that_never_answers_costs_no_more_than_the_deadline() {
    // A queue for one connection that nobody accepts: the kernel drops what comes after, without an answer.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket
        .bind(
            &"127.0.0.1:0"
                .parse::<std::net::SocketAddr>()
                .expect("an address")
                .into(),
        )
        .expect("a port");
    socket.listen(0).expect("listen");
    let address = Address::from(
        socket
            .local_addr()
            .expect("an address")
            .as_socket()
            .expect("an internet address"),
    );
    let mut held = Vec::new();
    for _ in 0..10 {
        let start = Instant::now();
        let limit = Duration::from_millis(300);
        match connect(&address, &TcpOptions::default(), start + limit) {
            Ok(channel) => held.push(channel),
            Err(error) => {
                assert!(matches!(error, ConnectError::Deadline { .. }), "{error}");
                // Connecting counts in whole milliseconds.
                let least = limit - Duration::from_millis(5);
                assert!(
                    start.elapsed() >= least && start.elapsed() < limit + LATE_MAX,
                    "{:?}",
                    start.elapsed()
                );
                return;
            }
        }
    }
    panic!("a queue for one connection took {}", held.len());
}

#[test]
fn a_deadline_that_passed_connects_nothing() {
    let listener = listen("127.0.0.1:0");
    let error = failure(connect(
        listener.local_address(),
        &TcpOptions::default(),
        Instant::now(),
    ));
    assert!(matches!(error, ConnectError::Deadline { .. }), "{error}");
    let path = path();
    let listener = listen(&format!("unix:{}", path.display()));
    let error = failure(connect(
        listener.local_address(),
        &TcpOptions::default(),
        Instant::now(),
    ));
    assert!(matches!(error, ConnectError::Deadline { .. }), "{error}");
}

#[test]
fn an_unknown_name_is_an_error_that_names_it() {
    // RFC 2606 §2: no name below .invalid exists.
    let address: Address = "nobody.invalid:4000".parse().expect("an address");
    let error = failure(connect(
        &address,
        &TcpOptions::default(),
        Instant::now() + Duration::from_secs(30),
    ));
    let named = match &error {
        ConnectError::Resolve { host, .. } => host == "nobody.invalid",
        // Without a network the resolver may wait for longer than the deadline.
        ConnectError::Deadline { target, .. } => target == "nobody.invalid:4000",
        _ => false,
    };
    assert!(named, "{error}");
}

#[test]
fn options_are_set_on_both_ends() {
    let options = TcpOptions {
        no_delay: true,
        keep_alive: Some(KeepAlive {
            idle: Duration::from_secs(7),
            interval: Duration::from_secs(3),
            count: 4,
        }),
        user_timeout: Some(Duration::from_millis(12_345)),
        send_buffer: Some(100_000),
        receive_buffer: Some(200_000),
        congestion: Some("reno".to_owned()),
    };
    let listener =
        Listener::bind(&"127.0.0.1:0".parse().expect("an address"), &options).expect("a free port");
    let dialled = connect(listener.local_address(), &options, soon()).expect("a connection");
    let (accepted, _) = listener.accept(Some(soon())).expect("the connection");
    for channel in [dialled, accepted] {
        let (send, _receive, _) = channel.split();
        let fd = send.poll_fd().expect("a socket");
        let socket = SockRef::from(&fd);
        assert!(socket.tcp_nodelay().expect("no_delay"));
        assert!(socket.keepalive().expect("keepalive"));
        assert_eq!(
            socket.tcp_keepalive_time().expect("idle"),
            Duration::from_secs(7)
        );
        assert_eq!(
            socket.tcp_keepalive_interval().expect("interval"),
            Duration::from_secs(3)
        );
        assert_eq!(socket.tcp_keepalive_retries().expect("count"), 4);
        assert_eq!(
            socket.tcp_user_timeout().expect("user timeout"),
            Some(Duration::from_millis(12_345))
        );
        // The kernel doubles them.
        assert_eq!(socket.send_buffer_size().expect("send buffer"), 200_000);
        assert_eq!(socket.recv_buffer_size().expect("receive buffer"), 400_000);
        let name = socket.tcp_congestion().expect("congestion");
        assert!(name.starts_with(b"reno"), "{name:?}");
    }
}

#[test]
fn an_option_that_cannot_be_set_is_an_error_that_names_it() {
    let listener = listen("127.0.0.1:0");
    let options = TcpOptions {
        congestion: Some("no-such-thing".to_owned()),
        ..TcpOptions::default()
    };
    let error = failure(connect(listener.local_address(), &options, soon()));
    assert!(
        matches!(
            error,
            ConnectError::Option {
                option: "congestion",
                ..
            }
        ),
        "{error}"
    );
    let error = Listener::bind(&"127.0.0.1:0".parse().expect("an address"), &options)
        .err()
        .expect("no listener");
    assert!(
        matches!(
            error,
            ListenError::Option {
                option: "congestion",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn accept_ends_at_its_deadline_and_goes_on_working() {
    for address in [
        "127.0.0.1:0".to_owned(),
        format!("unix:{}", path().display()),
    ] {
        let listener = listen(&address);
        let start = Instant::now();
        let limit = Duration::from_millis(150);
        let error = listener
            .accept(Some(start + limit))
            .err()
            .expect("nobody connects");
        assert!(matches!(error, ListenError::Deadline), "{error}");
        assert!(
            start.elapsed() >= limit && start.elapsed() < limit + LATE_MAX,
            "{:?}",
            start.elapsed()
        );
        assert!(listener.try_accept().expect("nobody yet").is_none());
        let _dialled = connect(listener.local_address(), &TcpOptions::default(), soon())
            .expect("a connection");
        listener.accept(Some(soon())).expect("the connection");
    }
}

#[test]
fn shutdown_from_another_thread_ends_a_waiting_accept() {
    for address in [
        "127.0.0.1:0".to_owned(),
        "[::1]:0".to_owned(),
        format!("unix:{}", path().display()),
    ] {
        let listener = listen(&address);
        let closer = listener.closer();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let error = listener.accept(None).err();
                (error, Instant::now())
            });
            thread::sleep(Duration::from_millis(100));
            let start = Instant::now();
            closer.shutdown();
            let (error, woken) = waiting.join().expect("no panic");
            assert!(
                matches!(error, Some(ListenError::ShutDown)),
                "{address}: {error:?}"
            );
            assert!(woken.saturating_duration_since(start) < LATE_MAX);
        });
        assert!(matches!(
            listener.try_accept().err(),
            Some(ListenError::ShutDown)
        ));
        drop(listener);
        closer.shutdown();
    }
}

#[test]
fn a_listener_fits_into_a_poll_loop() {
    for address in [
        "127.0.0.1:0".to_owned(),
        format!("unix:{}", path().display()),
    ] {
        let listener = listen(&address);
        assert_eq!(listener.as_fd().as_raw_fd(), listener.as_raw_fd());
        let socket = SockRef::from(&listener);
        assert!(
            socket.nonblocking().expect("its mode"),
            "accepting never sleeps in the kernel"
        );
        let dialled: Vec<_> = (0..3)
            .map(|_| {
                connect(listener.local_address(), &TcpOptions::default(), soon())
                    .expect("a connection")
            })
            .collect();
        // Connections on loopback stand when connect returns, so all can be taken without waiting.
        let accepted: Vec<_> =
            std::iter::from_fn(|| listener.try_accept().expect("accept")).collect();
        assert_eq!(accepted.len(), dialled.len());
    }
}

#[test]
fn a_port_in_use_is_an_error_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = Address::from(taken.local_addr().expect("its address"));
    let error = Listener::bind(&address, &TcpOptions::default())
        .err()
        .expect("the port is taken");
    assert!(matches!(error, ListenError::Bind { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_living_one_is_not() {
    let path = path();
    let address = Address::unix(&path).expect("a short path");
    drop(UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists(), "what a process that was killed leaves");
    let listener = Listener::bind(&address, &TcpOptions::default()).expect("replaces it");
    let error = Listener::bind(&address, &TcpOptions::default())
        .err()
        .expect("somebody listens");
    assert!(matches!(error, ListenError::Bind { .. }), "{error}");
    let _dialled =
        connect(&address, &TcpOptions::default(), soon()).expect("the first still listens");
    listener.accept(Some(soon())).expect("the connection");
    drop(listener);
    assert!(!path.exists(), "its own path is removed");
}

#[test]
fn a_file_that_is_no_socket_is_never_removed() {
    let path = path();
    fs::write(&path, "precious").expect("a file");
    let address = Address::unix(&path).expect("a short path");
    let error = Listener::bind(&address, &TcpOptions::default())
        .err()
        .expect("it is in the way");
    assert!(matches!(error, ListenError::Bind { .. }), "{error}");
    assert_eq!(fs::read(&path).expect("still there"), b"precious");
    fs::remove_file(&path).expect("ours");
}

fn listen_with_mode(address: &Address, mode: u32) -> Listener {
    let mut options = ChannelOptions::default();
    options.unix.mode = mode;
    Listener::bind_with(address, &options).expect("a free path")
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("the socket").permissions().mode() & 0o777
}

#[test]
fn only_this_user_may_connect_unless_others_are_asked_for_whatever_the_umask() {
    let (ours, all) = (path(), path());
    let _own = Listener::bind(
        &Address::unix(&ours).expect("a short path"),
        &TcpOptions::default(),
    )
    .expect("a free path");
    assert_eq!(mode(&ours), 0o600);
    // More than a usual umask leaves.
    let _open = listen_with_mode(&Address::unix(&all).expect("a short path"), 0o666);
    assert_eq!(mode(&all), 0o666);
}

#[test]
fn at_no_moment_may_others_connect() {
    // Somebody looks as often as he can while sockets are made; their mode is never another one.
    let stop = AtomicBool::new(false);
    let path = path();
    let address = Address::unix(&path).expect("a short path");
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut seen = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                if let Ok(metadata) = fs::metadata(&path) {
                    seen.push(metadata.permissions().mode() & 0o777);
                }
            }
            seen.sort_unstable();
            seen.dedup();
            seen
        });
        for _ in 0..200 {
            drop(Listener::bind(&address, &TcpOptions::default()).expect("a free path"));
        }
        stop.store(true, Ordering::Relaxed);
        let seen = watching.join().expect("no panic");
        assert!(
            seen.iter().all(|mode| *mode == 0o600),
            "{seen:?} (384 is 0o600)"
        );
    });
}

#[test]
fn of_many_that_find_a_stale_socket_one_gets_it() {
    for _ in 0..20 {
        let path = path();
        let address = Address::unix(&path).expect("a short path");
        drop(UnixListener::bind(&path).expect("a socket"));
        let start = Barrier::new(4);
        let listeners: Vec<_> = thread::scope(|scope| {
            let binding: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        Listener::bind(&address, &TcpOptions::default()).ok()
                    })
                })
                .collect();
            let bound = binding
                .into_iter()
                .filter_map(|one| one.join().expect("no panic"));
            bound.collect()
        });
        assert_eq!(
            listeners.len(),
            1,
            "nobody took a living one for a stale one"
        );
        let _dialled = connect(&address, &TcpOptions::default(), soon()).expect("it listens");
        listeners[0]
            .accept(Some(soon()))
            .expect("at the one that has the path");
    }
}

#[test]
fn abstract_names_have_no_file() {
    let name = format!("unix:@{}", path().display());
    let address: Address = name.parse().expect("an address");
    let listener = Listener::bind(&address, &TcpOptions::default()).expect("a free name");
    assert_eq!(listener.local_address().to_string(), name);
    let dialled = connect(&address, &TcpOptions::default(), soon()).expect("a connection");
    let (accepted, _) = listener.accept(Some(soon())).expect("the connection");
    carries(dialled, accepted);
    assert!(!PathBuf::from(&name["unix:".len()..]).exists());
    assert!(
        Listener::bind(&address, &TcpOptions::default()).is_err(),
        "it is taken"
    );
    drop(listener);
    listen(&name);
}

#[test]
fn vsock_carries_octets() {
    // Context 1 is this machine, where the kernel has the loopback transport.
    let address: Address = "vsock:1:4294967295".parse().expect("an address");
    let listener = match Listener::bind(&address, &TcpOptions::default()) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("SKIPPED vsock_carries_octets: {error}");
            return;
        }
    };
    let bound = listener.local_address().clone();
    let dialled = match connect(&bound, &TcpOptions::default(), soon()) {
        Ok(channel) => channel,
        Err(error) => {
            eprintln!("SKIPPED vsock_carries_octets: {error}");
            return;
        }
    };
    assert!(
        dialled.describe().starts_with("vsock "),
        "{}",
        dialled.describe()
    );
    let (accepted, _) = listener.accept(Some(soon())).expect("the connection");
    carries(dialled, accepted);
}

#[test]
fn a_path_that_somebody_replaced_is_left_alone() {
    let path = path();
    let listener = listen(&format!("unix:{}", path.display()));
    fs::remove_file(&path).expect("the socket");
    fs::write(&path, "somebody else's").expect("a file");
    drop(listener);
    assert_eq!(fs::read(&path).expect("still there"), b"somebody else's");
    fs::remove_file(&path).expect("ours");
}

#[test]
fn nobody_at_a_unix_path_is_a_refusal() {
    let address = Address::unix(&path()).expect("a short path");
    let error = failure(connect(&address, &TcpOptions::default(), soon()));
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn a_reset_is_told_to_both_halves() {
    let listener = listen("127.0.0.1:0");
    let dialled =
        connect(listener.local_address(), &TcpOptions::default(), soon()).expect("a connection");
    let (accepted, _) = listener.accept(Some(soon())).expect("the connection");
    let (mut send, mut receive, _) = dialled.split();
    // To close with bytes unread resets the connection.
    send.send(&[0; 100], &[]).expect("send");
    thread::sleep(Duration::from_millis(50));
    drop(accepted);
    thread::sleep(Duration::from_millis(50));
    let error = receive.receive(&mut [0; 4]).expect_err("nobody is there");
    assert!(matches!(error, ChannelError::Reset { .. }), "{error}");
    let error = send.send(&[0; 100], &[]).expect_err("nobody is there");
    assert!(matches!(error, ChannelError::Reset { .. }), "{error}");
}
