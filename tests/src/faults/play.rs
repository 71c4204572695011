//! One migration of the table: both programs are started, the moment is waited for, the fault is made and undone, and it is judged how
//! they ended.
//!
//! The rule it keeps: the moment is never slept for. It is a line that a program said, or one at which the destination stands still
//! until it is let go on (`--hold-at`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

use super::judge::{PAUSED, STARTED, Witness, judge};
use super::net::{End, Network};
use super::table::{Ending, Fault, Kind, Moment, Scenario};
use crate::impaired;
use crate::model::Random;
use crate::programs::{Ended, Launch, Process};
use crate::proxy::Proxy;

/// Both sides give a channel up when nothing moves on it for this long.
const STALL: Duration = Duration::from_millis(1500);

/// The same where nothing is to be given up: a kernel may take a second to find out that a link is back.
const LONG_STALL: Duration = Duration::from_secs(4);

/// A cut that nobody has to notice.
const SHORT: Duration = Duration::from_millis(200);

/// A cut that everybody notices.
const LONG: Duration = Duration::from_millis(2200);

/// How long a side waits for the other one that will not come back.
const IN_VAIN: Duration = Duration::from_millis(700);

/// How long it waits for one that will: bounds only how long a busy host may take.
const IN_HOPE: Duration = Duration::from_secs(30);

/// Longest time to any line that a program says without being disturbed, on a busy host.
const SOON: Duration = Duration::from_secs(20);

/// Longest time from the end of the fault to the end of a program: its deadlines and some seconds on a busy host.
const END_MAX: Duration = Duration::from_secs(45);

/// What a busy host may add to that.
const BUSY: Duration = Duration::from_secs(6);

/// Links between the namespaces.
const PATHS: usize = 2;

/// The port in the destination's namespace.
const PORT: u16 = 4444;

/// The line of the sender's log with which round 0 begins.
const READY: &str = "the destination is ready";

/// The line of the sender's log when a round has landed, at level debug.
const CLOSED: &str = "round closed";

/// The sender's line when all channels are lost.
const LINK_LOST: &str = "link lost: dialling again";

/// The receiver's line when the source has come back.
const BACK: &str = "the source is back";

/// The line of the receiver's log when a source said hello.
const HELLO: &str = "control channel open";

/// How one migration of the table went.
#[derive(Debug)]
pub struct Played {
    /// Its row.
    pub scenario: Scenario,
    /// Its seed.
    pub seed: u64,
    /// How long it took.
    pub took: Duration,
    /// How it ended.
    pub ending: Option<Ending>,
    /// Whether the fault was made in the moment that was meant.
    pub hit: bool,
    /// What must not be.
    pub violations: Vec<String>,
    /// What both sides said.
    pub words: String,
}

/// A place for migrations: namespaces if this host has them, a folder, certificates.
#[derive(Debug)]
pub struct Stage {
    network: Option<Network>,
    folder: PathBuf,
}

impl Stage {
    /// A place of its own; `name` tells several of one process apart.
    ///
    /// # Errors
    /// No folder, no certificate, or no namespaces although they are asked for.
    pub fn new(name: &str, namespaces: bool) -> anyhow::Result<Self> {
        let folder = format!("multifd-faults-{}-{name}", std::process::id());
        let stage = Self {
            network: namespaces.then(|| Network::new(name, PATHS)).transpose()?,
            folder: std::env::temp_dir().join(folder),
        };
        fs::create_dir_all(&stage.folder)?;
        certify(&stage.folder).context("certificates")?;
        Ok(stage)
    }

