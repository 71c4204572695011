//! The TLS kind: the whole suite, and who is let in, who is not, and what both are told.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use multifd_transport::adopt::{Part, Protection, from_fd};
use multifd_transport::tls::{
    Clients, PeerName, TlsClient, TlsConfigError, TlsFiles, TlsPem, TlsServer, TlsSide,
};
use multifd_transport::{
    Address, Channel, ChannelError, ChannelOptions, ConnectError, EstablishError, ListenError,
    Listener, TcpOptions, Unavailable, conformance_tests, connect, connect_with,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType, date_time_ymd,
};

conformance_tests!(tls, tls_pair);
conformance_tests!(tls_adopted, adopted_pair);

/// What a test is given to wait, on a machine that is busy with other things.
const LATE_MAX: Duration = Duration::from_secs(10);

fn soon() -> Instant {
    Instant::now() + LATE_MAX
}

/// An authority that signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// How a certificate is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Age {
    Valid,
    Expired,
    Unborn,
}

impl Authority {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mut params = CertificateParams::default();
        let name = format!("authority {}", NEXT.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    fn pem(&self) -> Vec<u8> {
        self.0.pem().into_bytes()
    }

    /// A certificate for a name, and its key.
    fn certify(&self, name: &str, age: Age) -> (Vec<u8>, Vec<u8>) {
        self.certify_all(&[name], age)
    }

    /// As [`certify`](Self::certify), for several names; those with `://` are URIs.
    fn certify_all(&self, names: &[&str], age: Age) -> (Vec<u8>, Vec<u8>) {
        let (uris, names): (Vec<&str>, Vec<&str>) =
            names.iter().partition(|name| name.contains("://"));
        let names: Vec<_> = names.into_iter().map(str::to_owned).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.subject_alt_names.extend(
            uris.into_iter()
                .map(|uri| SanType::URI(uri.parse().expect("a URI"))),
        );
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        match age {
            Age::Valid => {}
            Age::Expired => {
                params.not_before = date_time_ymd(2001, 1, 1);
                params.not_after = date_time_ymd(2002, 1, 1);
            }
            Age::Unborn => params.not_before = date_time_ymd(4000, 1, 1),
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        (
            certificate.pem().into_bytes(),
            key.serialize_pem().into_bytes(),
        )
    }

    /// What a side needs that trusts this authority and shows a certificate of it.
    fn side(&self, age: Age) -> TlsPem {
        let (certificate, key) = self.certify("127.0.0.1", age);
        TlsPem {
            authorities: Some(self.pem()),
            certificate: Some(certificate),
            key: Some(key),
        }
    }
}

static OURS: LazyLock<Authority> = LazyLock::new(Authority::new);

fn options(client: Option<TlsClient>, server: Option<TlsServer>) -> ChannelOptions {
    let mut options = ChannelOptions::default();
    options.tls_client = client;
    options.tls_server = server;
    options
}

fn listen(server: &TlsPem) -> Listener {
    let clients = match server.authorities {
        Some(_) => Clients::OfAuthority,
        None => Clients::Anybody,
    };
    let server = TlsServer::new(server, clients).expect("certificates");
    let address = "tls:127.0.0.1:0".parse().expect("an address");
    Listener::bind_with(&address, &options(None, Some(server))).expect("a free port")
}

fn dial(address: &Address, client: &TlsPem) -> Result<Box<dyn Channel>, ConnectError> {
    let client = TlsClient::new(client).expect("certificates");
    connect_with(address, &options(Some(client), None), soon())
}

/// Both sides' results of one connection.
#[expect(clippy::type_complexity, reason = "what both sides return")]
fn meet(
    client: &TlsPem,
    server: &TlsPem,
) -> (
    Result<Box<dyn Channel>, ConnectError>,
    Result<(Box<dyn Channel>, String), ListenError>,
) {
    let listener = listen(server);
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon())));
        let dialled = dial(listener.local_address(), client);
        // A server that was refused waits for the client to close.
        (dialled, accepting.join().expect("no panic"))
    })
}

fn tls_pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    static SIDE: LazyLock<TlsPem> = LazyLock::new(|| OURS.side(Age::Valid));
    let (dialled, accepted) = meet(&SIDE, &SIDE);
    (
        dialled.expect("a connection"),
        accepted.expect("the connection").0,
    )
}

