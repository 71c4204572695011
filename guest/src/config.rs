//! What guest to build, and what is refused before anything is built.
//!
//! A [`Config`] is plain data; [`Config::validate`] is the one door, and each refusal says what to give instead.

use crate::error::{Error, Result};
use crate::layout::Layout;

/// The guest's page, and the unit of everything that is counted in pages here: 4,096 bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Smallest memory: 64 MiB.
pub const MEMORY_BYTES_MIN: u64 = 64 << 20;

/// Largest memory: 256 GiB, what the guest's own page tables describe in its first MiB.
pub const MEMORY_BYTES_MAX: u64 = 256 << 30;

/// Most virtual CPUs.
pub const VCPUS_MAX: u32 = 16;

/// The shape and the behaviour of a guest.
///
/// ```
/// use multifd_guest::{Config, Fill, Pattern};
///
/// let config = Config {
///     memory_bytes: 128 << 20,
///     vcpus: 1,
///     working_set_bytes: 32 << 20,
///     dirty_rate_bytes_per_s: 20_000_000,
///     pattern: Pattern::Sequential,
///     fill: Fill { filled_percent: 100, zero_percent: 50 },
///     ..Config::default()
/// };
/// config.validate()?;
/// # Ok::<(), multifd_guest::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Memory in bytes: a multiple of [`PAGE_BYTES`] from [`MEMORY_BYTES_MIN`] to [`MEMORY_BYTES_MAX`].
    pub memory_bytes: u64,
    /// Virtual CPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// The memory that the guest keeps writing, in bytes, a multiple of [`PAGE_BYTES`]. It is the top of the memory,
    /// split evenly over the virtual CPUs.
    pub working_set_bytes: u64,
    /// Pages written a second over all virtual CPUs, times [`PAGE_BYTES`]. 0 is an idle guest: it runs and reports,
    /// and writes nothing. What the host cannot reach is run as fast as it goes.
    pub dirty_rate_bytes_per_s: u64,
    /// The order in which the working set is written.
    pub pattern: Pattern,
    /// How the writes are learnt.
    pub tracking: Tracking,
    /// Everything pseudo-random follows from this.
    pub seed: u64,
    /// What the memory holds at the start.
    pub fill: Fill,
    /// What else writes the memory.
    pub device: Device,
}

/// A device that the guest drives, for tests of what a migration does about memory that no virtual CPU wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// None.
    #[default]
    None,
    /// One that writes guest memory from the host, behind KVM's back. The guest's driver then writes each page that the
    /// device was given when it takes the page back ("unmap"), and so the page is tracked like any other. Needs KVM.
    Dma,
    /// The same with a driver and a VMM that say nothing to anybody: what it writes is lost in a migration. Needs KVM.
    DmaUnreported,
}

/// The order in which a virtual CPU writes its share of the working set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pattern {
    /// Any page next, uniformly, so that some pages are written twice before others are written once.
    #[default]
    Random,
    /// Page after page, then again from the start.
    Sequential,
}

/// How the writes of the guest are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tracking {
    /// The best that the host offers: KVM's ring, KVM's log, or a process guest when there is no KVM.
    #[default]
    Auto,
    /// KVM, by its ring where offered and by its log otherwise; never a process guest.
    Kvm,
    /// KVM's dirty ring; refused where it is not offered.
    Ring,
    /// KVM's dirty log.
    Log,
    /// No machine at all: threads of this process write the memory. Their writes are found by userfaultfd where it is
    /// offered; otherwise the threads mark what they wrote.
    Process,
    /// Threads of this process, their writes found by userfaultfd; refused where it is not offered.
    Userfault,
    /// Threads of this process, which mark what they wrote.
    Marks,
}

/// What the memory holds at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The share of the memory that is filled, counted from the lowest address, 0 to 100. The rest is never touched.
    pub filled_percent: u8,
    /// Of the filled pages, the share that stays zero, 0 to 100, strewn evenly. The others are incompressible.
    pub zero_percent: u8,
}

impl Default for Fill {
    fn default() -> Self {
        Self {
            filled_percent: 100,
            zero_percent: 0,
        }
    }
}

impl Default for Config {
    /// 1 GiB, 2 virtual CPUs that write 100 MB/s at random over 256 MiB, memory full of incompressible pages.
    fn default() -> Self {
        Self {
            memory_bytes: 1 << 30,
            vcpus: 2,
            working_set_bytes: 256 << 20,
            dirty_rate_bytes_per_s: 100_000_000,
            pattern: Pattern::default(),
            tracking: Tracking::default(),
            seed: 1,
            fill: Fill::default(),
            device: Device::default(),
        }
    }
}

impl Config {
    /// Whether a guest can be built of this, on a host with enough memory.
    ///
    /// # Errors
    /// [`Error::Config`], naming the first field that cannot be, and what to give instead.
    pub fn validate(&self) -> Result<()> {
        Layout::new(self).map(|_| ())
    }

