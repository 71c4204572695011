//! Real migrations of the model machine through the impairment proxy, with what must hold afterwards.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::{Address, GuestMemory, Listener, TcpOptions};
use multifd_wire::{ChannelRef, LaneId, Phase};

use crate::flow::Place;
use crate::model::{DestinationMachine, Random, SourceMachine, differing_page, fill, memory};
use crate::proxy::{Direction, Flipped, Impairment, Proxy, Rule};

/// Small enough that a migration takes a moment, and large enough for several rounds.
const MEMORY_BYTES: u64 = 4 << 20;

/// Data channels of each migration.
pub const LANES: u32 = 2;

/// How a migration through the proxy went.
#[derive(Debug)]
pub struct Passage {
    /// How the source says that it ended.
    pub outcome: tx::OutcomeKind,
    /// The source's error, in words.
    pub error: Option<String>,
    /// The rules that were carried out.
    pub happened: Vec<Rule>,
    /// Bits that were flipped, and whether a report names them.
    pub flipped: Vec<(Flipped, bool)>,
    /// What must never be; empty if all is well.
    pub violations: Vec<String>,
}

/// Dozens of flipped bits: in the pages of every lane, and one elsewhere in two of three migrations.
#[must_use]
pub fn draw_flips(random: &mut Random) -> Vec<Rule> {
    let flip = |connection, direction, after| Rule {
        connection,
        direction,
        after,
        impairment: Impairment::Flip,
    };
    let mut rules: Vec<Rule> = (0..40)
        .map(|_| {
            // Behind the first heads; nearly everything there is content of pages.
            let connection = 1 + random.below(LANES.into()) as u32;
            flip(
                connection,
                Direction::Forth,
                10_000 + random.below(1_200_000),
            )
        })
        .collect();
    match random.below(3) {
        0 => rules.push(flip(0, Direction::Forth, random.below(1_500))),
        1 => rules.push(flip(0, Direction::Back, random.below(1_500))),
        _ => {}
    }
    rules.sort_by_key(|rule| (rule.connection, rule.after));
    rules.dedup_by_key(|rule| (rule.connection, rule.after));
    rules
}

/// Which flipped bits a report names, by channel and frame. One that the other side never read can't be in any: the first that ends the
/// migration may hide others, and so may a channel that was closed over another one.
fn named(flipped: &[Flipped], sent: &tx::Report, received: &rx::Report) -> Vec<(Flipped, bool)> {
    let channel = |flip: &Flipped| match flip.lane {
        Some(lane) => Some(ChannelRef::Lane(LaneId::new(lane)).to_string()),
        None if flip.connection == 0 && flip.place == Place::Hello => None,
        None => Some(ChannelRef::Control.to_string()),
    };
    let is_named = |flip: &Flipped| {
        let name = flip.place.name(flip.direction);
        match flip.direction {
            Direction::Forth => received
                .damaged
                .iter()
                .chain(&received.mismatched)
                .any(|d| d.frame == name && (d.channel == channel(flip) || name == "hello")),
            Direction::Back => sent.damaged.iter().any(|d| {
                d.frame == name
                    && (d.channel.is_none()
                        || flip.lane.is_some()
                        || d.channel == channel(flip)
                        || name == "hello_reply")
            }),
        }
    };
    flipped.iter().map(|flip| (*flip, is_named(flip))).collect()
}

/// One to three rules from a seed.
#[must_use]
pub fn draw(random: &mut Random) -> Vec<Rule> {
    let count = 1 + random.below(3);
    (0..count)
        .map(|_| {
            let connection = random.below(u64::from(LANES) + 1) as u32;
            let direction = if connection > 0 || random.below(2) == 0 {
                Direction::Forth
            } else {
                Direction::Back
            };
            // Hello, set-up, first round, later: each has its share.
            let most = match (connection, random.below(4)) {
                (0, 0) => 200,
                (0, _) => 3_000,
                (_, 0) => 600,
                (_, 1) => 100_000,
                _ => 3_000_000,
            };
            let impairment = match random.below(6) {
                0 => Impairment::Cut,
                1 => Impairment::Reset,
                2 => Impairment::Stall(Duration::from_millis(random.below(600))),
                3 => Impairment::Throttle(200_000 + random.below(4_000_000)),
                4 => Impairment::Flip,
                _ => Impairment::Truncate,
            };
            Rule {
                connection,
                direction,
                after: random.below(most),
                impairment,
            }
        })
        .collect()
}