    /// The namespaces, if there are.
    #[must_use]
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// Plays a row with a seed.
    ///
    /// # Panics
    /// If the programs were not built.
    #[must_use]
    pub fn play(&self, scenario: Scenario, seed: u64) -> Played {
        let began = Instant::now();
        let mut play = Play::new(self, scenario, seed);
        let done = play.run();
        if let Err(error) = done {
            play.trouble.push(format!("{error:#}"));
        }
        play.end(began)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Files of an authority and of a destination's certificate that it signed.
fn certify(folder: &Path) -> anyhow::Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "faults");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    fs::write(folder.join("ca.pem"), authority.pem())?;
    let hosts = vec![
        "127.0.0.1".to_owned(),
        Network::address(0),
        Network::address(1),
    ];
    let mut params = CertificateParams::new(hosts)?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &authority)?;
    fs::write(folder.join("cert.pem"), certificate.pem())?;
    fs::write(folder.join("key.pem"), key.serialize_pem())?;
    Ok(())
}

/// A small disk. Gone when dropped.
struct Disk(PathBuf);

impl Disk {
    fn new(folder: &Path, size: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let size = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "multifd-faults"])
            .arg(folder)
            .status()?;
        anyhow::ensure!(mounted.success(), "no small disk at {}", folder.display());
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A migration of the table that is under way.
struct Play<'s> {
    stage: &'s Stage,
    scenario: Scenario,
    seed: u64,
    random: Random,
    /// In the namespaces, or on loopback.
    network: Option<&'s Network>,
    /// Where the source dials the control channel and its lanes.
    addresses: Vec<String>,
    source: Option<(Process, bool)>,
    destinations: Vec<(Process, bool)>,
    disk: Option<Disk>,
    proxy: Option<Proxy>,
    /// When the links were made bad for good.
    struck: Option<Instant>,
    hit: bool,
    trouble: Vec<String>,
}

impl<'s> Play<'s> {
    fn new(stage: &'s Stage, scenario: Scenario, seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0xFA17);
        let fault = scenario.fault;
        let links = scenario.kind != Kind::Unix && fault != Fault::Proxied;
        let inside = links && (fault.needs_root() || random.below(2) == 0);
        Self {
            stage,
            scenario,
            seed,
            random,
            network: stage.network.as_ref().filter(|_| inside),
            addresses: Vec::new(),
            source: None,
            destinations: Vec::new(),
            disk: None,
            proxy: None,
            struck: None,
            hit: true,
            trouble: Vec::new(),
        }
    }

    fn run(&mut self) -> anyhow::Result<()> {
        use Fault::*;
        let (fault, moment) = (self.scenario.fault, self.scenario.moment);
        let by_line = moment == Moment::Switchover && self.random.below(2) == 0;
        let hold = match moment {
            _ if fault.is_from_the_beginning() => None,
            Moment::SetUp => Some("prepare"),
            Moment::Switchover if !by_line => Some("load"),
            Moment::Commit => Some("resume"),
            Moment::AfterCommit => Some("running"),
            _ => None,
        };
        if matches!(fault, DiskFullSource | DiskFullDestination) {
            let size = format!("{}k", 4 + 4 * self.random.below(6));
            self.disk = Some(Disk::new(&self.stage.folder.join("disk"), &size)?);
        }
        if !self.start_destination(hold)? {
            return Ok(());
        }
        self.start_source()?;
        if fault.is_from_the_beginning() {
            return Ok(());
        }
        let source = &self.source.as_ref().context("a source")?.0;
        let destination = &self.destinations.last().context("a destination")?.0;
        let reached = match (hold, moment) {
            (Some(hold), _) => destination.wait_for_line_within(&format!("held at {hold}"), SOON),
            (None, Moment::FirstRound) => source.wait_for_line_within(READY, SOON),
            (None, Moment::LaterRounds) => source.wait_for_line_within(CLOSED, SOON),
            (None, _) => source.wait_for_line_within(PAUSED, SOON),
        };
        if reached.is_none() {
            bail!("{moment:?} was never reached, and nothing had been done");
        }
        self.strike()
    }

    /// Whether what was to be hit was still going on.
    fn note_hit(&mut self) {
        let said =
            |process: Option<&(Process, bool)>, text| process.is_some_and(|(p, _)| p.said(text));
        self.hit = !match self.scenario.moment {
            Moment::FirstRound => said(self.source.as_ref(), CLOSED),
            Moment::LaterRounds => said(self.source.as_ref(), PAUSED),
            Moment::Switchover | Moment::Devices => said(self.destinations.last(), STARTED),
            // Held.
            Moment::SetUp | Moment::Commit | Moment::AfterCommit => false,
        };
    }

