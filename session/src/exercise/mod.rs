//! What tests and fuzz targets share: a body per role that drives its session with a sequence of frames and events, made of any bytes.
//!
//! Only behind the feature `exercise`, and never part of a product: these bodies panic when the crate breaks a promise. A sequence is
//! structured, so that a fuzzer gets past the set-up: what happens on this side is what a driver could tell, in the order in which it could.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod destination;
mod pair;
mod source;

pub use destination::destination;
pub use pair::{Run, pair, pair_traced};
pub use source::source;

/// Reads a script, one byte after another.
struct Script<'a>(std::slice::Iter<'a, u8>);

impl Script<'_> {
    fn next(&mut self) -> Option<u8> {
        self.0.next().copied()
    }

    /// A number below `most`; 0 once the script is over.
    fn below(&mut self, most: u32) -> u32 {
        u32::from(self.next().unwrap_or(0)) % most.max(1)
    }
}

#[cfg(test)]
mod tests {
    /// Scripts that get far, and what a fuzzer found, with how each ends.
    macro_rules! corpus {
        ($role:literal: $($name:literal: $end:expr;)*) => {
            &[$((
                $name,
                include_bytes!(concat!("../../../fuzz/corpus/", $role, "/", $name)),
                $end,
            ),)*]
        };
    }

    type Corpus = &'static [(&'static str, &'static [u8], Option<&'static str>)];

    const DESTINATION: Corpus = corpus! { "destination":
        "asked": Some("failed");
        "devices": Some("running");
        "lane-lost-and-migrated": Some("running");
        "lane-lost-in-set-up": None;
        "migrated": Some("running");
        "resumed-and-migrated": Some("running");
        "resumed-before-ready": None;
        "silent": Some("failed");
    };

    const SOURCE: Corpus = corpus! { "source":
        "asked-and-not-committed": Some("failed");
        "asked-and-running": Some("migrated");
        "forgotten-and-begun-again": Some("migrated");
        "lane-lost-and-migrated": Some("migrated");
        "migrated": Some("migrated");
        "prepared-too-early": Some("migrated");
        "resumed-and-migrated": Some("migrated");
        "resumed-in-the-switchover": Some("migrated");
        "silent": Some("failed");
    };

    #[test]
    fn each_script_of_the_corpus_keeps_the_promises_and_ends_as_it_did() {
        for (name, script, end) in DESTINATION {
            assert_eq!(super::destination::run(script), *end, "{name}");
        }
        for (name, script, end) in SOURCE {
            assert_eq!(super::source::run(script), *end, "{name}");
        }
    }

    #[test]
    fn pairs_of_sessions_keep_the_promises() {
        let mut throttled = 0;
        let bad: Vec<_> = (0..3000)
            .map(|seed| (seed, super::pair(seed)))
            .inspect(|(_, run)| throttled += u32::from(run.throttled))
            .filter(|(_, run)| !run.violations.is_empty())
            .take(8)
            .collect();
        assert!(bad.is_empty(), "{bad:#?}");
        // Or nobody has looked whether it is released.
        assert!(throttled > 20, "{throttled}");
    }

    proptest::proptest! {
        /// Any script at all.
        #[test]
        fn no_script_makes_the_destination_break_a_promise(
            script in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
        ) {
            super::destination(&script);
        }

        /// Any script at all, for the source.
        #[test]
        fn no_script_makes_the_source_break_a_promise(
            script in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
        ) {
            super::source(&script);
        }

        /// Scripts that begin with a set-up, and go on with a switchover, a resume, or both.
        #[test]
        fn no_script_after_a_set_up_makes_the_source_break_a_promise(
            settings in 0..8_u8,
            far in proptest::prelude::any::<[bool; 3]>(),
            script in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
        ) {
            let mut all = super::source::SET_UP.to_vec();
            all[0] = settings;
            let parts = [super::source::SWITCHOVER, super::source::RESUMED, super::source::SWITCHOVER];
            for (part, wanted) in parts.into_iter().zip(far) {
                if wanted {
                    all.extend(part);
                }
            }
            all.extend(script);
            super::source(&all);
        }

        /// Scripts that begin with a set-up, or with a switchover.
        #[test]
        fn no_script_after_a_set_up_makes_the_destination_break_a_promise(
            far in proptest::prelude::any::<bool>(),
            script in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
        ) {
            let mut all = super::destination::SET_UP.to_vec();
            if far {
                all.extend(super::destination::SWITCHOVER);
            }
            all.extend(script);
            super::destination(&all);
        }
    }
}
