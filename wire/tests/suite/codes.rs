//! Codes and numbers with an owner mean what they say, both ways.

use std::collections::BTreeSet;

use multifd_wire::error::{LayoutError, Malformed, Misbehaved};
use multifd_wire::frame::{GiveBackReason, Mark, OutcomeState, Section};
use multifd_wire::kind::Senders;
use multifd_wire::limits::ROUND_MAX;
use multifd_wire::{
    ChannelKind, ChannelRef, Features, Generation, Incarnation, Intent, Kind, LaneId, Phase,
    Reason, Role, Round, Sequence, SessionId, Token,
};

const ROLES: [Role; 2] = [Role::Source, Role::Destination];
const CHANNELS: [ChannelKind; 2] = [ChannelKind::Control, ChannelKind::Data];

// SPEC: KIND-1
#[test]
fn each_kind_travels_as_one_line_of_the_table_says() {
    let travels = |kind: Kind| {
        let both = ROLES
            .iter()
            .flat_map(|from| CHANNELS.iter().map(move |on| (*from, *on)));
        both.filter(|(from, on)| kind.may_travel(*from, *on))
            .collect::<Vec<_>>()
    };
    let (source, destination) = (Role::Source, Role::Destination);
    let (control, data) = (ChannelKind::Control, ChannelKind::Data);
    assert_eq!(travels(Kind::Pages), [(source, data)]);
    assert_eq!(travels(Kind::Commit), [(source, control)]);
    assert_eq!(travels(Kind::Ack), [(destination, control)]);
    assert_eq!(
        travels(Kind::Abort),
        [(source, control), (destination, control)]
    );
    assert_eq!(travels(Kind::OptionalUnknown(0xfffe)).len(), 4);
    for kind in Kind::ALL {
        let ways = travels(*kind).len();
        let both = kind.senders() == Senders::Both;
        assert_eq!(ways, if both { 2 } else { 1 }, "{kind}");
        for from in ROLES {
            for on in CHANNELS {
                let seen = kind.check_direction(from, on);
                let wrong = Misbehaved::Direction {
                    kind: *kind,
                    from,
                    on,
                };
                assert_eq!(
                    seen,
                    if kind.may_travel(from, on) {
                        Ok(())
                    } else {
                        Err(wrong)
                    }
                );
            }
        }
    }
}

// SPEC: CHAN-2
#[test]
fn destination_sends_nothing_on_a_data_channel_but_carried_streams() {
    for kind in Kind::ALL {
        // SPEC: CARRY-2
        let carried = *kind == Kind::StreamData;
        assert_eq!(
            kind.may_travel(Role::Destination, ChannelKind::Data),
            carried,
            "{kind}"
        );
    }
}

// SPEC: KIND-2
#[test]
fn kind_is_refused_in_a_phase_that_does_not_allow_it() {
    for kind in Kind::ALL {
        for phase in Phase::ALL {
            let wrong = Misbehaved::Phase {
                kind: *kind,
                phase: *phase,
            };
            let allowed = kind.phases().contains(phase);
            let seen = kind.check_phase(*phase);
            assert_eq!(seen, if allowed { Ok(()) } else { Err(wrong) });
        }
        assert!(
            !kind.may_come_in(Phase::Hello) && !kind.may_come_in(Phase::Suspended),
            "{kind}"
        );
    }
    assert_eq!(Kind::Commit.phases(), [Phase::Commit]);
    assert!(
        Phase::ALL
            .iter()
            .all(|phase| Kind::OptionalUnknown(0xfffe).may_come_in(*phase))
    );
}

// SPEC: EXT-5
#[test]
fn codes_of_kinds_are_used_once_with_or_without_the_optional_bit() {
    let codes: BTreeSet<u16> = Kind::ALL.iter().map(|kind| kind.code() & 0x7fff).collect();
    assert_eq!(codes.len(), Kind::ALL.len());
    assert!(codes.iter().all(|code| !(0x7f00..=0x7fff).contains(code)));
    for kind in Kind::ALL {
        assert_eq!(Kind::from_code(kind.code()), Ok(*kind));
        assert_eq!(kind.is_optional(), *kind == Kind::Progress);
    }
}

// SPEC: REASON-1, EXT-4
#[test]
fn reasons_keep_their_number_known_or_not() {
    assert_eq!(Reason::from_u32(0), None);
    for code in (1..1000).chain([u32::MAX]) {
        let reason = Reason::from_u32(code).unwrap();
        assert_eq!(reason.as_u32(), code);
        assert_eq!(Reason::ALL.contains(&reason), code <= 21);
        assert_eq!(
            reason.to_string().contains(&code.to_string()),
            code > 21,
            "{reason}"
        );
        assert!(reason.advice().ends_with('.'));
    }
}

