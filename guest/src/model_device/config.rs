//! What a model device is made to be: sizes, speeds, abilities and failures, also as one line of text.
//!
//! ```text
//!   model:size=100M,initial=80M,growth=10M,config=4K,reinit=1,name=nic0
//! ```
//! The text is what a user writes on a command line and what travels in the configuration, so both sides build the same device.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use multifd_wire::DeviceState;
use multifd_wire::limits::DEVICE_NAME_BYTES_MAX;

use super::stream::BLOCK;

/// The longest configuration of a model device: what the destination takes at most.
pub const DEVICE_CONFIG_BYTES_MAX: u64 = multifd_wire::limits::BLOB_BYTES_MAX;

/// The smallest state: one block.
pub const DEVICE_STATE_BYTES_MIN: u64 = 4096;

/// The largest state. The device keeps 16 bytes for each 64 KiB of it.
pub const DEVICE_STATE_BYTES_MAX: u64 = 1 << 40;

/// The smallest block.
const BLOCK_BYTES_MIN: u64 = 1 << 10;

/// When a model device is made to fail. Each happens once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFailure {
    /// Reading fails once so many bytes were read.
    Read {
        /// Bytes.
        after: u64,
    },
    /// Writing fails once so many bytes were written.
    Write {
        /// Bytes.
        after: u64,
    },
    /// One byte of the stream is another than it should be: the device that loads it finds out.
    Corrupt {
        /// Its place in the stream.
        at: u64,
    },
    /// The configuration can't be read.
    SaveConfig,
    /// The configuration is refused.
    LoadConfig,
    /// The state is refused when it is finished.
    Finish,
    /// The step into this state fails, and the device stays where it was.
    Step(DeviceState),
    /// The step into this state leaves the device broken, in [`DeviceState::Error`].
    Break(DeviceState),
    /// The step into this state never returns.
    HangStep(DeviceState),
    /// Reading never returns once so many bytes were read.
    HangRead {
        /// Bytes.
        after: u64,
    },
    /// Writing never returns once so many bytes were written.
    HangWrite {
        /// Bytes.
        after: u64,
    },
}

/// What a model device is made to be. Sizes in bytes, speeds in bytes a second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name: 1 to 64 bytes of letters, digits and `-_.`, the same on both sides.
    pub name: String,
    /// Its whole state.
    pub size: u64,
    /// How much of it can be read while it runs, and comes first; rounded to whole blocks. 0: none.
    pub initial: u64,
    /// In which pieces it changes its state and gives it away: 1 KiB to 64 KiB, which is what it is if not said.
    pub block: u64,
    /// How fast it changes its state while it runs: the part that can be read then, or all of it if none can.
    pub growth: u64,
    /// How fast it can be read; 0 as fast as it can.
    pub read: u64,
    /// How fast it can be written; 0 as fast as it can.
    pub write: u64,
    /// Its configuration.
    pub config: u64,
    /// Guest memory that it writes while it runs, 4 KiB for each block of its state that it changes; 0: none.
    pub dma: u64,
    /// How often it announces new initial bytes.
    pub reinit: u32,
    /// How long after the ones before were read; whole milliseconds.
    pub reinit_after: Duration,
    /// Whether it can be read while it runs. With `initial` 0 it then has only a little to say until it is stopped.
    pub pre_copy: bool,
    /// Whether it has the P2P-quiescent state.
    pub p2p: bool,
    /// Whether the guest may be paused only after its initial bytes were loaded.
    pub ack: bool,
    /// Whether its configuration is to be loaded after all memory.
    pub after_memory: bool,
    /// The seed of its content.
    pub seed: u64,
    /// When it fails.
    pub failure: Option<DeviceFailure>,
}

impl DeviceConfig {
    /// A device of this name with so much state, which is fast and sound and can be read only when it is stopped.
    #[must_use]
    pub fn new(name: &str, size: u64) -> Self {
        Self {
            name: name.to_owned(),
            size,
            initial: 0,
            block: BLOCK,
            growth: 0,
            read: 0,
            write: 0,
            config: 0,
            dma: 0,
            reinit: 0,
            reinit_after: Duration::from_millis(30),
            pre_copy: false,
            p2p: true,
            ack: false,
            after_memory: false,
            seed: 1,
            failure: None,
        }
    }

