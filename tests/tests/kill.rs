//! `kill -9` of either side, at random moments of a migration: the guest survives at the source every time before the commit, and
//! never do two guests run.
//!
//! Half of the moments are spread over the whole life of a migration; the other half are drawn from the switchover, which
//! is short and where ownership passes. `cargo test` tries 8 moments for each side. The long form:
//!
//! ```sh
//! MULTIFD_KILLS=50 cargo test -p multifd-tests --test kill -- --nocapture --test-threads 1
//! ```
//!
//! The moments are drawn from a seed that is printed; `MULTIFD_SEED=N` draws them again, though what they hit depends on the host.
//! The guest is a KVM machine where there is KVM, and threads of a process elsewhere.
#![allow(clippy::print_stdout)] // the distribution of outcomes is worth reading

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use multifd_tests::host::Host;
use multifd_tests::model::Random;
use multifd_tests::programs::{Ended, PATIENCE, Process, number_from_environment, seed};

/// The line of the sender's log with which the switchover begins.
const PAUSED: &str = "the guest is paused for the switchover";

/// The line of the sender's log before the guest runs on at the source after all.
const RUNS_ON: &str = "the guest runs on here";

/// The line of the receiver's log just before its guest runs.
const STARTED: &str = "the guest is started here";

/// The line of the receiver's log when a source said hello.
const HELLO: &str = "control channel open";

/// The survivor notices at once, since the kernel closes the sockets of the dead; this allows for its own winding up.
const NOTICED_MAX: Duration = Duration::from_secs(5);

/// A migration of about a second, of which the rounds are most.
fn sender(address: &str) -> Process {
    let flags = [
        "--connect",
        address,
        "--report",
        "json",
        "--quiet",
        "--memory",
        "128M",
        "--working-set",
        "16M",
        "--dirty-rate",
        "30M",
        "--bandwidth",
        "120M",
        "--warm-up",
        "50ms",
        // Who was killed does not come back, and is not waited for.
        "--reconnect-deadline",
        "0s",
        // A host that is busy with other tests is slower than the guest; whether it converges is not what is tested.
        "--if-not-converging",
        "switch",
    ];
    Process::start("multifd-send", &flags)
}

fn receiver() -> (Process, String) {
    Process::receiver(&["--run-for", "200ms", "--suspend", "0s"])
}

/// How long a migration takes that nobody disturbs.
struct Calm {
    whole: Duration,
    downtime: Duration,
}

fn calm() -> Calm {
    let (receiver, address) = receiver();
    let sent = sender(&address).end();
    let report = sent.report();
    assert_eq!(report["outcome"], "migrated", "{sent}");
    assert_eq!(sent.status, Some(0), "{sent}");
    let received = receiver.end();
    assert_eq!(received.report()["guest_check"], "passed", "{received}");
    assert_eq!(received.status, Some(0), "{received}");
    let downtime = report["downtime_ms"].as_f64().expect("it was paused");
    Calm {
        whole: sent.took,
        downtime: Duration::from_secs_f64(downtime / 1e3),
    }
}

/// When the blow falls.
#[derive(Debug)]
enum Moment {
    /// So long after the sender was started.
    Age(Duration),
    /// So long after the guest was paused.
    Switchover(Duration),
}

impl Moment {
    fn draw(number: u64, calm: &Calm, random: &mut Random) -> Self {
        let part = |of: Duration, random: &mut Random| {
            of.mul_f64(random.below(1 << 20) as f64 / f64::from(1 << 20))
        };
        if number.is_multiple_of(2) {
            Self::Age(part(calm.whole.mul_f64(1.05), random))
        } else {
            Self::Switchover(part(calm.downtime.mul_f64(1.5), random))
        }
    }

    /// Sleeps until it has come. It may come never: then the migration is over.
    fn wait(&self, sender: &Process) {
        match self {
            Self::Age(age) => std::thread::sleep(age.saturating_sub(sender.age())),
            Self::Switchover(after) => {
                if sender.wait_for_line_or_end(PAUSED).is_some() {
                    std::thread::sleep(*after);
                }
            }
        }
    }
}

/// How often each end came.
#[derive(Default)]
struct Tally(BTreeMap<String, u64>);

impl Tally {
    fn count(&mut self, what: String) {
        *self.0.entry(what).or_default() += 1;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (what, times) in &self.0 {
            writeln!(f, "{times:5}  {what}")?;
        }
        Ok(())
    }
}

fn at_random_moments(victim: &str, mut strike: impl FnMut(&Moment) -> String) {
    let (seed, kills) = (
        seed(),
        number_from_environment("MULTIFD_KILLS").unwrap_or(8),
    );
    let calm = calm();
    println!(
        "{kills} kills of the {victim}, MULTIFD_SEED={seed}; undisturbed it takes {:?} with a downtime of {:?}",
        calm.whole, calm.downtime
    );
    let (mut random, mut tally) = (Random::new(seed), Tally::default());
    for number in 0..kills {
        let moment = Moment::draw(number, &calm, &mut random);
        let outcome = strike(&moment);
        println!("{number:4}  {moment:?}: {outcome}");
        tally.count(outcome);
    }
    println!("the {victim} killed {kills} times:\n{tally}");
}

