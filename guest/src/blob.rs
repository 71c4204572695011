//! The configuration as bytes: what a destination needs to build the same machine.
//!
//! ```text
//!    0 magic[8] "MFDCONF\n"     8 u32 version (1)        12 u32 kind (1 KVM, 2 process)
//!   16 u32 vcpus               20 u32 pattern            24 u32 tracking
//!   28 u8 filled percent       29 u8 zero percent        30 u16 device (0 none)
//!   32 u64 memory bytes        40 u64 working set bytes  48 u64 dirty rate, bytes/s    56 u64 seed
//! ```
//!
//! Little-endian, 64 bytes. The kind is what the source *is*, not what it was asked to be: a source that chose KVM by
//! itself asks the destination for KVM, because the two kinds cannot load each other's state.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::codec::{Reader, put};
use crate::config::{Config, Device, Fill, Pattern, Tracking};
use crate::error::Result;
use crate::guest::Kind;

/// The kind number of this guest's configuration and state blobs in a migration stream: "mfdg".
pub const BLOB_KIND: u32 = 0x6764_666d;

/// Length of a configuration's bytes.
pub const CONFIG_BLOB_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"MFDCONF\n";

/// Raised whenever a field changes its meaning, and when the same configuration would lead to another layout,
/// program or batch than before.
const VERSION: u32 = 1;

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RawConfig {
    magic: [u8; 8],
    version: u32,
    kind: u32,
    vcpus: u32,
    pattern: u32,
    tracking: u32,
    filled_percent: u8,
    zero_percent: u8,
    device: u16,
    memory_bytes: u64,
    working_set_bytes: u64,
    dirty_rate_bytes_per_s: u64,
    seed: u64,
}

const _: () = assert!(size_of::<RawConfig>() == CONFIG_BLOB_BYTES);

impl Config {
    /// The bytes for a destination of a guest of kind `kind`.
    pub(crate) fn to_blob(&self, kind: Kind) -> Vec<u8> {
        let raw = RawConfig {
            magic: MAGIC,
            version: VERSION,
            kind: kind.code(),
            vcpus: self.vcpus,
            pattern: self.pattern.code(),
            tracking: self.tracking.code(),
            filled_percent: self.fill.filled_percent,
            zero_percent: self.fill.zero_percent,
            device: self.device.code(),
            memory_bytes: self.memory_bytes,
            working_set_bytes: self.working_set_bytes,
            dirty_rate_bytes_per_s: self.dirty_rate_bytes_per_s,
            seed: self.seed,
        };
        let mut octets = Vec::with_capacity(CONFIG_BLOB_BYTES);
        put(&mut octets, &raw);
        octets
    }

    /// The configuration in a source's [`Guest::config_blob`](crate::Guest::config_blob), for
    /// [`Guest::create_empty`](crate::Guest::create_empty).
    ///
    /// # Errors
    /// [`Error::Malformed`](crate::Error::Malformed) if these are not the bytes of a configuration;
    /// [`Error::Config`](crate::Error::Config) if no guest can be built of it.
    pub fn from_blob(octets: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("configuration", octets);
        let raw: RawConfig = reader.take()?;
        reader.expect("magic", raw.magic, MAGIC)?;
        reader.expect("version", raw.version, VERSION)?;
        let unknown =
            |field: &str, code: u32| reader.malformed(format!("{field} {code} is not known"));
        let kind = Kind::from_code(raw.kind).ok_or_else(|| unknown("kind", raw.kind))?;
        let pattern =
            Pattern::from_code(raw.pattern).ok_or_else(|| unknown("pattern", raw.pattern))?;
        let device =
            Device::from_code(raw.device).ok_or_else(|| unknown("device", raw.device.into()))?;
        let asked =
            Tracking::from_code(raw.tracking).ok_or_else(|| unknown("tracking", raw.tracking))?;
        let tracking = match (kind, asked) {
            (Kind::Kvm, Tracking::Auto) => Tracking::Kvm,
            (Kind::Process, Tracking::Auto) => Tracking::Process,
            (Kind::Kvm, Tracking::Kvm | Tracking::Ring | Tracking::Log) => asked,
            (Kind::Process, Tracking::Process | Tracking::Userfault | Tracking::Marks) => asked,
            _ => {
                return Err(reader.malformed(format!("kind {kind} cannot be tracked by {asked:?}")));
            }
        };
        reader.finish()?;
        let config = Self {
            memory_bytes: raw.memory_bytes,
            vcpus: raw.vcpus,
            working_set_bytes: raw.working_set_bytes,
            dirty_rate_bytes_per_s: raw.dirty_rate_bytes_per_s,
            pattern,
            tracking,
            seed: raw.seed,
            fill: Fill {
                filled_percent: raw.filled_percent,
                zero_percent: raw.zero_percent,
            },
            device,
        };
        config.validate()?;
        Ok(config)
    }
}

