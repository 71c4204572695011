//! The shape of the workspace, as docs/architecture.md and CONTRIBUTING.md promise it, checked against what cargo and the files say.
//!
//! Nothing is built here: `cargo metadata` describes the packages, and the files are read as text. A rule that fails names the
//! package or file that breaks it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which of our packages each of our packages may depend on. `multifd-tests` may depend on all of them.
///
/// The stream format, the channels and the tracking do not know each other, so that each can be read, tested and replaced alone.
/// Nobody but the programs and the tests (and embedders) depends on the two sides.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("multifd-wire", &[]),
    ("multifd-transport", &[]),
    ("multifd-tracking", &[]),
    // The protocol knows the format and nothing that does I/O.
    ("multifd-session", &["multifd-wire"]),
    ("multifd-bridge", &["multifd-wire", "multifd-transport"]),
    ("multifd-confine", &["multifd-transport"]),
    // Whoever owns a side may ask it, and is no part of it.
    (
        "multifd-control",
        &[
            "multifd-wire",
            "multifd-transport",
            "multifd-sender",
            "multifd-receiver",
        ],
    ),
    (
        "multifd-guest",
        &["multifd-tracking", "multifd-transport", "multifd-wire"],
    ),
    (
        "multifd-sender",
        &[
            "multifd-session",
            "multifd-wire",
            "multifd-transport",
            "multifd-tracking",
            "multifd-guest",
        ],
    ),
    (
        "multifd-receiver",
        // The tracking through the feature `vfio` only, whose devices it opens.
        &[
            "multifd-session",
            "multifd-wire",
            "multifd-transport",
            "multifd-tracking",
            "multifd-guest",
        ],
    ),
    (
        "multifd",
        &[
            "multifd-session",
            "multifd-wire",
            "multifd-transport",
            "multifd-tracking",
            "multifd-sender",
            "multifd-receiver",
        ],
    ),
    (
        "multifd-cli",
        &[
            "multifd-bridge",
            "multifd-confine",
            "multifd-control",
            "multifd-wire",
            "multifd-transport",
            "multifd-guest",
            "multifd-sender",
            "multifd-receiver",
        ],
    ),
    // The program's flags come from `cli`; the library, which VMMs embed, has the front door only.
    (
        "multifd-engine",
        &["multifd", "multifd-cli", "multifd-confine"],
    ),
    // An embedder's view: the front door and nothing behind it.
    ("multifd-vmm", &["multifd"]),
    (
        "multifd-tests",
        &[
            "multifd-bridge",
            "multifd-wire",
            "multifd-transport",
            "multifd-tracking",
            "multifd-guest",
            "multifd-session",
            "multifd-sender",
            "multifd-receiver",
        ],
    ),
];

/// Crates in which the compiler forbids `unsafe` for good: no file of theirs can allow it again.
const WITHOUT_UNSAFE: &[&str] = &[
    "wire", "bridge", "session", "sender", "receiver", "confine", "control", "multifd", "cli",
    "engine",
];

/// Crates whose files may allow `unsafe`, one by one and with a reason.
const WITH_UNSAFE: &[&str] = &["transport", "tracking", "guest", "examples"];

/// The one file elsewhere: it stands in for the C library below simulated programs (docs/decisions/0017).
const INTERPOSER: &str = "tests/src/sim/interpose.rs";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package lies in the workspace")
        .to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What `cargo metadata` says. It changes nothing, Cargo.lock included.
fn metadata(arguments: &[&str]) -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo can be started");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {complaint}");
    serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON")
}

/// The packages of the workspace.
fn packages() -> Vec<Value> {
    let Value::Array(packages) = metadata(&["--no-deps"])["packages"].take() else {
        panic!("cargo metadata has no list of packages");
    };
    assert!(!packages.is_empty(), "a workspace without packages");
    packages
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

fn list<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

fn is_ours(dependency: &Value) -> bool {
    dependency["path"].is_string()
}

#[test]
fn packages_depend_on_each_other_only_in_the_allowed_directions() {
    for package in packages() {
        let name = text(&package, "name");
        let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(known, _)| *known == name) else {
            panic!(
                "{name} is new: say in MAY_DEPEND_ON, and in docs/architecture.md, what it may depend on"
            );
        };
        for dependency in list(&package, "dependencies").iter().filter(|d| is_ours(d)) {
            let on = text(dependency, "name");
            // A package names itself as a dev-dependency to turn its features on for its own tests.
            let itself = on == name && text(dependency, "kind") == "dev";
            assert!(
                itself || allowed.contains(&on),
                "{name} must not depend on {on}"
            );
        }
    }
}

#[test]
fn an_embedder_gets_the_two_sides_without_the_built_in_guest() {
    for package in packages() {
        let name = text(&package, "name");
        if !["multifd-sender", "multifd-receiver"].contains(&name) {
            continue;
        }
        let guest = list(&package, "dependencies")
            .iter()
            .find(|d| text(d, "name") == "multifd-guest" && d["kind"].is_null());
        if let Some(guest) = guest {
            assert_eq!(
                guest["optional"], true,
                "{name}: the guest comes with the feature `model` only"
            );
        }
        for target in list(&package, "targets") {
            assert!(
                !list(target, "kind").iter().any(|kind| kind == "bin"),
                "{name} is a library: programs are in multifd-cli"
            );
        }
    }
}

