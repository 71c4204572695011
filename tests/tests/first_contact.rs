//! How the first connection comes about: a destination that is not there yet, or busy, or that dials its source.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::model::{DestinationMachine, SourceMachine, differing_page, fill, memory};
use multifd_transport::{ChannelOptions, GuestMemory, Listener, TcpOptions};

/// A machine, and its migration by this dialler.
struct Source {
    memory: GuestMemory,
    migration: tx::Migration,
}

fn start(dial: impl tx::Dial + 'static, config: tx::config::ConfigBuilder) -> Source {
    let memory = memory(8 << 20);
    fill(&memory, 1, 3);
    let machine = SourceMachine::start(memory.clone(), 0, 0, 1);
    let parts = tx::Parts {
        sources: vec![machine.source()],
        vmm: Box::new(machine),
        memory: memory.clone(),
        dial: Box::new(dial),
        config: config.build().expect("within limits"),
        spawner: None,
    };
    let migration = tx::Migration::start(parts).expect("a thread");
    Source { memory, migration }
}

fn config() -> tx::config::ConfigBuilder {
    tx::Config::builder().downtime_limit(Duration::from_secs(60))
}

fn dialer(address: SocketAddr) -> tx::Dialer {
    tx::Dialer {
        address: address.into(),
        options: ChannelOptions::default(),
    }
}

/// Takes the guest over at these listeners, and sees that it is the same.
fn receive(source: Source, listeners: Vec<Listener>) {
    let destination = DestinationMachine::default();
    let (memory, running) = (
        Arc::clone(&destination.memory),
        Arc::clone(&destination.running),
    );
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners,
        config: rx::Config::default(),
        spawner: None,
    })
    .expect("a thread");
    let sent = source.migration.wait();
    assert!(sent.error.is_none(), "{:?}", sent.error);
    let received = reception.wait();
    assert!(received.error.is_none(), "{:?}", received.error);
    assert!(running.load(Ordering::SeqCst));
    let there = memory.lock().unwrap().clone().expect("memory");
    assert_eq!(differing_page(&source.memory, &there), None);
}

fn listen(address: SocketAddr) -> Listener {
    Listener::bind(&address.into(), &TcpOptions::default()).expect("the port")
}

#[test]
fn a_destination_that_comes_up_a_moment_later_is_found() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound");
    drop(taken);
    let source = start(dialer(address), config());
    thread::sleep(Duration::from_millis(300));
    receive(source, vec![listen(address)]);
}

#[test]
fn a_destination_that_has_no_room_at_first_is_asked_again() {
    // It closes the first connections unheard, as one that is busy with strangers does.
    let busy = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = busy.local_addr().expect("bound");
    let source = start(dialer(address), config());
    for _ in 0..3 {
        drop(busy.accept().expect("it tries again"));
    }
    drop(busy);
    receive(source, vec![listen(address)]);
}

#[test]
fn a_destination_may_dial_its_source() {
    let any = "127.0.0.1:0".parse().expect("an address");
    let listener = listen(any);
    let address = listener.local_address().clone();
    let source = start(tx::CalledDialer { listener }, config().channels(4));
    let calling =
        Listener::calling(&address, &ChannelOptions::default()).expect("a listener that calls");
    receive(source, vec![calling]);
}

#[test]
fn what_ended_the_last_try_is_told_when_the_time_is_over() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound");
    drop(taken);
    let config = config().hello_deadline(Duration::from_millis(500));
    let sent = start(dialer(address), config).migration.wait();
    let error = sent.error.expect("nobody is there");
    assert_eq!(error.code(), "sender.channel.dial");
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[test]
fn what_stays_so_is_told_at_once() {
    let dial = tx::Dialer {
        address: "tls:127.0.0.1:9".parse().expect("an address"),
        options: ChannelOptions::default(),
    };
    let began = Instant::now();
    let config = config().hello_deadline(Duration::from_secs(60));
    let sent = start(dial, config).migration.wait();
    let error = sent.error.expect("no authority was given");
    assert!(error.to_string().contains("TLS needs"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30), "not tried again");
}
