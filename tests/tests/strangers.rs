//! Strangers at the destination's door: however many stand there, an honest source gets in.
#![allow(clippy::print_stderr)] // a skipped test says so

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use multifd_receiver::{AfterFailedSetup, ConfigBuilder};
use multifd_tests::bounded::{Destination, GRACE, rx_builder, within};
use multifd_tests::fake_source::FakeSource;
use multifd_tests::model::DestinationMachine;
use multifd_tests::peer::Peer;
use multifd_transport::tls::{Clients, TlsClient, TlsPem, TlsServer};
use multifd_transport::{Address, ChannelOptions, Listener, connect_with};
use multifd_wire::frame::{Abort, Commit};
use multifd_wire::{
    ChannelRef, Digest, Features, Hello, HelloReply, Incarnation, Kind, LaneId, Phase, Reason,
    SessionId, Token,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// So many at once.
const STRANGERS: usize = 1000;

/// An honest source is let in within this time: on a quiet host within a tenth of it, but the thousand are this process's own.
const SOON: Duration = Duration::from_secs(20);

/// What one test's strangers cost is not to count against another's time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Room for both ends of all of them.
fn descriptors_or_skip(test: &str) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: now.maximum,
        maximum: now.maximum,
    };
    let enough = now.maximum.is_none_or(|most| most >= 4096);
    if !enough || setrlimit(Resource::Nofile, most).is_err() {
        eprintln!("SKIPPED {test}: 4096 descriptors");
        return false;
    }
    true
}

/// As a destination is in earnest: what strangers get is not cut short by deadlines of tests.
fn patient() -> multifd_receiver::Config {
    let config = rx_builder().hello_deadline(Duration::from_secs(60));
    config.build().expect("within the limits")
}

fn place(address: &Address) -> SocketAddr {
    let (Address::Tcp(target) | Address::Tls(target)) = address else {
        panic!("{address} is no TCP address");
    };
    SocketAddr::new(target.host().parse().expect("an address"), target.port())
}

/// Strangers of whom each has said so much of something.
fn strangers(at: SocketAddr, says: &[u8]) -> Vec<TcpStream> {
    let stranger = |_| {
        let mut stream = TcpStream::connect(at).expect("a connection");
        // It may have been let go already.
        let _ = stream.write_all(says);
        stream
    };
    (0..STRANGERS).map(stranger).collect()
}

/// A source is let in: at once, or after it was told that the destination is busy and has tried again, as `multifd-send` does.
fn is_let_in(address: &Address, options: ChannelOptions, case: &str) {
    let address = address.clone();
    let began = Instant::now();
    let reply = within(SOON, case, move || {
        loop {
            let channel = connect_with(&address, &options, began + SOON).expect("a connection");
            let mut source = Peer::new(channel);
            let hello = Hello::start(SessionId::new([9; 16]), Features::NONE, Features::NONE);
            match source.greet(&hello) {
                Ok(HelloReply::Refused {
                    reason: Reason::Busy,
                    ..
                }) if began.elapsed() < SOON => std::thread::sleep(Duration::from_millis(50)),
                reply => return reply,
            }
        }
    });
    assert!(
        matches!(reply, Ok(HelloReply::Accepted { .. })),
        "{case}: {reply:?}"
    );
}

#[test]
fn a_thousand_silent_strangers_keep_nobody_out() {
    let _alone = alone();
    if !descriptors_or_skip("a_thousand_silent_strangers_keep_nobody_out") {
        return;
    }
    let destination = Destination::with(patient(), DestinationMachine::default());
    let crowd = strangers(place(&destination.address), b"");
    is_let_in(&destination.address, ChannelOptions::default(), "silent");
    drop(crowd);
    destination.handle().cancel();
}

#[test]
fn a_thousand_strangers_who_speak_slowly_keep_nobody_out() {
    let _alone = alone();
    if !descriptors_or_skip("a_thousand_strangers_who_speak_slowly_keep_nobody_out") {
        return;
    }
    let destination = Destination::with(patient(), DestinationMachine::default());
    let mut crowd = strangers(place(&destination.address), b"MULTIFD\n");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                crowd.retain_mut(|stream| stream.write_all(&[1]).is_ok());
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        is_let_in(&destination.address, ChannelOptions::default(), "slow");
        over.store(true, Ordering::Relaxed);
    });
    destination.handle().cancel();
}

#[test]
fn a_thousand_strangers_who_say_a_wrong_hello_and_stay_keep_nobody_out() {
    let _alone = alone();
    if !descriptors_or_skip("a_thousand_strangers_who_say_a_wrong_hello_and_stay_keep_nobody_out") {
        return;
    }
    let destination = Destination::with(patient(), DestinationMachine::default());
    let crowd = strangers(place(&destination.address), &[b'x'; 128]);
    is_let_in(&destination.address, ChannelOptions::default(), "garbage");
    drop(crowd);
    destination.handle().cancel();
}

