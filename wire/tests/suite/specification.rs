//! SPEC.md and the code say the same: rules that are cited exist, and the tables are those of the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use multifd_wire::exercise::samples;
use multifd_wire::kind::Senders;
use multifd_wire::limits;
use multifd_wire::{HEADER_BYTES, Kind, Phase, Reason, Text};

use crate::support::{repository, vectors};

fn specification() -> String {
    fs::read_to_string(repository("SPEC.md")).unwrap()
}

/// The rules that SPEC.md defines: a name in bold, at the start of a paragraph or a table row.
fn defined() -> Vec<String> {
    let text = specification();
    let rule = |line: &str| {
        let name = line
            .trim_start_matches("| ")
            .strip_prefix("**")?
            .split_once("**")?
            .0;
        is_rule(name).then(|| name.to_string())
    };
    text.lines().filter_map(rule).collect()
}

/// Whether a word has the form of a rule's name: capital letters, a hyphen, a number.
fn is_rule(word: &str) -> bool {
    word.split_once('-').is_some_and(|(name, number)| {
        !name.is_empty()
            && name.bytes().all(|octet| octet.is_ascii_uppercase())
            && !number.is_empty()
            && number.bytes().all(|octet| octet.is_ascii_digit())
    })
}

/// The rules named in a text after each `SPEC: `, and whatever of rule form follows directly, separated by commas.
fn cited(text: &str) -> Vec<String> {
    let mut rules = Vec::new();
    for after in text.split("SPEC: ").skip(1) {
        for word in after
            .split([' ', ',', ')', '`', '.', ';', ':', '\n'])
            .filter(|w| !w.is_empty())
        {
            if !is_rule(word) {
                break;
            }
            rules.push(word.to_string());
        }
    }
    rules
}

/// Every Rust file below a folder.
fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn each_rule_has_one_definition_and_numbers_have_no_gaps() {
    let mut groups: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for rule in defined() {
        let (group, number) = rule.split_once('-').unwrap();
        let fresh = groups
            .entry(group.to_string())
            .or_default()
            .insert(number.parse().unwrap());
        assert!(fresh, "{rule} is defined twice");
    }
    assert!(groups.len() > 30, "only {} groups of rules", groups.len());
    for (group, numbers) in groups {
        let last = u32::try_from(numbers.len()).unwrap();
        assert_eq!(numbers.last(), Some(&last), "{group} has a gap");
    }
}

#[test]
fn each_rule_that_the_code_and_the_vectors_cite_is_defined() {
    let defined: BTreeSet<String> = defined().into_iter().collect();
    let mut count = 0;
    for file in code() {
        for rule in cited(&fs::read_to_string(&file).unwrap()) {
            assert!(defined.contains(&rule), "{} cites {rule}", file.display());
            count += 1;
        }
    }
    assert!(count > 150, "only {count} citations were found");
    for vector in vectors() {
        for rule in &vector.spec {
            assert!(
                defined.contains(rule),
                "vector {} cites {rule}",
                vector.name
            );
        }
    }
}

/// The Rust files of the repository's own packages.
fn code() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in fs::read_dir(repository("")).unwrap() {
        let folder = folder.unwrap().path();
        if folder.join("Cargo.toml").exists() {
            sources(&folder, &mut files);
        }
    }
    files
}

/// Which part of a file's citations are a test's: all of a file of tests, and those that stand at a test inside another.
fn cited_by_tests(path: &Path, text: &str) -> Vec<String> {
    let inside = path.strip_prefix(repository("")).unwrap();
    let of_tests =
        |part: &std::ffi::OsStr| ["tests", "fuzz", "tests.rs"].contains(&part.to_str().unwrap());
    if inside.iter().any(of_tests) {
        return cited(text);
    }
    let (_, module) = text
        .split_once("#[cfg(test)]\nmod tests")
        .unwrap_or_default();
    let mut rules = cited(module);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    for (at, line) in lines.iter().enumerate() {
        let next = lines[at..].iter().find(|line| !line.starts_with("//"));
        if line.starts_with("//") && next == Some(&"#[test]") {
            rules.extend(cited(line));
        }
    }
    rules
}

