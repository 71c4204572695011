//! Two network namespaces with several links between them, and what can happen to those links.
//!
//! ```text
//!   source's namespace                     destination's namespace
//!     a0  10.77.0.1/24 ───── veth ───── 10.77.0.2/24  b0      path 0: the control channel and half of the lanes
//!     a1  10.77.1.1/24 ───── veth ───── 10.77.1.2/24  b1      path 1: the other lanes
//! ```
//! Needs root, and `ip`, `tc` and `ss` of iproute2. The rule this file keeps: a namespace goes when its [`Network`] is dropped, and
//! its links with it; one that a killed run left is named after the process that made it, and
//! [`remove_stale`] takes it away.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// Names of our namespaces begin so.
const PREFIX: &str = "mfdfaults-";

/// Bytes a second that a slow link carries, for `tc`.
const SLOW: &str = "24mbit";

/// Octets of the largest packet that arrives where large ones are lost.
const SMALL_MTU: &str = "1400";

/// The usual size.
const MTU: &str = "1500";

/// Which end of the links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The source's.
    Source,
    /// The destination's.
    Destination,
}

/// What keeps this host from namespaces; `None` if nothing does.
#[must_use]
pub fn what_is_missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    for (program, flag) in [("ip", "-V"), ("tc", "-V"), ("ss", "-V")] {
        let started = Command::new(program)
            .arg(flag)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !started.is_ok_and(|status| status.success()) {
            return Some(format!("there is no `{program}` (package iproute2)"));
        }
    }
    Network::new("probe", 1)
        .err()
        .map(|error| format!("no network namespace can be made: {error:#}"))
}

/// Removes namespaces of processes that are gone.
pub fn remove_stale() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for name in entries.flatten().map(|entry| entry.file_name()) {
        let name = name.to_string_lossy();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if let Some(owner) = owner
            && !Path::new("/proc").join(owner).exists()
        {
            let _ = run(&["ip", "netns", "del", &name]);
        }
    }
}

/// Two namespaces and their links. Removed when dropped.
#[derive(Debug)]
pub struct Network {
    source: String,
    destination: String,
    paths: usize,
}