/// The error of a client that this server refuses once it has seen the client's certificate.
fn refused_afterwards(client: &TlsPem, server: &TlsPem) -> (ChannelError, ListenError) {
    let listener = listen(server);
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon())));
        let channel = dial(listener.local_address(), client).expect("half a handshake");
        let (mut send, mut receive, _) = channel.split();
        receive.set_deadline(Some(soon()));
        // As a source does: it speaks first, and then reads the answer.
        send.send(&[0; 128], &[]).expect("the socket takes it");
        let error = receive.receive(&mut [0; 8]).expect_err("refused");
        drop((send, receive));
        let accepted = accepting.join().expect("no panic");
        (error, accepted.err().expect("refused"))
    })
}

fn establish_error<T>(result: Result<T, ConnectError>) -> EstablishError {
    match result.err().expect("no channel") {
        ConnectError::Establish { cause, .. } => cause,
        other => panic!("{other}"),
    }
}

#[test]
fn both_ends_say_what_they_are() {
    let (left, right) = tls_pair();
    assert!(left.describe().starts_with("tls 127.0.0.1:"));
    assert!(right.describe().starts_with("tls 127.0.0.1:"));
}

#[test]
fn nothing_that_is_sent_can_be_read_on_the_way() {
    // A relay in the middle that keeps what it passes on.
    let listener = listen(&OURS.side(Age::Valid));
    let Address::Tls(target) = listener.local_address() else {
        panic!("a TLS address")
    };
    let target = ("127.0.0.1", target.port());
    let relay = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = format!("tls:{}", relay.local_addr().expect("an address"))
        .parse()
        .expect("an address");
    thread::scope(|scope| {
        let passing = scope.spawn(|| {
            let (mut client, _) = relay.accept().expect("the client");
            let mut server = TcpStream::connect(target).expect("the server");
            let (mut back_from, mut back_to) =
                (server.try_clone().unwrap(), client.try_clone().unwrap());
            let back = thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
            let (mut seen, mut octets) = (Vec::new(), [0; 4096]);
            while let Ok(count @ 1..) = client.read(&mut octets) {
                seen.extend_from_slice(&octets[..count]);
                server.write_all(&octets[..count]).expect("the server");
            }
            drop(server.shutdown(std::net::Shutdown::Write));
            let _ = back.join();
            seen
        });
        let accepting = scope.spawn(|| listener.accept(Some(soon())).expect("the client").0);
        let channel = dial(&address, &OURS.side(Age::Valid)).expect("a connection");
        let (mut send, _receive, _) = channel.split();
        let (_back, mut receive, _) = accepting.join().expect("no panic").split();
        let secret = b"the content of a page that nobody should see".repeat(200);
        send.send(&secret, &[]).expect("send");
        let mut got = vec![0; secret.len()];
        receive.receive(&mut got).expect("receive");
        assert_eq!(got, secret);
        drop((send, _receive, receive, _back));
        let seen = passing.join().expect("no panic");
        assert!(seen.len() > secret.len(), "it passed there");
        assert!(
            !seen.windows(16).any(|window| window == &secret[..16]),
            "in the clear"
        );
    });
}

#[test]
fn an_octet_changed_on_the_way_is_an_error_and_never_content() {
    let listener = listen(&OURS.side(Age::Valid));
    let Address::Tls(target) = listener.local_address() else {
        panic!("a TLS address")
    };
    let target = ("127.0.0.1", target.port());
    let relay = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = format!("tls:{}", relay.local_addr().expect("an address"))
        .parse()
        .expect("an address");
    const LEN: usize = 100_000;
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut client, _) = relay.accept().expect("the client");
            let mut server = TcpStream::connect(target).expect("the server");
            let (mut back_from, mut back_to) =
                (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
            let (mut passed, mut octets) = (0, [0; 4096]);
            while let Ok(count @ 1..) = client.read(&mut octets) {
                // Far behind the handshake, which is some 3,000 bytes, and inside the first records of content.
                let place = 50_000_usize;
                if (passed..passed + count).contains(&place) {
                    octets[place - passed] ^= 1;
                }
                passed += count;
                if server.write_all(&octets[..count]).is_err() {
                    return;
                }
            }
        });
        let accepting = scope.spawn(|| listener.accept(Some(soon())).expect("the client").0);
        let channel = dial(&address, &OURS.side(Age::Valid)).expect("a connection");
        let (mut send, mut answers, _) = channel.split();
        let (_back, mut receive, _) = accepting.join().expect("no panic").split();
        receive.set_deadline(Some(soon()));
        answers.set_deadline(Some(soon()));
        // It may be refused before all of it was sent.
        let _ = send.send(&[0x5A; LEN], &[]);
        let mut got = vec![0; LEN];
        let error = receive.receive(&mut got).expect_err("changed");
        assert!(matches!(error, ChannelError::Tls(_)), "{error}");
        let error = answers.receive(&mut [0]).expect_err("the peer said so");
        assert!(matches!(error, ChannelError::Tls(_)), "{error}");
        assert!(error.to_string().contains("changed on the way"), "{error}");
        drop((send, answers, receive, _back));
    });
}

