//! `multifd-send --bridge`: another monitor's migration instead of the built-in guest's.

use anyhow::Context as _;
use multifd_bridge::cli::{self, Print, Way};
use multifd_cli::flags::ReportKind;
use multifd_cli::signals;

use crate::args::Args;

/// Carries it, and returns the exit status.
pub(crate) fn run(args: &Args) -> anyhow::Result<u8> {
    let way = args.way()?;
    let way = Way {
        control: way.control.context("--bridge needs --connect ADDRESS")?,
        data: way.data,
        channels: args.channels,
        options: way.options,
    };
    if cli::is_keeper() {
        return Ok(cli::keep(&way));
    }
    let stop = signals::catch(
        "multifd-send",
        "ending as soon as it is known where the guest is; SIGQUIT (Ctrl-\\) ends this program at once",
    )?;
    let print = match args.output.report() {
        ReportKind::Json => Print::Json,
        ReportKind::Text => Print::Text,
    };
    Ok(cli::send(&args.bridge, way, &stop, print))
}