#[test]
fn closed_lists_of_codes_come_back_and_end() {
    for code in 0..1000_u32 {
        assert_eq!(
            Phase::from_u32(code).map(Phase::as_u32),
            (code <= 7).then_some(code)
        );
        let mark = (1..=4).contains(&code).then_some(code);
        assert_eq!(Mark::from_u32(code).map(Mark::as_u32), mark);
        assert_eq!(OutcomeState::from_u32(code).map(OutcomeState::as_u32), mark);
        assert_eq!(
            Section::from_u32(code).map(Section::as_u32),
            (code <= 1).then_some(code)
        );
        let back = GiveBackReason::from_u32(code).map(GiveBackReason::as_u32);
        assert_eq!(back, (code == 1).then_some(code));
        let short = u16::try_from(code).unwrap();
        let intent = (1..=4).contains(&short).then_some(short);
        assert_eq!(Intent::from_u16(short).map(Intent::as_u16), intent);
    }
    for code in 0..=u8::MAX {
        assert_eq!(
            Role::from_u8(code).map(Role::as_u8),
            (1..=2).contains(&code).then_some(code)
        );
        assert_eq!(
            ChannelKind::from_u8(code).map(ChannelKind::as_u8),
            (code <= 1).then_some(code)
        );
    }
}

#[test]
fn channel_of_a_report_comes_back() {
    let lane = |lane| ChannelRef::Lane(LaneId::new(lane));
    for channel in [ChannelRef::None, ChannelRef::Control, lane(0), lane(255)] {
        assert_eq!(ChannelRef::from_u32(channel.as_u32()), Some(channel));
    }
    for impossible in [256, u32::MAX - 2, u32::MAX - 1, u32::MAX] {
        let code = lane(impossible).as_u32();
        assert_eq!(
            ChannelRef::from_u32(code),
            None,
            "lane {impossible} became {code}"
        );
    }
}

// SPEC: LIMIT-16
#[test]
fn numbers_end_where_they_end() {
    assert_eq!(
        Round::new(ROUND_MAX - 1).next(),
        Some(Round::new(ROUND_MAX))
    );
    assert_eq!(Round::new(ROUND_MAX).next(), None);
    assert_eq!(Incarnation::new(0).next(), Some(Incarnation::new(1)));
    assert_eq!(Incarnation::new(u32::MAX).next(), None);
    assert_eq!(Generation::new(u32::MAX).next(), None);
    assert_eq!(Sequence::FIRST.next(), Sequence::new(1));
}

#[test]
fn features_are_sets() {
    let (device, resume) = (Features::DEVICE_STATE, Features::RESUME);
    let both = device.union(resume);
    let others = Features::BRIDGE.union(Features::PAUSED);
    assert_eq!(both.union(others), Features::KNOWN);
    assert!(both.contains(resume) && !device.contains(resume));
    assert_eq!(both.without(device), resume);
    assert!(device.intersection(resume).is_empty());
    let shown = device.union(Features::new(1 << 40)).to_string();
    assert_eq!(shown, "device-state+0x10000000000");
    assert_eq!(Features::NONE.to_string(), "none");
}

#[test]
fn tokens_are_equal_only_when_all_octets_are() {
    let token = Token::new([5; 16]);
    assert_eq!(token, Token::new([5; 16]));
    for octet in 0..16 {
        let mut other = [5; 16];
        other[octet] ^= 0x10;
        assert_ne!(token, Token::new(other));
    }
    assert!(Token::NONE.is_none() && !token.is_none());
    let digits = "000102030405060708090a0b0c0d0E0F";
    let octets = core::array::from_fn(|index| u8::try_from(index).expect("sixteen"));
    assert_eq!(Token::from_hex(digits), Some(Token::new(octets)));
    for wrong in [
        "",
        &digits[1..],
        &format!("{digits}0"),
        &format!("+{}", &digits[1..]),
        &"0".repeat(32),
    ] {
        assert_eq!(Token::from_hex(wrong), None, "{wrong}");
    }
    let session = SessionId::new([0xab; 16]);
    assert_eq!(session.to_string(), "ab".repeat(16));
}

// SPEC: ERR-2, ERR-3, EXT-1
#[test]
fn errors_tell_the_peer_who_is_at_fault() {
    let crc = Malformed::HeaderCrc {
        found: 1,
        computed: 2,
    };
    assert_eq!(
        (crc.reason(), crc.code()),
        (Reason::Corruption, "wire.malformed.header-crc")
    );
    let kind = Malformed::UnknownKind { code: 7 };
    assert_eq!(kind.reason(), Reason::Incompatible);
    let reserved = Malformed::Reserved {
        field: "ready.reserved",
    };
    assert_eq!(reserved.reason(), Reason::Malformed);
    assert_eq!(
        reserved.to_string(),
        "ready.reserved is reserved and must be zero"
    );
    let layout = Malformed::from(LayoutError::Overlap { region: 3 });
    assert_eq!(
        (layout.reason(), layout.code()),
        (Reason::Malformed, "wire.layout.overlap")
    );
    let run = Misbehaved::RunPastRegion {
        region: 1,
        first: 2,
        count: 3,
    };
    assert_eq!(
        (run.reason(), run.code()),
        (Reason::Misbehaved, "wire.misbehaved.run-past-region")
    );
}
