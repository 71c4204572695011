//! Against the source: whatever comes instead of an acceptance, its guest runs on and its user learns why.

use std::time::Instant;

use multifd_tests::bounded::{GRACE, HELLO_DEADLINE, Source, tx_builder};
use multifd_tests::fake_destination::{FakeDestination, accepted};
use multifd_tests::peer::Peer;
use multifd_transport::Address;
use multifd_wire::{Features, HelloReply, Reason, SessionId};

fn source_to(address: &Address) -> Source {
    Source::to(address, tx_builder().build().unwrap())
}

#[test]
fn a_refusal_is_reported_with_its_reason_and_words() {
    for reason in Reason::ALL {
        let fake = FakeDestination::listen();
        let source = source_to(&fake.address);
        let mut control = Peer::new(fake.accept());
        let hello = control.hear_hello();
        control.raw(&HelloReply::refused(*reason, "not today", hello.session).encode());
        control.finish();
        let end = source.end(GRACE);
        end.failed("sender.peer.refused", reason.text());
        let error = end.finished.error.as_ref().unwrap();
        assert_eq!(error.reason(), *reason);
        assert!(error.to_string().contains("not today"), "{error}");
    }
}

#[test]
fn an_answer_that_is_none_ends_it() {
    type Act = fn(&mut Peer, SessionId);
    let cases: [(&str, Act, &str); 7] = [
        ("closes", |p, _| p.cut(), "channel-"),
        (
            "random bytes",
            |p, _| p.raw(&[0x55; 256]),
            "channel-stranger",
        ),
        (
            "a flipped bit",
            |p, session| {
                let mut reply = accepted(session).encode();
                reply[17] ^= 1;
                p.raw(&reply);
            },
            "wire.malformed.hello-crc",
        ),
        (
            "another session",
            |p, _| p.raw(&accepted(SessionId::new([1; 16])).encode()),
            "wire.incompatible.session",
        ),
        (
            "a version that was not offered",
            |p, session| {
                let reply = HelloReply::accepted(2, Features::NONE, session);
                p.raw(&reply.encode());
            },
            "wire.incompatible.version",
        ),
        (
            "a feature that was not asked for",
            |p, session| {
                let reply = HelloReply::accepted(1, Features::RESUME, session);
                p.raw(&reply.encode());
            },
            "wire.incompatible.features",
        ),
        (
            "half an answer",
            |p, session| p.raw(&accepted(session).encode()[..255]),
            "channel-deadline",
        ),
    ];
    for (name, act, code) in cases {
        let fake = FakeDestination::listen();
        let began = Instant::now();
        let source = source_to(&fake.address);
        let mut control = Peer::new(fake.accept());
        let hello = control.hear_hello();
        act(&mut control, hello.session);
        let end = source.end(HELLO_DEADLINE + GRACE);
        let error = end.finished.error.as_ref().unwrap();
        assert!(error.code().starts_with(code), "{name}: {error}");
        end.runs_on(name);
        assert!(began.elapsed() < HELLO_DEADLINE + GRACE, "{name}");
    }
}

#[test]
fn an_answer_that_does_not_come_is_waited_for_no_longer_than_its_deadline() {
    let fake = FakeDestination::listen();
    let began = Instant::now();
    let source = source_to(&fake.address);
    let silent = fake.accept();
    source.fails(HELLO_DEADLINE + GRACE, "channel-deadline", "no answer");
    assert!(began.elapsed() >= HELLO_DEADLINE, "{:?}", began.elapsed());
    drop(silent);
}

#[test]
fn nobody_there_is_an_error_too() {
    let fake = FakeDestination::listen();
    let address = fake.address.clone();
    drop(fake);
    source_to(&address).fails(GRACE, "sender.channel.dial", "nobody listens");
}
