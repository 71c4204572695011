//! The front door's public names, compared with a list that is committed, and counted beside those of the crates behind it.
//!
//! A name that is new, or gone, changes `names.txt` with it: `MULTIFD_BLESS=1 cargo test -p multifd --test names` writes it.
#![allow(clippy::print_stdout)] // the figures belong to the test's output

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What a public item may begin with.
const ITEMS: [&str; 8] = [
    "struct ",
    "enum ",
    "trait ",
    "fn ",
    "const fn ",
    "const ",
    "type ",
    "mod ",
];

/// The crates behind the door.
const BEHIND: [&str; 6] = [
    "sender",
    "receiver",
    "session",
    "wire",
    "transport",
    "tracking",
];

/// Names that a file makes public at its top level, by definition or by `pub use`.
fn names(file: &Path) -> Vec<String> {
    let text =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let mut lines = text.lines();
    let mut names = Vec::new();
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" {
            lines.next();
            continue;
        }
        let Some(item) = line.strip_prefix("pub ") else {
            continue;
        };
        if let Some(start) = item.strip_prefix("use ") {
            let mut list = start.to_owned();
            while !list.ends_with(';') {
                list.push_str(lines.next().expect("a use ends").trim());
            }
            names.extend(used(list.trim_end_matches(';')));
        } else if let Some(rest) = ITEMS.iter().find_map(|kind| item.strip_prefix(kind)) {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            names.push(rest[..end.unwrap_or(rest.len())].to_owned());
        }
    }
    names
}

/// The names that the list of a `use` gives.
fn used(list: &str) -> Vec<String> {
    let inner = match list.split_once('{') {
        Some((_, inner)) => inner.trim_end_matches('}'),
        None => list,
    };
    let names = inner
        .split(',')
        .map(|path| path.rsplit("::").next().unwrap_or(path));
    let names = names.map(|name| name.rsplit(" as ").next().unwrap_or(name).trim());
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn the_front_door_has_the_names_of_the_list_and_no_other() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut door = BTreeSet::new();
    for module in ["lib", "source", "destination", "transport", "tracking"] {
        let file = here.join("src").join(module).with_extension("rs");
        door.extend(names(&file).into_iter().map(|name| match module {
            "lib" => name,
            _ => format!("{module}::{name}"),
        }));
    }
    let mut behind = 0;
    for part in BEHIND {
        let mut files = Vec::new();
        sources(&here.join("..").join(part).join("src"), &mut files);
        let count: usize = files.iter().map(|file| names(file).len()).sum();
        println!("{part}: {count} names");
        behind += count;
    }
    println!("multifd: {} names beside {behind} behind it", door.len());
    let list: String = door.iter().map(|name| format!("{name}\n")).collect();
    let file = here.join("tests/names.txt");
    if std::env::var_os("MULTIFD_BLESS").is_some() {
        fs::write(&file, &list).expect("writable");
    }
    let committed = fs::read_to_string(&file).expect("names.txt");
    assert_eq!(list, committed, "see the head of this file");
    assert!(behind > 3 * door.len(), "the door is as wide as the house");
}