#[test]
fn what_comes_with_the_end_of_the_handshake_is_not_lost() {
    // The dialling side speaks as soon as its handshake is over, before the other side has read the end of it.
    let listener = listen(&OURS.side(Age::Valid));
    let said = thread::scope(|scope| {
        let address = listener.local_address();
        let speaking = scope.spawn(|| {
            let channel = dial(address, &OURS.side(Age::Valid)).expect("a connection");
            let (mut send, receive, closer) = channel.split();
            send.send(b"first words", &[]).expect("send");
            (send, receive, closer)
        });
        let (mut channel, _) = loop {
            if let Some(accepted) = listener.try_accept().expect("a connection") {
                break accepted;
            }
        };
        // Half of the handshake, until the other side's last part of it and its first words lie in the socket together.
        let early = channel.establish(Instant::now() + Duration::from_millis(1));
        if early.is_err() {
            thread::sleep(Duration::from_millis(300));
            channel.establish(soon()).expect("the rest of it");
        }
        let (_send, mut receive, _) = channel.split();
        receive.set_deadline(Some(soon()));
        let mut words = [0; 11];
        receive.receive(&mut words).expect("the first words");
        drop(speaking.join().expect("no panic"));
        words
    });
    assert_eq!(&said, b"first words");
}

// SPEC: BELOW-3
#[test]
fn an_end_that_was_not_announced_is_no_clean_end() {
    let (left, right) = tls_pair();
    let (mut send, _receive, closer) = left.split();
    let (_send, mut receive, _) = right.split();
    send.send(b"whole", &[]).expect("send");
    receive.receive(&mut [0; 5]).expect("receive");
    // Ends the connection as a dying process or somebody on the way would.
    closer.shutdown();
    let error = receive.receive(&mut [0; 5]).expect_err("the end");
    assert!(
        matches!(error, ChannelError::Reset { bytes_done: 0 }),
        "{error}"
    );
}

// SPEC: BELOW-3
#[test]
fn a_server_of_another_authority_is_refused_and_told() {
    let other = Authority::new();
    let (dialled, accepted) = meet(&OURS.side(Age::Valid), &other.side(Age::Valid));
    let error = establish_error(dialled);
    assert!(
        matches!(&error, EstablishError::Certificate(text) if text.contains("no authority (CA)")),
        "{error}"
    );
    assert_eq!(error.code(), "establish-certificate");
    let error = accepted.err().expect("refused").to_string();
    assert!(error.contains("does not know the authority"), "{error}");
}

#[test]
fn an_expired_certificate_and_one_of_the_future_are_refused_as_such() {
    for (age, word) in [
        (Age::Expired, "has expired"),
        (Age::Unborn, "not valid yet"),
    ] {
        let (dialled, accepted) = meet(&OURS.side(Age::Valid), &OURS.side(age));
        let error = establish_error(dialled).to_string();
        assert!(error.contains(word), "{error}");
        assert!(matches!(
            accepted,
            Err(ListenError::Establish {
                cause: EstablishError::Refused(_),
                ..
            })
        ));
    }
}

#[test]
fn a_certificate_for_another_name_is_refused_unless_that_name_is_asked_for() {
    let (certificate, key) = OURS.certify("dest.example", Age::Valid);
    let server = TlsPem {
        authorities: None,
        certificate: Some(certificate),
        key: Some(key),
    };
    let client = TlsPem {
        authorities: Some(OURS.pem()),
        ..TlsPem::default()
    };
    let (dialled, _) = meet(&client, &server);
    let error = establish_error(dialled);
    assert!(matches!(error, EstablishError::Certificate(_)), "{error}");
    assert!(error.to_string().contains("dest.example"), "{error}");

    let listener = listen(&server);
    let client = TlsClient::new(&client)
        .and_then(|client| client.with_server_name("dest.example"))
        .expect("a name");
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon())).map(drop));
        connect_with(
            listener.local_address(),
            &options(Some(client), None),
            soon(),
        )
        .expect("the name that was asked for");
        accepting.join().expect("no panic").expect("a channel");
    });
}

