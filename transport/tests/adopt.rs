//! Sockets that somebody else made: told apart, as channels and as listeners, and refused when they are neither.

use std::fs::File;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use multifd_transport::adopt::{Part, Protection, from_fd};
use multifd_transport::{
    AdoptError, Channel, ChannelOptions, Listener, TcpOptions, conformance_tests, connect,
};
use socket2::SockRef;

conformance_tests!(adopted_tcp, || pair_of(tcp_streams()));
conformance_tests!(adopted_unix, || {
    let (left, right) = UnixStream::pair().expect("a pair");
    pair_of((left.into(), right.into()))
});

fn tcp_streams() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let dialled = TcpStream::connect(address).expect("a connection");
    (dialled.into(), listener.accept().expect("it").0.into())
}

fn pair_of((left, right): (OwnedFd, OwnedFd)) -> (Box<dyn Channel>, Box<dyn Channel>) {
    (
        plain(left, Part::Dialled("host")).expect("a channel"),
        plain(right, Part::Accepted).expect("a channel"),
    )
}

fn plain(fd: impl Into<OwnedFd>, part: Part<'_>) -> Result<Box<dyn Channel>, AdoptError> {
    from_fd(
        fd.into(),
        Protection::Plain,
        part,
        &ChannelOptions::default(),
    )
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn options_are_set_on_a_socket_that_was_passed_in() {
    let (left, _right) = tcp_streams();
    let watched = left.try_clone().expect("a descriptor");
    let options = ChannelOptions::from(TcpOptions {
        user_timeout: Some(Duration::from_millis(12_345)),
        ..TcpOptions::default()
    });
    let channel = from_fd(left, Protection::Plain, Part::Accepted, &options).expect("a channel");
    assert!(channel.describe().starts_with("tcp 127.0.0.1:"));
    let fd = watched.as_fd();
    let socket = SockRef::from(&fd);
    assert!(socket.tcp_nodelay().expect("TCP_NODELAY"));
    let timeout = socket.tcp_user_timeout().expect("TCP_USER_TIMEOUT");
    assert_eq!(timeout, Some(Duration::from_millis(12_345)));
}

#[test]
fn what_is_no_connection_is_refused_with_the_reason() {
    let file: OwnedFd = File::open("/dev/null").expect("a file").into();
    let udp: OwnedFd = UdpSocket::bind("127.0.0.1:0").expect("a socket").into();
    let datagrams: OwnedFd = UnixDatagram::unbound().expect("a socket").into();
    let listening: OwnedFd = TcpListener::bind("127.0.0.1:0").expect("a port").into();
    let unconnected = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let unconnected: OwnedFd = unconnected.expect("a socket").into();
    for (fd, reason) in [
        (file, "no socket"),
        (udp, "no stream socket"),
        (datagrams, "no stream socket"),
        (listening, "listens and is not a connection"),
        (unconnected, "not connected"),
    ] {
        let error = plain(fd, Part::Accepted).err().expect("no channel");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn listeners_of_every_family_are_made_of_descriptors() {
    let name = format!("multifd-adopt-{}", std::process::id());
    let path = std::env::temp_dir().join(&name);
    let tcp: OwnedFd = TcpListener::bind("127.0.0.1:0").expect("a port").into();
    let unix: OwnedFd = UnixListener::bind(&path).expect("a path").into();
    let hidden = {
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        UnixListener::bind_addr(&address).expect("a name")
    };
    for (fd, begins) in [
        (tcp, "tcp:127.0.0.1:".to_owned()),
        (unix, format!("unix:{}", path.display())),
        (hidden.into(), format!("unix:@{name}")),
    ] {
        let options = ChannelOptions::default();
        let listener = Listener::from_fd(fd, Protection::Plain, &options).expect("a listener");
        let address = listener.local_address();
        assert!(address.to_string().starts_with(&begins), "{address}");
        let dialled = connect(address, &TcpOptions::default(), soon()).expect("a connection");
        let (accepted, _) = listener.accept(Some(soon())).expect("the connection");
        let ((mut send, _, _), (_, mut receive, _)) = (dialled.split(), accepted.split());
        send.send(b"hello", &[]).expect("send");
        let mut octets = [0; 5];
        receive.receive(&mut octets).expect("receive");
        assert_eq!(&octets, b"hello");
    }
    assert!(path.exists(), "the path is its maker's to remove");
    std::fs::remove_file(&path).expect("ours");
}

#[test]
fn what_does_not_listen_is_no_listener() {
    let (connected, _peer) = tcp_streams();
    let file: OwnedFd = File::open("/dev/null").expect("a file").into();
    for (fd, reason) in [(connected, "does not listen"), (file, "no socket")] {
        let error = Listener::from_fd(fd, Protection::Plain, &ChannelOptions::default());
        let error = error.err().expect("no listener");
        let text = error.to_string();
        assert!(
            text.contains("descriptor ") && text.contains(reason),
            "{text}"
        );
        assert_eq!(error.code(), "listen-bind");
    }
}

#[test]
fn a_descriptor_is_not_used_without_tls_where_tls_is_asked_for() {
    let options = ChannelOptions::default();
    for part in [Part::Accepted, Part::Dialled("host")] {
        let (fd, _peer) = tcp_streams();
        let error = from_fd(fd, Protection::Tls, part, &options).err();
        let error = error.expect("no certificates");
        assert!(error.to_string().contains("TLS needs"), "{error}");
    }
    let listening: OwnedFd = TcpListener::bind("127.0.0.1:0").expect("a port").into();
    let error = Listener::from_fd(listening, Protection::Tls, &options).err();
    assert_eq!(error.expect("no certificate").code(), "listen-unavailable");
    let (left, _right) = UnixStream::pair().expect("a pair");
    let error = from_fd(left.into(), Protection::Tls, Part::Accepted, &options).err();
    assert!(
        error
            .expect("no TLS")
            .to_string()
            .contains("TCP sockets only")
    );
}
