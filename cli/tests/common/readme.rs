//! The tables of exit states in README.md, as the programs' own tests hold them against what they do.

use std::collections::BTreeSet;

/// The rows of the table whose first column is this program: exit status and outcome.
pub(crate) fn exit_states(program: &str) -> BTreeSet<(u8, String)> {
    let readme = include_str!("../../../README.md");
    let head = format!("| `{program}` | `outcome` in the report |");
    let (_, table) = readme.split_once(&head).expect("the table is there");
    table
        .lines()
        .skip(2)
        .map_while(|line| line.strip_prefix("| "))
        .map(|line| {
            let mut cells = line.split(" | ");
            let status = cells.next().and_then(|cell| cell.parse().ok());
            let outcome = cells.next().and_then(|cell| cell.split('`').nth(1));
            let (Some(status), Some(outcome)) = (status, outcome) else {
                panic!("no status and outcome in: {line}");
            };
            (status, outcome.to_owned())
        })
        .collect()
}
