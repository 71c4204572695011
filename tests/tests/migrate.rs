//! Whole migrations of the model machine in one process, over every kind of channel.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::host::Host;
use multifd_tests::model::{DestinationMachine, SourceMachine, differing_page, fill, memory};
use multifd_transport::{Address, Channel, GuestMemory, Listener, TcpOptions};
use multifd_wire::ChannelRef;

/// Everything that one migration left behind.
struct Done {
    sent: tx::Finished,
    received: rx::Finished,
    source_memory: GuestMemory,
    destination_memory: Option<GuestMemory>,
    destination_running: bool,
    source_running: bool,
}

fn listen(address: &str) -> (Vec<Listener>, Address) {
    let listener = Listener::bind(&address.parse().unwrap(), &TcpOptions::default()).unwrap();
    let address = listener.local_address().clone();
    (vec![listener], address)
}

/// Default settings for a host that is busy with other tests, on which these guests can outpace their link: convergence is not
/// what is tested.
fn patient() -> tx::config::ConfigBuilder {
    tx::Config::builder().downtime_limit(Duration::from_secs(60))
}

fn migrate(
    machine: SourceMachine,
    source_memory: GuestMemory,
    destination: DestinationMachine,
    config: tx::Config,
    address: &str,
) -> Done {
    let (listeners, address) = listen(address);
    let (dest_memory, dest_running) = (
        Arc::clone(&destination.memory),
        Arc::clone(&destination.running),
    );
    let source_running = Arc::clone(&machine.running);
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners,
        config: rx::Config::default(),
        spawner: None,
    })
    .unwrap();
    let sources = vec![machine.source()];
    let parts = tx::Parts {
        vmm: Box::new(machine),
        memory: source_memory.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address,
            options: TcpOptions::default().into(),
        }),
        config,
        spawner: None,
    };
    let sent = tx::Migration::start(parts).unwrap().wait();
    let received = reception.wait();
    let destination_memory = dest_memory.lock().unwrap().clone();
    Done {
        sent,
        received,
        source_memory,
        destination_memory,
        destination_running: dest_running.load(Ordering::SeqCst),
        source_running: source_running.load(Ordering::SeqCst),
    }
}

fn assert_migrated(done: &Done) {
    assert!(
        done.sent.error.is_none(),
        "{}",
        done.sent.error.as_ref().unwrap()
    );
    assert!(
        done.received.error.is_none(),
        "{}",
        done.received.error.as_ref().unwrap()
    );
    assert_eq!(done.sent.report.outcome, tx::OutcomeKind::Migrated);
    assert_eq!(done.sent.report.digest_equal, Some(true));
    assert!(
        done.destination_running && !done.source_running,
        "exactly the destination runs"
    );
    assert_eq!(
        differing_page(
            &done.source_memory,
            done.destination_memory.as_ref().unwrap()
        ),
        None
    );
}

#[test]
fn an_idle_guest_moves_over_tcp() {
    let source = memory(64 << 20);
    fill(&source, 1, 3);
    let machine = SourceMachine::start(source.clone(), 0, 0, 1);
    let done = migrate(
        machine,
        source,
        DestinationMachine::default(),
        patient().build().unwrap(),
        "127.0.0.1:0",
    );
    assert_migrated(&done);
}

#[test]
fn a_writing_guest_moves_over_tcp_with_every_number_of_channels() {
    for channels in [1, 2, 4, 8] {
        let source = memory(64 << 20);
        fill(&source, channels.into(), 4);
        let machine = SourceMachine::start(source.clone(), 2, 20_000, channels.into());
        let config = patient().channels(channels).build().unwrap();
        let done = migrate(
            machine,
            source,
            DestinationMachine::default(),
            config,
            "127.0.0.1:0",
        );
        assert_migrated(&done);
        assert!(
            done.sent.report.rounds >= 2,
            "{:?}",
            done.sent.report.round_list
        );
    }
}

#[test]
fn a_writing_guest_moves_over_unix_sockets() {
    let path = std::env::temp_dir().join(format!("multifd-test-{}.sock", std::process::id()));
    let source = memory(32 << 20);
    fill(&source, 5, 2);
    let machine = SourceMachine::start(source.clone(), 1, 5000, 5);
    let done = migrate(
        machine,
        source,
        DestinationMachine::default(),
        patient().build().unwrap(),
        &format!("unix:{}", path.display()),
    );
    assert_migrated(&done);
}

#[test]
fn a_writing_guest_moves_over_in_memory_channels() {
    struct Offer(rx::Handle);
    impl tx::Dial for Offer {
        fn dial(
            &self,
            _: ChannelRef,
            _: Instant,
        ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
            let (ours, theirs) = multifd_transport::memory::pair(256 << 10);
            self.0.offer(theirs)?;
            Ok(ours)
        }
    }
    let source = memory(32 << 20);
    fill(&source, 6, 0);
    let machine = SourceMachine::start(source.clone(), 1, 5000, 6);
    let destination = DestinationMachine::default();
    let (dest_memory, state, want) = (
        Arc::clone(&destination.memory),
        Arc::clone(&destination.state),
        machine.state.clone(),
    );
    let parts = rx::Parts {
        vmm: Box::new(destination),
        listeners: Vec::new(),
        config: rx::Config::default(),
        spawner: None,
    };
    let reception = rx::Reception::start(parts).unwrap();
    let sources = vec![machine.source()];
    let dial = Box::new(Offer(reception.handle()));
    let parts = tx::Parts {
        vmm: Box::new(machine),
        memory: source.clone(),
        sources,
        dial,
        config: patient().build().unwrap(),
        spawner: None,
    };
    let sent = tx::Migration::start(parts).unwrap().wait();
    assert!(sent.error.is_none(), "{}", sent.error.unwrap());
    assert!(reception.wait().error.is_none());
    assert_eq!(
        differing_page(&source, dest_memory.lock().unwrap().as_ref().unwrap()),
        None
    );
    assert_eq!(state.lock().unwrap().as_ref().unwrap(), &want);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running_at_the_source_only() {
    let source = memory(64 << 20);
    fill(&source, 7, 0);
    let machine = SourceMachine::start(source.clone(), 1, 5000, 7);
    let (running, writes) = (Arc::clone(&machine.running), machine.write_counter());
    let (listeners, address) = listen("127.0.0.1:0");
    let destination = DestinationMachine::default();
    let dest_running = Arc::clone(&destination.running);
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners,
        config: rx::Config::default(),
        spawner: None,
    })
    .unwrap();
    let sources = vec![machine.source()];
    let config = tx::Config::builder()
        .bandwidth(Some(16 << 20))
        .build()
        .unwrap();
    let dial = Box::new(tx::Dialer {
        address,
        options: TcpOptions::default().into(),
    });
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(machine),
        memory: source,
        sources,
        dial,
        config,
        spawner: None,
    })
    .unwrap();
    let handle = migration.handle();
    while handle.progress().sent_bytes < 4 << 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (began, host) = (Instant::now(), Host::watch());
    handle.cancel();
    let sent = migration.wait();
    assert!(
        began.elapsed() < Duration::from_secs(3) + host.delayed(),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(sent.report.outcome, tx::OutcomeKind::Cancelled);
    let received = reception.wait();
    assert_eq!(received.error.unwrap().code(), "receiver.peer.aborted");
    assert!(running.load(Ordering::SeqCst) && !dest_running.load(Ordering::SeqCst));
    let (before, began) = (writes(), Instant::now());
    while writes() == before {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "the guest goes on writing"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
