//! Losses that cost little: in set-up, by a flipped bit on the control channel, and of the source's own process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{GRACE, Source, within};
use multifd_tests::fake_destination::{FakeDestination, accepted};
use multifd_tests::links::Links;
use multifd_tests::model::{DestinationMachine, differing_page};
use multifd_tests::peer::{Peer, encode};
use multifd_transport::{GuestMemory, TcpOptions};
use multifd_wire::frame::{Outcome, OutcomeState};
use multifd_wire::{Body, ChannelRef, HelloReply, Intent, Layout, Phase, Reason, SessionId};

use super::pairs::{Pair, comes_back, waits};

/// A machine that takes its time to be built.
struct Slow(DestinationMachine);

impl rx::Vmm for Slow {
    fn prepare(
        &mut self,
        configs: Vec<rx::Blob>,
        layout: &Layout,
    ) -> Result<GuestMemory, rx::VmmError> {
        std::thread::sleep(Duration::from_millis(400));
        self.0.prepare(configs, layout)
    }

    fn load(&mut self, states: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        self.0.load(states)
    }

    fn resume(&mut self, proof: rx::Ownership) -> Result<(), rx::VmmError> {
        self.0.resume(proof)
    }
}

// SPEC: RESUME-13
#[test]
fn a_loss_during_the_first_set_up_is_made_good_without_building_the_machine_again() {
    // The control channel, the lanes, everything; while the machine is built, and when it is.
    for (case, wait) in (0..3).flat_map(|case| [(case, 50), (case, 380)]) {
        let machine = DestinationMachine::default();
        let (there, runs_there) = (Arc::clone(&machine.memory), Arc::clone(&machine.running));
        let reception = rx::Reception::start(rx::Parts {
            vmm: Box::new(Slow(machine)),
            listeners: Vec::new(),
            config: waits().build().unwrap(),
            spawner: None,
        })
        .unwrap();
        let links = Links::to(reception.handle());
        let config = comes_back().channels(2).build().unwrap();
        let source = Source::sized(4 << 20, links.dial(), config);
        let (handle, memory) = (source.handle(), source.memory.clone());
        while handle.progress().phase < Phase::Setup {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait));
        match case {
            0 => links.cut(ChannelRef::Control),
            1 => links.cut_all(),
            _ => {
                links.take_down();
                std::thread::sleep(Duration::from_millis(100));
                links.set_down(false);
            }
        }
        let end = source.end(4 * GRACE);
        let error = &end.finished.error;
        assert!(error.is_none(), "case {case}, {wait} ms: {error:?}");
        let received = within(2 * GRACE, "the destination's end", || reception.wait());
        assert!(
            received.error.is_none(),
            "case {case}: {:?}",
            received.error
        );
        assert!(runs_there.load(Ordering::SeqCst));
        let there = there.lock().unwrap().clone().unwrap();
        assert_eq!(differing_page(&memory, &there), None);
        assert!(end.finished.report.suspensions >= 1, "case {case}");
    }
}

#[test]
fn a_bit_that_flips_on_the_control_channel_costs_the_channel_and_is_named() {
    // The flipped bits are to be the only losses, however late this host gives a channel its turn.
    let late = 4 * GRACE;
    let config = comes_back().channels(2).bandwidth(Some(24 << 20));
    let config = config.stall(late).hello_deadline(late);
    let receiver = waits().stall(late).hello_deadline(late);
    let pair = Pair::with(24 << 20, config.body_bytes(64 << 10), receiver);
    let (ours, theirs) = (pair.source.handle(), pair.destination.handle());
    for octets in [2u64 << 20, 8 << 20] {
        pair.sent(octets);
        let dialled = pair.links.dialled();
        pair.links.flip_control();
        // The next one is not to flip a bit of the hello that resumes, but one of the rounds.
        let since = Instant::now();
        while pair.links.dialled() < dialled + 3
            || ours.progress().phase != Phase::Rounds
            || theirs.progress().phase != Phase::Rounds
        {
            assert!(since.elapsed() < late, "{:?}", ours.progress());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let ends = pair.arrives("flipped bits");
    let theirs = &ends.destination.report;
    assert_eq!((theirs.control_damaged, theirs.suspensions), (2, 2));
    assert_eq!(ends.source.finished.report.suspensions, 2);
}

/// What `ask` makes of this answer.
fn asked(reply: Option<HelloReply>, states: &[OutcomeState]) -> Result<OutcomeState, tx::Error> {
    let fake = FakeDestination::listen();
    let dial = tx::Dialer {
        address: fake.address.clone(),
        options: TcpOptions::default().into(),
    };
    let session = SessionId::new([3; 16]);
    let ticket = tx::AskTicket::new(session.value(), [9; 16]);
    let asker = std::thread::spawn(move || tx::ask(&dial, &ticket, Duration::from_secs(2)));
    let answers = states
        .iter()
        .map(Some)
        .chain(reply.is_some().then_some(None));
    for state in answers {
        let mut peer = Peer::new(fake.accept());
        let hello = peer.hear_hello();
        assert_eq!((hello.intent, hello.session), (Intent::Ask, session));
        assert_eq!(hello.token.value(), [9; 16]);
        let welcome = accepted(session);
        peer.raw(&reply.as_ref().unwrap_or(&welcome).encode());
        if let Some(&state) = state {
            peer.raw(&encode(0, Outcome { state }, Body::None));
        }
        peer.finish();
        let _ = peer.hear(Duration::from_millis(200));
    }
    within(GRACE, "an answer", || asker.join().unwrap())
}

#[test]
fn who_has_the_ticket_learns_the_outcome_from_another_process() {
    for state in [
        OutcomeState::Running,
        OutcomeState::NotCommitted,
        OutcomeState::FailedAfterCommit,
    ] {
        assert_eq!(asked(None, &[state]).unwrap(), state);
    }
    // It is asked again until it runs.
    let soon = [OutcomeState::CommittedNotRunning, OutcomeState::Running];
    assert_eq!(asked(None, &soon).unwrap(), OutcomeState::Running);
}

#[test]
fn a_refusal_is_no_answer_and_says_so() {
    let session = SessionId::new([3; 16]);
    let no = HelloReply::refused(Reason::WrongSession, "who?", session);
    let error = asked(Some(no), &[]).unwrap_err();
    assert_eq!(error.code(), "sender.peer.refused", "{error}");
}
