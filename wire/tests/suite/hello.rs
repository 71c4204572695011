//! Hellos, replies and negotiation.

use multifd_wire::exercise::reseal_hello;
use multifd_wire::negotiate::{self, Agreement, Offer};
use multifd_wire::{
    Features, HELLO_BYTES, HELLO_REPLY_BYTES, Hello, HelloReply, Incarnation, Incompatible, LaneId,
    Malformed, Reason, SessionId, Text, Token, VersionRange,
};

const SESSION: SessionId = SessionId::new([7; 16]);
const TOKEN: Token = Token::new([9; 16]);

fn start(mandatory: Features, optional: Features) -> Hello {
    Hello::start(SESSION, mandatory, optional)
}

fn all_hellos() -> [Hello; 4] {
    [
        start(Features::RESUME, Features::DEVICE_STATE),
        Hello::join(
            SESSION,
            TOKEN,
            Features::KNOWN,
            LaneId::new(255),
            Incarnation::new(u32::MAX),
        ),
        Hello::resume(SESSION, TOKEN, Features::RESUME),
        Hello::ask(SESSION, TOKEN),
    ]
}

fn all_replies() -> [HelloReply; 3] {
    [
        HelloReply::accepted(1, Features::KNOWN, SESSION),
        HelloReply::refused(Reason::Busy, "later", SESSION),
        HelloReply::refused(Reason::Malformed, "", SessionId::new([0; 16])),
    ]
}

// SPEC: HELLO-4
#[test]
fn each_flipped_bit_of_a_hello_is_seen() {
    for hello in all_hellos() {
        for bit in 0..HELLO_BYTES * 8 {
            let mut octets = hello.encode();
            octets[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::decode(&octets).is_err(), "bit {bit}");
        }
    }
}

// SPEC: REPLY-1
#[test]
fn each_flipped_bit_of_a_reply_is_seen() {
    for reply in all_replies() {
        for bit in 0..HELLO_REPLY_BYTES * 8 {
            let mut octets = reply.encode();
            octets[bit / 8] ^= 1 << (bit % 8);
            assert!(HelloReply::decode(&octets).is_err(), "bit {bit}");
        }
    }
}

// SPEC: GEN-3
#[test]
fn each_reserved_bit_of_a_hello_is_refused() {
    for hello in all_hellos() {
        for bit in 120 * 8..124 * 8 {
            let mut octets = hello.encode();
            octets[bit / 8] |= 1 << (bit % 8);
            reseal_hello(&mut octets);
            let refused = Malformed::Reserved {
                field: "hello.reserved",
            };
            assert_eq!(Hello::decode(&octets), Err(refused), "bit {bit}");
        }
    }
}

// SPEC: GEN-3, REPLY-2, REPLY-3
#[test]
fn each_reserved_bit_of_a_reply_is_refused() {
    for reply in all_replies() {
        for octet in (41..48).chain(50..56).chain(240..252) {
            for bit in 0..8 {
                let mut octets = reply.encode();
                octets[octet] |= 1 << bit;
                reseal_hello(&mut octets);
                let refused = Malformed::Reserved {
                    field: "hello_reply.reserved",
                };
                assert_eq!(HelloReply::decode(&octets), Err(refused), "octet {octet}");
            }
        }
    }
}

// SPEC: TEXT-2
#[test]
fn text_of_a_refusal_is_followed_by_zeros() {
    for octet in 56 + "later".len()..192 {
        let mut octets = all_replies()[1].encode();
        octets[octet] = b'x';
        reseal_hello(&mut octets);
        let refused = Malformed::Reserved {
            field: "hello_reply.text",
        };
        assert_eq!(HelloReply::decode(&octets), Err(refused), "octet {octet}");
    }
}

// SPEC: LIMIT-13, TEXT-3
#[test]
fn text_of_a_refusal_is_cut_between_characters_at_its_limit() {
    for (text, bytes) in [
        ("a".repeat(136), 136),
        ("a".repeat(137), 136),
        ("ä".repeat(69), 136),
    ] {
        let reply = HelloReply::refused(Reason::Busy, &text, SESSION);
        let HelloReply::Refused { text: cut, .. } = reply else {
            panic!("accepted")
        };
        assert_eq!(cut.bytes(), bytes);
        assert!(text.starts_with(cut.as_str()));
        assert_eq!(HelloReply::decode(&reply.encode()), Ok(reply));
    }
    assert_eq!(Text::<4>::clip("xäöü").as_str(), "xä");
    assert_eq!(Text::<9>::clip("a\u{1b}[2J\nb").as_str(), "a [2J b");
}

#[test]
fn a_text_for_the_peer_names_no_local_path() {
    let told = |text: &str| Text::<256>::clip(text).to_string();
    for (text, expected) in [
        (
            "state file /run/vm7.state: No such file",
            "state file <path>: No such file",
        ),
        (
            "unix:/run/x.sock, then `/etc/ä b`",
            "unix:<path>, then `<path> b`",
        ),
        (
            "(/dev/vfio/12) is in use. /x.",
            "(<path>) is in use. <path>.",
        ),
        ("/a:b/c/d.", "<path>."),
        (
            "100 MB/s and/or 5 / 3 // TCP/IP",
            "100 MB/s and/or 5 / 3 // TCP/IP",
        ),
        ("/", "/"),
        ("", ""),
    ] {
        assert_eq!(told(text), expected, "{text}");
    }
    assert_eq!(Text::<64>::name("/pci/0").as_str(), "/pci/0");
}

