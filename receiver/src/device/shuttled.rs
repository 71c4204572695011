//! The stream between lanes and loader under random and systematic thread schedules.
//!
//! The file of the stream is compiled once more here, with the model's lock and condition variable in the stream of the
//! standard ones. A lost wake-up shows as a deadlock, which the model reports.

use multifd_wire::frame::{DeviceChunk, DeviceMark, Mark, Section};
use multifd_wire::{DeviceId, Generation};
use shuttle::sync::Arc;
use shuttle::thread;

use super::assembler;
use assembler::{Assembler, Item};

mod sync {
    pub(super) use shuttle::sync::{Condvar, Mutex, MutexGuard};
    pub(super) use std::sync::PoisonError;
}

#[allow(clippy::duplicate_mod)] // on purpose: with another lock
#[path = "stream.rs"]
mod stream;

use stream::{Body, DeviceStream, Waited};

const RANDOM: usize = 3000;

fn new_stream() -> Arc<DeviceStream> {
    let assembler = Assembler::new(DeviceId::new(0), 4, 8);
    Arc::new(DeviceStream::new(assembler, 4, 8))
}

/// A data chunk of four bytes that all are its index.
fn bring(stream: &DeviceStream, index: u64) {
    let head = DeviceChunk {
        device: DeviceId::new(0),
        section: Section::Data,
        index,
        offset: index * 4,
    };
    match stream.admit(&head, 4, 0).unwrap() {
        Body::Take(mut octets) => {
            octets.fill(index as u8);
            stream.arrived(index, octets).unwrap();
        }
        Body::Have => {}
    }
}

fn mark(stream: &DeviceStream, what: Mark, index: u64, offset: u64) {
    let mark = DeviceMark {
        device: DeviceId::new(0),
        mark: what,
        generation: Generation::new(0),
        index,
        offset,
    };
    stream.mark(&mark).unwrap();
}

/// Loads to the end of the stream; gives the bytes and the last credit.
fn load(stream: &DeviceStream) -> (Vec<u8>, u64) {
    let (mut got, mut credit, mut config) = (Vec::new(), 8, 0);
    loop {
        match stream.next().expect("the stream ends, not the migration") {
            Item::Data(octets) => {
                got.extend_from_slice(&octets);
                credit = stream.loaded(octets).unwrap_or(credit);
            }
            Item::Config(octets) => {
                got.extend_from_slice(&octets);
                config += octets.len() as u64;
                credit = stream.put_together(octets).unwrap_or(credit);
            }
            Item::ConfigEnd => return (got, stream.let_go(config).unwrap_or(credit)),
            Item::InitialEnd(_) | Item::DataEnd | Item::Restart => {}
        }
    }
}

