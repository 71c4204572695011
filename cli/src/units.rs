//! Sizes, rates and times as people write them, and printed so that they can be read again.
//!
//! ```text
//!   size   64M  64MiB  = 64 × 1,048,576 bytes       64MB = 64,000,000 bytes         1.5G, 1.5GiB, 4096
//!   rate   100M/s  100MiB/s  100MB/s  (the /s may be left out)                      10Gbit/s  10Gbps = 1,250,000,000 bytes/s
//!   time   300ms  2s  1.5s  2min  1h 30m
//! ```
//! The rule it keeps: every number that a user gives is bounded here or by the library's `Config`, so that no later sum of it can
//! overflow.

use std::fmt;
use std::time::Duration;

pub use multifd_wire::Token;

/// The longest time that a flag takes: a day. Far from where sums of instants overflow, and longer than anything that is waited for.
pub const TIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// A number of bytes.
///
/// # Errors
/// What could be written instead.
pub fn size(text: &str) -> Result<u64, String> {
    bytes(text.trim()).map_err(|error| format!("{error}: write for example 64M, 1.5GiB or 100MB"))
}

/// What a source shows to a destination that asks for it: 32 hexadecimal digits, or `@` and the file that holds them.
///
/// # Errors
/// What could be written instead.
pub fn pass(text: &str) -> Result<Token, String> {
    let digits = match text.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file).map_err(|error| error.to_string())?,
        None => text.to_owned(),
    };
    Token::from_hex(digits.trim()).ok_or_else(|| {
        "a pass is 32 hexadecimal digits, not all 0: openssl rand -hex 16".to_owned()
    })
}

/// Bytes a second.
///
/// # Errors
/// What could be written instead.
pub fn rate(text: &str) -> Result<u64, String> {
    let advice = |error| format!("{error}: write for example 64M, 100MB/s, 1.5GiB/s or 10Gbit/s");
    let text = text.trim();
    let amount = text
        .strip_suffix("/s")
        .or_else(|| text.strip_suffix("ps"))
        .unwrap_or(text)
        .trim_end();
    let bits = amount
        .strip_suffix("bits")
        .or_else(|| amount.strip_suffix("bit"))
        .or_else(|| prefix_of_bits(amount));
    match bits {
        Some(bits) => decimal(bits.trim_end())
            .map(|bits| bits / 8)
            .map_err(advice),
        None if amount.ends_with('b') => Err(advice("`b` could be bits or bytes".to_owned())),
        None => bytes(amount).map_err(advice),
    }
}

/// Of `10Gb`, the `10G`: a small b after a large prefix is bits. With a small prefix nobody can know.
fn prefix_of_bits(amount: &str) -> Option<&str> {
    amount
        .strip_suffix('b')
        .filter(|rest| rest.ends_with(['K', 'M', 'G', 'T']))
}

/// A share, `80%` or `80`, at most 99 %.
///
/// # Errors
/// What could be written instead.
pub fn percent(text: &str) -> Result<u8, String> {
    let number = text.trim().trim_end_matches('%').trim_end();
    let percent: Option<u8> = number.parse().ok();
    let fits = percent.filter(|percent| *percent <= 99);
    fits.ok_or_else(|| "write for example 80%, at least 0% and at most 99%".to_owned())
}

/// A duration, at most [`TIME_MAX`].
///
/// # Errors
/// What could be written instead.
pub fn time(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let parsed = match fraction(text) {
        Some(time) => Ok(time),
        None => humantime::parse_duration(text).map_err(|error| error.to_string()),
    };
    let time = parsed.map_err(|error| format!("{error}: write for example 300ms, 1.5s or 2min"))?;
    if time > TIME_MAX {
        return Err(format!("{text} is too long: give at most 24h"));
    }
    Ok(time)
}

/// A number with a decimal point and one unit.
fn fraction(text: &str) -> Option<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit_at);
    let number: f64 = number.contains('.').then(|| number.parse().ok())??;
    let unit = humantime::parse_duration(&format!("1{}", unit.trim_start())).ok()?;
    Duration::try_from_secs_f64(unit.as_secs_f64() * number).ok()
}

/// `MB` is decimal, as it is written; `MiB` and the short `M` are powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let written = text.to_ascii_lowercase();
    if written.ends_with('b') && !written.ends_with("ib") {
        return decimal(text);
    }
    let binary = parse_size::Config::new().with_binary();
    binary.parse_size(text).map_err(|error| error.to_string())
}

fn decimal(text: &str) -> Result<u64, String> {
    let decimal = parse_size::Config::new().with_decimal();
    decimal.parse_size(text).map_err(|error| error.to_string())
}

/// Prints a number of bytes with three digits, such as `1.50 GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = None;
        for name in UNITS {
            // What would be printed as 1000 or more goes into the next unit.
            if value < 999.5 {
                break;
            }
            value /= 1024.0;
            unit = Some(name);
        }
        let Some(unit) = unit else {
            return write!(f, "{} B", self.0);
        };
        let digits = if value < 9.995 {
            2
        } else {
            usize::from(value < 99.95)
        };
        write!(f, "{value:.digits$} {unit}")
    }
}