    /// With so many initial bytes, and the wish to have them loaded before the guest is paused.
    #[must_use]
    pub fn with_initial(mut self, octets: u64) -> Self {
        (self.initial, self.pre_copy, self.ack) = (octets, true, true);
        self
    }

    /// As the other side is to build it: what goes wrong here is nobody else's business.
    #[must_use]
    pub fn for_peer(&self) -> Self {
        Self {
            failure: None,
            ..self.clone()
        }
    }

    /// Reads what a peer wrote. It says what its device is, and not what is to go wrong on this side.
    ///
    /// # Errors
    /// As parsing; and a failure that is asked for.
    pub fn from_peer(text: &str) -> Result<Self, DeviceConfigError> {
        let config: Self = text.parse()?;
        match config.failure {
            None => Ok(config),
            Some(failure) => Err(DeviceConfigError(format!(
                "the peer asks for a failure (fail={failure}), which only this side may choose"
            ))),
        }
    }

    /// Memory that the device needs while its state comes or goes, in bytes: two versions of each block. A device with small blocks
    /// needs much more than one with large ones of the same size.
    #[must_use]
    pub fn bookkeeping_bytes(&self) -> u64 {
        let blocks = self.size / self.block.max(1) + 1;
        blocks.saturating_mul(16).saturating_add(self.config)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// The first that is out of its range.
    pub fn check(&self) -> Result<(), DeviceConfigError> {
        let wrong = |text: String| Err(DeviceConfigError(text));
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty()
            || self.name.len() > DEVICE_NAME_BYTES_MAX
            || !self.name.chars().all(good)
        {
            return wrong(format!(
                "name `{}`: 1 to {DEVICE_NAME_BYTES_MAX} letters, digits and - _ .",
                self.name
            ));
        }
        if !(DEVICE_STATE_BYTES_MIN..=DEVICE_STATE_BYTES_MAX).contains(&self.size) {
            return wrong(format!("size is {}, must be 4K to 1T", self.size));
        }
        if !(BLOCK_BYTES_MIN..=BLOCK).contains(&self.block) {
            return wrong(format!("block is {}, must be 1K to 64K", self.block));
        }
        if self.initial > self.size {
            return wrong(format!(
                "initial is {}, more than the size of {}",
                self.initial, self.size
            ));
        }
        if self.initial > 0 && !self.pre_copy {
            return wrong("initial needs pre-copy=yes".into());
        }
        if self.ack && !self.pre_copy {
            return wrong("ack=yes needs pre-copy=yes".into());
        }
        if self.reinit > 0 && self.initial == 0 {
            return wrong("reinit needs initial".into());
        }
        if self.config > DEVICE_CONFIG_BYTES_MAX {
            return wrong(format!(
                "config is {}, must be at most {DEVICE_CONFIG_BYTES_MAX}",
                self.config
            ));
        }
        Ok(())
    }
}

/// A model device that can't be made, or a text that says none. The text says what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceConfigError(String);

impl fmt::Display for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "model:name={},size={}", self.name, self.size)?;
        let word = |yes: bool| if yes { "yes" } else { "no" };
        write!(f, ",initial={},growth={}", self.initial, self.growth)?;
        write!(f, ",read={},write={}", self.read, self.write)?;
        write!(f, ",config={},dma={}", self.config, self.dma)?;
        write!(f, ",block={}", self.block)?;
        let after = self.reinit_after.as_millis();
        write!(f, ",reinit={},reinit-ms={after}", self.reinit)?;
        write!(f, ",seed={}", self.seed)?;
        write!(
            f,
            ",pre-copy={},p2p={}",
            word(self.pre_copy),
            word(self.p2p)
        )?;
        write!(f, ",ack={}", word(self.ack))?;
        write!(f, ",after-memory={}", word(self.after_memory))?;
        match self.failure {
            None => Ok(()),
            Some(failure) => write!(f, ",fail={failure}"),
        }
    }
}