/// A rule that nothing cites is one that nobody keeps on purpose; one that no test cites, one that nobody would miss.
#[test]
fn each_rule_is_cited_by_a_test_or_a_vector_or_says_why_not() {
    let mut tested: BTreeSet<String> = vectors()
        .into_iter()
        .flat_map(|vector| vector.spec)
        .collect();
    for file in code() {
        let text = fs::read_to_string(&file).unwrap();
        tested.extend(cited_by_tests(&file, &text));
    }
    let list = fs::read_to_string(repository("wire/tests/suite/untested.txt")).unwrap();
    let excused: BTreeMap<&str, &str> = list
        .lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(rule, _)| is_rule(rule))
        .collect();
    let defined: BTreeSet<String> = defined().into_iter().collect();
    for (rule, why) in &excused {
        assert!(defined.contains(*rule), "untested.txt names {rule}");
        assert!(
            !why.trim().is_empty(),
            "untested.txt does not say why of {rule}"
        );
    }
    let missing: Vec<&String> = defined
        .iter()
        .filter(|rule| !tested.contains(*rule) && !excused.contains_key(rule.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "cited by no test and no vector, and not in untested.txt: {missing:?}"
    );
}

/// A rule of form can be shown to whoever reads the vectors: octets that break it.
#[test]
fn each_rule_of_form_has_a_vector_that_breaks_it() {
    let broken: BTreeSet<String> = vectors()
        .into_iter()
        .filter(|vector| vector.structure != "session" && vector.expect != "accept")
        .flat_map(|vector| vector.spec)
        .collect();
    // They are checked below this protocol.
    let of_form = marks()
        .into_iter()
        .filter(|(rule, mark)| *mark == 'F' && !rule.starts_with("BELOW-"));
    let missing: Vec<String> = of_form
        .map(|(rule, _)| rule)
        .filter(|rule| !broken.contains(rule))
        .collect();
    assert!(missing.is_empty(), "no vector breaks {missing:?}");
}

#[test]
fn each_rule_that_the_text_refers_to_is_defined() {
    let defined: BTreeSet<String> = defined().into_iter().collect();
    let text = specification();
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
    for word in words.filter(|word| is_rule(word)) {
        // Names of other documents and of algorithms have the same form.
        if !["CRC-32", "UTF-8", "BCP-14", "RFC-2119"].contains(&word) {
            assert!(defined.contains(word), "SPEC.md refers to {word}");
        }
    }
}

/// The rows of the table under a heading, cells trimmed, without the two lines of its head.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = specification();
    let after = text
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no {heading}"))
        .1;
    let lines = after.lines().skip_while(|line| !line.starts_with('|'));
    let rows = lines.take_while(|line| line.starts_with('|')).skip(2);
    let cells = |line: &str| {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_string())
            .collect()
    };
    rows.map(cells).collect()
}

/// A size or a range of sizes as the table of kinds prints it.
fn range(min: usize, max: usize, step: usize) -> String {
    match (min == max, step) {
        (true, _) => format!("{min}"),
        (false, 1) => format!("{min} to {max}"),
        (false, step) => format!("{min} to {max} by {step}"),
    }
}

