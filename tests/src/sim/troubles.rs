//! What goes wrong beside the table of faults, and how the scene is: drawn from numbers of its own, so that whatever else a seed draws
//! stays what it was.
//!
//! | | in one of so many | what |
//! |---|---|---|
//! | a program stands still | 6 | all its threads, for simulated milliseconds or seconds; the network and the other program go on |
//! | a thread hangs | 12 | the VMM's at the destination never comes back from one of its steps |
//! | an uneven lane | 4 | one data channel is 4 to 40 times as slow as it would be |
//! | used memory | 2 | some pages of what the destination prepares are not zero |

use std::sync::Arc;
use std::time::Duration;

use multifd_transport::GuestMemory;
use multifd_wire::PAGE_BYTES_U64;

use super::faults::Side;
use super::schedule::{self, Group};
use super::world::{Step, World};
use super::{Mode, pick};
use crate::model::Random;

/// A program stands still.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stop {
    side: Side,
    after: Duration,
    pub(super) lasts: Duration,
}

/// What a seed has of all that.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Troubles {
    pub(super) stop: Option<Stop>,
    /// The VMM's thread at the destination hangs in this step.
    pub(super) hangs: Option<Step>,
    /// A data channel, and by how much it is slower.
    uneven: Option<(u64, u64)>,
    /// Where to take the content of used memory from.
    used: Option<u64>,
}

impl Troubles {
    pub(super) fn draw(seed: u64, mode: Mode) -> Self {
        let mut random = Random::new(seed ^ 0x7472_6f75_626c_6573);
        random.next_u64();
        let used = (random.below(2) == 0).then(|| random.next_u64());
        if mode != Mode::Faults {
            return Self {
                used,
                ..Self::default()
            };
        }
        let uneven =
            (random.below(4) == 0).then(|| (random.next_u64(), pick(&mut random, &[4, 16, 40])));
        let stop = (random.below(6) == 0).then(|| Stop {
            side: pick(&mut random, &[Side::Source, Side::Destination]),
            after: Duration::from_micros(random.below(60_000)),
            lasts: Duration::from_millis(pick(&mut random, &[20, 300, 2_000, 7_000])),
        });
        let steps = [Step::Prepare, Step::Load, Step::Load, Step::Resume];
        let hangs = (random.below(12) == 0).then(|| pick(&mut random, &steps));
        Self {
            stop,
            hangs,
            uneven,
            used,
        }
    }

    /// How much slower the data channel at this place is, of so many.
    pub(super) fn slowness(&self, lane: u64, lanes: u64) -> u64 {
        match self.uneven {
            Some((which, factor)) if which % lanes == lane => factor,
            _ => 1,
        }
    }

    /// Leaves something in memory that was just prepared.
    pub(super) fn use_memory(&self, memory: &GuestMemory, shape: &[u64]) {
        let Some(seed) = self.used else { return };
        let mut random = Random::new(seed);
        for (region, pages) in (0..).zip(shape) {
            for _ in 0..1 + random.below(4) {
                let at = random.below(*pages) * PAGE_BYTES_U64;
                if let Ok(span) = memory.span(region, at + random.below(511) * 8, 8) {
                    span.copy_from(&random.next_u64().to_le_bytes());
                }
            }
        }
    }

    /// Lets the program stand still when it is time; ends when it goes on.
    pub(super) fn stop_life(stop: Stop, world: &Arc<World>) {
        std::thread::sleep(stop.after);
        if world.is_over() {
            return;
        }
        world.stopped(stop.side, stop.lasts);
        let group = match stop.side {
            Side::Source => Group::Source,
            Side::Destination => Group::Destination,
        };
        let lasts = u64::try_from(stop.lasts.as_nanos()).unwrap_or(u64::MAX);
        schedule::stop(group, schedule::now() + lasts);
        std::thread::sleep(stop.lasts);
    }
}
