//! What `multifd-send`, `multifd-receive` and `multifd-ctl` share: the flags that they have in common, units as people write them, words
//! for the user, signals and the log. The programs are this package's binaries; the libraries of the two sides know nothing of it.
//!
//! | module | what it is |
//! |---|---|
//! | [`flags`] | flags that both programs have: kinds of channel, stall, output |
//! | [`tls`] | certificates, who the peer may be, what may go in clear text |
//! | [`confinement`] | `--confine`: what a program takes from itself |
//! | [`control`] | `--control`: the socket by which a migration is watched and steered |
//! | [`units`] | sizes, rates and times: read as people write them, printed in the same spelling |
//! | [`say`] | lines on standard output and standard error that can't end the program |
//! | [`signals`] | SIGINT, SIGTERM and SIGHUP ask for a cancellation, however often they come |
//! | [`start`] | the command line, the log, and the report of a program that did not begin |
//! | [`round_end`] | when the round under way ends |
//!
//! What it must never do: decide anything about a migration. That is the libraries' work.

#![forbid(unsafe_code)]

pub mod confinement;
pub mod control;
pub mod flags;
pub mod round_end;
#[macro_use]
pub mod say;
pub mod signals;
pub mod start;
pub mod tls;
pub mod units;

use std::path::Path;

/// The folder that a file is in.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => path,
    }
}
