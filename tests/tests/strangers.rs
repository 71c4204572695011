//! Strangers at the destination's door: however many stand there, an honest source gets in.
#![allow(clippy::print_stderr)] // a skipped test says so

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use multifd_tests::bounded::{Destination, rx_builder, within};
use multifd_tests::model::DestinationMachine;
use multifd_tests::peer::Peer;
use multifd_transport::tls::{Clients, TlsClient, TlsPem, TlsServer};
use multifd_transport::{Address, ChannelOptions, Listener, connect_with};
use multifd_wire::{Features, Hello, HelloReply, Reason, SessionId, Token};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// So many at once.
const STRANGERS: usize = 1000;

/// An honest source is let in within this time: on a quiet host within a tenth of it, but the thousand are this process's own.
const SOON: Duration = Duration::from_secs(20);

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

fn hello(features: Features) -> Hello {
    Hello::start(SessionId::new([7; 16]), Features::NONE, features)
}

/// SPEC: HELLO-8, SEC-7
#[test]
fn only_a_source_with_the_pass_may_begin() {
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
