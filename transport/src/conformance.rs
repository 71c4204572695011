//! What every kind of channel must do, as checks that run against any kind.
//!
//! A kind is a name and a function that makes a connected pair. Each check makes its own pairs, uses nothing but the traits of
//! this crate, and panics with a sentence if the kind does not keep the promise that the check is named after.
//! [`conformance_tests!`](crate::conformance_tests) makes one test per check; [`CHECKS`] is for runners of another sort.
//!
//! Rule: a check that waits for something has a limit, so that a kind that hangs fails instead of hanging the run.

mod data;
mod ends;
mod splits;
mod time;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::channel::{Channel, Closer, ReceiveHalf, SendHalf};
use crate::memory::{GuestMemory, RegionLayout, Span};

pub use ends::no_descriptor_stays_open;

/// A kind of channel under test. Each direction must be able to hold [`HELD_BYTES_MIN`] bytes that nobody has received yet.
#[derive(Clone, Copy)]
pub struct Kind {
    /// What to call it in failures.
    pub name: &'static str,
    /// Makes two connected channels.
    #[expect(clippy::type_complexity, reason = "what every `pair` of this crate is")]
    pub pair: fn() -> (Box<dyn Channel>, Box<dyn Channel>),
}

/// What the checks send before they begin to receive, at most.
pub const HELD_BYTES_MIN: usize = 4_096;

/// One promise.
#[derive(Clone, Copy)]
pub struct Check {
    /// The promise, in words.
    pub name: &'static str,
    /// Panics if the kind breaks it.
    pub run: fn(Kind),
}

/// How long a check may take before it counts as hanging. The slowest takes a second or two on an idle machine.
const CHECK_MAX: Duration = Duration::from_secs(60);

macro_rules! checks {
    ($($module:ident::$name:ident,)*) => {
        /// All checks that can run beside each other in one process; [`no_descriptor_stays_open`] needs a process of its own.
        pub const CHECKS: &[Check] = &[$(Check { name: stringify!($name), run: $module::$name }),*];
    };
}

checks! {
    data::octets_arrive_in_order,
    data::bodies_land_where_they_belong,
    data::more_pieces_than_one_call_takes_arrive,
    data::empty_pieces_and_spans_are_nothing,
    data::nothing_outside_the_spans_is_written,
    data::large_private_receives_are_filled,
    data::both_directions_work_at_once,
    data::frames_stay_framed_while_the_guest_writes,
    splits::any_split_reads_the_same_stream,
    time::deadline_ends_a_receive_from_a_silent_peer,
    time::deadline_takes_nothing_of_a_small_receive,
    time::deadline_in_a_body_says_how_much_landed,
    time::deadline_ends_a_send_to_a_stalled_reader,
    time::deadline_that_passed_is_one_try,
    time::near_limits_are_kept_closely,
    time::far_deadline_does_not_fire_early,
    time::stall_ends_a_receive_and_a_send,
    time::stall_spares_a_peer_that_is_slow,
    ends::shutdown_wakes_a_small_receive,
    ends::shutdown_wakes_a_body_receive,
    ends::shutdown_wakes_a_drain,
    ends::shutdown_wakes_a_send,
    ends::shutdown_wakes_a_wait_with_limits,
    ends::shutdown_wins_over_octets_read_ahead,
    ends::shutdown_is_an_end_for_the_peer,
    ends::shutdown_twice_or_too_late_is_harmless,
    ends::close_between_frames_is_clean,
    ends::close_in_a_frame_says_how_much_came,
    ends::send_to_a_closed_peer_fails_and_goes_on_failing,
    ends::finish_ends_one_direction_only,
    ends::dropped_send_half_ends_one_direction_only,
    ends::drain_counts_and_stops,
    ends::farewell_is_read_though_octets_were_unread,
    ends::both_halves_have_the_name_of_the_channel,
    ends::a_binding_is_that_of_one_connection_and_the_same_at_both_ends,
    splits::what_came_can_be_looked_at_after_an_error,
}