#[test]
fn the_same_by_tls() {
    let _alone = alone();
    if !descriptors_or_skip("the_same_by_tls") {
        return;
    }
    let (client, server) = sides();
    // A stranger who begins a handshake, and one who says nothing.
    let began: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1];
    for (case, says) in [("silent by TLS", &b""[..]), ("half a handshake", began)] {
        let options = |client: Option<&TlsPem>| {
            let mut options = ChannelOptions::default();
            options.tls_client = client.map(|pem| TlsClient::new(pem).expect("certificates"));
            let clients = match server.authorities {
                Some(_) => Clients::OfAuthority,
                None => Clients::Anybody,
            };
            options.tls_server = Some(TlsServer::new(&server, clients).expect("certificates"));
            options
        };
        let anywhere = "tls:127.0.0.1:0".parse().expect("an address");
        let listener = Listener::bind_with(&anywhere, &options(None)).expect("a free port");
        let address = listener.local_address().clone();
        let reception = multifd_receiver::Reception::start(multifd_receiver::Parts {
            vmm: Box::new(DestinationMachine::default()),
            listeners: vec![listener],
            config: patient(),
            spawner: None,
        })
        .expect("a reception");
        let crowd = strangers(place(&address), says);
        is_let_in(&address, options(Some(&client)), case);
        drop(crowd);
        reception.handle().cancel();
    }
}

/// A destination that goes on waiting.
fn waits_on() -> ConfigBuilder {
    rx_builder()
        .after_failed_setup(AfterFailedSetup::WaitOn)
        .suspend(Duration::from_secs(60))
}

fn hello(features: Features) -> Hello {
    Hello::start(SessionId::new([7; 16]), Features::NONE, features)
}

