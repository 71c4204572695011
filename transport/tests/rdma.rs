//! The RDMA kind, on every device that the environment names: `MULTIFD_RDMA=10.9.0.1,10.9.1.1` lists an address of each. The devices are
//! real kernel verbs (soft-RoCE and soft-iWARP will do). Without the variable the tests are skipped by name, and fail if
//! `MULTIFD_REQUIRE_RDMA` is 1. `MULTIFD_CHECK=name,name` runs only these of the suite's checks.
#![allow(clippy::print_stdout, clippy::print_stderr)] // says what is skipped, and how far a long run is

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use multifd_transport::conformance::{self, CHECKS, Kind};
use multifd_transport::memory::RegionLayout;
use multifd_transport::rdma::{self, CHUNK_BYTES, RdmaOptions, Registration};
use multifd_transport::{
    Address, Channel, ChannelError, ChannelOptions, ConnectError, GuestMemory, IoSource,
    ListenError, Listener, connect_with,
};

/// The devices' addresses; none if the test is skipped.
fn devices(test: &str) -> Vec<String> {
    match std::env::var("MULTIFD_RDMA") {
        Ok(list) => list.split(',').map(str::to_owned).collect(),
        Err(_) => {
            assert!(
                std::env::var("MULTIFD_REQUIRE_RDMA").as_deref() != Ok("1"),
                "{test}: MULTIFD_RDMA names no device, and MULTIFD_REQUIRE_RDMA=1"
            );
            println!("SKIPPED {test}: no RDMA device (MULTIFD_RDMA=address,... names them)");
            Vec::new()
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn pair_at(host: &str, options: RdmaOptions) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let address: Address = format!("rdma:{host}:0").parse().expect("an address");
    let mut all = ChannelOptions::default();
    all.rdma = options;
    let listener = Listener::bind_with(&address, &all).expect("an RDMA listener");
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(soon())).expect("the connection").0);
        let dialled = connect_with(listener.local_address(), &all, soon()).expect("a connection");
        (dialled, accepting.join().expect("no panic"))
    })
}

/// The device of the suite that runs.
static DEVICE: Mutex<String> = Mutex::new(String::new());

fn pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let host = DEVICE.lock().expect("no panic here").clone();
    pair_at(&host, RdmaOptions::default())
}