    fn release(&mut self) {
        for (destination, _) in &mut self.destinations {
            destination.release();
        }
    }

    /// Makes the fault and undoes it. A destination that is held goes on before or after the fault is undone.
    fn strike(&mut self) -> anyhow::Result<()> {
        use Fault::*;
        let early = self.random.below(2) == 0;
        let end = if self.random.below(2) == 0 {
            End::Source
        } else {
            End::Destination
        };
        let network = self.network;
        let network = || network.context("this needs namespaces");
        let lasts = match self.scenario.fault {
            ShortCut => {
                network()?.take_all_down(end)?;
                SHORT
            }
            LongCut | BackKillSource | BackKillDestination => {
                network()?.take_all_down(end)?;
                LONG
            }
            LastingCut | CutKillSource | CutKillDestination => {
                network()?.take_all_down(end)?;
                Duration::ZERO
            }
            PathCut => {
                network()?.take_down(end, 1)?;
                Duration::ZERO
            }
            PathGone => {
                network()?.take_down(end, 1)?;
                network()?.reset_connections(end)?;
                Duration::ZERO
            }
            SlowLink => {
                network()?.slow_down()?;
                Duration::ZERO
            }
            AddressGone => {
                network()?.take_addresses(end)?;
                LONG
            }
            Blackhole => {
                network()?.blackhole(end)?;
                LONG
            }
            Reset => {
                network()?.reset_connections(end)?;
                Duration::ZERO
            }
            OneWay => {
                network()?.blackhole(end)?;
                Duration::ZERO
            }
            OneWayPath => {
                network()?.blackhole_path(end, 1)?;
                Duration::ZERO
            }
            LargeLost => {
                (0..PATHS).try_for_each(|path| network()?.lose_large(path))?;
                Duration::ZERO
            }
            LargeLostPath => {
                network()?.lose_large(1)?;
                Duration::ZERO
            }
            NoDescriptorsSource => return self.without_descriptors(End::Source),
            NoDescriptorsDestination => return self.without_descriptors(End::Destination),
            KillSource => {
                self.kill_source();
                Duration::ZERO
            }
            KillDestination => {
                self.kill_destination();
                Duration::ZERO
            }
            ReplaceDestination | RestartDestination => {
                self.kill_destination();
                self.note_hit();
                self.start_destination(None)?;
                return Ok(());
            }
            StopSource => {
                self.source()?.stand_still();
                LONG
            }
            StopDestination => {
                self.destination()?.stand_still();
                LONG
            }
            _ => bail!("this fault is there from the beginning"),
        };
        self.struck = Some(Instant::now());
        self.note_hit();
        if early || lasts.is_zero() {
            self.release();
        }
        std::thread::sleep(lasts);
        self.undo()?;
        self.release();
        Ok(())
    }

    fn undo(&mut self) -> anyhow::Result<()> {
        use Fault::*;
        match self.scenario.fault {
            // Until the end, which the source finds by itself.
            LastingCut | PathCut | PathGone | SlowLink | Reset | KillSource | KillDestination
            | OneWay | OneWayPath | LargeLost | LargeLostPath => {}
            StopSource => self.source()?.go_on(),
            StopDestination => self.destination()?.go_on(),
            CutKillSource | CutKillDestination => {
                if self
                    .source()?
                    .wait_for_line_within(LINK_LOST, SOON)
                    .is_none()
                {
                    self.hit = false;
                }
                self.kill_one_side();
                self.restore()?;
            }
            BackKillSource | BackKillDestination => {
                self.restore()?;
                if self
                    .destination()?
                    .wait_for_line_within(BACK, SOON)
                    .is_none()
                {
                    self.hit = false;
                }
                self.kill_one_side();
                // It may be over already.
                self.hit &= !self.destination()?.said(STARTED);
            }
            _ => self.restore()?,
        }
        Ok(())
    }

