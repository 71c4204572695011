//! The vectors of illegal sessions, played into the real machines: the honest side refuses the last block with the reason that the vector
//! says. What a driver checks before a machine hears of it is named in two lists below, with the place of its own test.

// The test reads files; the machines under test know none.
#![allow(clippy::disallowed_methods)]

mod destination;
mod source;

use std::fs;
use std::path::Path;

use multifd_session::common::ChannelFault;
use multifd_wire::exercise::{Block, Vector};
use multifd_wire::{Hello, Reason, Role};

/// What one block holds: a hello, a reply, or a frame.
struct Said<'b> {
    side: Role,
    octets: &'b [u8],
    is_read: bool,
    is: Is,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    Hello,
    Reply(Hello),
    Frame(Hello),
}

/// A step of a vector.
enum Step<'b> {
    Said(Said<'b>),
    Lost(Hello),
}

/// The steps of a session, each with the hello of its channel.
fn steps(blocks: &[Block]) -> Vec<Step<'_>> {
    let mut channels: Vec<(&str, Hello, bool)> = Vec::new();
    let mut steps = Vec::new();
    for block in blocks {
        let name = match block {
            Block::Said { channel, .. } | Block::Lost(channel) => channel.as_str(),
        };
        let place = channels.iter().position(|(known, ..)| *known == name);
        match block {
            Block::Lost(_) => {
                let (_, hello, _) = channels.remove(place.unwrap());
                steps.push(Step::Lost(hello));
            }
            Block::Said {
                side,
                octets,
                is_read,
                ..
            } => {
                let is = match place.map(|place| &mut channels[place]) {
                    None => {
                        let hello = Hello::decode(octets.as_slice().try_into().unwrap()).unwrap();
                        channels.push((name, hello, false));
                        Is::Hello
                    }
                    Some((_, hello, is_open @ false)) => {
                        *is_open = true;
                        Is::Reply(*hello)
                    }
                    Some((_, hello, true)) => Is::Frame(*hello),
                };
                steps.push(Step::Said(Said {
                    side: *side,
                    octets,
                    is_read: *is_read,
                    is,
                }));
            }
        }
    }
    steps
}

fn illegal() -> Vec<Vector> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors");
    let files = fs::read_dir(folder).unwrap();
    let mut vectors: Vec<Vector> = files
        .map(|entry| entry.unwrap().path())
        .filter_map(|path| {
            let name = path.file_stem()?.to_str()?.to_string();
            let is_illegal = name.starts_with("illegal-") && path.extension()? == "txt";
            is_illegal.then(|| Vector::parse(&name, &fs::read_to_string(&path).unwrap()))
        })
        .collect();
    vectors.sort_by(|a, b| a.name.cmp(&b.name));
    vectors
}

fn reason(vector: &Vector) -> Option<Reason> {
    let code = vector.expect.strip_prefix("reason-")?;
    Reason::from_u32(code.parse().unwrap())
}

/// Whether the source has to find out: the last block is the destination's, and no acceptance that should have been a refusal.
fn is_for_the_source(vector: &Vector, steps: &[Step<'_>]) -> bool {
    let Some(Step::Said(last)) = steps.last() else {
        panic!("{}: no last block", vector.name);
    };
    let of_the_reply = ["REPLY-5", "REPLY-6", "PARAM-2", "JOIN-2"];
    let accepts = matches!(last.is, Is::Reply(_));
    last.side == Role::Destination && (!accepts || of_the_reply.contains(&vector.spec[0].as_str()))
}

fn closed_channel() -> ChannelFault {
    ChannelFault::new("channel.closed", false, "closed")
}

/// Plays each vector that one side has to refuse, and compares the reasons.
fn refuses(
    for_the_source: bool,
    elsewhere: &[(&str, &str)],
    play: impl Fn(&[Step<'_>]) -> Option<Reason>,
) {
    let (mut played, mut wrong) = (0, Vec::new());
    for vector in illegal() {
        let blocks = vector.blocks();
        let steps = steps(&blocks);
        let Some(due) = reason(&vector) else { continue };
        if is_for_the_source(&vector, &steps) != for_the_source {
            continue;
        }
        let name = vector.name.strip_prefix("illegal-").unwrap();
        let (last, before) = (steps.len(), steps.len() - 1);
        let early = play(&steps[..before]);
        let seen = play(&steps[..last]);
        let is_elsewhere = elsewhere.iter().any(|(other, _)| *other == name);
        if early.is_some() || (seen == Some(due)) == is_elsewhere {
            wrong.push(format!(
                "{name}: {due:?} due, {early:?} before, {seen:?} then"
            ));
        }
        played += usize::from(!is_elsewhere);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(played >= 18, "only {played} were played");
}

/// What the destination's driver refuses (`receiver/`), each with the test that shows it.
const BY_THE_RECEIVER: &[(&str, &str)] = &[
    ("chunk-no-device", "misbehaviour/devices_received.rs"),
    ("chunk-without-feature", "misbehaviour/pages_received.rs"),
    ("join-first-incarnation-1", "misbehaviour/hello_received.rs"),
    ("join-lane-past-the-grant", "misbehaviour/hello_received.rs"),
    ("resume-wrong-secret", "resume/strangers.rs"),
    ("sequence", "misbehaviour/setup_received.rs"),
];

/// What the source's driver refuses (`sender/`), likewise; or what cannot happen to this source.
const BY_THE_SENDER: &[(&str, &str)] = &[
    ("ack-of-no-generation", "sender/src/driver/device/stream.rs"),
    ("switchover-ack-twice", "sender/src/driver/device/stream.rs"),
    ("credit-no-device", "sender/src/driver/device/table.rs"),
    ("loaded-no-device", "sender/src/driver/device/table.rs"),
    (
        "switchover-ack-no-device",
        "sender/src/driver/device/table.rs",
    ),
    (
        "join-reply-other-features",
        "it insists on the session's features",
    ),
    (
        "running-before-commit",
        "it commits when it reads PREPARED; without: misbehaviour/commit_sent.rs",
    ),
];

#[test]
fn the_destination_refuses_what_it_must() {
    refuses(false, BY_THE_RECEIVER, destination::play);
}

#[test]
fn the_source_refuses_what_it_must() {
    refuses(true, BY_THE_SENDER, source::play);
}
