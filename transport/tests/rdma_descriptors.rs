//! What a process has open before and after RDMA channels. One test in a process of its own: others would open descriptors meanwhile.
#![allow(clippy::print_stdout)] // says what is skipped

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use multifd_transport::conformance::{Kind, no_descriptor_stays_open};
use multifd_transport::{Address, Channel, ChannelOptions, Listener, connect_with};

/// The device that is used now.
static DEVICE: Mutex<String> = Mutex::new(String::new());

#[test]
fn nothing_of_an_rdma_channel_stays_open() {
    let Ok(list) = std::env::var("MULTIFD_RDMA") else {
        assert!(
            std::env::var("MULTIFD_REQUIRE_RDMA").as_deref() != Ok("1"),
            "MULTIFD_RDMA names no device, and MULTIFD_REQUIRE_RDMA=1"
        );
        println!(
            "SKIPPED nothing_of_an_rdma_channel_stays_open: no RDMA device (MULTIFD_RDMA=address,... names them)"
        );
        return;
    };
    for device in list.split(',') {
        device.clone_into(&mut DEVICE.lock().expect("no panic here"));
        no_descriptor_stays_open(Kind { name: "rdma", pair });
    }
}

fn pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let host = DEVICE.lock().expect("no panic here").clone();
    let address: Address = format!("rdma:{host}:0").parse().expect("an address");
    let options = ChannelOptions::default();
    let soon = Instant::now() + Duration::from_secs(20);
    let listener = Listener::bind_with(&address, &options).expect("an RDMA listener");
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon)).expect("the connection").0);
        let dialled = connect_with(listener.local_address(), &options, soon).expect("a connection");
        (dialled, accepting.join().expect("no panic"))
    })
}