impl fmt::Display for DeviceFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { after } => write!(f, "read@{after}"),
            Self::Write { after } => write!(f, "write@{after}"),
            Self::Corrupt { at } => write!(f, "corrupt@{at}"),
            Self::SaveConfig => f.write_str("save-config"),
            Self::LoadConfig => f.write_str("load-config"),
            Self::Finish => f.write_str("finish"),
            Self::Step(state) => write!(f, "step@{state}"),
            Self::Break(state) => write!(f, "break@{state}"),
            Self::HangStep(state) => write!(f, "hang@{state}"),
            Self::HangRead { after } => write!(f, "hang-read@{after}"),
            Self::HangWrite { after } => write!(f, "hang-write@{after}"),
        }
    }
}

impl FromStr for DeviceConfig {
    type Err = DeviceConfigError;

    /// Reads `model:size=100M,initial=80M,…`; what is not said is as in [`DeviceConfig::new`], the name is `model`.
    fn from_str(text: &str) -> Result<Self, DeviceConfigError> {
        let Some(list) = text.strip_prefix("model:") else {
            return Err(DeviceConfigError(format!(
                "`{text}` is no device: write model:size=100M,initial=80M"
            )));
        };
        let mut config = Self::new("model", 0);
        let (mut pre_copy, mut ack) = (None, None);
        for pair in list.split(',').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(DeviceConfigError(format!("`{pair}` lacks its value")));
            };
            match key {
                "name" => value.clone_into(&mut config.name),
                "size" => config.size = size(key, value)?,
                "initial" => config.initial = size(key, value)?,
                "block" => config.block = size(key, value)?,
                "growth" => config.growth = size(key, value)?,
                "read" => config.read = size(key, value)?,
                "write" => config.write = size(key, value)?,
                "config" => config.config = size(key, value)?,
                "dma" => config.dma = size(key, value)?,
                "reinit" => config.reinit = number(key, value)?,
                "reinit-ms" => config.reinit_after = Duration::from_millis(number(key, value)?),
                "seed" => config.seed = number(key, value)?,
                "pre-copy" => pre_copy = Some(yes_or_no(key, value)?),
                "p2p" => config.p2p = yes_or_no(key, value)?,
                "ack" => ack = Some(yes_or_no(key, value)?),
                "after-memory" => config.after_memory = yes_or_no(key, value)?,
                "fail" => config.failure = Some(value.parse()?),
                _ => {
                    return Err(DeviceConfigError(format!(
                        "`{key}` is none of name, size, initial, block, growth, read, write, config, dma, reinit, reinit-ms, seed, \
                         pre-copy, p2p, ack, after-memory, fail"
                    )));
                }
            }
        }
        config.pre_copy = pre_copy.unwrap_or(config.initial > 0);
        config.ack = ack.unwrap_or(config.initial > 0);
        config.check()?;
        Ok(config)
    }
}

impl FromStr for DeviceFailure {
    type Err = DeviceConfigError;

    fn from_str(text: &str) -> Result<Self, DeviceConfigError> {
        let (what, at) = text.split_once('@').unwrap_or((text, ""));
        let state = || {
            DeviceState::ALL
                .into_iter()
                .find(|state| state.name() == at)
                .ok_or_else(|| DeviceConfigError(format!("fail={text}: `{at}` is no state")))
        };
        Ok(match what {
            "read" => Self::Read {
                after: size("fail", at)?,
            },
            "write" => Self::Write {
                after: size("fail", at)?,
            },
            "corrupt" => Self::Corrupt {
                at: size("fail", at)?,
            },
            "save-config" => Self::SaveConfig,
            "load-config" => Self::LoadConfig,
            "finish" => Self::Finish,
            "step" => Self::Step(state()?),
            "break" => Self::Break(state()?),
            "hang" => Self::HangStep(state()?),
            "hang-read" => Self::HangRead {
                after: size("fail", at)?,
            },
            "hang-write" => Self::HangWrite {
                after: size("fail", at)?,
            },
            _ => {
                return Err(DeviceConfigError(format!(
                    "fail={text}: read@SIZE, write@SIZE, corrupt@SIZE, save-config, load-config, finish, step@STATE, break@STATE, \
                     hang@STATE, hang-read@SIZE or hang-write@SIZE"
                )));
            }
        })
    }
}

