//! A pair over TCP: the destination listens, the source dials four data channels. Both in one process here, on two hosts elsewhere.
//!
//! `cargo run --release -p multifd --example tcp_pair`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use std::time::Duration;

use multifd::transport::{Address, ChannelOptions, Listener};
use multifd::{destination, source};
use support::{Arriving, Leaving};

/// The destination's side: waits for one guest.
fn destination() -> Result<(Address, destination::Reception<Arriving>), Box<dyn std::error::Error>>
{
    let listener = Listener::bind_with(&"tcp:127.0.0.1:0".parse()?, &ChannelOptions::default())?;
    let address = listener.local_address().clone();
    let config = destination::Config::builder()
        .memory_bytes_max(Some(1 << 30))
        .suspend(Duration::from_secs(60))
        .build()?;
    let parts = destination::Parts::new(Arriving::default());
    let parts = parts.listener(listener).config(config);
    Ok((address, destination::Reception::start(parts)?))
}

/// The source's side: sends one guest there.
fn source(to: Address) -> Result<source::Finished<Leaving>, Box<dyn std::error::Error>> {
    let memory = support::memory();
    let (machine, writes) = Leaving::start(&memory);
    let config = support::settings()
        .channels(4)
        .downtime_limit(Duration::from_millis(100))
        .build()?;
    let dial = source::SpreadDialer {
        control: to,
        // Other addresses of the same destination would go here, of any kind.
        data: Vec::new(),
        options: ChannelOptions::default(),
    };
    let parts = source::Parts::new(machine, memory, dial);
    let parts = parts.source(writes).config(config);
    Ok(source::Migration::start(parts)?.wait())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (address, reception) = destination()?;
    println!("listening on {address}");
    let left = source(address)?;
    let arrived = reception.wait();
    if let Some(error) = left.error {
        // It has a stable code, says in which phase and on which channel, and what to do.
        return Err(format!("{error} [{}]", error.code()).into());
    }
    println!(
        "{} bytes on the wire, digest {}",
        left.report.sent_bytes,
        left.report.digest.unwrap_or_default()
    );
    let machine = arrived.vmm.ok_or("it did not come back")?;
    assert!(machine.runs && machine.is_right());
    Ok(())
}
