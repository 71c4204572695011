//! The vectors of whole sessions, followed by an onlooker who sees every channel: legal ones keep every rule to their end, illegal
//! ones break the rule that they cite with their last block.

use multifd_wire::exercise::Vector;
use multifd_wire::{Phase, Reason};

use crate::onlooker::Onlooker;
use crate::support::vectors;

fn sessions() -> Vec<Vector> {
    let all = vectors().into_iter();
    all.filter(|vector| vector.structure == "session").collect()
}

#[test]
fn each_legal_session_keeps_every_rule() {
    let legal: Vec<Vector> = sessions()
        .into_iter()
        .filter(|vector| vector.expect == "accept")
        .collect();
    assert!(legal.len() >= 9, "only {} sessions", legal.len());
    for vector in &legal {
        let mut onlooker = Onlooker::default();
        for (at, block) in vector.blocks().iter().enumerate() {
            let seen = onlooker.see(block);
            assert_eq!(seen, Ok(()), "{}: block {at}", vector.name);
        }
        if vector.name != "session-refusals" {
            assert_eq!(onlooker.phase(), Phase::Done, "{}", vector.name);
        }
    }
}

#[test]
fn each_illegal_session_breaks_the_rule_that_it_cites_with_its_last_block() {
    let illegal: Vec<Vector> = sessions()
        .into_iter()
        .filter(|vector| vector.expect != "accept")
        .collect();
    assert!(illegal.len() >= 100, "only {} sessions", illegal.len());
    let mut wrong = Vec::new();
    for vector in &illegal {
        let mut onlooker = Onlooker::default();
        let blocks = vector.blocks();
        let (last, before) = blocks.split_last().unwrap();
        let early = before
            .iter()
            .enumerate()
            .find_map(|(at, block)| Some((at, onlooker.see(block).err()?)));
        let seen = onlooker.see(last);
        let cited = seen.is_err_and(|rule| vector.spec.iter().any(|cited| cited == rule));
        if early.is_some() || !cited {
            wrong.push(format!(
                "{} {:?}: early {early:?}, then {seen:?}",
                vector.name, vector.spec
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Who has to refuse an illegal session is said in a form that a stranger's program can read.
#[test]
fn each_illegal_session_says_who_has_to_find_out() {
    for vector in sessions() {
        let illegal = vector.name.starts_with("illegal-");
        assert_eq!(illegal, vector.expect != "accept", "{}", vector.name);
        if let Some(code) = vector.expect.strip_prefix("reason-") {
            let reason = Reason::from_u32(code.parse().unwrap());
            assert!(
                reason.is_some_and(|reason| Reason::ALL.contains(&reason)),
                "{}",
                vector.name
            );
        } else {
            assert!(
                ["accept", "kept"].contains(&vector.expect.as_str()),
                "{}",
                vector.name
            );
        }
    }
}