/// A stranger whose hello is accepted, once the one before is forgotten.
fn begins(destination: &Destination, hello: &Hello) -> Peer {
    let began = Instant::now();
    loop {
        let mut peer = Peer::new(destination.connect());
        match peer.greet(hello) {
            Ok(HelloReply::Accepted { .. }) => return peer,
            Ok(HelloReply::Refused {
                reason: Reason::Busy,
                ..
            }) => {}
            other => panic!("{other:?}"),
        }
        assert!(began.elapsed() < GRACE, "the one before is never forgotten");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until the destination knows nothing of a session any more.
fn is_forgotten(destination: &Destination, session: SessionId) {
    let began = Instant::now();
    let ask = Hello::ask(session, Token::new([9; 16]));
    loop {
        // A session that is here refuses the secret, and takes its time for it.
        if let Ok(HelloReply::Refused {
            reason: Reason::WrongSession,
            ..
        }) = Peer::new(destination.connect()).greet(&ask)
        {
            return;
        }
        assert!(began.elapsed() < 4 * GRACE, "it still waits for a stranger");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An honest migration comes through.
fn serves(destination: Destination) {
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    source.round_zero();
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none(), "{:?}", end.finished.error);
    assert!(end.running, "the guest runs");
}

type Stranger = fn(Peer);

// SPEC: SEC-8
#[test]
fn strangers_who_begin_and_come_to_nothing_do_not_end_the_wait() {
    let _alone = alone();
    // Death, an abort, garbage, and a frame out of order.
    let kinds: [Stranger; 4] = [
        drop,
        |peer| {
            peer.send(Abort {
                reason: Reason::Cancelled,
                phase: Phase::Setup,
                channel: ChannelRef::None,
                text: "never mind",
            });
        },
        |peer| peer.raw(&[0xA5; 64]),
        |peer| {
            peer.send(Commit {
                digest: Digest::new(0),
            });
        },
    ];
    let destination = Destination::with(
        waits_on().build().expect("within the limits"),
        DestinationMachine::default(),
    );
    for does in kinds {
        for number in 0..STRANGERS {
            // Of a kept session everything is kept for a minute, unless another source begins.
            let features = if number % 2 == 0 {
                Features::RESUME
            } else {
                Features::NONE
            };
            does(begins(&destination, &hello(features)));
        }
    }
    // The last one may be kept; whoever begins takes its place.
    drop(begins(&destination, &hello(Features::NONE)));
    is_forgotten(&destination, SessionId::new([7; 16]));
    serves(destination);
}

// SPEC: SEC-8
#[test]
fn wrong_tickets_and_half_set_ups_do_not_end_the_wait() {
    let _alone = alone();
    let destination = Destination::with(
        waits_on().build().expect("within the limits"),
        DestinationMachine::default(),
    );
    let stranger = begins(&destination, &hello(Features::NONE));
    for number in 0..u32::try_from(STRANGERS).expect("few") {
        let lane = LaneId::new(number % 4);
        let ticket = Token::new([1; 16]);
        let join = Hello::join(
            SessionId::new([7; 16]),
            ticket,
            Features::NONE,
            lane,
            Incarnation::new(0),
        );
        Peer::new(destination.connect()).raw(&join.encode());
    }
    drop(stranger);
    is_forgotten(&destination, SessionId::new([7; 16]));
    // Each has the machine built, and dies before its lanes are there.
    let connect = || destination.connect();
    for _ in 0..STRANGERS {
        FakeSource::open(&connect).send_tables(2);
    }
    serves(destination);
}

/// A source that is still there, but lost its channel in set-up, is not waited for when another one begins.
// SPEC: SEC-8
#[test]
fn a_set_up_that_lost_its_channel_gives_way_at_once() {
    let _alone = alone();
    let destination = Destination::with(
        waits_on().build().expect("within the limits"),
        DestinationMachine::default(),
    );
    let connect = || destination.connect();
    let stranger = FakeSource::open_with(&connect, Features::RESUME);
    let (session, secret) = (stranger.session, stranger.grant.resume_secret);
    stranger.send_tables(2);
    drop(stranger);
    let newcomer = begins(&destination, &hello(Features::NONE));
    // Whoever had the place before has nothing to say any more.
    let resume = Hello::resume(session, secret, Features::NONE);
    let reply = Peer::new(destination.connect()).greet(&resume);
    assert!(
        matches!(
            reply,
            Ok(HelloReply::Refused {
                reason: Reason::WrongSession,
                ..
            })
        ),
        "{reply:?}"
    );
    drop(newcomer);
    is_forgotten(&destination, SessionId::new([7; 16]));
    serves(destination);
}

/// What joins again takes the place of what joined before, so that one lane holds one channel.
#[test]
fn a_lane_that_joins_again_and_again_before_the_end_of_set_up_holds_one_channel() {
    let _alone = alone();
    // 1,500 joins take seconds on a host that has other things to do, and the set-up is to be under way all the time.
    let config = rx_builder().setup_deadline(Duration::from_secs(120));
    let config = config.build().expect("within the limits");
    let destination = Destination::with(config, DestinationMachine::default());
    let connect = || destination.connect();
    let mut source = FakeSource::open(&connect);
    let joins = |incarnation| {
        let peer = Peer::new(destination.connect());
        let hello = Hello::join(
            source.session,
            source.grant.ticket,
            Features::NONE,
            LaneId::new(0),
            Incarnation::new(incarnation),
        );
        peer.raw(&hello.encode());
        peer
    };
    let mut newest = joins(0);
    assert!(matches!(
        newest.hear_reply(),
        Ok(HelloReply::Accepted { .. })
    ));
    for incarnation in 1..=1500 {
        let mut before = std::mem::replace(&mut newest, joins(incarnation));
        // It is closed without a word: nothing is kept to say one.
        assert!(before.hear_reply().is_err(), "{incarnation}");
    }
    source.send_tables(1);
    assert!(matches!(
        newest.hear_reply(),
        Ok(HelloReply::Accepted { .. })
    ));
    source.control.hear_kind(Kind::Ready);
    destination.handle().cancel();
}

/// SPEC: HELLO-8, SEC-7
#[test]
fn only_a_source_with_the_pass_may_begin() {
    let _alone = alone();
    let pass = Token::new([3; 16]);
    let config = rx_builder().pass(pass).build().expect("within the limits");
    let destination = Destination::with(config, DestinationMachine::default());
    for shown in [Token::NONE, Token::new([4; 16])] {
        let mut peer = Peer::new(destination.connect());
        let reply = peer.greet(&hello(Features::NONE).with_pass(shown));
        let reason = match reply {
            Ok(HelloReply::Refused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason, Reason::BadTicket);
    }
    let reply = Peer::new(destination.connect()).greet(&hello(Features::NONE).with_pass(pass));
    assert!(
        matches!(reply, Ok(HelloReply::Accepted { .. })),
        "{reply:?}"
    );
    destination.handle().cancel();
}

/// Certificates of both sides, of one authority.
fn sides() -> (TlsPem, TlsPem) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let authority = CertifiedIssuer::self_signed(params, key).expect("an authority");
    let side = || {
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &authority).expect("a certificate");
        TlsPem {
            authorities: Some(authority.pem().into_bytes()),
            certificate: Some(certificate.pem().into_bytes()),
            key: Some(key.serialize_pem().into_bytes()),
        }
    };
    (side(), side())
}