/// Migrates a model machine over TCP through these rules, and says what is wrong afterwards.
///
/// # Panics
/// If there is no memory, port or thread.
#[must_use]
pub fn migrate(seed: u64, rules: Vec<Rule>) -> Passage {
    let ms = Duration::from_millis;
    let source_memory = memory(MEMORY_BYTES);
    fill(&source_memory, seed, 3);
    let machine = SourceMachine::start(source_memory.clone(), 1, 2_000, seed);
    let (source_running, state) = (Arc::clone(&machine.running), machine.state.clone());
    let destination = DestinationMachine::default();
    let (destination_memory, loaded, destination_running) = (
        Arc::clone(&destination.memory),
        Arc::clone(&destination.state),
        Arc::clone(&destination.running),
    );
    let listener = Listener::bind(
        &"127.0.0.1:0".parse().expect("an address"),
        &TcpOptions::default(),
    )
    .expect("a free port");
    let Address::Tcp(target) = listener.local_address().clone() else {
        unreachable!("bound to TCP")
    };
    let target = target.to_string().parse().expect("a socket address");
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners: vec![listener],
        config: rx::Config::builder()
            .hello_deadline(ms(600))
            .setup_deadline(ms(1_500))
            .stall(ms(400))
            .keep_alive(ms(100))
            .suspend(ms(1_500))
            .build()
            .expect("settings in their ranges"),
        spawner: None,
    })
    .expect("threads");
    let theirs = reception.handle();
    let proxy = Proxy::start(target, rules).expect("a proxy");
    let sources = vec![machine.source()];
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(machine),
        memory: source_memory.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address: proxy.address().into(),
            options: TcpOptions::default().into(),
        }),
        config: tx::Config::builder()
            .channels(LANES)
            .body_bytes(64 << 10)
            .hello_deadline(ms(600))
            .setup_deadline(ms(1_500))
            .stall(ms(400))
            .keep_alive(ms(100))
            .commit_deadline(ms(2_500))
            .reconnect_deadline(ms(1_200))
            .when_not_converging(tx::WhenNotConverging::Switch)
            .build()
            .expect("settings in their ranges"),
        spawner: None,
    })
    .expect("threads");
    let sent = migration.wait();
    if sent.error.is_some() && theirs.progress().phase == Phase::Hello {
        theirs.cancel();
    }
    let (happened, flipped) = (proxy.happened(), proxy.flipped());
    drop(proxy);
    let received = reception.wait();
    let mut violations = Vec::new();
    let (here, there) = (
        source_running.load(Ordering::SeqCst),
        destination_running.load(Ordering::SeqCst),
    );
    let outcome = sent.report.outcome;
    if here && there {
        violations.push("two owners".to_owned());
    }
    if !here && !there && outcome != tx::OutcomeKind::Unknown {
        violations.push(format!("the guest is lost: {outcome:?}"));
    }
    let expected = match outcome {
        tx::OutcomeKind::Migrated => !here && there,
        tx::OutcomeKind::Failed | tx::OutcomeKind::Cancelled => here && !there,
        // No guest of these says so.
        tx::OutcomeKind::Gone => false,
        tx::OutcomeKind::Unknown | tx::OutcomeKind::Stranded => !here,
        // An outcome of which this check knows nothing.
        _ => false,
    };
    if !expected {
        violations.push(format!(
            "{outcome:?}, says the source, but it runs {here}, the destination {there}"
        ));
    }
    if there != (received.report.outcome == rx::OutcomeKind::Running) {
        violations.push(format!(
            "{:?}, says the destination",
            received.report.outcome
        ));
    }
    if there {
        let destination_memory = destination_memory.lock().expect("no panics").clone();
        let differs = destination_memory.as_ref().map_or(Some((0, 0)), |memory| {
            differing_page(&source_memory, memory)
        });
        if let Some((region, page)) = differs {
            violations.push(format!(
                "the guest at the destination has another page {page} of region {region}: {}",
                difference(&source_memory, &destination_memory, region, page)
            ));
        }
        if loaded.lock().expect("no panics").as_ref() != Some(&state) {
            violations.push("the guest at the destination has another state".to_owned());
        }
    }
    let flipped = named(&flipped, &sent.report, &received.report);
    let only_flips = happened
        .iter()
        .all(|rule| rule.impairment == Impairment::Flip);
    let migrated = outcome == tx::OutcomeKind::Migrated;
    if only_flips && !flipped.is_empty() {
        // Where everything arrived, every page was looked at; where not, something was found that ended it.
        let in_pages = |flip: &Flipped| flip.place == Place::Body("PAGES");
        let missed = flipped
            .iter()
            .find(|(flip, named)| !named && in_pages(flip));
        if migrated && let Some((flip, _)) = missed {
            violations.push(format!(
                "{flip:?} was not named in {:?} or {:?}",
                received.report.damaged, received.report.mismatched
            ));
        }
        if !migrated && !flipped.iter().any(|(_, named)| *named) {
            violations.push(format!("it failed, and none of {flipped:?} was named"));
        }
    }
    Passage {
        flipped,
        outcome,
        error: sent.error.map(|error| error.to_string()),
        happened,
        violations,
    }
}

/// Which bytes of a page differ: a lost write shows as one word, a page that landed by half as a long piece.
fn difference(
    source: &GuestMemory,
    destination: &Option<GuestMemory>,
    region: u32,
    page: u64,
) -> String {
    let read = |memory: &GuestMemory| {
        let mut octets = vec![0u8; 4096];
        if let Ok(span) = memory.span(region, page * 4096, 4096) {
            span.copy_to(&mut octets);
        }
        octets
    };
    let Some(destination) = destination else {
        return "no memory at all".to_owned();
    };
    let (ours, theirs) = (read(source), read(destination));
    let differs: Vec<usize> = (0..4096).filter(|at| ours[*at] != theirs[*at]).collect();
    let zero = |octets: &[u8]| octets.iter().all(|octet| *octet == 0);
    format!(
        "{} bytes from {:?} to {:?}, zero at the source {}, at the destination {}",
        differs.len(),
        differs.first(),
        differs.last(),
        zero(&ours),
        zero(&theirs)
    )
}
