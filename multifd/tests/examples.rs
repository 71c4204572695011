//! Every example runs to its end, and checks what it shows by itself.
#![allow(clippy::print_stdout)] // what the examples say belongs to the test's output

use std::path::Path;
use std::process::Command;

/// The names of the files in `examples/`; a new one joins this list.
const EXAMPLES: [&str; 5] = [
    "devices",
    "in_process",
    "own_channel",
    "progress_and_cancel",
    "tcp_pair",
];

#[test]
fn every_example_runs() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut found: Vec<String> = std::fs::read_dir(here)
        .expect("examples/")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|end| end == "rs"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    found.sort();
    assert_eq!(found, EXAMPLES);
    // Cargo builds a package's examples with its tests: they are beside this test's own folder.
    let ours = std::env::current_exe().expect("a process knows its own file");
    let profile = ours.ancestors().nth(2).expect("target/<profile>");
    for name in EXAMPLES {
        let output = Command::new(profile.join("examples").join(name))
            .output()
            .unwrap_or_else(|error| {
                panic!("{name}: {error}: build it with `cargo test -p multifd`")
            });
        assert!(output.status.success(), "{name}: {output:?}");
        println!("{name}: {}", String::from_utf8_lossy(&output.stdout));
    }
}
