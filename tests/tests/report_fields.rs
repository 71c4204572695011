//! docs/report.md explains each field of the JSON reports in the words of the types that make them. `MULTIFD_WRITE=1` writes it anew.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

const HEAD: &str = "# The fields of the reports

Made from the types that are serialised (`cargo test -p multifd-tests --test report_fields`, which also compares; with `MULTIFD_WRITE=1` it writes this page). Both programs print such an object with
`--report json`, and an embedder gets the same from `Finished::report`. Names that end in `_ms` are milliseconds, in `_bytes` bytes, in `_s` seconds. What is null is not known, or did not come to pass.

The programs add: `guest_check` (what the built-in guest found when it checked itself: `passed`, `text`, `beats`), `source_guest_runs` (whether the built-in guest runs on at the source), and with `--loopback` `receiver`, the
destination's report.
";

/// Where the reports are, and which of their types come first.
const PARTS: &[(&str, &str)] = &[
    ("The source (`multifd-send`)", "sender/src/report.rs"),
    (
        "The destination (`multifd-receive`)",
        "receiver/src/report.rs",
    ),
    ("Both", "session/src/common/report.rs"),
];

/// Public fields of public types that are serialised, with the first paragraph of what is said of them.
fn tables(source: &str) -> String {
    let mut out = String::new();
    let (mut words, mut of_type, mut skipped, mut serialised) =
        (Vec::new(), String::new(), false, false);
    let mut inside = false;
    for line in source.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            words.push(text.trim().to_owned());
            continue;
        }
        if line.starts_with("#[") {
            serialised |= line.contains("derive") && line.contains("Serialize");
            skipped |= line == "#[serde(skip)]";
            continue;
        }
        let said = words.join(" ");
        words.clear();
        if let Some(name) = line.strip_prefix("pub struct ")
            && let Some(name) = name.strip_suffix(" {")
        {
            inside = serialised;
            of_type = name.to_owned();
            if inside {
                let _ = write!(
                    out,
                    "\n### {of_type}\n\n{said}\n\n| field | what it is |\n|---|---|\n"
                );
            }
        } else if line == "}" {
            inside = false;
        } else if let Some(field) = line.strip_prefix("pub ")
            && inside
            && !skipped
            && let Some((name, _)) = field.split_once(':')
        {
            assert!(!said.is_empty(), "{of_type}.{name} says nothing");
            let _ = writeln!(out, "| `{name}` | {said} |");
        }
        (skipped, serialised) = (false, false);
    }
    out
}

#[test]
fn the_page_of_the_reports_is_what_their_types_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut page = HEAD.to_owned();
    for (title, file) in PARTS {
        let source = fs::read_to_string(root.join(file)).unwrap();
        let _ = write!(page, "\n## {title}\n{}", tables(&source));
    }
    for field in ["downtime_ms", "round_list", "pages_cleared", "channel"] {
        assert!(page.contains(&format!("| `{field}` |")), "{field}");
    }
    let path = root.join("docs/report.md");
    if std::env::var_os("MULTIFD_WRITE").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == page,
        "docs/report.md is not what the types say: run this test with MULTIFD_WRITE=1"
    );
}