/// Two lanes bring two chunks and the marks between them, a third thread loads.
fn two_lanes_and_a_loader() {
    let stream = new_stream();
    let lanes: Vec<_> = (0..2u64)
        .map(|lane| {
            let stream = Arc::clone(&stream);
            thread::spawn(move || {
                bring(&stream, lane);
                let what = if lane == 0 {
                    Mark::ConfigEnd
                } else {
                    Mark::DataEnd
                };
                mark(&stream, what, 3 - lane, 8);
            })
        })
        .collect();
    let (got, credit) = load(&stream);
    assert_eq!(got, [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(credit, 16, "all of it is credit again");
    lanes.into_iter().for_each(|lane| lane.join().unwrap());
}

/// A configuration as large as the window, of which the first lane is lost after it brought its half; that half comes again.
fn a_configuration_that_fills_the_window() {
    let stream = new_stream();
    let config = |index: u64| DeviceChunk {
        device: DeviceId::new(0),
        section: Section::Config,
        index,
        offset: (index - 1) * 4,
    };
    let bring =
        move |stream: &DeviceStream, index| match stream.admit(&config(index), 4, 0).unwrap() {
            Body::Take(octets) => {
                stream.arrived(index, octets).unwrap();
            }
            Body::Have => {}
        };
    let lost = Arc::clone(&stream);
    let lane = thread::spawn(move || {
        mark(&lost, Mark::DataEnd, 0, 0);
        bring(&lost, 1);
        lost.lane_lost();
        let heir = Arc::clone(&lost);
        let again = thread::spawn(move || bring(&heir, 1));
        bring(&lost, 2);
        again.join().unwrap();
        assert_eq!(lost.missing(), Some(3));
        mark(&lost, Mark::ConfigEnd, 3, 8);
        assert_eq!(lost.missing(), None);
    });
    assert_eq!(load(&stream), (vec![0; 8], 16), "credit only at the end");
    lane.join().unwrap();
}

/// One lane is cut off in a body; another brings the same chunk later. The loader may wait meanwhile.
fn a_lane_dies_in_a_body() {
    let stream = new_stream();
    let dying = Arc::clone(&stream);
    let lane = thread::spawn(move || {
        let head = DeviceChunk {
            device: DeviceId::new(0),
            section: Section::Data,
            index: 0,
            offset: 0,
        };
        assert!(matches!(dying.admit(&head, 4, 0).unwrap(), Body::Take(_)));
        dying.give_up(0);
        let heir = Arc::clone(&dying);
        thread::spawn(move || bring(&heir, 0)).join().unwrap();
        mark(&dying, Mark::DataEnd, 1, 4);
        mark(&dying, Mark::ConfigEnd, 2, 4);
    });
    assert_eq!(load(&stream).0, [0; 4]);
    lane.join().unwrap();
}

/// The end of the migration ends the loader, wherever it waits; so does the end of memory where that is waited for.
fn the_end_wakes_the_loader() {
    let stream = new_stream();
    let loader = Arc::clone(&stream);
    let waiting = thread::spawn(move || loader.next().is_none());
    let last = Arc::clone(&stream);
    let gate = thread::spawn(move || {
        while last.wait_for_memory() == Waited::Restarted {}
        last.wait_for_memory()
    });
    bring(&stream, 1);
    stream.end();
    assert!(waiting.join().unwrap(), "chunk 0 never came");
    assert_eq!(gate.join().unwrap(), Waited::Ended);
    let stream = new_stream();
    let last = Arc::clone(&stream);
    let gate = thread::spawn(move || last.wait_for_memory());
    stream.memory_landed();
    assert_eq!(gate.join().unwrap(), Waited::Landed);
    // A switchover that is broken off waits anew, and a stream that begins anew behind it is heard.
    stream.memory_moves_on();
    stream.break_off();
    let last = Arc::clone(&stream);
    let gate = thread::spawn(move || last.wait_for_memory());
    mark(&stream, Mark::Restart, 0, 0);
    assert_eq!(gate.join().unwrap(), Waited::Restarted);
    // Memory that landed before the stream began anew is not what its end waits for.
    assert_eq!(stream.next(), Some(Item::Restart));
    stream.memory_landed();
    mark(&stream, Mark::Restart, 1, 0);
    assert_eq!(stream.next(), Some(Item::Restart));
    assert_eq!((stream.restarts(), stream.granted()), (2, 8));
    let last = Arc::clone(&stream);
    let gate = thread::spawn(move || last.wait_for_memory());
    stream.end();
    assert_eq!(gate.join().unwrap(), Waited::Ended);
}

#[test]
fn two_lanes_and_a_loader_under_every_small_and_many_random_schedules() {
    shuttle::check_dfs(two_lanes_and_a_loader, Some(20_000));
    shuttle::check_random(two_lanes_and_a_loader, RANDOM);
    shuttle::check_pct(two_lanes_and_a_loader, RANDOM, 3);
}

#[test]
fn a_configuration_as_large_as_the_window_locks_nothing_up_under_random_schedules() {
    shuttle::check_random(a_configuration_that_fills_the_window, RANDOM);
    shuttle::check_pct(a_configuration_that_fills_the_window, RANDOM, 3);
}

#[test]
fn a_chunk_whose_lane_dies_is_loaded_once_under_random_schedules() {
    shuttle::check_random(a_lane_dies_in_a_body, RANDOM);
    shuttle::check_pct(a_lane_dies_in_a_body, RANDOM, 3);
}

#[test]
fn nobody_sleeps_past_the_end_under_random_schedules() {
    shuttle::check_random(the_end_wakes_the_loader, RANDOM);
    shuttle::check_pct(the_end_wakes_the_loader, RANDOM, 3);
}