// SPEC: BELOW-3
#[test]
fn a_client_without_a_certificate_is_refused_where_one_is_asked_for() {
    let client = TlsPem {
        authorities: Some(OURS.pem()),
        ..TlsPem::default()
    };
    let (at_client, at_server) = refused_afterwards(&client, &OURS.side(Age::Valid));
    assert!(matches!(at_client, ChannelError::Tls(_)), "{at_client}");
    let text = at_client.to_string();
    assert!(
        text.contains("asks for a certificate, and this side has none"),
        "{text}"
    );
    let text = at_server.to_string();
    assert!(text.contains("it showed none"), "{text}");
    assert_eq!(at_server.code(), "establish-certificate");
}

#[test]
fn a_client_of_another_authority_or_with_an_expired_certificate_is_refused() {
    let mut stranger = Authority::new().side(Age::Valid);
    stranger.authorities = Some(OURS.pem());
    let cases = [
        (stranger, "does not know the authority"),
        (OURS.side(Age::Expired), "has expired"),
    ];
    for (client, word) in cases {
        let (at_client, at_server) = refused_afterwards(&client, &OURS.side(Age::Valid));
        assert!(at_client.to_string().contains(word), "{at_client}");
        assert_eq!(at_server.code(), "establish-certificate", "{at_server}");
    }
}

#[test]
fn a_server_without_an_authority_takes_clients_without_certificates() {
    let mut server = OURS.side(Age::Valid);
    server.authorities = None;
    let client = TlsPem {
        authorities: Some(OURS.pem()),
        ..TlsPem::default()
    };
    let (dialled, accepted) = meet(&client, &server);
    dialled.expect("a connection");
    accepted.expect("the connection");
}

// SPEC: BELOW-2
#[test]
fn a_peer_that_speaks_something_else_is_found_out_at_once() {
    // A plain TCP destination at the port that a TLS source dials.
    let plain = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = format!("tls:{}", plain.local_addr().expect("an address"))
        .parse()
        .expect("an address");
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut peer, _) = plain.accept().expect("the client");
            peer.write_all(&[0x42; 256]).expect("anything");
            let _ = peer.read_to_end(&mut Vec::new());
        });
        let error = establish_error(dial(&address, &OURS.side(Age::Valid)));
        assert!(
            matches!(
                error,
                EstablishError::Protocol {
                    protocol: "TLS",
                    ..
                }
            ),
            "{error}"
        );
    });
    // A plain TCP source at a TLS destination.
    let listener = listen(&OURS.side(Age::Valid));
    let Address::Tls(target) = listener.local_address() else {
        panic!("a TLS address")
    };
    let port = target.port();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = TcpStream::connect(("127.0.0.1", port)).expect("the listener");
            peer.write_all(b"MULTIFD\n and so on, which is no TLS record")
                .expect("anything");
            let _ = peer.read_to_end(&mut Vec::new());
        });
        let error = listener.accept(Some(soon())).err().expect("no TLS");
        assert_eq!(error.code(), "establish-protocol", "{error}");
    });
}

#[test]
fn a_peer_that_says_nothing_costs_no_more_than_the_deadline() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = format!("tls:{}", silent.local_addr().expect("an address"))
        .parse()
        .expect("an address");
    let client = TlsClient::new(&OURS.side(Age::Valid)).expect("certificates");
    let (start, limit) = (Instant::now(), Duration::from_millis(300));
    let error = establish_error(connect_with(
        &address,
        &options(Some(client), None),
        start + limit,
    ));
    assert!(matches!(error, EstablishError::Deadline), "{error}");
    assert!(start.elapsed() >= limit && start.elapsed() < limit + LATE_MAX);

    let listener = listen(&OURS.side(Age::Valid));
    let Address::Tls(target) = listener.local_address() else {
        panic!("a TLS address")
    };
    let _silent = TcpStream::connect(("127.0.0.1", target.port())).expect("the listener");
    let start = Instant::now();
    let error = listener
        .accept(Some(start + limit))
        .err()
        .expect("a silent peer");
    assert_eq!(error.code(), "establish-deadline", "{error}");
    assert!(start.elapsed() < limit + LATE_MAX);
}