    /// Takes the right to open descriptors away, then all connections, and gives it back.
    fn without_descriptors(&mut self, whose: End) -> anyhow::Result<()> {
        let process = match whose {
            End::Source => self.source()?,
            End::Destination => self.destination()?,
        };
        let before = process.limit_descriptors(3);
        let network = self.network.context("this needs namespaces")?;
        network.reset_connections(whose)?;
        self.note_hit();
        self.release();
        std::thread::sleep(SHORT);
        let process = match whose {
            End::Source => self.source()?,
            End::Destination => self.destination()?,
        };
        if let Some(before) = before {
            let _ = process.limit_descriptors(before);
        }
        Ok(())
    }

    fn kill_one_side(&mut self) {
        use Fault::*;
        match self.scenario.fault {
            CutKillSource | BackKillSource => self.kill_source(),
            _ => self.kill_destination(),
        }
    }

    fn restore(&self) -> anyhow::Result<()> {
        self.network.map_or(Ok(()), Network::restore)
    }

    fn source(&self) -> anyhow::Result<&Process> {
        Ok(&self.source.as_ref().context("a source")?.0)
    }

    fn destination(&self) -> anyhow::Result<&Process> {
        Ok(&self.destinations.last().context("a destination")?.0)
    }

    fn kill_source(&mut self) {
        if let Some((source, killed)) = &mut self.source {
            source.kill();
            *killed = true;
        }
    }

    fn kill_destination(&mut self) {
        if let Some((destination, killed)) = self.destinations.last_mut() {
            destination.kill();
            *killed = true;
        }
    }

    fn stall(&self) -> String {
        let stall = match self.scenario.fault {
            Fault::ShortCut | Fault::SlowLink | Fault::PathCut => LONG_STALL,
            _ => STALL,
        };
        format!("{}ms", stall.as_millis())
    }

    /// Whether this side waits for one that will not come back.
    fn patience(&self) -> String {
        use Fault::*;
        let in_vain = matches!(
            self.scenario.fault,
            LastingCut
                | OneWay
                | LargeLost
                | KillDestination
                | KillSource
                | ReplaceDestination
                | CutKillDestination
                | CutKillSource
                | BackKillDestination
                | BackKillSource
                | FewDescriptorsSource
                | FewDescriptorsDestination
                | LittleMemory
                | Proxied
        );
        // The way back has to be found before the other side is killed on it.
        let back = matches!(self.scenario.fault, BackKillDestination | BackKillSource);
        let time = match (in_vain, back) {
            (true, true) => 3 * IN_VAIN,
            (true, false) => IN_VAIN,
            (false, _) => IN_HOPE,
        };
        format!("{}ms", time.as_millis())
    }

    /// How long the source may take to end when the links are bad for good: both notice it within a stall, and wait for one another as long
    /// as they were told. Twice, since the last thing that arrived may have come in between.
    fn ends_within(&self) -> Option<Duration> {
        let lasting = matches!(self.scenario.fault, Fault::OneWay | Fault::LargeLost);
        lasting.then_some(2 * (STALL + IN_VAIN) + BUSY)
    }

    fn limits(&mut self, whose: End) -> Vec<String> {
        let limit = match (self.scenario.fault, whose) {
            (Fault::FewDescriptorsSource, End::Source)
            | (Fault::FewDescriptorsDestination, End::Destination) => {
                format!("ulimit -n {}", 8 + self.random.below(24))
            }
            (Fault::LittleMemory, End::Destination) => {
                format!("ulimit -v {}", 60_000 + self.random.below(400_000))
            }
            _ => return Vec::new(),
        };
        let script = format!("{limit}; exec \"$@\"");
        ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
    }

