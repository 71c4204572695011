//! Blackout of devices against the wire time of their state, over a link of a known rate and over loopback.
//!
//! ```text
//! cargo bench -p multifd-tests --bench device -- [--json | --markdown] [--short] [--rounds N] [--rate MBIT] [--channels 1,2,4,8] [--devices 1,2,4,8]
//!     [--size MIB] [--large MIB] [--only shaped,loopback,slow,initial] [--chunk KIB] [--window KIB]
//! ```
//! *Ours* is a whole migration of a machine with model devices by the real source and destination, in two network namespaces; its
//! memory is small and idle. The *blackout* goes from the paused guest until the source knows that the last device is loaded, the
//! *downtime* from the pause until the guest runs at the destination. The *wire time* is the devices' bytes divided by what a bare
//! socket loop with as many connections carried a moment before. *One stream* is the common way, in the same run: state read whole
//! into one buffer, sent over one connection, then loaded. Medians over the rounds; each ratio is the median of the ratios of neighbours.
//!
//! *slow*: devices that are read at a tenth of the link; N of them should take the time of one. *initial*: a device that is read
//! while the guest runs, with acknowledgement, against the same device without that.
//!
//! Needs root, `ip` and `tc` for the shaped link; without them it says so and measures loopback only.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program's business

mod link;
mod plain;

use std::cell::RefCell;
use std::time::Duration;

use link::{Cleared, Link};
use multifd_guest::DeviceConfig;
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_sender::report::DeviceDowntime;
use multifd_tests::devices::Plan;
use serde_json::{Value, json};

#[derive(Debug)]
struct Settings {
    form: Form,
    /// The table of the row that was printed last.
    printed: RefCell<String>,
    rounds: usize,
    rate_mbit: u64,
    channels: Vec<u32>,
    devices: Vec<usize>,
    size_mib: u64,
    large_mib: u64,
    slow_mib: u64,
    bare_mib: usize,
    chunk: Option<u64>,
    window: Option<u64>,
    only: Vec<String>,
}

/// How rows are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// In words, a line each.
    Words,
    /// An object a line.
    Json,
    /// As tables for docs/measurements/device.md.
    Markdown,
}

impl Settings {
    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == part)
    }
}

/// What one migration said of its devices.
#[derive(Debug, Clone, Copy)]
struct Figure {
    bytes: u64,
    blackout_ms: f64,
    downtime_ms: f64,
    parts: DeviceDowntime,
    commit_ms: f64,
}

fn main() {
    let settings = settings();
    // Rates are measured from memory that is backed already.
    let mut octets = vec![0x5a; settings.bare_mib << 20];
    let shaped = match Link::shaped(settings.rate_mbit) {
        Ok(link) => Some(Cleared(link)),
        Err(error) => {
            eprintln!("no shaped link, loopback only: {error:#}");
            None
        }
    };
    let (read, write) = plain::device_rates(&config(0, settings.size_mib << 20), 256 << 10);
    print(
        &settings,
        json!({ "table": "device alone", "read_mib_s": mib(read), "write_mib_s": mib(write) }),
    );
    if let Some(Cleared(link)) = &shaped {
        if settings.wants("shaped") {
            sizes(&settings, link, &mut octets);
        }
        if settings.wants("slow") {
            slow(&settings, link, &mut octets);
        }
        if settings.wants("initial") {
            initial(&settings, link);
        }
    }
    if settings.wants("loopback") {
        sizes(&settings, &Link::loopback(), &mut octets);
    }
}

fn settings() -> Settings {
    let mut s = Settings {
        form: Form::Words,
        printed: RefCell::default(),
        rounds: 3,
        rate_mbit: 4000,
        channels: vec![1, 2, 4, 8],
        devices: vec![1, 2, 4, 8],
        size_mib: 100,
        large_mib: 2048,
        slow_mib: 24,
        bare_mib: 256,
        chunk: None,
        window: None,
        only: Vec::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        let numbers = |list: String| -> Vec<u32> {
            let each = list.split(',').map(|n| n.parse().expect("a number"));
            each.collect()
        };
        match arg.as_str() {
            "--json" => s.form = Form::Json,
            "--markdown" => s.form = Form::Markdown,
            "--short" => {
                (s.rounds, s.channels, s.devices) = (1, vec![1, 4], vec![1, 4]);
                (s.large_mib, s.slow_mib, s.bare_mib) = (256, 8, 128);
            }
            "--rounds" => s.rounds = value().parse().expect("a number"),
            "--rate" => s.rate_mbit = value().parse().expect("Mbit/s"),
            "--channels" => s.channels = numbers(value()),
            "--devices" => s.devices = numbers(value()).iter().map(|n| *n as usize).collect(),
            "--size" => s.size_mib = value().parse().expect("MiB"),
            "--large" => s.large_mib = value().parse().expect("MiB"),
            "--chunk" => s.chunk = Some(value().parse::<u64>().expect("KiB") << 10),
            "--window" => s.window = Some(value().parse::<u64>().expect("KiB") << 10),
            "--only" => s.only = value().split(',').map(str::to_owned).collect(),
            // What `cargo bench` passes to every harness.
            "--bench" => {}
            other => {
                panic!("unknown argument {other}; see the head of tests/benches/device/main.rs")
            }
        }
    }
    s
}