#[test]
fn accepting_does_not_wait_for_a_handshake() {
    let listener = listen(&OURS.side(Age::Valid));
    let Address::Tls(target) = listener.local_address() else {
        panic!("a TLS address")
    };
    let _silent = TcpStream::connect(("127.0.0.1", target.port())).expect("the listener");
    let (mut channel, _) = loop {
        if let Some(accepted) = listener.try_accept().expect("a connection") {
            break accepted;
        }
    };
    let error = channel
        .establish(Instant::now() + Duration::from_millis(50))
        .expect_err("a silent peer");
    assert!(matches!(error, EstablishError::Deadline), "{error}");
}

#[test]
fn what_is_missing_is_named_before_anything_is_sent() {
    let address: Address = "tls:127.0.0.1:9".parse().expect("an address");
    let error = connect(&address, &TcpOptions::default(), soon())
        .err()
        .expect("no authority");
    assert!(
        matches!(
            &error,
            ConnectError::Unavailable {
                cause: Unavailable::NotConfigured { .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("TLS needs"), "{error}");
    let error = Listener::bind(&address, &TcpOptions::default())
        .err()
        .expect("no certificate");
    assert_eq!(error.code(), "listen-unavailable", "{error}");
}

#[test]
fn certificates_and_keys_of_no_use_are_refused_with_the_reason() {
    let good = OURS.side(Age::Valid);
    let text = |error: TlsConfigError| error.to_string();
    let without_authority = TlsPem {
        authorities: None,
        ..good.clone()
    };
    let error = text(TlsClient::new(&without_authority).expect_err("no authority"));
    assert!(error.contains("authority (CA)"), "{error}");
    let without_key = TlsPem {
        key: None,
        ..good.clone()
    };
    let error = text(TlsServer::new(&without_key, Clients::OfAuthority).expect_err("no key"));
    assert!(error.contains("without its key"), "{error}");
    let only_authority = TlsPem {
        authorities: good.authorities.clone(),
        ..TlsPem::default()
    };
    let error =
        text(TlsServer::new(&only_authority, Clients::OfAuthority).expect_err("no certificate"));
    assert!(error.contains("certificate and key"), "{error}");
    let no_pem = TlsPem {
        authorities: Some(b"nothing of the kind".to_vec()),
        ..good.clone()
    };
    let error = text(TlsClient::new(&no_pem).expect_err("no PEM"));
    assert!(error.contains("no certificate in PEM form"), "{error}");
    let other_key = TlsPem {
        key: Some(OURS.certify("x", Age::Valid).1),
        ..good.clone()
    };
    assert!(
        TlsServer::new(&other_key, Clients::OfAuthority).is_err(),
        "another's key"
    );
    let error = TlsPem::read(Some("/nowhere/ca.pem".as_ref()), None, None)
        .expect_err("no such file")
        .to_string();
    assert!(error.contains("cannot read /nowhere/ca.pem"), "{error}");
    assert!(
        !format!("{good:?}").contains("PRIVATE"),
        "the key is never printed"
    );
}

/// TLS over a socket pair that somebody else connected.
fn adopted_pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    static SIDE: LazyLock<TlsPem> = LazyLock::new(|| OURS.side(Age::Valid));
    let client = TlsClient::new(&SIDE).expect("certificates");
    let server = TlsServer::new(&SIDE, Clients::OfAuthority).expect("certificates");
    let options = options(Some(client), Some(server));
    let plain = TcpListener::bind("127.0.0.1:0").expect("a port");
    let dialled = TcpStream::connect(plain.local_addr().expect("bound")).expect("a connection");
    let accepted = plain.accept().expect("the connection").0;
    let part = Part::Dialled("127.0.0.1");
    let mut left = from_fd(dialled.into(), Protection::Tls, part, &options).expect("a channel");
    let mut right =
        from_fd(accepted.into(), Protection::Tls, Part::Accepted, &options).expect("a channel");
    assert_eq!(
        left.binding(),
        None,
        "before the handshake there are no keys"
    );
    thread::scope(|scope| {
        let other = scope.spawn(|| right.establish(soon()).expect("a handshake"));
        left.establish(soon()).expect("a handshake");
        other.join().expect("no panic");
    });
    (left, right)
}

#[test]
fn a_binding_is_there_and_another_on_each_connection() {
    let (left, right) = tls_pair();
    let ours = left.binding().expect("TLS has keys");
    assert_eq!(right.binding(), Some(ours));
    assert_ne!(tls_pair().0.binding(), Some(ours));
}

#[test]
fn nobody_is_let_in_without_an_authority_unless_that_is_asked_for() {
    let mut pem = OURS.side(Age::Valid);
    pem.authorities = None;
    for clients in [Clients::OfAuthority, Clients::Named(names(&["a.example"]))] {
        let error = TlsServer::new(&pem, clients).expect_err("no authority");
        let text = error.to_string();
        assert!(
            text.contains("anybody connect has to be asked for"),
            "{text}"
        );
    }
    TlsServer::new(&pem, Clients::Anybody).expect("it was asked for");
    let with_authority = OURS.side(Age::Valid);
    let nobody = TlsServer::new(&with_authority, Clients::Named(Vec::new()));
    assert!(nobody.is_err(), "an empty list");
}

fn names(texts: &[&str]) -> Vec<PeerName> {
    texts
        .iter()
        .map(|text| text.parse().expect("a name"))
        .collect()
}

/// A side of our authority whose certificate is for these names.
fn side_for(names: &[&str]) -> TlsPem {
    let (certificate, key) = OURS.certify_all(names, Age::Valid);
    TlsPem {
        authorities: Some(OURS.pem()),
        certificate: Some(certificate),
        key: Some(key),
    }
}

const SPIFFE: &str = "spiffe://cluster.example/ns/vms/sa/migration";

#[test]
fn a_server_lets_in_only_the_names_that_it_was_given() {
    let cases: &[(&[&str], &[&str], bool)] = &[
        (&["src.example"], &["other.example", "src.example"], true),
        (&["src.example", SPIFFE], &[SPIFFE], true),
        (&["10.1.2.3"], &["10.1.2.3"], true),
        (&["*.hosts.example"], &["src.hosts.example"], true),
        (&["other.example"], &["src.example"], false),
        (&["src.example"], &[SPIFFE], false),
        (
            &["x", "spiffe://cluster.example/ns/vms/sa/other"],
            &[SPIFFE],
            false,
        ),
        (
            &["x", "spiffe://cluster.example/ns/vms/sa/migration/more"],
            &[SPIFFE],
            false,
        ),
    ];
    for (presented, wanted, good) in cases {
        let clients = Clients::Named(names(wanted));
        let server = TlsServer::new(&OURS.side(Age::Valid), clients).expect("certificates");
        let address = "tls:127.0.0.1:0".parse().expect("an address");
        let listener =
            Listener::bind_with(&address, &options(None, Some(server))).expect("a free port");
        let (heard, accepted) = thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept(Some(soon())));
            let channel =
                dial(listener.local_address(), &side_for(presented)).expect("half a handshake");
            let (mut send, mut receive, closer) = channel.split();
            receive.set_deadline(Some(
                Instant::now() + Duration::from_secs(if *good { 0 } else { 10 }),
            ));
            let _ = send.send(&[0; 128], &[]);
            let heard = receive.receive(&mut [0; 8]);
            closer.shutdown();
            (heard, accepting.join().expect("no panic"))
        });
        assert_eq!(
            accepted.is_ok(),
            *good,
            "{presented:?} where {wanted:?} may be"
        );
        if let Err(error) = accepted {
            let text = error.to_string();
            assert!(
                text.contains("the peer may only be: ") && text.contains(wanted[0]),
                "{text}"
            );
            assert!(text.contains(presented[0]) || presented[0] == "x", "{text}");
            assert_eq!(error.code(), "establish-certificate");
            let heard = heard.expect_err("refused").to_string();
            assert!(
                heard.contains("does not accept this side's certificate"),
                "{heard}"
            );
        }
    }
}

