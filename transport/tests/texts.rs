//! What people read when a channel did not come about: each text says what is wrong and what to do, and says it once.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use multifd_transport::tls::{Clients, TlsClient, TlsPem, TlsServer};
use multifd_transport::{
    Address, ChannelOptions, Listener, STRANGER_BYTES, Stranger, TcpOptions, connect, connect_with,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A certificate that is its own authority, and its key.
fn pem() -> TlsPem {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    TlsPem {
        authorities: Some(cert.pem().into_bytes()),
        certificate: Some(cert.pem().into_bytes()),
        key: Some(signing_key.serialize_pem().into_bytes()),
    }
}

fn client() -> ChannelOptions {
    let mut options = ChannelOptions::default();
    options.tls_client = Some(TlsClient::new(&pem()).expect("certificates"));
    options
}

fn tls_listener() -> Listener {
    let mut options = ChannelOptions::default();
    options.tls_server = Some(TlsServer::new(&pem(), Clients::OfAuthority).expect("certificates"));
    Listener::bind_with(&"tls:127.0.0.1:0".parse().expect("an address"), &options).expect("a port")
}

fn port(listener: &Listener) -> u16 {
    match listener.local_address() {
        Address::Tcp(target) | Address::Tls(target) => target.port(),
        other => panic!("{other} has no port"),
    }
}

/// What a plain channel hears instead of an answer, after saying hello.
fn heard(mut receive: Box<dyn multifd_transport::ReceiveHalf>) -> String {
    receive.set_deadline(Some(Instant::now() + Duration::from_secs(2)));
    receive.receive(&mut [0; 256]).expect_err("no answer");
    let mut octets = [0; STRANGER_BYTES];
    let count = receive.peek(&mut octets);
    Stranger::look_at(&octets[..count])
        .expect("something")
        .to_string()
}

/// Says `banner` to whoever connects, and reads until he goes.
fn speak(listener: TcpListener, banner: &[u8]) {
    let (mut peer, _) = listener.accept().expect("a client");
    peer.write_all(banner).expect("a banner");
    let _ = peer.read_to_end(&mut Vec::new());
}

#[test]
fn a_plain_source_at_a_tls_destination_is_told_to_use_tls() {
    let listener = tls_listener();
    let target: Address = format!("127.0.0.1:{}", port(&listener))
        .parse()
        .expect("an address");
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon())).err().expect("no TLS"));
        let channel = connect(&target, &TcpOptions::default(), soon()).expect("a connection");
        let (mut send, receive, closer) = channel.split();
        let mut hello = [0; 128];
        hello[..8].copy_from_slice(b"MULTIFD\n");
        send.send(&hello, &[]).expect("a hello");
        let text = heard(receive);
        assert!(
            text.contains("speaks TLS: dial it as tls:HOST:PORT"),
            "{text}"
        );
        closer.shutdown();
        let text = accepting.join().expect("no panic").to_string();
        assert!(text.contains(r#"it began with "MULTIFD\n"#), "{text}");
        assert!(
            text.contains("it dialled without TLS: let it dial tls:HOST:PORT"),
            "{text}"
        );
    });
}

#[test]
fn a_tls_source_at_a_plain_destination_is_told_that_there_is_no_tls() {
    let plain = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("tls:{}", plain.local_addr().expect("bound"));
    thread::scope(|scope| {
        scope.spawn(|| speak(plain, b"MULTIFD\n refuses a hello that is none"));
        let error = connect_with(&address.parse().expect("an address"), &client(), soon());
        let text = error.err().expect("no TLS").to_string();
        assert!(text.contains("it listens without TLS"), "{text}");
        assert!(text.contains("dial it as tcp:HOST:PORT"), "{text}");
        assert_eq!(text.matches("MULTIFD").count(), 1, "{text}");
    });
}