fn config(number: usize, bytes: u64) -> DeviceConfig {
    let mut config = DeviceConfig::new(&format!("d{number}"), bytes);
    (config.seed, config.config) = (number as u64 + 1, 4096);
    config
}

/// A whole migration of these devices.
fn migrate(settings: &Settings, link: &Link, devices: &[DeviceConfig], channels: u32) -> Figure {
    let mut plan = Plan::new(&[]);
    plan.source = devices.to_vec();
    plan.destination = devices.to_vec();
    plan.destination
        .iter_mut()
        .for_each(|config| config.read = 0);
    let mut source = tx::Config::builder()
        .channels(channels)
        // What is predicted is not what is measured here.
        .downtime_limit(Duration::from_secs(600));
    if let Some(chunk) = settings.chunk {
        source = source.device_chunk_bytes(chunk);
    }
    plan.config = source.build().expect("within the limits");
    if let Some(window) = settings.window {
        let destination = rx::Config::builder().device_window_bytes(window);
        plan.receiver = destination.build().expect("within the limits");
    }
    plan.listener = Some(link.listener());
    let from = link.duplicate();
    plan.dial = Some(Box::new(move |inner| from.dial(inner)));
    let done = plan.run();
    done.assert_migrated();
    let report = &done.sent.report;
    let downtime = report.downtime.expect("it migrated");
    let parts = downtime.devices.expect("it has devices");
    let bytes = report
        .devices
        .iter()
        .map(|d| d.stop_copy_bytes + d.config_bytes);
    Figure {
        bytes: bytes.sum(),
        blackout_ms: parts.quiesce_ms
            + parts.stop_ms
            + parts.read_ms
            + parts.wire_ms
            + parts.load_ms,
        downtime_ms: report.downtime_ms.expect("it migrated"),
        parts,
        commit_ms: downtime.commit_ms,
    }
}

