//! What must hold when a simulated migration is over, whatever happened in it.
//!
//! | promise | looked at |
//! |---|---|
//! | never two owners, none without COMMIT | by the world, whenever a VMM runs the guest |
//! | the guest at the destination is the guest | memory and state compared when it is started there |
//! | its devices are its devices, and run where it runs | by the world, at each call to a device; here at the end |
//! | the report tells the truth | here, against the ledger; of times in [`claims`] |
//! | a failed migration loses nothing | the guest runs at the source, the dirty set knows every page that differs |
//! | nobody calls an honest peer a liar | here, by the errors' codes |
//! | what need not fail does not | here, for plans of harmless faults |
//! | a damaged octet is found and named | here: the reports against the list of flipped bits that were read |
//! | it ends when its settings say, once nothing goes wrong any more | in [`claims`] |
//! | it ends, and leaves nothing behind | by the scheduler: simulated time is bounded, every thread has to end, and nobody may then hold a channel, a machine or a device |

use std::collections::{BTreeMap, BTreeSet};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_wire::Kind;

use super::faults::{Fault, Part, Side};
use super::world::{Summary, World};
use super::{Attempt, Settings, claims};
use super::{BY_PHASE, NEVER_READ};

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
        attempt.received().report.outcome,
        attempt
            .received()
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
    held(world, &summary, attempt, settings);
    honesty(world, &summary, attempt);
    success(world, &summary, attempt, settings);
    flips(world, &summary, attempt);
    claims::judge(world, &summary, attempt, settings);
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
            world.devices_stand_still();
        }
        tx::OutcomeKind::Failed | tx::OutcomeKind::Cancelled => {
            if !ledger.source_runs || ledger.destination_ran || ledger.commit_left {
                world.violation(format!("failed, says the source, but {ledger:?}"));
            }
            if error.is_none_or(|error| error.fault().to_string().is_empty()) {
                world.violation("failed, and does not say why");
            }
            world.devices_are_home();
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
            world.devices_stand_still();
        }
        // No guest of the simulator's says so.
        tx::OutcomeKind::Gone => world.violation("gone, says the source, and nobody told it"),
        tx::OutcomeKind::Unknown => {
            if ledger.source_runs || !(ledger.commit_left || ledger.disowned) {
                world.violation(format!("unknown, says the source, but {ledger:?}"));
            }
            world.devices_stand_still();
        }
        other => world.violation(format!("no outcome that the oracle knows: {other:?}")),
    }
}

fn destination(world: &World, summary: &Summary, attempt: &Attempt) {
    let ledger = &summary.ledger;
    match attempt.received().report.outcome {
        rx::OutcomeKind::Running => {
            if !ledger.destination_runs {
                world.violation(format!("running, says the destination, but {ledger:?}"));
            }
        }
        rx::OutcomeKind::Failed => {
            if ledger.destination_runs {
                world.violation(format!("failed, says the destination, but {ledger:?}"));
            }
            if attempt.received().error.is_none() {
                world.violation("failed at the destination, and does not say why");
            }
        }
        rx::OutcomeKind::Stranded => {
            let refused = summary.happened.iter().any(|(_, fault, _)| {
                matches!(
                    fault,
                    Fault::VmmRefuses | Fault::DeviceFails | Fault::ThreadHangs
                )
            });
            if ledger.destination_ran || !ledger.commit_left || !refused {
                world.violation(format!("stranded, says the destination, but {ledger:?}"));
            }
        }
        other => world.violation(format!("no outcome that the oracle knows: {other:?}")),
    }
}

/// A destination whose source died frees everything when its time is up; a source whose destination was restarted says so.
fn held(world: &World, summary: &Summary, attempt: &Attempt, settings: &Settings) {
    if let Some(held) = summary.held_ns
        && held > settings.holds_ns
    {
        world.violation(format!(
            "the destination held the machine for {} ms after its source had died, {} at most",
            held / 1_000_000,
            settings.holds_ns / 1_000_000
        ));
    }
    let code = attempt.sent.error.as_ref().map(tx::Error::code);
    if summary.must_say_lost
        && summary.happened.len() == 1
        && settings.must_converge
        && code != Some("sender.peer.session-lost")
    {
        world.violation(format!(
            "the destination was restarted, and the source says {code:?}"
        ));
    }
}

