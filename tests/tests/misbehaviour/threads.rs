//! Threads of the destination that never come back, as when the kernel kills one for a system call that its filter forbids, or a page
//! fault of its is never served: the end comes all the same, within the deadline that the embedder set, and says why.

use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_tests::bounded::{Destination, GRACE, rx_builder};
use multifd_tests::fake_source::FakeSource;
use multifd_tests::lost_threads::{LOSSES, Loss, Without};
use multifd_wire::frame::{Asks, KeepAlive, LaneDown};
use multifd_wire::{Frame, Incarnation, Kind, LaneId, Reason};

/// How long one of ours may take to end.
const DEADLINE: Duration = Duration::from_millis(300);

fn destination(thread: &'static str, loss: Loss) -> Destination {
    let config = rx_builder()
        .device_deadline(DEADLINE)
        .setup_deadline(Duration::from_millis(500))
        .build()
        .unwrap();
    Destination::with_threads(config, Box::new(Without { thread, loss }))
}

fn failure(end: &rx::Finished) -> &'static str {
    end.error.as_ref().map_or("none", rx::Error::code)
}

#[test]
fn a_vmm_thread_that_never_comes_back_holds_up_neither_the_deadline_nor_a_cancel() {
    let cases = LOSSES.map(|loss| [false, true].map(|cancelled| (loss, cancelled)));
    for (loss, cancelled) in cases.into_iter().flatten() {
        let destination = destination("mfd-vmm", loss);
        let connect = || destination.connect();
        let source = FakeSource::open(&connect);
        source.send_tables(1);
        if cancelled {
            destination.handle().cancel();
        }
        let began = Instant::now();
        let end = destination.end(GRACE).finished;
        assert!(began.elapsed() < GRACE, "{:?}", began.elapsed());
        assert!(end.vmm.is_none(), "it is with the thread");
        let code = if cancelled {
            "receiver.cancelled"
        } else {
            "receiver.timeout"
        };
        assert_eq!(failure(&end), code);
    }
}

#[test]
fn a_lanes_thread_that_never_comes_back_ends_the_session_when_the_lane_is_closed() {
    for loss in LOSSES {
        let destination = destination("mfd-lane1", loss);
        let connect = || destination.connect();
        let source = FakeSource::in_rounds(&connect, 2);
        source.control.send(LaneDown {
            lane: LaneId::new(1),
            incarnation: Incarnation::new(0),
            reason: Reason::ChannelsLost,
        });
        let end = destination.end(GRACE).finished;
        assert_eq!(failure(&end), "receiver.thread-stuck");
        let text = end.error.unwrap().to_string();
        assert!(text.contains("data channel 1"), "{text}");
        assert!(end.vmm.is_some());
    }
}

#[test]
fn a_lanes_thread_that_never_comes_back_does_not_hold_up_a_cancel() {
    for loss in LOSSES {
        let destination = destination("mfd-lane0", loss);
        let connect = || destination.connect();
        let _source = FakeSource::in_rounds(&connect, 1);
        destination.handle().cancel();
        let end = destination.end(GRACE).finished;
        assert_eq!(failure(&end), "receiver.cancelled");
    }
}

/// SPEC: LANE-1, LANE-2, READY-1. In a first set-up as later: whoever loses a lane says so and is answered, and the set-up goes on.
#[test]
fn a_lane_that_is_lost_before_ready_is_noticed_answered_and_may_be_dialled_again() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::open(&connect);
    source.send_tables(2);
    source.join(0);
    // Its channel ends: the destination notices by itself.
    source.lanes.clear();
    let heard = source.control.hear_kind(Kind::LaneDown);
    let Frame::LaneDown(down) = heard.frame() else {
        unreachable!("that kind was waited for")
    };
    assert_eq!((down.lane.value(), down.incarnation.value()), (0, 0));
    // One that has not joined yet is given up: it is answered, and that connection is never let in.
    let lost = LaneDown {
        lane: LaneId::new(1),
        incarnation: Incarnation::new(0),
        reason: Reason::ChannelsLost,
    };
    source.control.send(lost);
    let heard = source.control.hear_kind(Kind::LaneDown);
    assert_eq!(heard.frame(), Frame::from(lost));
    source.control.send(KeepAlive {
        stamp_us: 1,
        echo_us: 0,
        held_us: 0,
        asks: Asks::Answer,
    });
    source.rejoin(0, 1);
    assert_eq!(destination.handle().progress().lanes, 1);
}
