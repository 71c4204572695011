//! What a bridge at the destination says to a peer that is driven by hand: the rules of carried streams (SPEC.md section 22) that
//! two honest programs never show.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use multifd_bridge::destination::{self, Destination};
use multifd_bridge::{Config, Ended, MonitorAddress, Report};
use multifd_tests::peer::{PATIENCE, Peer};
use multifd_transport::{Address, Listener, TcpOptions, connect};
use multifd_wire::frame::{
    Grant, OutcomeState, SetupEnd, StreamCredit, StreamData, StreamEnd, StreamEndKind, StreamOpen,
    StreamOutcome,
};
use multifd_wire::{
    Body, Features, Frame, Hello, HelloReply, Incarnation, Kind, LaneId, Phase, Reason, SessionId,
    StreamId, Token,
};

const FEATURES: Features = Features::BRIDGE.union(Features::RESUME);

/// The main stream of a QEMU migration: its magic, so that the bridge knows which connection is the first.
const MAIN: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x03pc0";

/// A bridge at the destination, and the monitor's socket behind it.
struct Bridge {
    address: Address,
    monitor: UnixListener,
    stop: Arc<AtomicBool>,
    run: Option<JoinHandle<Report>>,
    folder: std::path::PathBuf,
}

impl Bridge {
    fn start() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("mfd-peer-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join("in.sock");
        let monitor = UnixListener::bind(&socket).unwrap();
        let listener =
            Listener::bind(&"127.0.0.1:0".parse().unwrap(), &TcpOptions::default()).unwrap();
        let address = listener.local_address().clone();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = std::thread::spawn(move || {
            let destination = Destination {
                monitor: MonitorAddress::Unix(socket),
                listeners: vec![listener],
                // Nobody asks how it ended after an end that the peer brought about.
                config: Config {
                    remember: Duration::from_millis(500),
                    ..Config::default()
                },
            };
            destination::run(destination, &stopped).unwrap()
        });
        Self {
            address,
            monitor,
            stop,
            run: Some(run),
            folder,
        }
    }

    fn dial(&self) -> Peer {
        let deadline = Instant::now() + PATIENCE;
        Peer::new(connect(&self.address, &TcpOptions::default(), deadline).unwrap())
    }

    /// The control channel of a session, and what the destination granted.
    fn open(&self) -> (Peer, SessionId, Grant) {
        let session = SessionId::new([7; 16]);
        let mut control = self.dial();
        let reply = control.greet(&Hello::start(session, FEATURES, Features::NONE));
        assert!(
            matches!(reply, Ok(HelloReply::Accepted { .. })),
            "{reply:?}"
        );
        let heard = control.hear_kind(Kind::Grant);
        let Frame::Grant(grant) = heard.frame() else {
            unreachable!("that kind was waited for")
        };
        control.keep_alive();
        (control, session, grant)
    }

    fn lane(&self, session: SessionId, ticket: Token, incarnation: u32) -> Peer {
        let mut lane = self.dial();
        let (number, incarnation) = (LaneId::new(0), Incarnation::new(incarnation));
        let reply = lane.greet(&Hello::join(session, ticket, FEATURES, number, incarnation));
        assert!(
            matches!(reply, Ok(HelloReply::Accepted { .. })),
            "{reply:?}"
        );
        lane
    }