#[test]
fn a_client_may_ask_for_a_listed_name_instead_of_the_host() {
    for (presented, wanted, good) in [
        (["x", SPIFFE], SPIFFE, true),
        (["dest.example", SPIFFE], "dest.example", true),
        (
            ["127.0.0.1", "spiffe://cluster.example/other"],
            SPIFFE,
            false,
        ),
    ] {
        let listener = listen(&side_for(&presented));
        let client = TlsClient::new(&OURS.side(Age::Valid))
            .and_then(|client| client.with_peers(names(&[wanted])))
            .expect("certificates");
        let options = options(Some(client), None);
        thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept(Some(soon())).map(drop));
            let dialled = connect_with(listener.local_address(), &options, soon());
            assert_eq!(
                dialled.is_ok(),
                good,
                "{presented:?} where {wanted} is asked for"
            );
            if let Err(error) = &dialled {
                assert!(
                    error.to_string().contains("the peer may only be"),
                    "{error}"
                );
            }
            drop(dialled);
            let _ = accepting.join().expect("no panic");
        });
    }
    // A list of names does not replace the authority.
    let stranger = Authority::new();
    let (certificate, key) = stranger.certify_all(&["x", SPIFFE], Age::Valid);
    let server = TlsPem {
        authorities: Some(OURS.pem()),
        certificate: Some(certificate),
        key: Some(key),
    };
    let listener = listen(&server);
    let client = TlsClient::new(&OURS.side(Age::Valid))
        .and_then(|client| client.with_peers(names(&[SPIFFE])))
        .expect("certificates");
    let options = options(Some(client), None);
    thread::scope(|scope| {
        scope.spawn(|| listener.accept(Some(soon())).map(drop));
        let error = establish_error(connect_with(listener.local_address(), &options, soon()));
        assert!(error.to_string().contains("no authority (CA)"), "{error}");
    });
}

