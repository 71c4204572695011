//! Every committed vector is read as it says, and our own encoder writes the same octets.

use std::collections::BTreeSet;

use multifd_wire::exercise::{Vector, check, samples};
use multifd_wire::{
    Features, Hello, HelloReply, Incarnation, Kind, LaneId, Reason, Sequence, SessionId, Text,
    Token, VersionRange,
};

use crate::support::{octets_of, repository, vectors};

/// Reads a vector's octets as its structure says; the stable code of the error otherwise.
fn read(vector: &Vector) -> Result<(), &'static str> {
    let octets = vector.octets.as_slice();
    match vector.structure.as_str() {
        "hello" => Hello::decode(octets.try_into().unwrap())
            .map(drop)
            .map_err(|e| e.code()),
        "hello_reply" => HelloReply::decode(octets.try_into().unwrap())
            .map(drop)
            .map_err(|e| e.code()),
        "frame" => {
            let rest = check(octets).map_err(|e| e.code())?;
            assert!(
                rest.is_some_and(|(_, _, rest)| rest.is_empty()),
                "{}: a whole frame",
                vector.name
            );
            Ok(())
        }
        "stream" => read_stream(octets),
        "digest" => Ok(()),
        other => panic!("{}: structure {other} is not known", vector.name),
    }
}

/// Reads frames to the end, each with the sequence that is due.
fn read_stream(mut octets: &[u8]) -> Result<(), &'static str> {
    let mut due = Sequence::FIRST;
    while !octets.is_empty() {
        let (header, _, rest) = check(octets).map_err(|e| e.code())?.expect("a whole frame");
        header.check_sequence(due).map_err(|e| e.code())?;
        due = due.next();
        octets = rest;
    }
    Ok(())
}

// SPEC: HEAD-9
#[test]
fn each_vector_is_taken_or_refused_as_it_says() {
    let all = vectors().into_iter();
    for vector in all.filter(|vector| vector.structure != "session") {
        let seen = read(&vector).err().unwrap_or("accept");
        assert_eq!(seen, vector.expect, "vector {}", vector.name);
    }
}

// SPEC: GEN-1, GEN-4
#[test]
fn each_sample_is_encoded_as_the_vector_of_its_name() {
    let vectors = vectors();
    for sample in samples() {
        let vector = vectors.iter().find(|vector| vector.name == sample.name);
        let vector = vector.unwrap_or_else(|| panic!("no vector for sample {}", sample.name));
        assert_eq!(octets_of(&sample), vector.octets, "sample {}", sample.name);
    }
}

#[test]
fn each_frame_vector_that_is_taken_has_a_sample() {
    let samples: BTreeSet<_> = samples()
        .iter()
        .map(|sample| sample.name.to_string())
        .collect();
    let vectors: BTreeSet<_> = vectors()
        .into_iter()
        .filter(|vector| vector.structure == "frame" && vector.expect == "accept")
        .map(|vector| vector.name)
        .filter(|name| name != "unknown-optional")
        .collect();
    assert_eq!(samples, vectors);
}

#[test]
fn each_kind_has_a_vector() {
    for kind in Kind::ALL {
        let found = samples().iter().any(|sample| sample.kind == *kind);
        assert!(found, "no sample, so no vector, of {kind}");
    }
}

#[test]
fn each_stable_code_of_a_decoder_has_a_vector_that_is_refused_with_it() {
    let expected: BTreeSet<_> = vectors().into_iter().map(|vector| vector.expect).collect();
    // SPEC: ERR-1
    for code in [
        "magic",
        "hello-crc",
        "header-crc",
        "table-crc",
        "body-crc",
        "reserved",
        "unknown-kind",
        "table-bytes",
        "body-bytes",
        "value",
        "count",
        "text",
    ] {
        assert!(
            expected.contains(&format!("wire.malformed.{code}")),
            "no vector for {code}"
        );
    }
    for code in ["order", "alignment", "wraps", "overlap", "pages"] {
        assert!(
            expected.contains(&format!("wire.layout.{code}")),
            "no vector for {code}"
        );
    }
}

/// Sixteen octets that count up.
fn counting(first: u8) -> [u8; 16] {
    std::array::from_fn(|index| first + u8::try_from(index).unwrap())
}

/// The octets of a vector.
fn octets(name: &str) -> Vec<u8> {
    vectors()
        .into_iter()
        .find(|vector| vector.name == name)
        .expect(name)
        .octets
}

#[test]
fn hellos_are_encoded_as_their_vectors() {
    let session = SessionId::new(counting(0x10));
    let (ticket, secret) = (Token::new(counting(0x20)), Token::new(counting(0x30)));
    let all = Features::DEVICE_STATE.union(Features::RESUME);
    let later = Hello {
        versions: VersionRange::new(1, 9).unwrap(),
        ..Hello::start(session, Features::NONE, Features::new(0xffff))
    };
    let join = Hello::join(session, ticket, all, LaneId::new(3), Incarnation::new(1));
    for (name, hello) in [
        ("hello-start", Hello::start(session, Features::NONE, all)),
        ("hello-join", join),
        ("hello-resume", Hello::resume(session, secret, all)),
        ("hello-ask", Hello::ask(session, secret)),
        ("hello-later-version", later),
    ] {
        assert_eq!(hello.encode().as_slice(), octets(name), "{name}");
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello), "{name}");
    }
}

#[test]
fn replies_are_encoded_as_their_vectors() {
    let session = SessionId::new(counting(0x10));
    let features = Features::DEVICE_STATE.union(Features::RESUME);
    let accepted = HelloReply::accepted(1, features, session);
    let refused = HelloReply::refused(Reason::Busy, "beschäftigt: try again", session);
    let bare = HelloReply::Refused {
        reason: Reason::from_u32(4096).unwrap(),
        text: Text::EMPTY,
        session: SessionId::new([0; 16]),
    };
    for (name, reply) in [
        ("reply-accepted", accepted),
        ("reply-refused", refused),
        ("reply-refused-bare", bare),
    ] {
        assert_eq!(reply.encode().as_slice(), octets(name), "{name}");
        assert_eq!(HelloReply::decode(&reply.encode()), Ok(reply), "{name}");
    }
}

#[test]
fn the_readme_of_the_vectors_names_every_structure() {
    let readme = std::fs::read_to_string(repository("tests/vectors/README.md")).unwrap();
    for vector in vectors() {
        let name = format!("`{}`", vector.structure);
        assert!(readme.contains(&name), "{name} is not in the README");
    }
}