#[test]
fn the_guest_survives_at_the_source_when_the_receiver_is_killed_before_the_commit() {
    at_random_moments("receiver", |moment| {
        let (mut receiver, address) = receiver();
        let sender = sender(&address);
        moment.wait(&sender);
        receiver.kill();
        let (killed, host) = (Instant::now(), Host::watch());
        let (received, sent) = (receiver.end(), sender.end());
        let noticed = killed.elapsed().saturating_sub(host.delayed());
        assert_receiver_killed(moment, noticed, &received, &sent)
    });
}

/// `noticed` is what passed from the blow to the end of the survivor.
fn assert_receiver_killed(
    moment: &Moment,
    noticed: Duration,
    received: &Ended,
    sent: &Ended,
) -> String {
    let context = format!("{moment:?}\n{sent}\n{received}");
    let report = sent.report();
    let (outcome, runs) = (
        report["outcome"].as_str().unwrap_or_default(),
        &report["source_guest_runs"],
    );
    let started = received.errors.contains(STARTED);
    let code = report["error"]["code"].as_str();
    match outcome {
        // Nothing was handed over: the guest lives here, was seen to go on, and was never begun to run there.
        "failed" => {
            assert_eq!(sent.status, Some(1), "{context}");
            assert_eq!(*runs, true, "{context}");
            assert!(!started, "two guests ran: {context}");
            assert!(
                code.is_some() && report["error"]["phase"].is_string(),
                "{context}"
            );
            assert_eq!(
                sent.errors.contains(PAUSED),
                sent.errors.contains(RUNS_ON),
                "a guest that was paused was let go on, and no other: {context}"
            );
        }
        "unknown" => {
            assert_eq!(sent.status, Some(4), "{context}");
            assert!(
                runs.is_null() && !sent.errors.contains(RUNS_ON),
                "two guests may run: {context}"
            );
            assert!(code.is_some(), "{context}");
        }
        "migrated" => {
            assert_eq!(sent.status, Some(0), "{context}");
            assert!(
                runs.is_null() && !sent.errors.contains(RUNS_ON),
                "two guests run: {context}"
            );
            assert!(started && report["error"].is_null(), "{context}");
        }
        other => panic!("outcome {other:?}: {context}"),
    }
    assert!(
        noticed < NOTICED_MAX,
        "noticed after {noticed:?}: {context}"
    );
    let phase = report["error"]["phase"].as_str().unwrap_or("-");
    format!("{outcome} [{}] phase {phase}", code.unwrap_or("-"))
}

#[test]
fn the_receiver_never_runs_the_guest_of_a_sender_that_was_killed_before_the_commit() {
    at_random_moments("sender", |moment| {
        let (receiver, address) = receiver();
        let mut sender = sender(&address);
        moment.wait(&sender);
        sender.kill();
        let sent = sender.end();
        if receiver_never_met(&receiver) {
            receiver.interrupt();
            let received = receiver.end();
            assert_eq!(received.status, Some(1), "{received}");
            return "the receiver had met nobody, and went on waiting".to_owned();
        }
        assert_sender_killed(moment, &sent, &receiver.end())
    });
}

/// Whether nobody had said hello when the sender died: the receiver then rightly waits for somebody else.
fn receiver_never_met(receiver: &Process) -> bool {
    receiver
        .wait_for_line_within(HELLO, Duration::from_millis(300))
        .is_none()
}

fn assert_sender_killed(moment: &Moment, sent: &Ended, received: &Ended) -> String {
    let context = format!("{moment:?}\n{sent}\n{received}");
    let report = received.report();
    let outcome = report["outcome"].as_str().unwrap_or_default();
    let started = received.errors.contains(STARTED);
    // If the sender lived long enough to say how it ended, both must say the same.
    let said = (!sent.output.is_empty()).then(|| sent.report());
    assert!(
        !sent.errors.contains(RUNS_ON),
        "nothing was wrong while it lived: {context}"
    );
    match outcome {
        "failed" => {
            assert_eq!(received.status, Some(1), "{context}");
            assert!(
                !started && report["guest_beats"].is_null(),
                "it was never committed: {context}"
            );
            assert!(said.is_none(), "the sender says that it moved: {context}");
            assert!(report["error"]["code"].is_string(), "{context}");
        }
        "running" => {
            assert_eq!(received.status, Some(0), "{context}");
            assert_eq!(report["guest_check"], "passed", "{context}");
            assert!(started, "{context}");
        }
        other => panic!("outcome {other:?}: {context}"),
    }
    if let Some(said) = said {
        assert_eq!(said["outcome"], "migrated", "{context}");
    }
    assert!(received.took < PATIENCE, "{context}");
    let phase = report["error"]["phase"].as_str().unwrap_or("-");
    format!(
        "{outcome} [{}] phase {phase}",
        report["error"]["code"].as_str().unwrap_or("-")
    )
}
