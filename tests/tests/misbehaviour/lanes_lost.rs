//! Both sides honest, the links not: a migration outlives its lanes as long as one is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_tests::bounded::{
    Destination, DialWith, GRACE, Source, destination_config, tx_builder,
};
use multifd_tests::cutting::{Cutting, Side};
use multifd_tests::model::{DestinationMachine, differing_page};
use multifd_transport::GuestMemory;
use multifd_transport::memory::pair;
use multifd_wire::{ChannelRef, LaneId};

/// A migration over four in-memory lanes, of which some are cut after so many bytes.
fn migrate(cuts: &[(u32, u64)], side: Side) -> (Source, Destination) {
    let destination = Destination::with(destination_config(), DestinationMachine::default());
    let (handle, cuts) = (destination.handle(), cuts.to_vec());
    let dial = move |channel| -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        let (mut ours, mut theirs) = pair(256 << 10);
        let cut = cuts
            .iter()
            .find(|(lane, _)| channel == ChannelRef::Lane(LaneId::new(*lane)));
        match (cut, side) {
            (Some((_, octets)), Side::Sending) => ours = Cutting::after(*octets, side, ours),
            (Some((_, octets)), Side::Receiving) => theirs = Cutting::after(*octets, side, theirs),
            (None, _) => {}
        }
        handle.offer(theirs)?;
        Ok(ours)
    };
    let config = tx_builder().channels(4).build().unwrap();
    let source = Source::sized(32 << 20, Box::new(DialWith(dial)), config);
    (source, destination)
}

fn arrives(cuts: &[(u32, u64)], side: Side) {
    let (source, destination) = migrate(cuts, side);
    let source_memory: GuestMemory = source.memory.clone();
    let (there, running): (_, Arc<AtomicBool>) = (
        Arc::clone(&destination.memory),
        Arc::clone(&destination.running),
    );
    let end = source.end(5 * GRACE);
    let case = format!("{cuts:?} {side:?}");
    assert!(
        end.finished.error.is_none(),
        "{case}: {:?}",
        end.finished.error
    );
    end.stays_paused(&case);
    let received = destination.end(GRACE);
    assert!(received.finished.error.is_none(), "{case}");
    assert!(running.load(Ordering::SeqCst), "{case}");
    let there = there.lock().unwrap().clone().unwrap();
    assert_eq!(differing_page(&source_memory, &there), None, "{case}");
}

#[test]
fn a_lane_cut_by_the_source_in_round_zero_is_done_without() {
    for octets in [200, 300 << 10, 2 << 20] {
        arrives(&[(1, octets)], Side::Sending);
    }
}

#[test]
fn a_lane_cut_by_the_destination_in_round_zero_is_done_without() {
    for octets in [200, 300 << 10, 2 << 20] {
        arrives(&[(1, octets)], Side::Receiving);
    }
}

#[test]
fn one_lane_is_enough() {
    arrives(&[(0, 1 << 20), (1, 200 << 10), (3, 2 << 20)], Side::Sending);
    arrives(
        &[(0, 1 << 20), (1, 200 << 10), (3, 2 << 20)],
        Side::Receiving,
    );
}

#[test]
fn without_any_lane_it_ends_and_the_guest_runs_on() {
    for side in [Side::Sending, Side::Receiving] {
        let cuts = [(0, 1 << 20), (1, 200 << 10), (2, 500 << 10), (3, 2 << 20)];
        let (source, destination) = migrate(&cuts, side);
        let running = Arc::clone(&destination.running);
        let end = source.end(5 * GRACE);
        let error = end.finished.error.as_ref().unwrap();
        // Whoever sees the last one go says so first.
        assert!(
            ["sender.channel.all-lanes-lost", "sender.peer.aborted"].contains(&error.code()),
            "{error}"
        );
        end.runs_on("no lane is left");
        let received = destination.end(GRACE);
        assert!(received.finished.error.is_some() && received.discarded);
        assert!(!running.load(Ordering::SeqCst));
    }
}
