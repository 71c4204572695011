//! The fuzz bodies hold over the committed corpus and over damaged frames.

use std::fs;

use multifd_wire::exercise::{frame, header, hello, hello_reply, layout, samples, stream};
use proptest::prelude::*;

use crate::support::{octets_of, repository, vectors};

/// A fuzz target's body.
type Body = fn(&[u8]);

/// Each target with its body.
const TARGETS: &[(&str, Body)] = &[
    ("frame", frame),
    ("header", header),
    ("hello", hello),
    ("hello_reply", hello_reply),
    ("layout", layout),
    ("stream", stream),
];

#[test]
fn bodies_hold_over_the_corpus() {
    for (target, body) in TARGETS {
        let folder = repository("fuzz/corpus").join(target);
        let mut entries = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            body(&fs::read(entry.unwrap().path()).unwrap());
            entries += 1;
        }
        assert!(entries >= 5, "{} has {entries} entries", folder.display());
    }
}

#[test]
fn each_target_has_its_file_and_calls_its_body() {
    let mut files: Vec<String> = fs::read_dir(repository("fuzz/fuzz_targets"))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .path()
                .file_stem()
                .unwrap()
                .to_str()
                .unwrap()
                .to_string()
        })
        .collect();
    // Targets with the body of another crate are that crate's.
    files.retain(|name| {
        let path = repository("fuzz/fuzz_targets").join(format!("{name}.rs"));
        fs::read_to_string(path).unwrap().contains("multifd_wire::")
    });
    files.sort();
    assert_eq!(
        files,
        TARGETS
            .iter()
            .map(|(name, _)| name.to_string())
            .collect::<Vec<_>>()
    );
    for (name, _) in TARGETS {
        let path = repository("fuzz/fuzz_targets").join(format!("{name}.rs"));
        let text = fs::read_to_string(path).unwrap();
        assert!(
            text.contains(&format!("exercise::{name}(")),
            "{name} does not call its body"
        );
    }
}

#[test]
fn bodies_hold_over_every_vector_of_any_structure() {
    for vector in vectors() {
        TARGETS.iter().for_each(|(_, body)| body(&vector.octets));
    }
}

#[test]
fn bodies_hold_over_every_prefix_of_a_sample() {
    for sample in samples() {
        let octets = octets_of(&sample);
        for bytes in 0..octets.len().min(400) {
            frame(&octets[..bytes]);
            stream(&octets[..bytes]);
        }
    }
}

proptest! {
    #[test]
    fn bodies_hold_over_any_octets(octets in prop::collection::vec(any::<u8>(), 0..600)) {
        TARGETS.iter().for_each(|(_, body)| body(&octets));
    }

    #[test]
    fn bodies_hold_over_damaged_frames(
        index in any::<prop::sample::Index>(),
        damage in prop::collection::vec((0_usize..160, any::<u8>()), 1..6),
    ) {
        let samples = samples();
        let sample = index.get(&samples);
        let mut octets = octets_of(sample);
        for (at, value) in damage {
            let at = at % octets.len();
            octets[at] = value;
        }
        frame(&octets);
        stream(&octets);
    }
}
