//! A destination that dials its source: the listener that calls, from the side that accepts and speaks first.

use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use multifd_transport::{
    Address, Channel, ChannelOptions, Closer, ListenError, Listener, ReceiveHalf, SendHalf,
    TcpOptions, conformance_tests,
};
use socket2::SockRef;

/// What a test is given to wait, on a machine that is busy with other things.
const LATE_MAX: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + LATE_MAX
}

conformance_tests!(called, called_pair);

/// The source's end, and the destination's, of a connection that the destination dialled.
fn called_pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let source = listen();
    let destination = calling(source.local_address());
    let ours = source.accept(Some(soon())).expect("a call").0;
    // A connection is given out when something was said on it; the suite has its own words.
    let (ours, theirs) = (speak_first(ours), destination);
    let (theirs, _) = theirs.accept(Some(soon())).expect("the connection");
    (ours, hear_first(theirs))
}

/// A channel on which one byte was said, and one on which it was heard.
struct Begun {
    halves: (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer),
    name: String,
}

impl Channel for Begun {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        self.halves
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}

fn speak_first(channel: Box<dyn Channel>) -> Box<dyn Channel> {
    let name = channel.describe();
    let mut halves = channel.split();
    halves.0.send(b"!", &[]).expect("a byte");
    Box::new(Begun { halves, name })
}

fn hear_first(channel: Box<dyn Channel>) -> Box<dyn Channel> {
    let name = channel.describe();
    let mut halves = channel.split();
    halves.1.receive(&mut [0]).expect("a byte");
    Box::new(Begun { halves, name })
}

fn listen() -> Listener {
    Listener::bind(
        &"127.0.0.1:0".parse().expect("an address"),
        &TcpOptions::default(),
    )
    .expect("a port")
}

fn calling(address: &Address) -> Listener {
    Listener::calling(address, &ChannelOptions::default()).expect("a thread")
}

#[test]
fn a_source_gets_as_many_channels_as_it_opens() {
    let source = listen();
    let destination = calling(source.local_address());
    assert_eq!(destination.local_address(), source.local_address());
    let mut kept = Vec::new();
    for number in 0..12_u8 {
        let (channel, _) = source.accept(Some(soon())).expect("a call");
        let (mut send, receive, _) = channel.split();
        send.send(&[number; 128], &[]).expect("send");
        kept.push((send, receive));
    }
    let mut heard: Vec<u8> = (0..12)
        .map(|_| {
            let (channel, _) = destination.accept(Some(soon())).expect("a channel");
            let mut hello = [0; 128];
            channel.split().1.receive(&mut hello).expect("receive");
            hello[0]
        })
        .collect();
    heard.sort_unstable();
    assert_eq!(heard, (0..12).collect::<Vec<u8>>());
}

#[test]
fn a_silent_source_holds_one_connection_and_nothing_is_given_out() {
    let source = TcpListener::bind("127.0.0.1:0").expect("a port");
    let destination = calling(&source.local_addr().expect("bound").into());
    let (_first, _) = source.accept().expect("one call");
    source.set_nonblocking(true).expect("nonblocking");
    thread::sleep(Duration::from_millis(600));
    assert!(source.accept().is_err(), "no second one");
    assert!(destination.try_accept().expect("nothing yet").is_none());
}

#[test]
fn a_source_that_comes_later_is_found() {
    let address = {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        taken.local_addr().expect("bound")
    };
    let destination = calling(&address.into());
    thread::sleep(Duration::from_millis(300));
    let source = Listener::bind(&address.into(), &TcpOptions::default()).expect("the port");
    let (channel, _) = source.accept(Some(soon())).expect("a call");
    let (mut send, _receive, _) = channel.split();
    send.send(b"x", &[]).expect("send");
    destination.accept(Some(soon())).expect("the channel");
}

#[test]
fn it_ends_when_it_is_shut_down_or_dropped_and_calls_no_more() {
    let source = TcpListener::bind("127.0.0.1:0").expect("a port");
    let destination = calling(&source.local_addr().expect("bound").into());
    let closer = destination.closer();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| destination.accept(None).err());
        thread::sleep(Duration::from_millis(50));
        closer.shutdown();
        let error = waiting.join().expect("no panic");
        assert!(matches!(error, Some(ListenError::ShutDown)), "{error:?}");
    });
    drop(destination);
    let (mut first, _) = source.accept().expect("the one that was ready");
    // It is closed, and no other comes.
    first.set_read_timeout(Some(LATE_MAX)).expect("a limit");
    assert_eq!(
        std::io::Read::read(&mut first, &mut [0]).expect("the end"),
        0
    );
    source.set_nonblocking(true).expect("nonblocking");
    thread::sleep(Duration::from_millis(400));
    assert!(source.accept().is_err());
}

#[test]
fn a_poll_loop_hears_the_bell_for_each_channel() {
    let source = listen();
    let destination = calling(source.local_address());
    // The bell has bytes to read.
    let ready = || {
        SockRef::from(&destination)
            .peek(&mut [MaybeUninit::uninit()])
            .is_ok_and(|count| count > 0)
    };
    assert!(!ready(), "nothing was said");
    let mut kept = Vec::new();
    for _ in 0..2 {
        let (channel, _) = source.accept(Some(soon())).expect("a call");
        let (mut send, receive, _) = channel.split();
        send.send(b"x", &[]).expect("send");
        kept.push((send, receive));
    }
    for _ in 0..2 {
        let until = soon();
        while !ready() {
            assert!(Instant::now() < until, "the bell");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(destination.try_accept().expect("no error").is_some());
    }
}

#[test]
fn rdma_is_refused_at_once() {
    let address: Address = "rdma:127.0.0.1:1".parse().expect("an address");
    let error = Listener::calling(&address, &ChannelOptions::default()).err();
    assert_eq!(error.expect("not by RDMA").code(), "listen-unavailable");
}