impl Network {
    /// Makes both namespaces, so many links, and their addresses; `name` tells several networks of one process apart.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new(name: &str, paths: usize) -> anyhow::Result<Self> {
        let id = std::process::id();
        let network = Self {
            source: format!("{PREFIX}{id}-{name}-a"),
            destination: format!("{PREFIX}{id}-{name}-b"),
            paths,
        };
        for namespace in [&network.source, &network.destination] {
            run(&["ip", "netns", "add", namespace])?;
            run(&["ip", "-n", namespace, "link", "set", "lo", "up"])?;
        }
        for path in 0..paths {
            let (near, far) = (link(End::Source, path), link(End::Destination, path));
            let (a, b) = (&network.source, &network.destination);
            run(&[
                "ip", "link", "add", &near, "netns", a, "type", "veth", "peer", "name", &far,
                "netns", b,
            ])?;
        }
        network.restore()?;
        Ok(network)
    }

    fn namespace(&self, end: End) -> &str {
        match end {
            End::Source => &self.source,
            End::Destination => &self.destination,
        }
    }

    /// How many links there are.
    #[must_use]
    pub fn paths(&self) -> usize {
        self.paths
    }

    /// Words before a program that let it run there.
    #[must_use]
    pub fn inside(&self, end: End) -> Vec<String> {
        let words = ["ip", "netns", "exec", self.namespace(end)];
        words.map(str::to_owned).to_vec()
    }

    /// The destination's address on a path.
    #[must_use]
    pub fn address(path: usize) -> String {
        host(End::Destination, path)
    }

    /// Takes one path down at one end.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn take_down(&self, end: End, path: usize) -> anyhow::Result<()> {
        self.set(end, path, "down")
    }

    /// Takes all paths down.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn take_all_down(&self, end: End) -> anyhow::Result<()> {
        (0..self.paths).try_for_each(|path| self.take_down(end, path))
    }

    /// Brings all paths up, at both ends.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn bring_up(&self) -> anyhow::Result<()> {
        for end in [End::Source, End::Destination] {
            (0..self.paths).try_for_each(|path| self.set(end, path, "up"))?;
        }
        Ok(())
    }

    fn set(&self, end: End, path: usize, state: &str) -> anyhow::Result<()> {
        run(&[
            "ip",
            "-n",
            self.namespace(end),
            "link",
            "set",
            &link(end, path),
            state,
        ])
    }

    /// Takes the addresses of one end away.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn take_addresses(&self, end: End) -> anyhow::Result<()> {
        (0..self.paths).try_for_each(|path| {
            run(&[
                "ip",
                "-n",
                self.namespace(end),
                "addr",
                "flush",
                "dev",
                &link(end, path),
            ])
        })
    }

    /// What is sent to the other end vanishes; what comes from there goes on coming.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn blackhole(&self, end: End) -> anyhow::Result<()> {
        (0..self.paths).try_for_each(|path| self.blackhole_path(end, path))
    }

    /// The same on one path.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn blackhole_path(&self, end: End, path: usize) -> anyhow::Result<()> {
        let other = match end {
            End::Source => End::Destination,
            End::Destination => End::Source,
        };
        let host = format!("{}/32", host(other, path));
        run(&[
            "ip",
            "-n",
            self.namespace(end),
            "route",
            "replace",
            "blackhole",
            &host,
        ])
    }

    /// Packets to the destination that are larger than `SMALL_MTU` vanish on a path; nobody is told, and new connections agree on the
    /// usual size all the same.
    ///
    /// # Errors
    /// What `ip` or `tc` says.
    pub fn lose_large(&self, path: usize) -> anyhow::Result<()> {
        let (near, far) = (link(End::Source, path), link(End::Destination, path));
        let destination = self.namespace(End::Destination);
        run(&[
            "ip",
            "-n",
            destination,
            "link",
            "set",
            &far,
            "mtu",
            SMALL_MTU,
        ])?;
        self.route(End::Destination, path, &["advmss", "1460"])?;
        // A packet that stands for many goes through uncut; this queue cuts it.
        run(&[
            "tc",
            "-n",
            &self.source,
            "qdisc",
            "replace",
            "dev",
            &near,
            "root",
            "tbf",
            "rate",
            "1gbit",
            "burst",
            "2kb",
            "latency",
            "50ms",
        ])
    }

    /// The route to the other end of a path, with more about it.
    fn route(&self, end: End, path: usize, more: &[&str]) -> anyhow::Result<()> {
        let (net, own) = (format!("10.77.{path}.0/24"), host(end, path));
        let name = link(end, path);
        let fixed = [
            "ip",
            "-n",
            self.namespace(end),
            "route",
            "replace",
            &net,
            "dev",
            &name,
            "proto",
            "kernel",
            "scope",
            "link",
            "src",
            &own,
        ];
        run(&[&fixed, more].concat())
    }

    /// All paths carry little from now on.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn slow_down(&self) -> anyhow::Result<()> {
        (0..self.paths).try_for_each(|path| {
            run(&[
                "tc",
                "-n",
                &self.source,
                "qdisc",
                "replace",
                "dev",
                &link(End::Source, path),
                "root",
                "tbf",
                "rate",
                SLOW,
                "burst",
                "16kb",
                "latency",
                "50ms",
            ])
        })
    }

    /// Both ends of all connections find them reset.
    ///
    /// # Errors
    /// What `ss` says.
    pub fn reset_connections(&self, end: End) -> anyhow::Result<()> {
        run(&[
            "ss",
            "-N",
            self.namespace(end),
            "-K",
            "-t",
            "state",
            "established",
        ])
    }

    /// As it was at the beginning.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn restore(&self) -> anyhow::Result<()> {
        for end in [End::Source, End::Destination] {
            for path in 0..self.paths {
                let (namespace, name) = (self.namespace(end), link(end, path));
                let address = format!("{}/24", host(end, path));
                // What is not there can't be taken away.
                let _ = run(&["tc", "-n", namespace, "qdisc", "del", "dev", &name, "root"]);
                run(&["ip", "-n", namespace, "link", "set", &name, "mtu", MTU])?;
                run(&[
                    "ip", "-n", namespace, "addr", "replace", &address, "dev", &name,
                ])?;
            }
            let _ = run(&[
                "ip",
                "-n",
                self.namespace(end),
                "route",
                "flush",
                "type",
                "blackhole",
            ]);
        }
        self.bring_up()?;
        for end in [End::Source, End::Destination] {
            (0..self.paths).try_for_each(|path| self.route(end, path, &[]))?;
            // Who was not answered while the links were down is not asked again for seconds.
            run(&["ip", "-n", self.namespace(end), "neigh", "flush", "all"])?;
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.source, &self.destination] {
            let _ = run(&["ip", "netns", "del", namespace]);
        }
    }
}

fn link(end: End, path: usize) -> String {
    match end {
        End::Source => format!("a{path}"),
        End::Destination => format!("b{path}"),
    }
}

fn host(end: End, path: usize) -> String {
    match end {
        End::Source => format!("10.77.{path}.1"),
        End::Destination => format!("10.77.{path}.2"),
    }
}

fn run(words: &[&str]) -> anyhow::Result<()> {
    let (program, arguments) = words.split_first().context("a program")?;
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` says: {}", words.join(" "), text.trim());
    }
    Ok(())
}