fn yes_or_no(key: &str, value: &str) -> Result<bool, DeviceConfigError> {
    match value {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(DeviceConfigError(format!("{key}={value}: yes or no"))),
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, DeviceConfigError> {
    value
        .parse()
        .map_err(|_| DeviceConfigError(format!("{key}={value}: a number")))
}

/// `64K`, `100M`, `2G`: powers of 1024, as everywhere on this command line.
fn size(key: &str, value: &str) -> Result<u64, DeviceConfigError> {
    let wrong = || DeviceConfigError(format!("{key}={value}: a size such as 64K, 100M or 2G"));
    let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match value.get(digits.len()..) {
        Some("") => 1,
        Some("K" | "k" | "KiB") => 1 << 10,
        Some("M" | "m" | "MiB") => 1 << 20,
        Some("G" | "g" | "GiB") => 1 << 30,
        _ => return Err(wrong()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_as_it_was() {
        for text in [
            "model:size=100M",
            "model:name=nic-0,size=1G,initial=900M,growth=10M,read=1G,write=2G,config=4K,dma=1M,reinit=2,seed=9,p2p=no",
            "model:size=64K,pre-copy=yes,after-memory=yes,fail=break@stop-copy",
            "model:size=64K,initial=8K,block=4K,reinit=1,reinit-ms=5",
            "model:size=64K,fail=read@1K",
            "model:size=64K,fail=corrupt@77",
            "model:size=64K,fail=hang@stop-copy",
            "model:size=64K,fail=hang-read@1K",
            "model:size=64K,fail=hang-write@1K",
            "model:size=64K,fail=finish",
        ] {
            let config: DeviceConfig = text.parse().unwrap();
            assert_eq!(config.to_string().parse(), Ok(config), "{text}");
        }
    }

    #[test]
    fn a_peer_can_not_choose_what_fails_here() {
        let mine: DeviceConfig = "model:size=64K,fail=finish".parse().unwrap();
        let error = DeviceConfig::from_peer(&mine.to_string()).unwrap_err();
        assert!(error.to_string().contains("only this side"), "{error}");
        let theirs = DeviceConfig::from_peer(&mine.for_peer().to_string()).unwrap();
        assert_eq!(theirs, mine.for_peer());
    }

    #[test]
    fn small_blocks_are_known_to_cost_memory() {
        let bytes = |text: &str| text.parse::<DeviceConfig>().unwrap().bookkeeping_bytes();
        assert!(bytes("model:size=1024G,block=1K") >= 16 << 30);
        assert!(bytes("model:size=1G") < 1 << 20);
    }

    #[test]
    fn refuses_what_is_no_device_and_says_what_would_be() {
        for (text, says) in [
            ("100M", "no device"),
            ("model:", "size"),
            ("model:size=1K", "size"),
            ("model:size=1M,initial=2M", "initial"),
            ("model:size=1M,initial=1M,pre-copy=no", "pre-copy"),
            ("model:size=1M,ack=yes", "ack"),
            ("model:size=1M,reinit=1", "reinit"),
            ("model:size=1M,config=17M", "config"),
            ("model:size=1M,block=1023", "block"),
            ("model:size=1M,block=65537", "block"),
            ("model:size=1M,speed=3", "none of"),
            ("model:size=1M,fail=maybe", "fail"),
            ("model:size=1M,fail=step@limbo", "no state"),
            ("model:size=1X", "size such as"),
            ("model:size=1M,p2p=perhaps", "yes or no"),
            ("model:name=a b,size=1M", "name"),
        ] {
            let error = text.parse::<DeviceConfig>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