#[test]
fn names_that_are_none_are_refused() {
    for text in ["", "two words", "spiffe://with space/x", "http://\u{202e}x"] {
        assert!(text.parse::<PeerName>().is_err(), "{text:?}");
    }
    for text in ["a.example", "10.0.0.1", "::1", SPIFFE] {
        assert_eq!(text.parse::<PeerName>().expect(text).to_string(), text);
    }
}

/// A directory that no other test uses, with these files.
struct Directory(PathBuf);

impl Directory {
    fn new(files: &[(&str, &[u8])]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("multifd-tls-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a new directory");
        let directory = Self(path);
        directory.write(files);
        directory
    }

    fn write(&self, files: &[(&str, &[u8])]) {
        for (name, octets) in files {
            fs::write(self.0.join(name), octets).expect("a file");
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn directories_are_read_as_the_field_lays_them_out() {
    let (ca, side) = (OURS.pem(), OURS.side(Age::Valid));
    let (certificate, key) = (
        side.certificate.as_deref().unwrap(),
        side.key.as_deref().unwrap(),
    );
    let qemu = Directory::new(&[
        ("ca-cert.pem", &ca),
        ("server-cert.pem", certificate),
        ("server-key.pem", key),
    ]);
    let files = TlsFiles::in_directory(&qemu.0, TlsSide::Server).expect("as QEMU has it");
    assert_eq!(files.certificate, Some(qemu.0.join("server-cert.pem")));
    assert_eq!(files.read().expect("files").key.as_deref(), Some(key));
    let files = TlsFiles::in_directory(&qemu.0, TlsSide::Client).expect("without a certificate");
    assert_eq!((files.certificate, files.key), (None, None));
    qemu.write(&[("client-cert.pem", certificate)]);
    let error = TlsFiles::in_directory(&qemu.0, TlsSide::Client).expect_err("no key");
    assert!(
        error.to_string().contains("client-key.pem is missing"),
        "{error}"
    );

    let secret = Directory::new(&[("ca.crt", &ca), ("tls.crt", certificate), ("tls.key", key)]);
    for side in [TlsSide::Client, TlsSide::Server] {
        let files = TlsFiles::in_directory(&secret.0, side).expect("as Kubernetes has it");
        assert_eq!(files.authorities, Some(secret.0.join("ca.crt")));
        assert_eq!(files.key, Some(secret.0.join("tls.key")));
    }
    secret.write(&[("ca-cert.pem", &ca)]);
    let error = TlsFiles::in_directory(&secret.0, TlsSide::Server).expect_err("two");
    assert!(error.to_string().contains("there are both"), "{error}");
    let empty = Directory::new(&[]);
    let error = TlsFiles::in_directory(&empty.0, TlsSide::Server).expect_err("none");
    let text = error.to_string();
    assert!(
        text.contains("ca-cert.pem") && text.contains("ca.crt"),
        "{text}"
    );
}

/// The certificate that the listener shows, as far as this client accepts it.
fn shake(listener: &Listener, client: &ChannelOptions) -> Result<(), String> {
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon())).map(drop));
        let dialled = connect_with(listener.local_address(), client, soon());
        let result = dialled.map(drop).map_err(|error| error.to_string());
        let _ = accepting.join().expect("no panic");
        result
    })
}