#[test]
fn every_package_states_its_licence_compiler_purpose_and_the_common_lints() {
    for package in packages() {
        let name = text(&package, "name");
        assert_eq!(
            text(&package, "license"),
            "Apache-2.0 OR BSD-3-Clause",
            "{name}"
        );
        assert!(
            !text(&package, "rust_version").is_empty(),
            "{name} has no rust-version"
        );
        assert!(
            text(&package, "description").len() > 10,
            "{name} has no description"
        );
        let manifest = read(Path::new(text(&package, "manifest_path")));
        let lints = manifest
            .split("\n[")
            .find_map(|section| section.strip_prefix("lints]\n"))
            .unwrap_or_default();
        assert!(
            lints.lines().any(|line| line.trim() == "workspace = true"),
            "{name} does not take the workspace's lints"
        );
    }
    for file in ["LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
        assert!(root().join(file).is_file(), "{file} is missing");
    }
}

#[test]
fn crates_without_unsafe_forbid_it() {
    for krate in WITHOUT_UNSAFE {
        let library = read(&root().join(krate).join("src/lib.rs"));
        assert!(
            library
                .lines()
                .any(|line| line == "#![forbid(unsafe_code)]"),
            "{krate}/src/lib.rs does not forbid unsafe code"
        );
    }
}

#[test]
fn the_protocol_denies_clocks_threads_locks_queues_and_sockets() {
    let library = read(&root().join("session/src/lib.rs"));
    assert!(
        library
            .lines()
            .any(|line| line == "#![deny(clippy::disallowed_types, clippy::disallowed_methods)]"),
        "session/src/lib.rs does not deny what its clippy.toml lists"
    );
    let list = read(&root().join("session/clippy.toml"));
    for path in [
        "std::time::Instant",
        "std::time::SystemTime",
        "std::thread::spawn",
        "std::sync::Mutex",
        "std::sync::RwLock",
        "std::sync::Condvar",
        "std::sync::mpsc::Receiver",
        "std::net::TcpStream",
        "std::fs::File",
    ] {
        assert!(
            list.contains(&format!("\"{path}\"")),
            "session/clippy.toml does not list {path}"
        );
    }
    for path in sources(&root().join("session/src")) {
        let source = read(&path);
        for level in ["allow", "expect"] {
            assert!(
                !source.contains(&format!("{level}(clippy::disallowed")),
                "{} lets itself off",
                path.display()
            );
        }
    }
}

/// Names of SPEC rules, such as `BACK-2`, in a line.
fn rules(line: &str) -> impl Iterator<Item = &str> {
    let words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words.filter(|word| {
        let (name, number) = word.split_once('-').unwrap_or_default();
        name.len() > 1
            && name.chars().all(|c| c.is_ascii_uppercase())
            && number.chars().all(|c| c.is_ascii_digit())
            && !number.is_empty()
    })
}

#[test]
fn drivers_cite_no_rule_of_the_protocol_but_those_that_the_architecture_lists() {
    let text = read(&root().join("docs/architecture.md"));
    let mut tables = 0;
    for driver in ["sender/src/driver", "receiver/src/driver"] {
        let head = format!("| rule of `{driver}` |");
        let Some(at) = text.find(&head) else {
            continue;
        };
        tables += 1;
        let rows = text[at..].lines().take_while(|line| line.starts_with('|'));
        let first_cells = rows.filter_map(|row| row.split('|').nth(1));
        let listed: BTreeSet<_> = first_cells.flat_map(rules).collect();
        let files = sources(&root().join(driver))
            .into_iter()
            .map(|path| read(&path));
        let files: Vec<_> = files.collect();
        // Tests may cite what they like.
        let product = |file: &str| file.find("mod tests {").unwrap_or(file.len());
        let cited = files.iter().flat_map(|file| file[..product(file)].lines());
        let cited = cited.filter(|line| line.contains("SPEC: ") || line.contains("(SPEC"));
        let cited: BTreeSet<_> = cited.flat_map(rules).collect();
        assert_eq!(
            cited, listed,
            "{driver} and its table in docs/architecture.md"
        );
    }
    assert_eq!(tables, 2, "docs/architecture.md has a table for each side");
}

