//! `--confine`: what a program takes from itself before it speaks with a peer.

use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum;
use multifd_confine::{Capabilities, Capability, Confined, Exec, Files, Policy, Ports, Side};
use multifd_transport::{Address, AddressKind, Spawner, StdSpawner};

use crate::folder_of;
use crate::tls::TlsFlags;

/// See `--confine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Confine {
    /// Capabilities, files, TCP ports and system calls that are not needed are given up
    On,
    /// The program keeps every right of the user who started it
    Off,
}

/// The flag.
#[derive(Debug, clap::Args)]
pub struct ConfineFlags {
    /// Whether the program gives up what it does not need, before it speaks with a peer
    ///
    /// So that a peer that finds a fault in it finds little to do with it: no capabilities, no programs, no files but those that
    /// the flags name, no TCP ports but those of the addresses, few system calls where its bytes are read. A call that is
    /// refused fails with "Operation not permitted". Files that only the capabilities of root could open, such as a key that another
    /// user owns, can't be read then. A bridge (--bridge) is not confined.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Confine::On, hide_short_help = true, help_heading = "Protection")]
    pub confine: Confine,
}

/// Addresses of one side.
#[derive(Debug, Clone, Copy)]
pub enum Places<'a> {
    /// Where it listens.
    Listening(&'a [Address]),
    /// Where it connects.
    Dialling(&'a [Address]),
}

impl ConfineFlags {
    fn is_on(&self) -> bool {
        self.confine == Confine::On
    }

    /// The first step, before the process has threads: gives up capabilities, but for what the kinds of channel and the ports that
    /// are listened on need.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn give_up_capabilities(
        &self,
        kinds: impl IntoIterator<Item = AddressKind>,
        listened: &[Address],
    ) -> anyhow::Result<()> {
        if !self.is_on() {
            return Ok(());
        }
        let by_rdma = kinds.into_iter().any(|kind| kind == AddressKind::Rdma);
        let is_low =
            |address: &Address| tcp_port(address).is_some_and(|port| (1..1024).contains(&port));
        let kept = Capabilities::NONE
            // Guest memory is pinned, past the limit of an ordinary user.
            .and_if(by_rdma.into(), Capability::IPC_LOCK)
            .and_if(
                listened.iter().any(is_low).into(),
                Capability::NET_BIND_SERVICE,
            );
        multifd_confine::capabilities(kept).context(TURN_OFF)
    }

    /// The second step, before anything is bound or dialled: files, ports and system calls. `written` are the files and folders that are
    /// written beside the usual ones.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn confine(
        &self,
        places: Places<'_>,
        tls: &TlsFlags,
        written: &[&Path],
        exec: Exec,
    ) -> anyhow::Result<()> {
        if !self.is_on() {
            return Ok(());
        }
        let mut files = Files::of_a_host()
            .and_write("/dev/kvm")
            .and_write("/dev/infiniband")
            .and_write("/dev/userfaultfd")
            .and_write("/dev/pts")
            .and_write("/dev/tty");
        for folder in tls.folders() {
            files = files.and_read(folder);
        }
        for path in written {
            files = files.and_write(path);
        }
        let (Places::Listening(addresses) | Places::Dialling(addresses)) = places;
        for address in addresses {
            if let Address::Unix(path) = address {
                files = files.and_write(folder_of(path));
            }
        }
        let tcp = addresses.iter().filter_map(tcp_port);
        let ports = match places {
            Places::Listening(_) => Ports {
                bind: tcp.collect(),
                connect: Vec::new(),
            },
            Places::Dialling(_) => Ports {
                bind: vec![0],
                // Long answers of name servers come by TCP.
                connect: tcp.chain([DNS]).collect(),
            },
        };
        let applied = multifd_confine::process(&Policy { files, ports, exec }).context(TURN_OFF)?;
        tracing::info!("confined: {applied}");
        Ok(())
    }

    /// The third: what starts the threads of a side.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn spawner(&self, side: Side) -> anyhow::Result<Option<Box<dyn Spawner>>> {
        if !self.is_on() {
            return Ok(None);
        }
        let confined = Confined::new(StdSpawner, side).context(TURN_OFF)?;
        Ok(Some(Box::new(confined)))
    }
}

const TURN_OFF: &str = "the program can't confine itself (--confine off does without)";

const DNS: u16 = 53;

fn tcp_port(address: &Address) -> Option<u16> {
    match address {
        Address::Tcp(place) | Address::Tls(place) => Some(place.port()),
        _ => None,
    }
}