    /// The connection that the bridge makes next to the monitor.
    fn connection(&self) -> UnixStream {
        let (socket, _) = self.monitor.accept().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// How it ended.
    fn ended(mut self) -> Report {
        self.run.take().expect("once").join().unwrap()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn piece(lane: &Peer, stream: u32, offset: u64, octets: &[u8]) {
    let frame = StreamData {
        stream: StreamId::new(stream),
        offset,
    };
    lane.send_with(frame, Body::Octets(octets), octets);
}

fn clean_end(control: &Peer, stream: u32, offset: u64) {
    control.send(StreamEnd {
        stream: StreamId::new(stream),
        how: StreamEndKind::Clean,
        offset,
    });
}

fn read(socket: &mut UnixStream, expected: &[u8]) {
    let mut octets = vec![0; expected.len()];
    socket.read_exact(&mut octets).unwrap();
    assert_eq!(octets, expected);
}

/// SPEC: FEAT-6
#[test]
fn a_session_that_is_no_bridge_or_cannot_be_resumed_is_refused_with_the_reason() {
    let bridge = Bridge::start();
    for features in [Features::BRIDGE, Features::RESUME, Features::NONE] {
        let hello = Hello::start(SessionId::new([1; 16]), features, Features::NONE);
        let reply = bridge.dial().greet(&hello);
        assert!(
            matches!(&reply, Ok(HelloReply::Refused { reason, .. }) if *reason == Reason::Feature),
            "{features:?}: {reply:?}"
        );
    }
    let with_devices = FEATURES.union(Features::DEVICE_STATE);
    let hello = Hello::start(SessionId::new([1; 16]), with_devices, Features::NONE);
    let reply = bridge.dial().greet(&hello);
    assert!(matches!(reply, Ok(HelloReply::Refused { .. })), "{reply:?}");
    // None of them took the place of the one that comes now.
    drop(bridge.open());
}

#[test]
fn silent_strangers_cost_no_thread_and_keep_nobody_out() {
    let bridge = Bridge::start();
    let strangers: Vec<_> = (0..600).map(|_| bridge.dial()).collect();
    let began = Instant::now();
    let (control, _, _) = bridge.open();
    assert!(began.elapsed() < PATIENCE / 4, "{:?}", began.elapsed());
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(
        threads < 200,
        "{threads} threads for {} strangers",
        strangers.len()
    );
    drop(control);
}

/// SPEC: CARRY-1
#[test]
fn a_frame_of_a_migration_of_our_own_ends_a_bridged_one() {
    let bridge = Bridge::start();
    let (mut control, _, _) = bridge.open();
    control.send(SetupEnd {
        configs: 0,
        regions: 1,
        devices: 0,
        lanes: 1,
        memory_bytes: 4096,
    });
    let told = control.hear_abort();
    assert_eq!(told.reason, Reason::Misbehaved, "{told:?}");
    assert_eq!(told.phase, Phase::Carrying, "{told:?}");
    assert_eq!(bridge.ended().outcome, Ended::Failed);
}

/// SPEC: CARRY-2, CARRY-3, CARRY-5, CARRY-9
#[test]
fn a_second_connection_ends_only_after_the_first_one_did() {
    let bridge = Bridge::start();
    let (mut control, session, grant) = bridge.open();
    let lane = bridge.lane(session, grant.ticket, 0);
    for stream in [0, 1] {
        let stream = StreamId::new(stream);
        control.send(StreamOpen { stream });
    }
    piece(&lane, 0, 0, MAIN);
    let mut first = bridge.connection();
    read(&mut first, MAIN);
    piece(&lane, 1, 0, b"pages");
    let mut second = bridge.connection();
    read(&mut second, b"pages");
    // A piece that is sent again, as after a lane was lost, is dropped.
    drop(lane);
    let lane = bridge.lane(session, grant.ticket, 1);
    piece(&lane, 1, 0, b"pages");
    piece(&lane, 1, 5, b"and more");
    read(&mut second, b"and more");
    // The second ends cleanly while the first goes on: its monitor does not hear of it.
    clean_end(&control, 1, 13);
    let some = Some(Duration::from_millis(400));
    second.set_read_timeout(some).unwrap();
    let heard = second.read(&mut [0; 8]).map_err(|error| error.kind());
    assert_eq!(heard, Err(ErrorKind::WouldBlock));
    // The first ends without a last word: it failed. First the one, then the other.
    clean_end(&control, 0, MAIN.len() as u64);
    assert_eq!(first.read(&mut [0; 8]).unwrap(), 0);
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    drop(first);
    let rest = second.read(&mut [0; 8]);
    assert!(!matches!(rest, Ok(1..)), "{rest:?}");
    drop(second);
    let heard = control.hear_until(&[Kind::StreamOutcome]);
    let Frame::StreamOutcome(outcome) = heard.frame() else {
        unreachable!("that kind was waited for")
    };
    assert_eq!(outcome.state, OutcomeState::NotCommitted);
    control.send(StreamOutcome {
        state: OutcomeState::NotCommitted,
    });
    assert_ne!(bridge.ended().outcome, Ended::Migrated);
}

/// SPEC: CARRY-7, CARRY-13
#[test]
fn a_resume_says_what_has_come_and_what_may_come() {
    let bridge = Bridge::start();
    let (mut control, session, grant) = bridge.open();
    let lane = bridge.lane(session, grant.ticket, 0);
    let stream = StreamId::new(0);
    control.send(StreamOpen { stream });
    piece(&lane, 0, 0, MAIN);
    let mut first = bridge.connection();
    read(&mut first, MAIN);
    first.write_all(b"answer").unwrap();
    drop(lane);
    control.cut();
    let mut again = bridge.dial();
    let reply = again.greet(&Hello::resume(session, grant.resume_secret, FEATURES));
    assert!(
        matches!(reply, Ok(HelloReply::Accepted { .. })),
        "{reply:?}"
    );
    let heard = again.hear_kind(Kind::Grant);
    let Frame::Grant(granted) = heard.frame() else {
        unreachable!("that kind was waited for")
    };
    let ticket = granted.ticket;
    again.keep_alive();
    let heard = again.hear_until(&[Kind::StreamCredit]);
    let Frame::StreamCredit(credits) = heard.frame() else {
        unreachable!("that kind was waited for")
    };
    let credits: Vec<StreamCredit> = credits.iter().collect();
    let [credit] = credits[..] else {
        panic!("one stream: {credits:?}")
    };
    assert_eq!(credit.stream, stream);
    assert_eq!(credit.received, MAIN.len() as u64);
    assert!(
        credit.offset_max >= grant.device_window_bytes,
        "what was granted stays granted: {credit:?}"
    );
    // Past it nothing may come.
    let lane = bridge.lane(session, ticket, 1);
    piece(&lane, 0, credit.offset_max, b"x");
    assert_eq!(again.hear_abort().reason, Reason::Misbehaved);
}