/// Runs one check by its name.
///
/// # Panics
/// If there is no such check, the kind does not pass it, or it takes more than a minute.
pub fn run(name: &str, kind: Kind) {
    let check = CHECKS
        .iter()
        .find(|check| check.name == name)
        .expect("a check of this name");
    let (done, finished) = mpsc::channel();
    let run = check.run;
    let thread = thread::spawn(move || {
        run(kind);
        // The runner may have given up.
        let _ = done.send(());
    });
    match finished.recv_timeout(CHECK_MAX) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{}: {name} hangs", kind.name),
        Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// Makes a module of tests, one per check: `conformance_tests!(memory, || memory::pair(4096));`
#[macro_export]
macro_rules! conformance_tests {
    ($module:ident, $pair:expr) => {
        $crate::conformance_tests!(@tests $module, $pair;
            octets_arrive_in_order
            bodies_land_where_they_belong
            more_pieces_than_one_call_takes_arrive
            empty_pieces_and_spans_are_nothing
            nothing_outside_the_spans_is_written
            large_private_receives_are_filled
            both_directions_work_at_once
            frames_stay_framed_while_the_guest_writes
            any_split_reads_the_same_stream
            deadline_ends_a_receive_from_a_silent_peer
            deadline_takes_nothing_of_a_small_receive
            deadline_in_a_body_says_how_much_landed
            deadline_ends_a_send_to_a_stalled_reader
            deadline_that_passed_is_one_try
            near_limits_are_kept_closely
            far_deadline_does_not_fire_early
            stall_ends_a_receive_and_a_send
            stall_spares_a_peer_that_is_slow
            shutdown_wakes_a_small_receive
            shutdown_wakes_a_body_receive
            shutdown_wakes_a_drain
            shutdown_wakes_a_send
            shutdown_wakes_a_wait_with_limits
            shutdown_wins_over_octets_read_ahead
            shutdown_is_an_end_for_the_peer
            shutdown_twice_or_too_late_is_harmless
            close_between_frames_is_clean
            close_in_a_frame_says_how_much_came
            send_to_a_closed_peer_fails_and_goes_on_failing
            finish_ends_one_direction_only
            dropped_send_half_ends_one_direction_only
            drain_counts_and_stops
            farewell_is_read_though_octets_were_unread
            both_halves_have_the_name_of_the_channel
            a_binding_is_that_of_one_connection_and_the_same_at_both_ends
            what_came_can_be_looked_at_after_an_error
        );
    };
    (@tests $module:ident, $pair:expr; $($name:ident)*) => {
        mod $module {
            use super::*;

            fn kind() -> $crate::conformance::Kind {
                $crate::conformance::Kind { name: stringify!($module), pair: $pair }
            }

            $(
                #[test]
                fn $name() {
                    $crate::conformance::run(stringify!($name), kind());
                }
            )*

            #[test]
            fn every_check_of_the_suite_is_here() {
                let here = [$(stringify!($name)),*];
                let suite = $crate::conformance::CHECKS.iter().map(|check| check.name);
                assert!(suite.eq(here), "conformance_tests! and CHECKS differ");
            }
        }
    };
}

/// One end of a pair.
struct End {
    send: Box<dyn SendHalf>,
    receive: Box<dyn ReceiveHalf>,
    closer: Closer,
}

impl Kind {
    /// A connected pair, split.
    fn ends(self) -> (End, End) {
        let end = |channel: Box<dyn Channel>| {
            let (send, receive, closer) = channel.split();
            End {
                send,
                receive,
                closer,
            }
        };
        let (left, right) = (self.pair)();
        (end(left), end(right))
    }
}

/// Guest memory of one region, all bytes 0xA5.
fn guest(bytes: usize) -> GuestMemory {
    let layout = RegionLayout {
        guest_address: 0,
        bytes: bytes as u64,
    };
    let memory = GuestMemory::anonymous(&[layout]).expect("a little memory");
    span(&memory, 0, bytes).copy_from(&vec![CANARY; bytes]);
    memory
}

/// What guest memory holds where nothing was written.
const CANARY: u8 = 0xA5;

fn span(memory: &GuestMemory, offset: usize, len: usize) -> Span<'_> {
    memory
        .span(0, offset as u64, len as u64)
        .expect("inside the region")
}

fn read(memory: &GuestMemory, offset: usize, len: usize) -> Vec<u8> {
    let mut octets = vec![0; len];
    span(memory, offset, len).copy_to(&mut octets);
    octets
}

/// A small generator of numbers that look random: the same for the same seed (Marsaglia, "Xorshift RNGs", 2003).
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn octets(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