    /// Starts a destination; says whether it came up. One that takes another's place has its address.
    fn start_destination(&mut self, hold: Option<&str>) -> anyhow::Result<bool> {
        let folder = self.stage.folder.clone();
        let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let first = self.addresses.is_empty();
        let listen = match (self.scenario.kind, self.network) {
            (Kind::Unix, _) => format!("unix:{}", file("socket")),
            (kind, Some(_)) => format!("{}:0.0.0.0:{PORT}", name(kind)),
            (kind, None) if first => format!("{}:127.0.0.1:0", name(kind)),
            (_, None) => self.addresses[0].clone(),
        };
        let (stall, patience) = (self.stall(), self.patience());
        let (cert, key) = (file("cert.pem"), file("key.pem"));
        let mut arguments = vec![
            "--listen",
            &listen,
            "--report",
            "json",
            "--run-for",
            "30ms",
            "--one-attempt",
            "--stall",
            &stall,
            "--suspend",
            &patience,
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
            "--tls-any-source",
            "--clear-text",
        ];
        if let Some(hold) = hold {
            arguments.extend(["--hold-at", hold]);
        }
        let mut launch = Launch::new("multifd-receive")
            .arguments(&arguments)
            .log("info");
        if let Some(network) = self.network {
            launch = launch.by(&network.inside(End::Destination));
        }
        launch = launch.by(&self.limits(End::Destination)).held();
        let log = folder.join("disk/destination.log");
        let mute = self.scenario.fault == Fault::DiskFullDestination;
        if mute {
            launch = launch.log("trace").output(File::create(&log)?);
        }
        let process = launch.start();
        let said = if mute {
            first_line(&log)
        } else {
            process.wait_for_line_within("listening on ", SOON)
        };
        let up = said.is_some();
        if let (true, Some(said)) = (first, said) {
            self.addresses = self.seen_from_the_source(&said)?;
        }
        self.destinations.push((process, false));
        Ok(up)
    }

    /// Where the source finds a destination that said this; by way of the proxy if there is one.
    fn seen_from_the_source(&mut self, said: &str) -> anyhow::Result<Vec<String>> {
        let said = said.trim_start_matches("listening on ").to_owned();
        let kind = name(self.scenario.kind);
        if self.network.is_some() {
            let place = |path| format!("{kind}:{}:{PORT}", Network::address(path));
            return Ok((0..PATHS).map(place).collect());
        }
        if self.scenario.fault == Fault::Proxied {
            let target = said.rsplit_once("127.0.0.1").context("on loopback")?.1;
            let target = format!("127.0.0.1{target}").parse()?;
            let proxy = Proxy::start(target, impaired::draw(&mut self.random))?;
            let address = format!("{kind}:{}", proxy.address());
            self.proxy = Some(proxy);
            return Ok(vec![address]);
        }
        Ok(vec![said])
    }

    fn start_source(&mut self) -> anyhow::Result<()> {
        let seed = self.seed.to_string();
        let (stall, patience) = (self.stall(), self.patience());
        let authority = self
            .stage
            .folder
            .join("ca.pem")
            .to_string_lossy()
            .into_owned();
        let tracking = ["auto", "marks", "process"][self.random.below(3) as usize];
        let channels = ["2", "3", "4"][self.random.below(3) as usize];
        let addresses = self.addresses.clone();
        let control = addresses.first().context("an address")?;
        let mut arguments = vec![
            "--connect",
            control,
            "--report",
            "json",
            "--memory",
            "64M",
            "--working-set",
            "2M",
            "--vcpus",
            "1",
            "--zero-percent",
            "95",
            "--dirty-rate",
            "5M",
            "--bandwidth",
            "12M",
            "--body",
            "64K",
            "--channels",
            channels,
            "--downtime-limit",
            "15ms",
            "--if-not-converging",
            "switch",
            "--max-rounds",
            "12",
            "--warm-up",
            "20ms",
            "--tracking",
            tracking,
            "--seed",
            &seed,
            "--stall",
            &stall,
            "--reconnect-deadline",
            &patience,
            "--tls-ca",
            &authority,
            "--clear-text",
        ];
        for address in &addresses {
            arguments.extend(["--data", address]);
        }
        if self.scenario.devices {
            // Stopped, it takes some tenths of a second to load.
            arguments.extend([
                "--device",
                "model:name=nic0,size=1M,initial=256K,growth=64K,write=4M,config=4K",
            ]);
        }
        if self.scenario.fault == Fault::RestartDestination {
            arguments.push("--restart-if-lost");
        }
        let mut launch = Launch::new("multifd-send")
            .arguments(&arguments)
            .log("info,multifd_sender=debug");
        if let Some(network) = self.network {
            launch = launch.by(&network.inside(End::Source));
        }
        launch = launch.by(&self.limits(End::Source));
        if self.scenario.fault == Fault::DiskFullSource {
            let log = self.stage.folder.join("disk/source.log");
            launch = launch.log("trace").output(File::create(log)?);
        }
        self.source = Some((launch.start(), false));
        Ok(())
    }

