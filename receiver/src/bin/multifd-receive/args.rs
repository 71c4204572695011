//! The command line of `multifd-receive`.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::time::Duration;

use clap::{Parser, ValueEnum};
use multifd_receiver::Config;
use multifd_transport::Address;

/// Wait for a guest that multifd-send moves here, and run it.
///
/// One guest is taken over; after it has run here for a while its memory is checked (every word of it), and the program ends.
#[derive(Debug, Parser)]
#[command(name = "multifd-receive", version, about, long_about, after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Where to listen: HOST:PORT (port 0: any free one, see the first line of output), [IPV6]:PORT, or unix:/path
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4444")]
    pub(crate) listen: Address,

    /// How long the guest runs here before it is stopped and checked (e.g. 1s)
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    pub(crate) run_for: Duration,

    /// The most guest memory to accept (e.g. 64G). Default: whatever can be had
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_memory: Option<u64>,

    /// Give the source up when nothing is heard of it for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) stall: Duration,

    /// How long a new connection may take to say hello
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) hello_deadline: Duration,

    /// How the final report is printed: text for people, json for programs (one object on standard output, nothing else there)
    #[arg(long, value_enum, default_value_t = ReportKind::Text)]
    pub(crate) report: ReportKind,

    /// Stop waiting for a source when standard input ends: for whoever starts this program, and may be killed
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,

    /// No progress display
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  multifd-receive --listen 0.0.0.0:4444
  multifd-receive --listen unix:/run/multifd.sock --report json

Whoever reaches the address can send a guest: there is no encryption yet, so listen on
trusted networks only.

Exit status:
  0  the guest arrived, and its check passed
  1  failed; the guest is the source's
  2  wrong usage
  4  the guest was handed over but could not be run
  5  it arrived, but its check found an error

Log: RUST_LOG=info (or debug) writes to standard error.";

/// See `--report`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportKind {
    /// For people
    Text,
    /// One JSON object on standard output
    Json,
}

impl Args {
    /// The settings of the reception.
    pub(crate) fn reception(&self) -> anyhow::Result<Config> {
        Ok(Config::builder()
            .hello_deadline(self.hello_deadline)
            .stall(self.stall)
            .keep_alive(Duration::from_secs(1).min(self.stall / 4))
            .memory_bytes_max(self.max_memory)
            .build()?)
    }
}

/// A number of octets; K, M, G and T are powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let binary = parse_size::Config::new().with_binary();
    binary
        .parse_size(text)
        .map_err(|e| format!("{e}: write for example 64M or 1.5G"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