/// Prints bytes a second, such as `926 MiB/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

/// Prints a time with the unit that fits, such as `8.1 ms` or `934 ms` or `12.3 s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(pub Duration);

impl Time {
    /// Of a number of milliseconds, as reports have them.
    #[must_use]
    pub fn ms(ms: f64) -> Self {
        Self(Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default())
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        match seconds {
            _ if seconds < 0.099_95 => write!(f, "{:.1} ms", seconds * 1e3),
            _ if seconds < 0.9995 => write!(f, "{:.0} ms", seconds * 1e3),
            _ if seconds < 99.95 => write!(f, "{seconds:.1} s"),
            _ => write!(f, "{seconds:.0} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_decimal_or_binary_as_they_are_written() {
        for (text, bytes) in [
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("64MB", 64_000_000),
            ("64 mb", 64_000_000),
            ("1.5g", 3 << 29),
            ("1.5GiB", 3 << 29),
            ("4096", 4096),
            ("100 B", 100),
            ("1T", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["12X", "", "-1M", "100MB/s", "99999999999T", "M"] {
            assert!(size(text).unwrap_err().contains("64M"), "{text}");
        }
    }

    #[test]
    fn rates_are_in_bytes_or_bits() {
        for (text, bytes) in [
            ("100M", 100 << 20),
            ("100M/s", 100 << 20),
            ("100MB/s", 100_000_000),
            ("100MBps", 100_000_000),
            ("1.5GiB/s", 3 << 29),
            ("10Gbit/s", 1_250_000_000),
            ("10 Gbit/s", 1_250_000_000),
            ("10Gbps", 1_250_000_000),
            ("10Gb/s", 1_250_000_000),
            ("400Mbits/s", 50_000_000),
            ("0", 0),
        ] {
            assert_eq!(rate(text), Ok(bytes), "{text}");
        }
        assert!(rate("100mb/s").unwrap_err().contains("bits or bytes"));
        assert!(rate("fast").unwrap_err().contains("100MB/s"));
    }

    #[test]
    fn shares_are_in_percent() {
        for (text, is) in [("80%", 80), ("0", 0), (" 99 % ", 99)] {
            assert_eq!(percent(text), Ok(is), "{text}");
        }
        for text in ["100%", "-1%", "", "%", "0.8", "256"] {
            assert!(percent(text).unwrap_err().contains("80%"), "{text}");
        }
    }

    #[test]
    fn times_have_units_and_may_have_fractions() {
        for (text, ms) in [
            ("300ms", 300),
            ("1.5s", 1500),
            ("0.5 min", 30_000),
            ("2min", 120_000),
            ("1h 30m", 5_400_000),
            ("0s", 0),
            ("24h", 86_400_000),
        ] {
            assert_eq!(time(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in [
            "18446744073709551615s",
            "18446744073709551615y",
            "99999999999999999999s",
            "1e400s",
            "24h 1ms",
        ] {
            time(text).unwrap_err();
        }
        assert!(time("2").unwrap_err().contains("300ms"));
        assert!(time("soon").unwrap_err().contains("300ms"));
    }

    #[test]
    fn three_digits_are_printed() {
        let printed = |bytes| Size(bytes).to_string();
        assert_eq!(printed(999), "999 B");
        assert_eq!(printed(64 << 20), "64.0 MiB");
        assert_eq!(printed(3 << 29), "1.50 GiB");
        assert_eq!(printed(785 << 20), "785 MiB");
        assert_eq!(printed(1 << 30), "1.00 GiB");
        assert_eq!(printed(1023 << 20), "1.00 GiB");
        assert_eq!(Time::ms(8.14).to_string(), "8.1 ms");
        assert_eq!(Time::ms(934.2).to_string(), "934 ms");
        assert_eq!(Time::ms(12_340.0).to_string(), "12.3 s");
        assert_eq!(Time::ms(f64::NAN).to_string(), "0.0 ms");
    }

    proptest! {
        #[test]
        fn what_is_printed_can_be_read_again(bytes in any::<u64>(), ms in 0u64..80_000_000) {
            let near = |a: f64, b: f64| (a - b).abs() <= a.max(b) * 0.006;
            prop_assert!(near(size(&Size(bytes).to_string()).unwrap() as f64, bytes as f64));
            prop_assert!(near(rate(&Rate(bytes).to_string()).unwrap() as f64, bytes as f64));
            let again = time(&Time(Duration::from_millis(ms)).to_string()).unwrap();
            prop_assert!(near(again.as_secs_f64(), ms as f64 / 1e3), "{again:?}");
        }

        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,24}", number in any::<u64>(), unit in "[a-zA-Z/. ]{0,6}") {
            for text in [text, format!("{number}{unit}"), format!("{number}.{number}{unit}")] {
                let _ = (size(&text), rate(&text), percent(&text));
                if let Ok(time) = time(&text) {
                    prop_assert!(time <= TIME_MAX);
                }
            }
        }
    }
}