// SPEC: BELOW-7
#[test]
fn every_check_of_the_suite_passes_on_every_device() {
    let only = std::env::var("MULTIFD_CHECK").ok();
    let known = |name: &str| CHECKS.iter().any(|check| check.name == name);
    let names = only.iter().flat_map(|only| only.split(','));
    assert!(
        names.clone().all(known),
        "not all checks: {:?}",
        names.collect::<Vec<_>>()
    );
    let mut failed = Vec::new();
    for device in devices("every_check_of_the_suite_passes_on_every_device") {
        DEVICE.lock().expect("no panic here").clone_from(&device);
        let kind = Kind { name: "rdma", pair };
        for check in CHECKS {
            let wanted = |only: &String| only.split(',').any(|name| name == check.name);
            if !only.as_ref().is_none_or(wanted) {
                continue;
            }
            let start = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(|| conformance::run(check.name, kind)));
            let word = if result.is_ok() { "ok" } else { "FAILED" };
            eprintln!(
                "{device} {} ... {word} ({:.1?})",
                check.name,
                start.elapsed()
            );
            if result.is_err() {
                failed.push(format!("{device} {}", check.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

fn guest(bytes: u64) -> GuestMemory {
    let layouts = [
        RegionLayout {
            guest_address: 0,
            bytes,
        },
        RegionLayout {
            guest_address: 1 << 32,
            bytes,
        },
    ];
    GuestMemory::anonymous(&layouts).expect("a little memory")
}

fn content(len: usize, mut seed: u64) -> Vec<u8> {
    let mut octets = Vec::with_capacity(len + 8);
    while octets.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        octets.extend_from_slice(&(seed >> 8).to_le_bytes());
    }
    octets.truncate(len);
    octets
}

/// Moves every page of two regions as frames of scattered runs, and compares.
fn moves(host: &str, registration: Registration) {
    const PAGE: u64 = 4096;
    const BYTES: u64 = 12 << 20;
    let (source, target) = (guest(BYTES), guest(BYTES));
    for region in 0..2 {
        let span = source.span(region, 0, BYTES).expect("inside");
        span.copy_from(&content(BYTES as usize, u64::from(region) + 7));
    }
    let options = RdmaOptions::with_memory(source.clone(), registration);
    let (left, right) = pair_at(host, options);
    let ((mut send, _back, _), (_there, mut receive, _)) = (left.split(), right.split());
    // Neighbours follow each other in runs of 1 to 40 pages, in an order that jumps.
    let pages = 2 * BYTES / PAGE;
    let mut frames: Vec<Vec<(u32, u64, u64)>> = vec![Vec::new()];
    let (mut seen, mut page, mut held) = (vec![false; pages as usize], 0, 0);
    for _ in 0..pages {
        let mut run = 0;
        while run < 1 + page % 40
            && page + run < pages
            && !seen[(page + run) as usize]
            && (page + run) / (pages / 2) == page / (pages / 2)
        {
            seen[(page + run) as usize] = true;
            run += 1;
        }
        if run > 0 {
            if held + run > 256 {
                frames.push(Vec::new());
                held = 0;
            }
            held += run;
            let region = (page / (pages / 2)) as u32;
            let first = page % (pages / 2);
            frames
                .last_mut()
                .expect("one")
                .push((region, first * PAGE, run * PAGE));
        }
        page = (page + 977) % pages;
    }
    frames.push(
        (0..pages)
            .filter(|page| !seen[*page as usize])
            .map(|page| {
                let region = (page / (pages / 2)) as u32;
                (region, page % (pages / 2) * PAGE, PAGE)
            })
            .collect(),
    );
    thread::scope(|scope| {
        scope.spawn(|| {
            for (number, frame) in frames.iter().enumerate() {
                let body: Vec<_> = frame
                    .iter()
                    .map(|(region, at, len)| {
                        IoSource::Guest(source.span(*region, *at, *len).expect("inside"))
                    })
                    .collect();
                send.send(&[number as u8; 48], &body).expect("send");
            }
            send.finish().expect("finish");
        });
        receive.set_stall(Some(Duration::from_secs(20)));
        for (number, frame) in frames.iter().enumerate() {
            let mut head = [0; 48];
            receive.receive(&mut head).expect("a head");
            assert_eq!(head, [number as u8; 48]);
            let body: Vec<_> = frame
                .iter()
                .map(|(region, at, len)| target.span(*region, *at, *len).expect("inside"))
                .collect();
            receive.receive_into(&body).expect("a body");
        }
        let end = receive.receive(&mut [0]).expect_err("the end");
        assert!(matches!(end, ChannelError::Closed), "{end}");
    });
    for region in 0..2 {
        let read = |memory: &GuestMemory| {
            let mut octets = vec![0; BYTES as usize];
            let span = memory.span(region, 0, BYTES).expect("inside");
            span.copy_to(&mut octets);
            octets
        };
        assert!(read(&source) == read(&target), "region {region} differs");
    }
}

#[test]
fn registered_guest_memory_arrives_whole_when_all_is_pinned() {
    for device in devices("registered_guest_memory_arrives_whole_when_all_is_pinned") {
        moves(&device, Registration::All);
    }
}

#[test]
fn registered_guest_memory_arrives_whole_through_few_chunks() {
    for device in devices("registered_guest_memory_arrives_whole_through_few_chunks") {
        // Room for 3 of 12 chunks: most are forgotten and registered again.
        moves(
            &device,
            Registration::Chunks {
                bytes_max: 3 * CHUNK_BYTES,
            },
        );
    }
}

#[test]
fn a_body_for_a_landing_that_was_withdrawn_ends_the_channel_with_the_verbs_reason() {
    let mut said = Vec::new();
    for device in
        devices("a_body_for_a_landing_that_was_withdrawn_ends_the_channel_with_the_verbs_reason")
    {
        let source = guest(1 << 20);
        let options = RdmaOptions::with_memory(source.clone(), Registration::default());
        let (left, right) = pair_at(&device, options);
        let ((mut send, _back, _), (_there, receive, _)) = (left.split(), right.split());
        // The peer takes nothing more, and its connection stands.
        drop(receive);
        send.set_deadline(Some(soon()));
        let body = [IoSource::Guest(
            source.span(0, 0, 64 << 10).expect("inside"),
        )];
        // Its credit ends before the deadline does.
        let error = loop {
            if let Err(error) = send.send(&[1; 48], &body) {
                break error;
            }
        };
        assert!(
            matches!(error, ChannelError::Lost(_) | ChannelError::Reset { .. }),
            "{device}: {error}"
        );
        let again = send.send(&[1; 48], &body).expect_err("it stays lost");
        assert_eq!(again.to_string(), error.to_string());
        said.push(format!("{device}: {error}"));
    }
    // An iWARP device ends the connection instead, and the reason stays with the peer's.
    if !said.is_empty() {
        assert!(
            said.iter()
                .any(|text| text.contains("RDMA: ") && text.contains("access")),
            "{said:?}"
        );
    }
}

#[test]
fn nobody_listening_is_a_refusal_that_names_the_address() {
    for device in devices("nobody_listening_is_a_refusal_that_names_the_address") {
        let address: Address = format!("rdma:{device}:9").parse().expect("an address");
        let start = Instant::now();
        let error = connect_with(
            &address,
            &ChannelOptions::default(),
            start + Duration::from_secs(10),
        )
        .err()
        .expect("nobody is there");
        assert!(
            matches!(
                error,
                ConnectError::Refused { .. } | ConnectError::Deadline { .. }
            ),
            "{error}"
        );
        assert!(error.to_string().contains(&device), "{error}");
        assert!(start.elapsed() < Duration::from_secs(15));
    }
}

#[test]
fn accepting_ends_at_its_deadline_and_by_shutdown() {
    for device in devices("accepting_ends_at_its_deadline_and_by_shutdown") {
        let address: Address = format!("rdma:{device}:0").parse().expect("an address");
        let listener =
            Listener::bind_with(&address, &ChannelOptions::default()).expect("a listener");
        assert!(!listener.local_address().to_string().ends_with(":0"));
        let error = listener
            .accept(Some(Instant::now() + Duration::from_millis(200)))
            .err()
            .expect("nobody connects");
        assert!(matches!(error, ListenError::Deadline), "{error}");
        let closer = listener.closer();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept(None).err());
            thread::sleep(Duration::from_millis(100));
            closer.shutdown();
            let error = waiting.join().expect("no panic");
            assert!(matches!(error, Some(ListenError::ShutDown)), "{error:?}");
        });
    }
}

#[test]
fn a_host_without_a_device_is_told_so_and_works_otherwise() {
    if rdma::available().is_ok() {
        println!(
            "SKIPPED a_host_without_a_device_is_told_so_and_works_otherwise: there is a device"
        );
        return;
    }
    let address: Address = "rdma:127.0.0.1:4444".parse().expect("an address");
    let options = ChannelOptions::default();
    let error = connect_with(&address, &options, soon())
        .err()
        .expect("no device");
    assert_eq!(error.code(), "connect-unavailable");
    let text = error.to_string();
    assert!(
        text.contains("no RDMA device") || text.contains("libibverbs.so.1"),
        "{text}"
    );
    let error = Listener::bind_with(&address, &options)
        .err()
        .expect("no device");
    assert_eq!(error.code(), "listen-unavailable", "{error}");
}
