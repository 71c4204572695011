//! What must hold when a simulated migration is over, whatever happened in it.
//!
//! | promise | looked at |
//! |---|---|
//! | never two owners, none without COMMIT | by the world, whenever a VMM runs the guest |
//! | the guest at the destination is the guest | memory and state compared when it is started there |
//! | the report tells the truth | here, against the ledger |
//! | a failed migration loses nothing | the guest runs at the source, the dirty set knows every page that differs |
//! | nobody calls an honest peer a liar | here, by the errors' codes |
//! | what need not fail does not | here, for plans of harmless faults |
//! | a damaged octet is found and named | here, for plans of flips |
//! | it ends, and leaves nothing behind | by the scheduler: simulated time is bounded, every thread has to end |

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_wire::{ChannelRef, Kind};

use super::faults::{Fault, Side};
use super::world::{Summary, World};
use super::{Attempt, Settings};

/// Errors that say that the other side lied. Only a forged or flipped octet may lead to one.
const ACCUSATIONS: &[&str] = &[
    "misbehaved",
    "malformed",
    "digest-mismatch",
    "internal",
    "incompatible",
];

fn accuses(code: &str) -> bool {
    ACCUSATIONS.iter().any(|word| code.contains(word))
}

/// Enters what does not hold, and says how the migration ended.
pub(super) fn judge(world: &World, attempt: &Attempt, settings: &Settings) -> tx::OutcomeKind {
    let summary = world.summary();
    let outcome = attempt.sent.report.outcome;
    let code = attempt.sent.error.as_ref().map(tx::Error::code);
    world.say(&format!(
        "the source says {outcome:?} ({}), the destination {:?} ({})",
        code.unwrap_or("no error"),
        attempt.received.report.outcome,
        attempt
            .received
            .error
            .as_ref()
            .map_or("no error", rx::Error::code)
    ));
    if summary.ledger.source_crashed {
        ghosts_source(world, &summary);
    } else {
        source(world, &summary, attempt);
    }
    if !summary.ledger.destination_crashed {
        destination(world, &summary, attempt);
    }
    honesty(world, &summary, attempt);
    success(world, &summary, attempt, settings);
    flips(world, &summary, attempt);
    outcome
}

/// The source's program died: what counts is only what the destination did.
fn ghosts_source(world: &World, summary: &Summary) {
    if summary.ledger.destination_ran && !summary.ledger.commit_left {
        world.violation("the destination runs what the source never gave away");
    }
}

fn source(world: &World, summary: &Summary, attempt: &Attempt) {
    let ledger = &summary.ledger;
    let error = attempt.sent.error.as_ref();
    match attempt.sent.report.outcome {
        tx::OutcomeKind::Migrated => {
            if ledger.source_runs || !ledger.destination_ran {
                world.violation(format!("migrated, says the source, but {ledger:?}"));
            }
            if error.is_some() {
                world.violation("migrated, but with an error");
            }
        }
        tx::OutcomeKind::Failed | tx::OutcomeKind::Cancelled => {
            if !ledger.source_runs || ledger.destination_ran || ledger.commit_left {
                world.violation(format!("failed, says the source, but {ledger:?}"));
            }
            if error.is_none_or(|error| error.fault().to_string().is_empty()) {
                world.violation("failed, and does not say why");
            }
            // A page that was forged to be another one was acknowledged for what it was not.
            if !summary.forged
                && let Some((region, page)) = world.machine.forgotten_page()
            {
                world.violation(format!(
                    "page {page} of region {region} differs and is not in the dirty set"
                ));
            }
        }
        tx::OutcomeKind::Stranded => {
            if ledger.source_runs || ledger.destination_ran || !ledger.commit_left {
                world.violation(format!("stranded, says the source, but {ledger:?}"));
            }
        }
        tx::OutcomeKind::Unknown => {
            if ledger.source_runs || !(ledger.commit_left || ledger.disowned) {
                world.violation(format!("unknown, says the source, but {ledger:?}"));
            }
        }
    }
}

fn destination(world: &World, summary: &Summary, attempt: &Attempt) {
    let ledger = &summary.ledger;
    match attempt.received.report.outcome {
        rx::OutcomeKind::Running => {
            if !ledger.destination_runs {
                world.violation(format!("running, says the destination, but {ledger:?}"));
            }
        }
        rx::OutcomeKind::Failed => {
            if ledger.destination_ran {
                world.violation(format!("failed, says the destination, but {ledger:?}"));
            }
            if attempt.received.error.is_none() {
                world.violation("failed at the destination, and does not say why");
            }
        }
        rx::OutcomeKind::Stranded => {
            let refused = summary
                .happened
                .iter()
                .any(|(_, fault, _)| *fault == Fault::VmmRefuses);
            if ledger.destination_ran || !ledger.commit_left || !refused {
                world.violation(format!("stranded, says the destination, but {ledger:?}"));
            }
        }
    }
}