    /// The checks of single fields; [`Layout::new`] adds what follows from several.
    pub(crate) fn validate_fields(&self) -> Result<()> {
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&self.memory_bytes) {
            let advice = format!(
                "give from {MEMORY_BYTES_MIN} (64 MiB) to {MEMORY_BYTES_MAX} (256 GiB) bytes"
            );
            return Err(refuse("memory_bytes", self.memory_bytes, advice));
        }
        page_multiple("memory_bytes", self.memory_bytes)?;
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(refuse(
                "vcpus",
                self.vcpus,
                format!("give from 1 to {VCPUS_MAX}"),
            ));
        }
        page_multiple("working_set_bytes", self.working_set_bytes)?;
        percent("fill.filled_percent", self.fill.filled_percent)?;
        percent("fill.zero_percent", self.fill.zero_percent)
    }

    /// Bytes that the guest will certainly occupy on the host: what is filled, and the working set.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let filled = self.memory_bytes / 100 * u64::from(self.fill.filled_percent);
        let filled = filled / 100 * (100 - u64::from(self.fill.zero_percent));
        let written = if self.dirty_rate_bytes_per_s == 0 {
            0
        } else {
            self.working_set_bytes
        };
        filled.max(written)
    }
}

/// An [`Error::Config`] for `field`.
pub(crate) fn refuse(field: &'static str, given: impl ToString, advice: String) -> Error {
    Error::Config {
        field,
        given: given.to_string(),
        advice,
    }
}

fn page_multiple(field: &'static str, bytes: u64) -> Result<()> {
    if bytes.is_multiple_of(PAGE_BYTES) {
        return Ok(());
    }
    let near = (bytes - bytes % PAGE_BYTES).max(PAGE_BYTES);
    Err(refuse(
        field,
        bytes,
        format!("give a multiple of {PAGE_BYTES} bytes, such as {near}"),
    ))
}

fn percent(field: &'static str, value: u8) -> Result<()> {
    if value <= 100 {
        return Ok(());
    }
    Err(refuse(
        field,
        value,
        "give a percentage from 0 to 100".to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        let error = config.validate().expect_err("must be refused");
        assert_eq!(error.code(), "guest-config");
        error.to_string()
    }

    #[test]
    fn default_is_valid() {
        Config::default().validate().unwrap();
    }

    #[test]
    fn accepts_memory_at_both_bounds_and_refuses_one_page_past_them() {
        for memory_bytes in [MEMORY_BYTES_MIN, MEMORY_BYTES_MAX] {
            let config = Config {
                memory_bytes,
                working_set_bytes: 1 << 20,
                ..Config::default()
            };
            config.validate().unwrap();
        }
        for memory_bytes in [MEMORY_BYTES_MIN - PAGE_BYTES, MEMORY_BYTES_MAX + PAGE_BYTES] {
            let text = refusal(|config| config.memory_bytes = memory_bytes);
            assert!(
                text.contains("64 MiB") && text.contains("256 GiB"),
                "{text}"
            );
        }
    }

    #[test]
    fn refuses_part_pages_and_names_the_multiple_below() {
        let text = refusal(|config| config.memory_bytes = (1 << 30) + 5);
        assert!(text.contains("such as 1073741824"), "{text}");
        let text = refusal(|config| config.memory_bytes = 100);
        assert!(text.contains("64 MiB"), "{text}");
        let text = refusal(|config| config.working_set_bytes = 100);
        assert!(text.contains("such as 4096"), "{text}");
        let text = refusal(|config| config.working_set_bytes = 8191);
        assert!(
            text.contains("working_set_bytes") && text.contains("such as 4096"),
            "{text}"
        );
    }

    #[test]
    fn refuses_zero_and_seventeen_vcpus() {
        for vcpus in [0, VCPUS_MAX + 1] {
            assert!(refusal(|config| config.vcpus = vcpus).contains("from 1 to 16"));
        }
        Config {
            vcpus: VCPUS_MAX,
            ..Config::default()
        }
        .validate()
        .unwrap();
    }

    #[test]
    fn refuses_percentages_over_one_hundred() {
        assert!(refusal(|config| config.fill.filled_percent = 101).contains("0 to 100"));
        assert!(refusal(|config| config.fill.zero_percent = 101).contains("0 to 100"));
    }

    #[test]
    fn refuses_a_working_set_that_leaves_no_room_and_names_the_largest() {
        let text = refusal(|config| config.working_set_bytes = config.memory_bytes);
        let largest: u64 = text
            .split(|sign: char| !sign.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .nth(1)
            .expect("the refusal names a number");
        assert!(largest < 1 << 30, "{text}");
        let config = Config {
            working_set_bytes: largest,
            ..Config::default()
        };
        config.validate().unwrap();
        let config = Config {
            working_set_bytes: largest + PAGE_BYTES,
            ..Config::default()
        };
        config.validate().unwrap_err();
    }

    #[test]
    fn refuses_fewer_working_set_pages_than_vcpus_unless_idle() {
        let text = refusal(|config| config.working_set_bytes = PAGE_BYTES);
        assert!(text.contains("one page for each"), "{text}");
        let idle = Config {
            working_set_bytes: 0,
            dirty_rate_bytes_per_s: 0,
            ..Config::default()
        };
        idle.validate().unwrap();
    }

    #[test]
    fn any_rate_is_accepted() {
        for dirty_rate_bytes_per_s in [0, 1, 4096, u64::MAX] {
            Config {
                dirty_rate_bytes_per_s,
                ..Config::default()
            }
            .validate()
            .unwrap();
        }
    }
}
