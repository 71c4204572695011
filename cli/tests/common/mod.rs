//! Running a program of this package to its end, and what both programs promise about their flags.
#![allow(dead_code)] // Each test program uses a part of it.

use std::process::{Command, Output};

/// A program as the user starts it, without what the environment may say about the log.
pub(crate) fn program(path: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command.args(arguments).env_remove("RUST_LOG");
    command
}

pub(crate) fn run(path: &str, arguments: &[&str]) -> Output {
    let output = program(path, arguments).output();
    output.expect("cargo built it with this test")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// `--help` names exactly these flags, and these exit statuses. Gives the text.
pub(crate) fn help_of(path: &str, flags: &[&str], statuses: &[u8]) -> String {
    let output = run(path, &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = text(&output.stdout);
    for flag in flags {
        assert!(help.contains(flag), "{flag} is not in:\n{help}");
    }
    // And the other way round: no flag is shown that this list does not know.
    let (shown, _) = help.split_once("Examples:").expect("examples");
    for word in shown
        .split_whitespace()
        .filter(|word| word.starts_with("--"))
    {
        let flag = word
            .trim_end_matches([',', '.', ':', ')'])
            .trim_end_matches("'s");
        assert!(flags.contains(&flag), "{flag} is new: add it to FLAGS");
    }
    let (_, listed) = help.split_once("Exit status:").expect("a list of them");
    for status in statuses {
        let line = format!("\n  {status}  ");
        assert!(listed.contains(&line), "status {status} is not in:\n{help}");
    }
    help
}

/// Each of these is wrong usage: status 2, nothing on standard output, and what would be right on the other.
pub(crate) fn refuses(path: &str, cases: &[(&[&str], &str)]) {
    for (arguments, advice) in cases {
        let output = run(path, arguments);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {errors}");
        assert!(
            errors.contains(advice),
            "{arguments:?}: no {advice:?} in {errors}"
        );
        assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
    }
}
