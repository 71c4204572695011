//! Words for the user, on standard output and standard error.
//!
//! The rule it keeps: an output that can't be written (a full disk, a pipe that nobody reads) never ends the program, since a guest
//! lives in it. `println!` would panic.

use std::fmt::Arguments;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

/// It was said that standard output can't be written.
static TOLD: AtomicBool = AtomicBool::new(false);

/// A line on standard output. If it can't be written, that is told on standard error, once.
pub fn out(text: Arguments<'_>) {
    let mut output = io::stdout().lock();
    let written = writeln!(output, "{text}").and_then(|()| output.flush());
    if let Err(error) = written
        && !TOLD.swap(true, Ordering::Relaxed)
    {
        err(format_args!(
            "standard output can't be written ({error}): the exit status says how it ended"
        ));
    }
}

/// A line on standard error; whether it can be written changes nothing.
pub fn err(text: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// As `println!`, which it replaces in the programs.
#[macro_export]
macro_rules! out {
    ($($text:tt)*) => {
        $crate::say::out(format_args!($($text)*))
    };
}

/// As `eprintln!`, which it replaces in the programs.
#[macro_export]
macro_rules! err {
    ($($text:tt)*) => {
        $crate::say::err(format_args!($($text)*))
    };
}