/// Devices that are faster than the link: blackout against wire time.
fn sizes(settings: &Settings, link: &Link, octets: &mut [u8]) {
    let mut sets: Vec<(usize, u64)> = settings
        .devices
        .iter()
        .map(|n| (*n, settings.size_mib))
        .collect();
    sets.push((1, settings.large_mib));
    for channels in &settings.channels {
        for (count, size_mib) in &sets {
            let devices: Vec<_> = (0..*count).map(|i| config(i, size_mib << 20)).collect();
            let (mut rates, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
            for round in 0..settings.rounds {
                rates.push(plain::bare_rate(link, octets, *channels as usize));
                ours.push(migrate(settings, link, &devices, *channels));
                // Once is enough for what takes many seconds.
                if round == 0 || *size_mib <= settings.size_mib {
                    theirs.push(plain::one_stream(link, &devices).as_secs_f64() * 1e3);
                }
            }
            let wire = |f: &Figure, rate: &f64| f.bytes as f64 / rate * 1e3;
            let ratios = |of: fn(&Figure) -> f64| {
                let pairs = ours.iter().zip(&rates);
                median(pairs.map(|(f, rate)| of(f) / wire(f, rate)).collect())
            };
            let pairs = ours.iter().zip(&rates);
            let mut row = json!({
                "table": "blackout", "link": link.name(), "channels": channels, "devices": count, "mib_each": size_mib,
                "link_mib_s": mib(median(rates.clone())),
                "wire_ms": one(median(pairs.map(|(f, rate)| wire(f, rate)).collect())),
                "blackout_ms": one(middle(&ours, |f| f.blackout_ms)),
                "ratio": three(ratios(|f| f.blackout_ms)),
                "downtime_ms": one(middle(&ours, |f| f.downtime_ms)),
                "downtime_ratio": three(ratios(|f| f.downtime_ms)),
                "one_stream_ms": one(median(theirs.clone())),
                "one_stream_ratio": three(median(
                    theirs.iter().zip(ours.iter().zip(&rates)).map(|(ms, (f, rate))| ms / wire(f, rate)).collect(),
                )),
            });
            row["parts"] = parts(&ours);
            print(settings, row);
        }
    }
}

/// Devices that are read at a tenth of the link: N take the time of one.
fn slow(settings: &Settings, link: &Link, octets: &mut [u8]) {
    let channels = 4;
    let rate = plain::bare_rate(link, octets, 4);
    let made = |count: usize| -> Vec<DeviceConfig> {
        let device = |i| DeviceConfig {
            read: (rate / 10.0) as u64,
            ..config(i, settings.slow_mib << 20)
        };
        (0..count).map(device).collect()
    };
    let mut single = Vec::new();
    for count in &settings.devices {
        let (mut ours, mut ratios, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..settings.rounds {
            single.push(migrate(settings, link, &made(1), channels).blackout_ms);
            let figure = migrate(settings, link, &made(*count), channels);
            ratios.push(figure.blackout_ms / single[single.len() - 1]);
            ours.push(figure);
            theirs.push(plain::one_stream(link, &made(*count)).as_secs_f64() * 1e3);
        }
        let mut row = json!({
            "table": "slow devices", "link": link.name(), "channels": channels, "devices": count,
            "mib_each": settings.slow_mib, "read_mib_s": mib(rate / 10.0),
            "blackout_ms": one(middle(&ours, |f| f.blackout_ms)),
            "of_one_device": three(median(ratios)),
            "one_stream_ms": one(median(theirs)),
        });
        row["parts"] = parts(&ours);
        print(settings, row);
    }
}

/// Initial bytes that are loaded and acknowledged while the guest runs, against none.
fn initial(settings: &Settings, link: &Link) {
    let bytes = settings.size_mib << 20;
    let without = DeviceConfig {
        growth: bytes / 20,
        ..config(0, bytes)
    };
    let with = without.clone().with_initial(bytes / 100 * 96);
    for channels in &settings.channels {
        let (mut plain, mut early) = (Vec::new(), Vec::new());
        for _ in 0..settings.rounds {
            plain.push(migrate(
                settings,
                link,
                std::slice::from_ref(&without),
                *channels,
            ));
            early.push(migrate(
                settings,
                link,
                std::slice::from_ref(&with),
                *channels,
            ));
        }
        let less = |of: fn(&Figure) -> f64| {
            let pairs = early.iter().zip(&plain);
            three(1.0 - median(pairs.map(|(e, p)| of(e) / of(p)).collect()))
        };
        let mut row = json!({
            "table": "initial bytes", "link": link.name(), "channels": channels, "mib": settings.size_mib,
            "initial_mib": with.initial >> 20,
            "downtime_without_ms": one(middle(&plain, |f| f.downtime_ms)),
            "downtime_with_ms": one(middle(&early, |f| f.downtime_ms)),
            "less": less(|f| f.downtime_ms),
            "mib_at_stop": one(middle(&early, |f| f.bytes as f64 / f64::from(1 << 20))),
        });
        row["parts"] = parts(&early);
        print(settings, row);
    }
}

/// Where the time goes, medians of each part.
fn parts(of: &[Figure]) -> Value {
    let part = |f: fn(&Figure) -> f64| one(middle(of, f));
    json!({
        "quiesce": part(|f| f.parts.quiesce_ms), "stop": part(|f| f.parts.stop_ms), "read": part(|f| f.parts.read_ms),
        "wire": part(|f| f.parts.wire_ms), "load": part(|f| f.parts.load_ms), "config": part(|f| f.parts.config_ms),
        "memory_tail": part(|f| f.parts.memory_tail_ms), "commit": part(|f| f.commit_ms),
    })
}

/// The columns of each table in print.
const COLUMNS: [(&str, &[&str]); 4] = [
    ("device alone", &["read_mib_s", "write_mib_s"]),
    (
        "blackout",
        &[
            "link",
            "channels",
            "devices",
            "mib_each",
            "link_mib_s",
            "wire_ms",
            "blackout_ms",
            "ratio",
            "downtime_ms",
            "downtime_ratio",
            "one_stream_ms",
            "one_stream_ratio",
            "parts",
        ],
    ),
    (
        "slow devices",
        &[
            "devices",
            "mib_each",
            "read_mib_s",
            "blackout_ms",
            "of_one_device",
            "one_stream_ms",
            "parts",
        ],
    ),
    (
        "initial bytes",
        &[
            "channels",
            "mib",
            "initial_mib",
            "mib_at_stop",
            "downtime_without_ms",
            "downtime_with_ms",
            "less",
            "parts",
        ],
    ),
];

fn print(settings: &Settings, row: Value) {
    if settings.form == Form::Json {
        println!("{row}");
        return;
    }
    let table = row["table"].as_str().unwrap_or_default();
    let columns = COLUMNS.iter().find(|(name, _)| *name == table);
    let columns = columns.map_or(&[][..], |(_, columns)| *columns);
    let cells: Vec<String> = columns.iter().map(|column| cell(&row[*column])).collect();
    if settings.form == Form::Words {
        let words: Vec<String> = columns
            .iter()
            .zip(cells)
            .map(|(column, cell)| format!("{column} {cell}"))
            .collect();
        println!("{table}: {}", words.join(", "));
        return;
    }
    if settings.printed.replace(table.to_owned()) != table {
        println!("\n| {} |", columns.join(" | "));
        println!("|{}", "---|".repeat(columns.len()));
    }
    println!("| {} |", cells.join(" | "));
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        // In the order of time.
        Value::Object(parts) => [
            "quiesce", "stop", "read", "wire", "load", "config", "commit",
        ]
        .iter()
        .filter_map(|part| Some(format!("{part} {}", parts.get(*part)?)))
        .collect::<Vec<_>>()
        .join(", "),
        other => other.to_string(),
    }
}

fn middle(of: &[Figure], f: impl Fn(&Figure) -> f64) -> f64 {
    median(of.iter().map(f).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn mib(octets: f64) -> f64 {
    (octets / f64::from(1 << 20)).round()
}

fn one(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn three(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
