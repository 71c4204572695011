//! The values of features in hello and reply.

use multifd_wire::negotiate::{Offer, accept, answer};
use multifd_wire::{
    Features, Hello, HelloReply, Incarnation, Incompatible, LaneId, Malformed, Parameter,
    Parameters, SessionId, Token,
};

use multifd_wire::exercise::reseal_hello;

const SESSION: SessionId = SessionId::new([9; 16]);

/// Bits that this version does not know.
const LATER: Features = Features::new(1 << 40 | 1 << 63);

fn parameter(bit: u8, key: u16, value: u32) -> Parameter {
    Parameter { bit, key, value }
}

fn later(parameters: &[Parameter]) -> Hello {
    Hello {
        parameters: Parameters::new(parameters).unwrap(),
        ..Hello::start(SESSION, Features::NONE, Features::KNOWN.union(LATER))
    }
}

/// A hello with these octets in its places.
fn with_places(places: &[(u16, u16, u32)]) -> Result<Hello, Malformed> {
    let mut octets = later(&[]).encode();
    for (place, (feature, key, value)) in octets[72..120].chunks_exact_mut(8).zip(places) {
        place[..2].copy_from_slice(&feature.to_le_bytes());
        place[2..4].copy_from_slice(&key.to_le_bytes());
        place[4..].copy_from_slice(&value.to_le_bytes());
    }
    reseal_hello(&mut octets);
    Hello::decode(&octets)
}

// SPEC: PARAM-1, LIMIT-21
#[test]
fn up_to_six_come_back_in_rising_order_wherever_they_were() {
    let all: Vec<Parameter> = (0..6)
        .rev()
        .map(|key| parameter(63, key, 1 << key))
        .collect();
    let hello = later(&all);
    assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    assert_eq!(hello.parameters.get(63, 2), Some(4));
    assert_eq!(hello.parameters.get(40, 2), None);
    let seven: Vec<Parameter> = (0..7).map(|key| parameter(63, key, 1)).collect();
    assert_eq!(Parameters::new(&seven), None);
    assert_eq!(Parameters::new(&[parameter(64, 0, 1)]), None);
    assert_eq!(
        Parameters::new(&[parameter(1, 0, 1), parameter(1, 0, 2)]),
        None
    );
}

// SPEC: PARAM-1, PARAM-2
#[test]
fn places_out_of_order_twice_with_a_gap_or_of_a_feature_that_is_not_named_are_refused() {
    assert!(with_places(&[(41, 0, 7), (41, 1, 0), (64, 0, 9)]).is_ok());
    type Places = &'static [(u16, u16, u32)];
    let refused: [(&str, Places); 6] = [
        ("falling", &[(64, 0, 1), (41, 0, 1)]),
        ("twice", &[(41, 5, 1), (41, 5, 1)]),
        ("a gap", &[(0, 0, 0), (41, 0, 1)]),
        ("no bit", &[(65, 0, 1)]),
        ("not named", &[(42, 0, 1)]),
        ("a value of nothing", &[(0, 0, 1)]),
    ];
    for (name, places) in refused {
        assert!(with_places(places).is_err(), "{name}");
    }
}

// SPEC: PARAM-2
#[test]
fn only_a_start_and_an_acceptance_have_them() {
    let values = Parameters::new(&[parameter(0, 0, 1)]).unwrap();
    let token = Token::new([3; 16]);
    let join = Hello::join(
        SESSION,
        token,
        Features::KNOWN,
        LaneId::new(0),
        Incarnation::new(0),
    );
    let resume = Hello::resume(SESSION, token, Features::KNOWN);
    for hello in [join, resume] {
        let hello = Hello {
            parameters: values,
            ..hello
        };
        assert!(
            Hello::decode(&hello.encode()).is_err(),
            "{:?}",
            hello.intent
        );
    }
    let accepted = HelloReply::Accepted {
        version: 1,
        features: Features::DEVICE_STATE,
        session: SESSION,
        parameters: values,
    };
    assert_eq!(HelloReply::decode(&accepted.encode()), Ok(accepted));
    let start = Hello::start(SESSION, Features::DEVICE_STATE, Features::NONE);
    assert!(accept(&start, &accepted).is_ok());
    let resume = Hello::resume(SESSION, token, Features::DEVICE_STATE);
    assert_eq!(accept(&resume, &accepted), Err(Incompatible::Parameters));
    let mut octets = accepted.encode();
    octets[16] = 2;
    reseal_hello(&mut octets);
    assert!(HelloReply::decode(&octets).is_err(), "not agreed on");
    let mut octets = HelloReply::refused(multifd_wire::Reason::Busy, "", SESSION).encode();
    octets[192] = 1;
    reseal_hello(&mut octets);
    assert!(HelloReply::decode(&octets).is_err(), "in a refusal");
}

/// What makes room for features of tomorrow. SPEC: PARAM-3, FEAT-1
#[test]
fn values_of_unknown_features_are_passed_over_and_the_session_begins() {
    let hello = later(&[parameter(40, 1, 3), parameter(63, 0, 65536)]);
    let hello = Hello::decode(&hello.encode()).unwrap();
    let reply = answer(&hello, &Offer::ALL);
    let agreed = accept(&hello, &reply).unwrap();
    assert_eq!(agreed.features, Features::KNOWN);
    assert_eq!(
        reply,
        HelloReply::accepted(1, Features::KNOWN, SESSION),
        "and no values of them come back"
    );
}
