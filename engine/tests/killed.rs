//! Engines that are killed at any moment: the guest goes on, on one side and not on two.
//!
//! Each scenario moves the example in C and kills one of the two engines, at a moment that is drawn: some time after the begin, or
//! just after one of the processes said what it does. Then the engines are started again with the same commands, as an operator would.
#![allow(clippy::print_stdout)] // what was drawn, and what was skipped

mod common;

use std::time::{Duration, Instant};

use common::{Folder, Process, example_or_skip, number, receiving, sending};

const SCENARIOS: u64 = 50;

/// Enough that a migration has several rounds.
const MIB: &str = "48";

/// How long engines wait for each other.
const LASTING: [&str; 2] = ["--reconnect-deadline", "20s"];
const SUSPEND: [&str; 3] = ["--one-attempt", "--suspend", "20s"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Sender,
    Receiver,
}

#[derive(Debug, Clone, Copy)]
enum Moment {
    /// After the sender was started.
    After(Duration),
    /// After the source said so.
    Source(&'static str, Duration),
    /// After the destination said so.
    Destination(&'static str, Duration),
}

/// Numbers from a seed (SplitMix64).
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % limit
    }
}

fn drawn(seed: u64, whole: Duration) -> (Victim, Moment) {
    let mut draw = Draw(seed);
    let victim = match draw.below(2) {
        0 => Victim::Sender,
        _ => Victim::Receiver,
    };
    let micros = |draw: &mut Draw, limit| Duration::from_micros(draw.below(limit));
    let moment = match draw.below(8) {
        0..=2 => {
            let most = u64::try_from(whole.as_micros()).unwrap_or(1_000_000);
            Moment::After(micros(&mut draw, most))
        }
        3 => Moment::Source("paused", micros(&mut draw, 3000)),
        4 => Moment::Source("committing", micros(&mut draw, 300)),
        5 => Moment::Source("moved", micros(&mut draw, 300)),
        6 => Moment::Destination("loaded", micros(&mut draw, 1500)),
        _ => Moment::Destination("runs", micros(&mut draw, 300)),
    };
    (victim, moment)
}

/// A source, a destination and their engines.
struct Scene {
    folder: Folder,
    source: Process,
    destination: Process,
    receiver: Process,
    sender: Process,
    address: String,
}

impl Scene {
    fn begin(program: &std::path::Path, name: &str) -> Self {
        let folder = Folder::new(name);
        let (s, d) = (folder.path("s"), folder.path("d"));
        let source = Process::start("source", program, &["source", &s, MIB]);
        let destination = Process::start("destination", program, &["destination", &d]);
        source.says(0, "listening");
        destination.says(0, "listening");
        let (receiver, address) = receiving(&d, "127.0.0.1:0", &SUSPEND);
        let sender = sending(&s, &address, &LASTING);
        Self {
            folder,
            source,
            destination,
            receiver,
            sender,
            address,
        }
    }

    fn state(process: &mut Process) -> (u64, bool, u64) {
        let line = process.ask("state", "state");
        let words: Vec<_> = line.split(' ').collect();
        let state = words[1].parse().expect("a number");
        (state, words[2] == "running", number(&line, "steps="))
    }

    /// Waits for the moment, or for the end of the sender.
    fn wait_for(&mut self, moment: Moment) {
        let (process, begin, pause) = match moment {
            Moment::After(time) => return std::thread::sleep(time),
            Moment::Source(begin, pause) => (&self.source, begin, pause),
            Moment::Destination(begin, pause) => (&self.destination, begin, pause),
        };
        process.says(0, begin);
        let until = Instant::now() + pause;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    /// What an operator does.
    fn settle(&mut self, victim: Victim) {
        match victim {
            Victim::Sender => {
                self.sender.kill();
                // Whether it had connected at all is known when the source has looked once more.
                Self::state(&mut self.source);
                if let Some((place, _)) = self.source.said("engine here") {
                    self.source.says(place, "engine gone");
                }
            }
            Victim::Receiver => {
                self.receiver.kill();
                self.destination.says(0, "engine gone");
                let path = self.folder.path("d");
                (self.receiver, _) = receiving(&path, &self.address, &SUSPEND);
                self.sender.status();
            }
        }
        // UNDECIDED: another engine asks.
        let (state, ..) = Self::state(&mut self.source);
        if state == 1 {
            let path = self.folder.path("s");
            self.sender = sending(&path, &self.address, &LASTING);
            let status = self.sender.status();
            assert!([0, 1].contains(&status), "{:#?}", self.sender.output());
        }
        self.receiver.terminate();
        self.receiver.status();
    }

    /// One owner, which works, and whose memory is whole. Gives whether it is the destination.
    fn one_owner(mut self) -> bool {
        let (source, source_runs, _) = Self::state(&mut self.source);
        let (destination, destination_runs, _) = Self::state(&mut self.destination);
        assert_ne!(
            source_runs, destination_runs,
            "states {source} and {destination}"
        );
        assert_eq!(destination_runs, destination == 3);
        assert_eq!(source_runs, source == 0);
        let owner = match destination_runs {
            true => &mut self.destination,
            false => &mut self.source,
        };
        let (.., before) = Self::state(owner);
        while Self::state(owner).2 == before {}
        let check = owner.ask("quit", "check");
        assert!(check.starts_with("check passed wrong=0 ran"), "{check}");
        destination_runs
    }
}

#[test]
fn no_moment_at_which_an_engine_is_killed_loses_the_guest_or_makes_two() {
    let test = "no_moment_at_which_an_engine_is_killed_loses_the_guest_or_makes_two";
    let Some(program) = example_or_skip(test) else {
        return;
    };
    let began = Instant::now();
    let mut unharmed = Scene::begin(program, "k");
    assert_eq!(unharmed.sender.status(), 0);
    let whole = began.elapsed();
    unharmed.receiver.status();
    assert!(unharmed.one_owner());

    let mut moved = 0;
    for seed in 0..SCENARIOS {
        let (victim, moment) = drawn(seed, whole);
        println!("seed {seed}: {victim:?} killed {moment:?}");
        let mut scene = Scene::begin(program, &format!("k{seed}"));
        scene.wait_for(moment);
        scene.settle(victim);
        moved += u64::from(scene.one_owner());
    }
    println!("{SCENARIOS} engines killed: {moved} guests moved, the others stayed");
    assert!(
        0 < moved && moved < SCENARIOS,
        "moments on both sides of the commit"
    );
}