impl Pattern {
    fn code(self) -> u32 {
        match self {
            Self::Random => 1,
            Self::Sequential => 2,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [Self::Random, Self::Sequential]
            .into_iter()
            .find(|pattern| pattern.code() == code)
    }
}

impl Device {
    fn code(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Dma => 1,
            Self::DmaUnreported => 2,
        }
    }

    fn from_code(code: u16) -> Option<Self> {
        [Self::None, Self::Dma, Self::DmaUnreported]
            .into_iter()
            .find(|device| device.code() == code)
    }
}

impl Tracking {
    fn code(self) -> u32 {
        match self {
            Self::Auto => 1,
            Self::Kvm => 2,
            Self::Ring => 3,
            Self::Log => 4,
            Self::Process => 5,
            Self::Userfault => 6,
            Self::Marks => 7,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        let all = [
            Self::Auto,
            Self::Kvm,
            Self::Ring,
            Self::Log,
            Self::Process,
            Self::Userfault,
            Self::Marks,
        ];
        all.into_iter().find(|tracking| tracking.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Config {
        Config {
            memory_bytes: 64 << 20,
            vcpus: 3,
            working_set_bytes: 1 << 20,
            dirty_rate_bytes_per_s: 5_000_000,
            pattern: Pattern::Sequential,
            tracking: Tracking::Log,
            seed: 0x0102_0304_0506_0708,
            device: Device::None,
            fill: Fill {
                filled_percent: 70,
                zero_percent: 30,
            },
        }
    }

    /// The layout of the format, byte by byte.
    #[test]
    fn encodes_to_the_vector() {
        let vector = concat!(
            "4d4644434f4e460a",
            "01000000",
            "01000000",
            "03000000",
            "02000000",
            "04000000",
            "46",
            "1e",
            "0000",
            "0000000400000000",
            "0000100000000000",
            "404b4c0000000000",
            "0807060504030201",
        );
        let hex: String = example()
            .to_blob(Kind::Kvm)
            .iter()
            .map(|octet| format!("{octet:02x}"))
            .collect();
        assert_eq!(hex, vector);
    }

    #[test]
    fn decodes_what_it_encodes() {
        assert_eq!(
            Config::from_blob(&example().to_blob(Kind::Kvm)).unwrap(),
            example()
        );
    }

    #[test]
    fn a_chosen_kind_binds_the_destination() {
        let auto = Config {
            tracking: Tracking::Auto,
            ..example()
        };
        let tracking = |kind| Config::from_blob(&auto.to_blob(kind)).unwrap().tracking;
        assert_eq!(tracking(Kind::Kvm), Tracking::Kvm);
        assert_eq!(tracking(Kind::Process), Tracking::Process);
    }

    #[test]
    fn refuses_every_truncation_and_an_octet_more() {
        let blob = example().to_blob(Kind::Kvm);
        for length in 0..blob.len() {
            assert_eq!(
                Config::from_blob(&blob[..length]).unwrap_err().code(),
                "guest-malformed",
                "{length}"
            );
        }
        let longer = [&blob[..], &[0]].concat();
        assert_eq!(
            Config::from_blob(&longer).unwrap_err().code(),
            "guest-malformed"
        );
    }

    #[test]
    fn refuses_each_field_that_is_not_known() {
        // Offset and a value that the field may not have.
        let wrong = [
            (0, 0),
            (8, 2),
            (12, 0),
            (12, 3),
            (20, 0),
            (20, 3),
            (24, 0),
            (24, 6),
            (24, 8),
            (24, 5),
            (30, 3),
            (31, 1),
        ];
        for (offset, value) in wrong {
            let mut blob = example().to_blob(Kind::Kvm);
            blob[offset] = value;
            assert_eq!(
                Config::from_blob(&blob).unwrap_err().code(),
                "guest-malformed",
                "{offset} = {value}"
            );
        }
    }

    #[test]
    fn refuses_what_no_guest_can_be_built_of() {
        for (offset, value) in [
            (16, 0),
            (16, 17),
            (28, 101),
            (29, 101),
            (32, 1),
            (39, 1),
            (40, 1),
            (47, 1),
        ] {
            let mut blob = example().to_blob(Kind::Kvm);
            blob[offset] = value;
            assert_eq!(
                Config::from_blob(&blob).unwrap_err().code(),
                "guest-config",
                "{offset} = {value}"
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_encodes_to_itself(changes in prop::collection::vec((0usize..64, any::<u8>()), 0..4)) {
            let mut blob = example().to_blob(Kind::Kvm);
            changes.into_iter().for_each(|(offset, octet)| blob[offset] = octet);
            if let Ok(config) = Config::from_blob(&blob) {
                let process = [Tracking::Process, Tracking::Userfault, Tracking::Marks].contains(&config.tracking);
                let kind = if process { Kind::Process } else { Kind::Kvm };
                // Only a tracking that the source chose by itself (1) is written as the choice.
                if blob[24] != 1 {
                    prop_assert_eq!(config.to_blob(kind), blob);
                }
            }
        }
    }
}