#[test]
fn an_ssh_server_is_told_from_a_silent_one() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = server.local_addr().expect("bound").into();
    thread::scope(|scope| {
        scope.spawn(|| speak(server, b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"));
        let channel = connect(&address, &TcpOptions::default(), soon()).expect("a connection");
        let (mut send, receive, closer) = channel.split();
        send.send(&[0; 128], &[]).expect("a hello");
        let text = heard(receive);
        assert!(text.contains(r#""SSH-2.0-OpenSSH_9.2p1"#), "{text}");
        assert!(text.contains("check host and port"), "{text}");
        closer.shutdown();
    });
}

#[test]
fn a_key_with_a_password_is_named_as_such() {
    let heads = [
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIFHDBOBgkqhkiG9w0BBQ0wQTApBgkqhkiG9w0BBQwwHAQI\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n",
    ];
    for head in heads {
        let mut pem = pem();
        pem.key = Some(head.as_bytes().to_vec());
        let text = TlsClient::new(&pem).expect_err("a password").to_string();
        assert!(text.contains("protected by a password"), "{text}");
        assert!(text.contains("openssl pkey -in KEY -out PLAIN"), "{text}");
    }
}

#[test]
fn a_link_local_address_without_an_interface_is_told_how_to_name_one() {
    let address: Address = "[fe80::1]:4000".parse().expect("an address");
    let dialled = connect(&address, &TcpOptions::default(), soon()).err();
    let bound = Listener::bind(&address, &TcpOptions::default()).err();
    for text in [
        dialled.expect("no interface").to_string(),
        bound.expect("no interface").to_string(),
    ] {
        assert!(text.contains("link-local"), "{text}");
        assert!(text.contains("[fe80::1%eth0]:4000"), "{text}");
    }
}

#[test]
fn what_is_in_the_way_of_a_unix_listener_is_named() {
    let path = std::env::temp_dir().join(format!("multifd-texts-{}", std::process::id()));
    let address = Address::unix(&path).expect("a short path");
    let refused = || {
        let error = Listener::bind(&address, &TcpOptions::default()).err();
        error.expect("it is in the way").to_string()
    };
    std::fs::write(&path, "precious").expect("a file");
    assert!(refused().contains("a file that is no socket; it is left as it is"));
    std::fs::remove_file(&path).expect("ours");
    let _living = UnixListener::bind(&path).expect("a socket");
    assert!(refused().contains("another process listens there"));
    std::fs::remove_file(&path).expect("ours");
}

/// The text of an error and of everything below it, as programs print chains.
fn chain(error: &dyn Error) -> Vec<String> {
    let mut texts = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        texts.push(error.to_string());
        next = error.source();
    }
    texts
}

#[test]
fn no_error_is_printed_twice() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = Address::from(taken.local_addr().expect("bound"));
    let listen = Listener::bind(&address, &TcpOptions::default())
        .err()
        .expect("it is taken");
    let nobody: Address = "unix:/nonexistent/multifd".parse().expect("an address");
    let connect = connect(&nobody, &TcpOptions::default(), soon())
        .err()
        .expect("nobody");
    let file = TlsPem::read(Some("/nowhere/ca.pem".as_ref()), None, None).expect_err("no file");
    let unavailable = connect_with(
        &"tls:127.0.0.1:9".parse().expect("an address"),
        &ChannelOptions::default(),
        soon(),
    );
    let unavailable = unavailable.err().expect("no authority");
    let map =
        multifd_transport::GuestMemory::anonymous(&[multifd_transport::memory::RegionLayout {
            guest_address: 0,
            bytes: 1 << 62,
        }]);
    let map = map.expect_err("too much");
    let (left, right) = multifd_transport::unix::pair().expect("a pair");
    let mut receive = left.split().1;
    drop(right);
    let channel = receive.receive(&mut [0]).expect_err("the end");
    let errors: [&dyn Error; 6] = [&listen, &connect, &file, &unavailable, &map, &channel];
    for error in errors {
        let chain = chain(error);
        for (above, below) in chain.iter().zip(chain.iter().skip(1)) {
            assert!(!above.contains(below.as_str()), "{chain:?}");
        }
    }
    // What goes wrong on a connection is cloned and kept; its cause is in the text.
    let _ = TcpStream::connect(taken.local_addr().expect("bound"));
}