/// No side may accuse the other, as long as nobody forged or damaged what they said.
fn honesty(world: &World, summary: &Summary, attempt: &Attempt) {
    let damaged = summary
        .flips
        .iter()
        .any(|flip| flip.in_head || flip.kind != Some(Kind::Pages));
    if summary.forged || damaged {
        return;
    }
    let codes = [
        attempt.sent.error.as_ref().map(tx::Error::code),
        attempt.received.error.as_ref().map(rx::Error::code),
    ];
    for code in codes.into_iter().flatten() {
        if accuses(code) {
            let errors = (
                attempt.sent.error.as_ref().map(ToString::to_string),
                attempt.received.error.as_ref().map(ToString::to_string),
            );
            world.violation(format!("{code} between honest peers: {errors:?}"));
        }
    }
}

/// A migration to which nothing happened that it may fail of has to succeed.
fn success(world: &World, summary: &Summary, attempt: &Attempt, settings: &Settings) {
    let migrated = attempt.sent.report.outcome == tx::OutcomeKind::Migrated;
    // Told to keep nothing that is lost, a side ends with its last lane; a slow lane may be taken for a dead one.
    let lanes_gone = attempt.sent.report.channels_lost as usize + 1 >= settings.quality.len();
    if lanes_gone && !settings.resumes {
        return;
    }
    if summary.must_succeed && settings.must_converge && !migrated {
        let error = attempt.sent.error.as_ref().map(ToString::to_string);
        world.violation(format!("had no reason to fail, but did: {error:?}"));
    }
}

/// A flipped bit was found: pages come back, anything else ends a channel or the migration, by name.
fn flips(world: &World, summary: &Summary, attempt: &Attempt) {
    let others = summary
        .happened
        .iter()
        .any(|(_, fault, _)| !is_flip(*fault));
    if others || summary.flips.is_empty() {
        return;
    }
    let pages = summary
        .flips
        .iter()
        .filter(|flip| !flip.in_head && flip.kind == Some(Kind::Pages))
        .count() as u64;
    let elsewhere: Vec<_> = summary
        .flips
        .iter()
        .filter(|flip| flip.in_head || flip.kind != Some(Kind::Pages))
        .collect();
    let migrated = attempt.sent.report.outcome == tx::OutcomeKind::Migrated;
    let damaged = attempt.received.report.pages_damaged;
    if elsewhere.is_empty() {
        // Two bits of one page are one damaged page; no plan has so many flips that this says nothing.
        if migrated && pages > 0 && damaged == 0 {
            world.violation(format!(
                "{pages} bits were flipped in pages, and none was found"
            ));
        }
        return;
    }
    let named = |channel: ChannelRef| {
        let ours = attempt.sent.error.as_ref().map(tx::Error::channel);
        let theirs = attempt.received.error.as_ref().map(rx::Error::channel);
        ours == Some(channel) || theirs == Some(channel)
    };
    // The first that is found ends it, so that of several only one can be asked for.
    let [flip] = elsewhere[..] else { return };
    let converged = attempt
        .sent
        .error
        .as_ref()
        .is_none_or(|error| !error.code().contains("converging"));
    // A migration that ended for another reason may have ended before the frame was read.
    if converged {
        // A source that finds its control channel damaged after the commit asks how it ended.
        let lost = attempt.sent.report.channels_lost > 0
            || attempt.received.report.refused > 0
            || attempt.sent.report.asked > 0;
        if migrated && !lost {
            let harmless = flip.from == Side::Destination && flip.kind == Some(Kind::Running);
            world.violation(format!(
                "{flip:?} was not found (harmless: {harmless}), the source migrated"
            ));
        } else if !migrated && !named(flip.channel) && !lost {
            let errors = (
                attempt.sent.error.as_ref().map(ToString::to_string),
                attempt.received.error.as_ref().map(ToString::to_string),
            );
            world.violation(format!("{flip:?} was not named: {errors:?}"));
        }
    }
}

fn is_flip(fault: Fault) -> bool {
    matches!(
        fault,
        Fault::FlipPage
            | Fault::FlipLaneHead
            | Fault::FlipForth
            | Fault::FlipBack
            | Fault::FlipHello
    )
}

/// Whether the guest is still at the source, so that it can be migrated after all.
pub(super) fn may_try_again(world: &World, attempt: &Attempt) -> bool {
    let ledger = world.summary().ledger;
    ledger.source_runs
        && !ledger.source_crashed
        && !ledger.destination_crashed
        && !ledger.commit_left
        && world.summary().violations.is_empty()
        && matches!(
            attempt.sent.report.outcome,
            tx::OutcomeKind::Failed | tx::OutcomeKind::Cancelled
        )
}

/// A second attempt, without faults, is correct (or does not converge, if it was told to say so).
pub(super) fn judge_second(world: &World, attempt: &Attempt) {
    let summary = world.summary();
    let stubborn = summary
        .happened
        .iter()
        .any(|(_, fault, _)| *fault == Fault::VmmRefuses);
    let code = attempt.sent.error.as_ref().map(tx::Error::code);
    match attempt.sent.report.outcome {
        tx::OutcomeKind::Migrated if summary.ledger.destination_runs => {}
        tx::OutcomeKind::Unknown | tx::OutcomeKind::Stranded
            if stubborn && !summary.ledger.source_runs => {}
        tx::OutcomeKind::Failed if stubborn || code.is_some_and(|c| c.contains("converg")) => {}
        outcome => world.violation(format!(
            "the second attempt ended with {outcome:?} {:?}",
            attempt.sent.error.as_ref().map(ToString::to_string)
        )),
    }
}
