//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use multifd_guest::vfio::Door;
use multifd_transport::Address;
use multifd_wire::DeviceState;

/// Migrates real VFIO devices, one to another, through the real source and destination in one process, and checks what came of it.
///
/// Devices come in pairs, SOURCE DESTINATION, all in one migration. A device is its place in sysfs, such as
/// /sys/bus/platform/devices/labdev.0 or /sys/bus/mdev/devices/UUID.
#[derive(Debug, Clone, Parser)]
#[command(name = "multifd-vfio", after_help = CHECKS)]
pub(crate) struct Args {
    /// SOURCE DESTINATION [SOURCE DESTINATION]...
    #[arg(required = true, value_name = "DEVICE")]
    pub(crate) devices: Vec<PathBuf>,

    /// How devices are opened
    #[arg(long, value_enum, default_value_t = DoorArg::Group)]
    pub(crate) door: DoorArg,

    /// MiB of guest memory
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    pub(crate) memory: u64,

    /// Pages of guest memory that each labdev writes a second
    #[arg(long, value_name = "PAGES", default_value_t = 5000)]
    pub(crate) dma: u64,

    /// KiB of each labdev's memory that are initial bytes [default: all of it]
    #[arg(long, value_name = "KIB")]
    pub(crate) initial: Option<u64>,

    /// KiB that each source's labdev declares initial again, once its initial bytes were read: the destination has to acknowledge twice
    #[arg(long, value_name = "KIB")]
    pub(crate) reinit: Option<u64>,

    /// A peer asks each source's labdev for DMA while it is P2P-quiescent: it must be done by the destination's device, and not before
    #[arg(long, conflicts_with = "dma")]
    pub(crate) late_dma: bool,

    /// Data channels
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) channels: u32,

    /// Where the destination listens: its kind of channel is that of the migration
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub(crate) listen: Address,

    /// MiB a second that the source sends at most
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) bandwidth: u64,

    /// Migrates to and fro so many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) times: u32,

    /// Writes a register of a labdev when it has come to a state, or at the beginning without one. SIDE is `source` or `destination`, INDEX
    /// the number of the pair, STATE as in the output, and REGISTER as in tests/lab/module/labdev.h. Can be repeated
    #[arg(long, value_name = "SIDE.INDEX[@STATE]:REGISTER=VALUE")]
    pub(crate) inject: Vec<Injection>,

    /// How the migration must end
    #[arg(long, value_enum, default_value_t = Expect::Migrated)]
    pub(crate) expect: Expect,

    /// What the source's error must say
    #[arg(long, value_name = "TEXT", requires = "expect")]
    pub(crate) because: Option<String>,
}

const CHECKS: &str = "\
What is checked, each with a line of its own:
  migrated   states in order at both sides, as the kernel's device saw them too; every device quiescent before any stops, and before any runs;
             initial bytes loaded at the destination before the guest is paused; device content the same on arrival; memory the same, and
             what devices wrote in it among it; the source's devices stopped
  failed     the guest and all its devices run at the source; then the same guest migrates by a second attempt, as above
  stranded   the destination owns the guest and could not run it: the source's guest and devices stand still

Exit status: 0 if every check passed; 1 if one did not; 2 for a wrong command line.";

/// By which door.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DoorArg {
    /// A group in a type 1 container
    Group,
    /// The character device bound to an iommufd
    Cdev,
    /// That with a page table that tracks dirty pages
    Tracked,
}

impl From<DoorArg> for Door {
    fn from(arg: DoorArg) -> Self {
        match arg {
            DoorArg::Group => Self::Group,
            DoorArg::Cdev => Self::Cdev,
            DoorArg::Tracked => Self::CdevTracked,
        }
    }
}

/// How it must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Expect {
    /// The guest runs at the destination
    Migrated,
    /// The guest runs on at the source
    Failed,
    /// The destination owns it and cannot run it
    Stranded,
}

/// Which side's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// A register that is written at some moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Injection {
    pub(crate) side: Side,
    pub(crate) pair: usize,
    /// At the beginning without one.
    pub(crate) state: Option<DeviceState>,
    pub(crate) register: String,
    pub(crate) value: u64,
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || {
            let (place, what) = text.split_once(':')?;
            let (register, value) = what.split_once('=')?;
            let (device, state) = match place.split_once('@') {
                Some((device, state)) => (device, Some(state)),
                None => (place, None),
            };
            let (side, pair) = device.split_once('.')?;
            Some((side, pair, state, register, value))
        };
        let (side, pair, state, register, value) = parts()
            .ok_or("SIDE.INDEX[@STATE]:REGISTER=VALUE, such as source.0@pre-copy:break=1")?;
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        Ok(Self {
            side: match side {
                "source" => Side::Source,
                "destination" => Side::Destination,
                other => return Err(format!("{other}: source or destination")),
            },
            pair: pair
                .parse()
                .map_err(|_| format!("{pair} is no number of a pair"))?,
            state: state
                .map(|name| {
                    let named = |state: &DeviceState| state.name() == name;
                    DeviceState::ALL
                        .into_iter()
                        .find(named)
                        .ok_or_else(|| format!("{name} is no state of a device"))
                })
                .transpose()?,
            register: register.to_owned(),
            value: number(value).map_err(|_| format!("{value} is no number"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_injection_is_read_and_what_is_none_is_refused() {
        let read = "source.1@pre-copy-p2p:fault_error=0x8".parse();
        let want = Injection {
            side: Side::Source,
            pair: 1,
            state: Some(DeviceState::PreCopyP2p),
            register: "fault_error".into(),
            value: 8,
        };
        assert_eq!(read, Ok(want));
        assert!("destination.0:break=1".parse::<Injection>().is_ok());
        for wrong in [
            "",
            "source:break=1",
            "here.0:break=1",
            "source.0@asleep:break=1",
            "source.0:break",
            "source.x:a=1",
            "source.0:a=b",
        ] {
            assert!(wrong.parse::<Injection>().is_err(), "{wrong}");
        }
    }
}