    /// Waits for both ends, and judges.
    fn end(mut self, began: Instant) -> Played {
        let mut words = String::new();
        let mut violations = std::mem::take(&mut self.trouble);
        let fault = self.scenario.fault;
        let mut witness = |ended: Result<Ended, String>,
                           killed,
                           mute,
                           violations: &mut Vec<String>| match ended {
            Ok(ended) => {
                words.push_str(&format!("{ended}\n\n"));
                Some(Witness {
                    ended,
                    killed,
                    mute,
                })
            }
            Err(what) => {
                words.push_str(&format!("{what}\n\n"));
                violations.push(format!("HANG: not over {END_MAX:?} after the fault"));
                None
            }
        };
        self.release();
        let begun = self.source.is_some();
        let source = self.source.take().and_then(|(process, killed)| {
            let mute = fault == Fault::DiskFullSource;
            witness(process.end_within(END_MAX), killed, mute, &mut violations)
        });
        let took = self
            .struck
            .map_or(Duration::ZERO, |struck| struck.elapsed());
        if let Some(longest) = self.ends_within()
            && took > longest
        {
            violations.push(format!(
                "LATE: over {took:?} after the fault, and not within {longest:?}"
            ));
        }
        // The way stays as it is while the source goes, and is free again for the destination's last words.
        drop(self.proxy.take());
        let mut destinations = Vec::new();
        for (mut process, killed) in std::mem::take(&mut self.destinations) {
            let mute = fault == Fault::DiskFullDestination;
            // Nobody has come, and nobody will.
            if !mute && !process.said(HELLO) && !process.is_over() {
                process.interrupt();
            }
            destinations.extend(witness(
                process.end_within(END_MAX),
                killed,
                mute,
                &mut violations,
            ));
        }
        if fault.needs_namespaces()
            && let Some(network) = self.network
            && let Err(error) = network.restore()
        {
            violations.push(format!("the links are not as they were: {error:#}"));
        }
        let mut ending = None;
        if violations.is_empty() {
            let source = source.as_ref().filter(|_| begun);
            let verdict = judge(source, &destinations);
            ending = verdict.ending;
            violations.extend(verdict.violations);
            let allowed = self.scenario.endings();
            // A switchover that is not held may be over between the line and the fault.
            let sure =
                self.hit && !matches!(self.scenario.moment, Moment::Switchover | Moment::Devices);
            let committed = fault.endings(Moment::Commit);
            if let Some(ending) = ending
                && self.hit
                && !allowed.contains(&ending)
                && (sure || !committed.contains(&ending))
            {
                violations.push(format!(
                    "it ended as {ending:?}, and not as one of {allowed:?}"
                ));
            }
        }
        Played {
            scenario: self.scenario,
            seed: self.seed,
            took: began.elapsed(),
            ending,
            hit: self.hit,
            violations,
            words,
        }
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Tcp => "tcp",
        Kind::Tls => "tls",
        Kind::Unix => "unix",
    }
}

/// What a program wrote first into a file, when it is there.
fn first_line(log: &Path) -> Option<String> {
    let until = Instant::now() + SOON;
    while Instant::now() < until {
        let text = fs::read_to_string(log).unwrap_or_default();
        if let Some(line) = text.lines().find(|line| line.contains("listening on ")) {
            return Some(line.to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
}