#[test]
fn certificates_renewed_on_disk_are_used_from_then_on_by_both_sides() {
    // The old ones ran out; a listener and a dialler that live on pick the new ones up.
    let expired = OURS.side(Age::Expired);
    let valid = OURS.side(Age::Valid);
    let put = |directory: &Directory, side: &TlsPem| {
        directory.write(&[
            ("tls.crt", side.certificate.as_deref().unwrap()),
            ("tls.key", side.key.as_deref().unwrap()),
        ]);
    };
    let (server, client) = (
        Directory::new(&[("ca.crt", &OURS.pem())]),
        Directory::new(&[("ca.crt", &OURS.pem())]),
    );
    put(&server, &expired);
    put(&client, &expired);
    let files = |directory: &Directory, side| TlsFiles::in_directory(&directory.0, side).unwrap();
    let accepting = TlsServer::from_files(files(&server, TlsSide::Server), Clients::OfAuthority);
    let address = "tls:127.0.0.1:0".parse().expect("an address");
    let listener = Listener::bind_with(&address, &options(None, accepting.ok())).expect("a port");
    let dialling = TlsClient::from_files(files(&client, TlsSide::Client)).expect("files");
    let dialling = options(Some(dialling), None);

    let error = shake(&listener, &dialling).expect_err("expired");
    assert!(error.contains("it has expired"), "{error}");
    put(&server, &valid);
    // The server's is good now; the client learns at its first receive that its own is not.
    let refused = thread::scope(|scope| {
        let accepted = scope.spawn(|| listener.accept(Some(soon())).map(drop));
        let channel = connect_with(listener.local_address(), &dialling, soon()).expect("a server");
        let (mut send, mut receive, _) = channel.split();
        receive.set_deadline(Some(soon()));
        let _ = send.send(&[0; 128], &[]);
        let heard = receive
            .receive(&mut [0; 8])
            .expect_err("refused")
            .to_string();
        drop((send, receive));
        (heard, accepted.join().expect("no panic").is_err())
    });
    assert!(
        refused.0.contains("this side's certificate has expired"),
        "{}",
        refused.0
    );
    assert!(refused.1);
    put(&client, &valid);
    shake(&listener, &dialling).expect("both are renewed");
}

#[test]
fn a_half_written_pair_leaves_the_old_one_in_use() {
    let old = OURS.side(Age::Valid);
    let new = OURS.side(Age::Valid);
    let part = |part: &Option<Vec<u8>>| part.clone().expect("a part");
    let directory = Directory::new(&[
        ("ca.crt", &OURS.pem()),
        ("tls.crt", &part(&old.certificate)),
        ("tls.key", &part(&old.key)),
    ]);
    let files = TlsFiles::in_directory(&directory.0, TlsSide::Server).expect("a layout");
    let server = TlsServer::from_files(files.clone(), Clients::Anybody).expect("files");
    let address = "tls:127.0.0.1:0".parse().expect("an address");
    let listener = Listener::bind_with(&address, &options(None, Some(server))).expect("a port");
    let client = TlsPem {
        authorities: Some(OURS.pem()),
        ..TlsPem::default()
    };
    let client = options(Some(TlsClient::new(&client).expect("an authority")), None);
    let half = part(&new.certificate);
    let steps: [&[(&str, &[u8])]; 4] = [
        &[("tls.crt", &half[..half.len() / 2])],
        &[("tls.crt", &half)],
        &[("tls.key", b"")],
        &[("tls.key", &part(&new.key))],
    ];
    for (step, files) in steps.into_iter().enumerate() {
        directory.write(files);
        shake(&listener, &client).unwrap_or_else(|error| panic!("step {step}: {error}"));
    }
    // Gone altogether, as in the moment of a swap.
    fs::remove_file(directory.0.join("tls.crt")).expect("ours");
    shake(&listener, &client).expect("the pair that was read last");
    // A program that starts in such a moment is told.
    assert!(TlsServer::from_files(files, Clients::Anybody).is_err());
}