#[test]
fn table_of_kinds_is_that_of_the_code() {
    let expected: Vec<Vec<String>> = Kind::ALL
        .iter()
        .map(|kind| {
            let shape = kind.shape();
            let from = match kind.senders() {
                Senders::Source => "source",
                Senders::Destination => "destination",
                Senders::Both => "both",
            };
            let phases: Vec<&str> = kind.phases().iter().map(|phase| phase.text()).collect();
            let body_step = if *kind == Kind::Pages { 4096 } else { 1 };
            vec![
                format!("`{:#06x}`", kind.code()),
                kind.name().to_string(),
                from.to_string(),
                kind.channel().unwrap().to_string(),
                phases.join(", "),
                range(shape.table_min, shape.table_max, shape.table_step),
                range(shape.body.min(), shape.body.max(), body_step),
            ]
        })
        .collect();
    let print = expected
        .iter()
        .map(|row| format!("| {} |", row.join(" | ")));
    assert_eq!(
        table("## 8. Frame kinds"),
        expected,
        "\n{}",
        print.collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn table_of_reasons_is_that_of_the_code() {
    let expected: Vec<Vec<String>> = Reason::ALL
        .iter()
        .map(|reason| {
            vec![
                reason.as_u32().to_string(),
                reason.text().to_string(),
                reason.advice().to_string(),
            ]
        })
        .collect();
    let print = expected
        .iter()
        .map(|row| format!("| {} |", row.join(" | ")));
    assert_eq!(
        table("### 17.2 Reasons"),
        expected,
        "\n{}",
        print.collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn table_of_phases_is_that_of_the_code() {
    let seen: Vec<(String, String)> = table("## 9. Phases")
        .into_iter()
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    let expected: Vec<(String, String)> = Phase::ALL
        .iter()
        .map(|phase| (phase.as_u32().to_string(), phase.text().to_string()))
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn table_of_limits_is_that_of_the_code() {
    let wide = |value: usize| u64::try_from(value).unwrap();
    let expected: Vec<Vec<String>> = [
        ("TABLE_BYTES_MAX", wide(limits::TABLE_BYTES_MAX)),
        ("BODY_BYTES_MAX", wide(limits::BODY_BYTES_MAX)),
        ("PAGES_PER_FRAME_MAX", wide(limits::PAGES_PER_FRAME_MAX)),
        ("RUNS_PER_PAGES_MAX", wide(limits::RUNS_PER_PAGES_MAX)),
        ("RUNS_PER_ZEROS_MAX", wide(limits::RUNS_PER_ZEROS_MAX)),
        (
            "RUNS_PER_GIVE_BACK_MAX",
            wide(limits::RUNS_PER_GIVE_BACK_MAX),
        ),
        ("REGIONS_MAX", wide(limits::REGIONS_MAX)),
        ("DEVICES_MAX", wide(limits::DEVICES_MAX)),
        ("LANES_MAX", wide(limits::LANES_MAX)),
        ("BLOB_BYTES_MAX", limits::BLOB_BYTES_MAX),
        ("BLOBS_MAX", wide(limits::BLOBS_MAX)),
        ("TEXT_BYTES_MAX", wide(limits::TEXT_BYTES_MAX)),
        ("REPLY_TEXT_BYTES_MAX", wide(limits::REPLY_TEXT_BYTES_MAX)),
        ("DEVICE_NAME_BYTES_MAX", wide(limits::DEVICE_NAME_BYTES_MAX)),
        ("MEMORY_PAGES_MAX", limits::MEMORY_PAGES_MAX),
        ("ROUND_MAX", u64::from(limits::ROUND_MAX)),
        ("DEVICE_STREAM_BYTES_MAX", limits::DEVICE_STREAM_BYTES_MAX),
        ("STREAMS_MAX", wide(limits::STREAMS_MAX)),
        ("STREAM_BYTES_MAX", limits::STREAM_BYTES_MAX),
        ("STREAM_CREDITS_MAX", wide(limits::STREAM_CREDITS_MAX)),
        ("PARAMETERS_MAX", wide(limits::PARAMETERS_MAX)),
    ]
    .iter()
    .zip(1..)
    .map(|((name, value), number)| {
        vec![
            format!("**LIMIT-{number}**"),
            name.to_string(),
            value.to_string(),
        ]
    })
    .collect();
    let seen: Vec<Vec<String>> = table("## 18. Limits")
        .into_iter()
        .map(|row| row[..3].to_vec())
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn each_diagram_of_the_code_stands_in_the_text() {
    let text = specification();
    let text: Vec<&str> = text.lines().map(str::trim_end).collect();
    let mut files = Vec::new();
    sources(&repository("wire/src/frame"), &mut files);
    files.extend(
        ["header.rs", "hello.rs", "hello_reply.rs"].map(|file| repository("wire/src").join(file)),
    );
    let mut diagrams = 0;
    for file in files {
        let code = fs::read_to_string(&file).unwrap();
        let Some((_, after)) = code.split_once("//! ```text\n") else {
            continue;
        };
        let lines: Vec<&str> = after
            .lines()
            .take_while(|line| *line != "//! ```")
            .map(|line| {
                line.trim_start_matches("//!")
                    .strip_prefix(' ')
                    .unwrap_or("")
                    .trim_end()
            })
            .collect();
        if !lines.iter().any(|line| line.contains("+-------")) {
            continue;
        }
        let found = text.windows(lines.len()).any(|window| window == lines);
        assert!(
            found,
            "the diagram of {} is not in SPEC.md:\n{}",
            file.display(),
            lines.join("\n")
        );
        diagrams += 1;
    }
    assert!(diagrams >= 30, "only {diagrams} diagrams were compared");
}

/// Whoever writes a reader has no table of Unicode at hand: the text has the code points, and the code refuses those.
// SPEC: TEXT-1
#[test]
fn characters_that_nobody_sees_are_those_of_the_text() {
    let text = specification();
    let (_, rule) = text.split_once("code points (hexadecimal) ").unwrap();
    let (list, _) = rule.split_once(", whether").unwrap();
    let code = |digits: &str| u32::from_str_radix(digits, 16).unwrap();
    let ranges: Vec<(u32, u32)> = list
        .split([',', '\n', ' '])
        .filter(|range| !range.is_empty())
        .map(|range| range.split_once('-').unwrap_or((range, range)))
        .map(|(first, last)| (code(first), code(last)))
        .collect();
    assert!(ranges.len() > 20, "{ranges:?}");
    for character in char::MIN..=char::MAX {
        let point = u32::from(character);
        let listed = ranges
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&point));
        let refused = Text::<4>::new(character.encode_utf8(&mut [0; 4])).is_err();
        assert_eq!(refused, listed, "U+{point:04X}");
    }
}

#[test]
fn each_kind_has_a_section() {
    let text = specification();
    for kind in Kind::ALL {
        let heading = format!("### {} ({:#06x})", kind.name(), kind.code());
        assert!(text.contains(&heading), "no section {heading}");
    }
}

/// Who keeps a rule, as its mark says.
fn marks() -> BTreeMap<String, char> {
    let text = specification();
    let rule = |line: &str| {
        let (name, rest) = line.strip_prefix("**")?.split_once("** ")?;
        let (mark, _) = rest.split_once(' ')?;
        let mark = mark.chars().next().filter(|_| mark.len() == 1);
        is_rule(name).then(|| (name.to_string(), mark.unwrap_or('?')))
    };
    text.lines().filter_map(rule).collect()
}

/// All marks of a rule: the one behind its name, and those in brackets.
fn marks_of(rule: &str) -> BTreeSet<char> {
    let text = specification();
    let (_, after) = text.split_once(&format!("\n**{rule}** ")).unwrap();
    let (paragraph, _) = after.split_once("\n\n").unwrap();
    let inside = ['F', 'S', 'K', 'M'].into_iter();
    let inside = inside.filter(|mark| paragraph.contains(&format!("({mark})")));
    paragraph.chars().take(1).chain(inside).collect()
}

/// What a reader has to find out can be shown to whoever writes one: a session that breaks it.
#[test]
fn each_rule_of_session_has_a_vector_that_breaks_it() {
    let elsewhere = [
        "RESUME-12", // nobody can see that what is said once more was lost
        "SEC-7",     // a pass is not on the wire but where it is shown
    ];
    let broken: BTreeSet<String> = vectors()
        .into_iter()
        .filter(|vector| vector.expect != "accept" || vector.name == "session-refusals")
        .flat_map(|vector| vector.spec)
        .collect();
    let missing: Vec<String> = defined()
        .into_iter()
        // No vector is below this protocol, and none is of section 22 as a whole.
        .filter(|rule| !["LIMIT", "BELOW", "CARRY"].contains(&rule.split_once('-').unwrap().0))
        .filter(|rule| marks_of(rule).contains(&'S') && !broken.contains(rule))
        .filter(|rule| !elsewhere.contains(&rule.as_str()))
        .collect();
    assert!(missing.is_empty(), "no vector breaks {missing:?}");
}

/// A stranger judges a reader by the illegal sessions: what the text leaves to the writer is not asked of a reader, and the other way round.
#[test]
fn each_illegal_session_is_for_the_reader_if_the_mark_of_its_rule_says_so() {
    let illegal = vectors()
        .into_iter()
        .filter(|vector| vector.name.starts_with("illegal-"));
    for vector in illegal {
        let marks = marks_of(&vector.spec[0]);
        let fits = match vector.expect.as_str() {
            "kept" => marks.contains(&'K') || marks.contains(&'M'),
            _ => marks.contains(&'S'),
        };
        let name = &vector.name;
        assert!(fits, "{name}: {} is {marks:?}", vector.spec[0]);
    }
}

#[test]
fn each_rule_says_who_keeps_it() {
    let marks = marks();
    for rule in defined() {
        if !rule.starts_with("LIMIT-") {
            let mark = marks.get(&rule);
            assert!(
                mark.is_some_and(|mark| "FSKM".contains(*mark)),
                "{rule}: {mark:?}"
            );
        }
    }
}

/// A drawing and a structure cannot differ in size unseen: the table of a kind of fixed size is as long as its sample.
#[test]
fn fixed_tables_have_the_size_that_the_table_of_kinds_says() {
    for sample in samples() {
        let shape = sample.kind.shape();
        if shape.table_min == shape.table_max {
            assert_eq!(
                sample.head.len(),
                HEADER_BYTES + shape.table_min,
                "{}",
                sample.kind
            );
        }
    }
}