/// No side may accuse the other, as long as nobody forged or damaged what they said.
fn honesty(world: &World, summary: &Summary, attempt: &Attempt) {
    let damaged = summary.flips.iter().any(|flip| !flip.is_in_page());
    if summary.forged || damaged {
        return;
    }
    let codes = [
        attempt.sent.error.as_ref().map(tx::Error::code),
        attempt.received().error.as_ref().map(rx::Error::code),
    ];
    for code in codes.into_iter().flatten() {
        if accuses(code) {
            let errors = (
                attempt.sent.error.as_ref().map(ToString::to_string),
                attempt.received().error.as_ref().map(ToString::to_string),
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

/// Every flipped bit that the other side could find out is in its report, by channel and frame; and nothing else is.
///
/// A program that died reports nothing, and what was forged may look damaged.
fn flips(world: &World, summary: &Summary, attempt: &Attempt) {
    let crashed = summary.ledger.source_crashed || summary.ledger.destination_crashed;
    if crashed || summary.restarts > 0 || summary.forged {
        return;
    }
    // What else ends the migration may do so while a greeter still reads a hello, or a dialler its reply: it comes too late for the report.
    let alone = summary.happened.len() == 1;
    let stranger = summary
        .happened
        .iter()
        .any(|(_, fault, _)| *fault == Fault::Stranger);
    type Place = (Side, Option<String>, String);
    let mut seen = BTreeSet::new();
    // At least, and at most.
    let mut expected: BTreeMap<Place, (u64, u64)> = BTreeMap::new();
    for flip in summary.flips.iter().filter(|flip| flip.arrived) {
        let page = if flip.is_in_page() { flip.page } else { 0 };
        if !seen.insert((flip.link, flip.from, flip.number, flip.part, page)) {
            continue;
        }
        let channel = (flip.part != Part::Hello).then(|| flip.channel.to_string());
        let place = (flip.from, channel, flip.name().to_owned());
        let (least, most) = expected.entry(place).or_default();
        let of_hello = matches!(flip.part, Part::Hello | Part::Reply);
        *least += u64::from(!flip.repeated && (alone || !of_hello));
        *most += 1;
    }
    let reports = [
        (
            Side::Source,
            attempt
                .received()
                .report
                .damaged
                .iter()
                .chain(&attempt.received().report.mismatched)
                .map(|d| (&d.channel, &d.frame, d.count))
                .collect::<Vec<_>>(),
        ),
        (
            Side::Destination,
            attempt
                .sent
                .report
                .damaged
                .iter()
                .map(|d| (&d.channel, &d.frame, d.count))
                .collect(),
        ),
    ];
    let mut found: BTreeMap<Place, u64> = BTreeMap::new();
    for (from, report) in reports {
        for (channel, frame, count) in report {
            *found
                .entry((from, channel.clone(), frame.clone()))
                .or_default() += count;
        }
    }
    // A page that the guest wrote while it was sent does not match either, and a stranger may say anything.
    let torn = |place: &Place| place.2 == Kind::Pages.name() || (stranger && place.2 == "hello");
    for (place, (least, most)) in &expected {
        let most = if torn(place) { &u64::MAX } else { most };
        let count = found.remove(place).unwrap_or(0);
        if !(*least..=*most).contains(&count) {
            world.violation(format!(
                "{least} to {most} changes of {} on {:?} from {:?} had to be found and named, {count} were; flips: {:?}",
                place.2, place.1, place.0, summary.flips
            ));
        }
    }
    for (place, count) in found.into_iter().filter(|(place, _)| !torn(place)) {
        world.violation(format!(
            "{count} changes of {} on {:?} from {:?} were found, and there was none",
            place.2, place.1, place.0
        ));
    }
}

/// What came of each flipped bit, for the table: of which frame, in which part of it, and how it ended.
pub(super) fn fates_of_flips(world: &World, attempt: &Attempt) -> Vec<(String, u64)> {
    let summary = world.summary();
    let migrated = attempt.sent.report.outcome == tx::OutcomeKind::Migrated;
    let mut fates: BTreeMap<String, u64> = BTreeMap::new();
    for flip in &summary.flips {
        let kind = match flip.part {
            Part::Hello | Part::Reply => "",
            _ => flip.kind.map_or(Kind::Outcome.name(), Kind::name),
        };
        let end = match (flip.arrived, migrated) {
            (false, _) => NEVER_READ,
            (true, true) if flip.is_in_page() => "named; the page sent again; migrated",
            (true, true) => "named; the channel made anew; migrated",
            (true, false) => "named; migration failed, or its end unknown, and said why",
        };
        *fates
            .entry(format!("{kind}/{:?}/{end}", flip.part))
            .or_default() += 1;
    }
    let theirs = &attempt.received().report;
    for d in theirs.damaged.iter().chain(&theirs.mismatched) {
        *fates
            .entry(format!("{BY_PHASE}destination/{}/{}", d.phase, d.frame))
            .or_default() += d.count;
    }
    for d in &attempt.sent.report.damaged {
        *fates
            .entry(format!("{BY_PHASE}source/{}/{}", d.phase, d.frame))
            .or_default() += d.count;
    }
    fates.into_iter().collect()
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
        .any(|(_, fault, _)| matches!(fault, Fault::VmmRefuses | Fault::DeviceFails));
    let code = attempt.sent.error.as_ref().map(tx::Error::code);
    match attempt.sent.report.outcome {
        tx::OutcomeKind::Migrated if summary.ledger.destination_runs => {
            world.devices_stand_still();
        }
        tx::OutcomeKind::Unknown | tx::OutcomeKind::Stranded
            if stubborn && !summary.ledger.source_runs => {}
        // What it was told to give up for, if it takes too long.
        tx::OutcomeKind::Failed
            if stubborn
                || code.is_some_and(|c| c.contains("converg") || c.contains("ack-deadline")) =>
        {
            world.devices_are_home();
        }
        outcome => world.violation(format!(
            "the second attempt ended with {outcome:?} {:?}",
            attempt.sent.error.as_ref().map(ToString::to_string)
        )),
    }
}