#[test]
fn unsafe_is_allowed_only_file_by_file_in_the_crates_that_may() {
    // Put together, so that this file does not say it.
    let needles = ["allow", "expect"].map(|level| format!("{level}({}_code", "unsafe"));
    let mut allowing = 0;
    for path in sources(&root()) {
        let source = read(&path);
        if !needles
            .iter()
            .any(|needle| source.contains(needle.as_str()))
        {
            continue;
        }
        allowing += 1;
        let inside = path
            .strip_prefix(root())
            .expect("found below the root")
            .to_owned();
        let krate = inside
            .iter()
            .next()
            .and_then(|part| part.to_str())
            .unwrap_or_default();
        assert!(
            WITH_UNSAFE.contains(&krate) || inside == Path::new(INTERPOSER),
            "{} must not allow unsafe code",
            inside.display()
        );
        assert!(
            !inside.ends_with("src/lib.rs"),
            "{}: unsafe code is allowed file by file, not for a whole crate",
            inside.display()
        );
    }
    assert!(
        allowing > 0,
        "the search is broken: guest memory cannot be mapped without unsafe code"
    );
}

/// Every Rust source below `directory`, build results left out.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries =
        fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    for entry in entries {
        let path = entry.expect("a readable directory").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(sources(&path));
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    found
}

#[test]
fn every_dependency_has_a_line_in_the_decisions_and_a_version() {
    let directory = root().join("docs/decisions");
    let decisions: String = fs::read_dir(&directory)
        .expect("docs/decisions")
        .map(|entry| read(&entry.expect("a readable directory").path()))
        .collect();
    for package in packages() {
        for dependency in list(&package, "dependencies")
            .iter()
            .filter(|d| !is_ours(d))
        {
            let (name, on) = (text(&package, "name"), text(dependency, "name"));
            assert!(
                decisions.contains(&format!("`{on}`")),
                "{name} depends on {on}: say why in docs/decisions/"
            );
            assert_ne!(
                text(dependency, "req"),
                "*",
                "{name} depends on any version of {on}"
            );
        }
    }
}

#[test]
fn everything_that_is_built_in_comes_from_the_registry_under_a_licence_of_deny_toml() {
    let allowed = allowed_licences(&read(&root().join("deny.toml")));
    let all = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let packages = list(&all, "packages");
    assert!(
        packages.len() > MAY_DEPEND_ON.len(),
        "no dependencies were found"
    );
    for package in packages {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        let from = package["source"].as_str();
        assert!(
            from.is_none_or(
                |source| source == "registry+https://github.com/rust-lang/crates.io-index"
            ),
            "{name} comes from {from:?}"
        );
        assert!(
            permits(licence, &allowed),
            "{name} is under {licence:?}, which deny.toml does not allow"
        );
    }
}

/// The strings of `allow = [...]` in the section `[licenses]`.
fn allowed_licences(deny: &str) -> Vec<String> {
    let section = deny.split("\n[licenses]\n").nth(1).unwrap_or_default();
    let list = section.split("allow = [").nth(1).unwrap_or_default();
    let list = list.split("\n]").next().unwrap_or_default();
    let allowed: Vec<String> = list
        .split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    assert!(
        !allowed.is_empty(),
        "deny.toml has no list of licences where this test looks for it"
    );
    allowed
}

/// Whether a licence expression can be met with the allowed licences alone. The old `A/B` means `A OR B`.
fn permits(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    any_of(&mut rest, allowed).unwrap_or(false) && rest.is_empty()
}

/// `all { OR all }`; nothing if it is no expression.
fn any_of(words: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let mut met = all_of(words, allowed)?;
    while let Some(("OR", rest)) = words.split_first().map(|(word, rest)| (*word, rest)) {
        *words = rest;
        met |= all_of(words, allowed)?;
    }
    Some(met)
}

/// `one { AND one }`.
fn all_of(words: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let mut met = one(words, allowed)?;
    while let Some(("AND", rest)) = words.split_first().map(|(word, rest)| (*word, rest)) {
        *words = rest;
        met &= one(words, allowed)?;
    }
    Some(met)
}

/// A licence, a licence `WITH` an exception, or an expression in parentheses.
fn one(words: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let (first, rest) = words.split_first()?;
    *words = rest;
    if *first == "(" {
        let met = any_of(words, allowed)?;
        let (last, rest) = words.split_first()?;
        *words = rest;
        return (*last == ")").then_some(met);
    }
    let mut licence = (*first).to_owned();
    if let ["WITH", exception, rest @ ..] = words {
        licence = format!("{licence} WITH {exception}");
        *words = rest;
    }
    Some(allowed.contains(&licence))
}

#[test]
fn licence_expressions_mean_what_spdx_says() {
    let allowed = ["MIT", "BSD-3-Clause", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
    for good in [
        "MIT",
        "GPL-2.0 OR MIT",
        "GPL-2.0/MIT",
        "(MIT OR GPL-2.0) AND BSD-3-Clause",
        "GPL-2.0 AND GPL-3.0 OR MIT",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(permits(good, &allowed), "{good}");
    }
    for bad in [
        "",
        "GPL-2.0",
        "MIT AND GPL-2.0",
        "Apache-2.0",
        "MIT WITH LLVM-exception",
        "(MIT",
        "MIT GPL-2.0",
        "MIT OR",
        "(MIT OR GPL-2.0) AND GPL-3.0",
    ] {
        assert!(!permits(bad, &allowed), "{bad}");
    }
}