// SPEC: VER-2
#[test]
fn newest_common_version_is_chosen() {
    let range = |min, max| VersionRange::new(min, max).unwrap();
    for (ours, theirs, common) in [
        ((1, 1), (1, 1), Some(1)),
        ((1, 3), (2, 9), Some(3)),
        ((4, 6), (1, 5), Some(5)),
        ((1, 2), (3, 4), None),
        ((3, 4), (1, 2), None),
    ] {
        let (ours, theirs) = (range(ours.0, ours.1), range(theirs.0, theirs.1));
        assert_eq!(ours.newest_common(theirs), common);
        assert_eq!(theirs.newest_common(ours), common);
    }
    assert_eq!(VersionRange::new(0, 1), None);
    assert_eq!(VersionRange::new(2, 1), None);
}

/// The reason of a refusal.
fn reason(reply: HelloReply) -> Option<Reason> {
    match reply {
        HelloReply::Accepted { .. } => None,
        HelloReply::Refused { reason, .. } => Some(reason),
    }
}

// SPEC: VER-2, VER-3
#[test]
fn hello_of_other_versions_is_refused_with_the_version_reason() {
    let hello = Hello {
        versions: VersionRange::new(2, 3).unwrap(),
        ..start(Features::NONE, Features::NONE)
    };
    assert_eq!(
        reason(negotiate::answer(&hello, &Offer::ALL)),
        Some(Reason::Version)
    );
    // Such a hello may use octets that version 1 reserves: the refusal is still about the version.
    let mut octets = hello.encode();
    octets[100] = 1;
    reseal_hello(&mut octets);
    let error = Hello::decode(&octets).unwrap_err();
    let reply = negotiate::refuse(&octets, &error, &Offer::ALL);
    assert_eq!(reason(reply), Some(Reason::Version));
    let HelloReply::Refused { session, .. } = reply else {
        panic!("accepted")
    };
    assert_eq!(session, SESSION);
}

// SPEC: HELLO-3, HELLO-10
#[test]
fn octets_that_are_no_hello_get_a_refusal_without_a_session() {
    for octets in [
        [0; HELLO_BYTES],
        [0xff; HELLO_BYTES],
        b"GET / HTTP/1.1\r\n".repeat(8).try_into().unwrap(),
    ] {
        let error = Hello::decode(&octets).unwrap_err();
        let reply = negotiate::refuse(&octets, &error, &Offer::ALL);
        assert_eq!(reason(reply), Some(Reason::Malformed));
        assert_eq!(HelloReply::decode(&reply.encode()), Ok(reply));
    }
}

// SPEC: FEAT-1, FEAT-3
#[test]
fn features_are_agreed_on_or_refused() {
    let offer = |features, required| Offer {
        features,
        required,
        ..Offer::ALL
    };
    let (none, device, resume, both) = (
        Features::NONE,
        Features::DEVICE_STATE,
        Features::RESUME,
        Features::DEVICE_STATE.union(Features::RESUME),
    );
    let unknown = Features::new(1 << 63);
    for (mandatory, optional, offered, required, agreed) in [
        (none, none, both, none, Some(none)),
        (device, resume, both, none, Some(both)),
        (none, both, device, none, Some(device)),
        (none, both.union(unknown), both, none, Some(both)),
        (device, none, resume, none, None),
        (unknown, none, both, none, None),
        (none, device, both, resume, None),
        (none, resume, both, resume, Some(resume)),
    ] {
        let hello = start(mandatory, optional);
        let reply = negotiate::answer(&hello, &offer(offered, required));
        match (agreed, negotiate::accept(&hello, &reply)) {
            (Some(features), Ok(agreement)) => {
                assert_eq!(
                    agreement,
                    Agreement {
                        version: 1,
                        features
                    }
                );
            }
            (None, Err(Incompatible::Refused { reason, .. })) => {
                assert_eq!(reason, Reason::Feature);
            }
            (wanted, seen) => panic!("{hello:?}: wanted {wanted:?}, got {seen:?}"),
        }
    }
}

// SPEC: JOIN-2
#[test]
fn data_channel_agrees_to_exactly_what_the_control_channel_did() {
    let agreed = Agreement {
        version: 1,
        features: Features::KNOWN,
    };
    let offer = Offer::exactly(agreed);
    let join = |features| {
        Hello::join(
            SESSION,
            TOKEN,
            features,
            LaneId::new(0),
            Incarnation::new(0),
        )
    };
    let same = join(Features::KNOWN);
    assert_eq!(
        negotiate::accept(&same, &negotiate::answer(&same, &offer)),
        Ok(agreed)
    );
    let fewer = join(Features::RESUME);
    assert_eq!(
        reason(negotiate::answer(&fewer, &offer)),
        Some(Reason::Feature)
    );
}

// SPEC: REPLY-5, REPLY-6
#[test]
fn reply_that_does_not_answer_the_hello_is_not_accepted() {
    let hello = start(Features::RESUME, Features::NONE);
    let accept = |version, features, session| {
        negotiate::accept(&hello, &HelloReply::accepted(version, features, session))
    };
    assert!(accept(1, Features::RESUME, SESSION).is_ok());
    assert_eq!(
        accept(2, Features::RESUME, SESSION),
        Err(Incompatible::Version { version: 2 })
    );
    assert_eq!(
        accept(1, Features::RESUME, SessionId::new([8; 16])),
        Err(Incompatible::Session)
    );
    for agreed in [Features::NONE, Features::KNOWN] {
        assert_eq!(
            accept(1, agreed, SESSION),
            Err(Incompatible::Features { agreed })
        );
    }
}

// SPEC: SEC-2
#[test]
fn tokens_are_never_shown() {
    let hello = Hello::ask(SESSION, Token::new(*b"very secret text"));
    let shown = format!("{hello:?} {:?}", Token::new(*b"very secret text"));
    assert!(shown.contains("redacted"));
    assert!(!shown.contains("very") && !shown.contains("118") && !shown.contains("0x76"));
}
