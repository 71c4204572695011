//! The tables of fields in SPEC.md say what the code does: places, sizes and names are those of the vectors, whose octets the
//! decoder takes, and each bound is where the decoder begins to refuse.

use std::collections::BTreeSet;
use std::fs;

use multifd_wire::exercise::{Sample, check, reseal, reseal_hello, reserved_bits, samples};
use multifd_wire::{HEADER_BYTES, Hello, HelloReply, Kind};

use crate::support::{repository, vectors};

/// One row of a table of fields.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    offset: usize,
    octets: usize,
    name: String,
    bound: Bound,
    /// Whether the row is of an entry that is there many times.
    repeats: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Bound {
    Any,
    NotZero,
    Range(u64, u64),
    /// From the first to the second, by the third.
    Stepped(u64, u64, u64),
    /// What a rule says.
    Rule(String),
}

fn bound(text: &str) -> Bound {
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|_| panic!("{text}"));
    match text {
        "any" => Bound::Any,
        "not 0" => Bound::NotZero,
        _ => match (text.strip_prefix("see "), text.split_once(" to ")) {
            (Some(rule), _) => Bound::Rule(rule.to_string()),
            (_, Some((low, high))) => match high.split_once(" by ") {
                Some((high, step)) => Bound::Stepped(number(low), number(high), number(step)),
                None => Bound::Range(number(low), number(high)),
            },
            _ => Bound::Range(number(text), number(text)),
        },
    }
}

/// The first table of fields after a line of SPEC.md.
fn fields(after: &str) -> Vec<Field> {
    let text = fs::read_to_string(repository("SPEC.md")).unwrap();
    let (_, rest) = text
        .split_once(&format!("\n{after}"))
        .unwrap_or_else(|| panic!("no {after}"));
    let head = "| offset | octets | field | unit | bound | meaning |";
    let (_, rest) = rest.split_once(head).unwrap();
    rest.lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            assert_eq!(cells.len(), 6, "{after}: {line}");
            assert!(!cells[5].is_empty() || cells[2] == "reserved", "{line}");
            Field {
                offset: cells[0].trim_start_matches('+').parse().unwrap(),
                octets: cells[1].parse().unwrap(),
                name: cells[2].to_string(),
                bound: bound(cells[4]),
                repeats: cells[0].starts_with('+'),
            }
        })
        .collect()
}

/// The fields of a kind's table. VM_STATE has the table of CONFIG.
fn of_kind(kind: Kind) -> Vec<Field> {
    let kind = match kind {
        Kind::VmState => Kind::Config,
        kind => kind,
    };
    fields(&format!("### {} ({:#06x})\n", kind.name(), kind.code()))
}

/// The fields before the entries, and those of an entry.
fn parts(kind: Kind) -> (Vec<Field>, Vec<Field>) {
    let mut rows = of_kind(kind);
    if matches!(kind, Kind::Pages | Kind::Zeros | Kind::GiveBack) {
        rows.extend(runs());
    }
    rows.into_iter().partition(|field| !field.repeats)
}

fn runs() -> impl Iterator<Item = Field> {
    let rows = fields("Pages travel as runs");
    rows.into_iter().map(|field| Field {
        repeats: true,
        ..field
    })
}

fn bytes(fields: &[Field]) -> usize {
    fields.last().map_or(0, |last| last.offset + last.octets)
}

#[test]
fn fields_follow_one_another_each_at_a_multiple_of_its_size() {
    let mut tables: Vec<(String, Vec<Field>)> = vec![
        ("hello".into(), fields("## 5. Hello\n")),
        ("reply".into(), fields("### 5.1 The reply\n")),
        ("header".into(), fields("## 6. Frames\n")),
        ("parameter".into(), fields("### 4.1 Parameters\n")),
    ];
    for kind in Kind::ALL {
        let (before, entry) = parts(*kind);
        tables.push((kind.name().into(), before));
        tables.push((format!("{kind}, an entry"), entry));
    }
    for (name, table) in tables {
        let mut end = 0;
        for field in table {
            assert_eq!(field.offset, end, "{name}: {}", field.name);
            let aligned = !matches!(field.octets, 2 | 4 | 8) || end % field.octets == 0;
            // SPEC: GEN-2
            assert!(
                aligned || field.name == "reserved",
                "{name}: {}",
                field.name
            );
            end += field.octets;
        }
    }
}

#[test]
fn tables_have_the_sizes_of_the_table_of_kinds() {
    for kind in Kind::ALL {
        let (before, entry) = parts(*kind);
        let shape = kind.shape();
        if shape.table_min == shape.table_max {
            assert_eq!(bytes(&before), shape.table_min, "{kind}");
        } else if *kind != Kind::Pages && *kind != Kind::Abort {
            assert_eq!(bytes(&entry), shape.table_step, "{kind}");
            assert_eq!(
                shape.table_min % bytes(&entry),
                bytes(&before) % bytes(&entry),
                "{kind}"
            );
        }
    }
}

/// What is reserved in the text is reserved in the map from which every decoder is tested.
#[test]
fn reserved_octets_are_those_that_the_decoders_refuse() {
    for sample in samples() {
        let (before, entry) = parts(sample.kind);
        let table_bytes = sample.head.len() - HEADER_BYTES;
        let mut reserved = BTreeSet::new();
        let mut add = |base: usize, field: &Field| {
            if field.bound == Bound::Range(0, 0) {
                reserved.extend(base + field.offset..base + field.offset + field.octets);
            }
        };
        before.iter().for_each(|field| add(0, field));
        if matches!(
            sample.kind,
            Kind::Regions | Kind::Devices | Kind::Credit | Kind::StreamCredit
        ) {
            for base in (bytes(&before)..table_bytes).step_by(bytes(&entry)) {
                entry.iter().for_each(|field| add(base, field));
            }
        }
        let mut whole: BTreeSet<usize> = BTreeSet::new();
        let bits = reserved_bits(sample.kind, table_bytes);
        for offset in 0..table_bytes {
            if bits.iter().filter(|(at, _)| *at == offset).count() == 8 {
                whole.insert(offset);
            }
        }
        // The upper octets of a field of flags are reserved, and named with it.
        assert!(reserved.is_subset(&whole), "{}", sample.name);
        let flags: BTreeSet<usize> = whole.difference(&reserved).copied().collect();
        for offset in flags {
            let at = match offset.checked_sub(bytes(&before)) {
                Some(inside) if !entry.is_empty() => inside % bytes(&entry),
                _ => offset,
            };
            let named = before.iter().chain(&entry).any(|field| {
                field.name == "flags" && (field.offset..field.offset + field.octets).contains(&at)
            });
            assert!(
                named,
                "{}: octet {offset} is not said to be reserved",
                sample.name
            );
        }
    }
}

/// The fields of a vector's table as its remarks name them: size and name, reserved ones joined.
fn remarked(name: &str) -> Vec<(usize, String)> {
    let path = repository("tests/vectors").join(format!("{name}.txt"));
    let text = fs::read_to_string(path).unwrap();
    let (_, octets) = text.split_once("\noctets:\n").unwrap();
    let mut seen: Vec<(usize, String)> = Vec::new();
    for line in octets.lines() {
        let (pairs, remark) = line.split_once(';').unwrap_or((line, ""));
        let pairs = pairs.trim();
        let count = match pairs.split_once(" * ") {
            Some((_, count)) => count.parse().unwrap(),
            None => pairs.split_whitespace().count(),
        };
        let remark = remark.trim();
        let field = remark
            .split(" = ")
            .next()
            .unwrap()
            .trim_start_matches("run.");
        match seen.last_mut() {
            Some(last) if remark.is_empty() || field == last.1 && field == "reserved" => {
                last.0 += count;
            }
            Some(last) if field.strip_prefix("rest of ") == Some(&last.1) => last.0 += count,
            _ => seen.push((count, field.trim_end_matches(" (no octets)").to_string())),
        }
    }
    seen
}

#[test]
fn fields_have_the_sizes_and_names_of_the_vectors() {
    for sample in samples() {
        let (before, entry) = parts(sample.kind);
        let seen = remarked(sample.name);
        // The header comes first: eight fields, of which the second is reserved and followed by a size.
        let mut seen = seen.into_iter().skip(8).peekable();
        let mut expect = |field: &Field, more: usize| {
            let (octets, name) = seen.next().unwrap();
            assert_eq!(
                (octets, name),
                (field.octets + more, field.name.clone()),
                "{}",
                sample.name
            );
        };
        let mut rows: Vec<Field> = before.clone();
        if !entry.is_empty() {
            let end = sample.head.len() - HEADER_BYTES;
            let crcs = match sample.kind {
                Kind::Pages => sample.body.len() / 1024,
                _ => 0,
            };
            let entries = (end - bytes(&before) - crcs) / bytes(&entry);
            rows.extend((0..entries).flat_map(|_| entry.clone()));
        }
        let mut rows = rows.into_iter().peekable();
        while let Some(field) = rows.next() {
            let mut more = 0;
            while field.name == "reserved"
                && rows.peek().is_some_and(|next| next.name == "reserved")
            {
                more += rows.next().unwrap().octets;
            }
            expect(&field, more);
        }
    }
}

/// Values at and beside a bound: those that must be taken and those that must be refused, as far as the field can hold them.
fn trials(field: &Field) -> (Vec<u64>, Vec<u64>) {
    let most = match field.octets {
        8.. => u64::MAX,
        octets => (1 << (8 * octets)) - 1,
    };
    match field.bound {
        Bound::Any => (vec![0, most], vec![]),
        Bound::NotZero => (vec![most], vec![0]),
        Bound::Range(low, high) => {
            let below = low.checked_sub(1);
            let above = high.checked_add(1).filter(|above| *above <= most);
            (vec![low, high], below.into_iter().chain(above).collect())
        }
        Bound::Stepped(low, high, step) => (
            vec![low, low + step, high],
            vec![low - step, low - 1, low + 1, high + 1, high + step],
        ),
        Bound::Rule(_) => (vec![], vec![]),
    }
}

fn put(octets: &mut [u8], at: usize, bytes: usize, value: u64) {
    let value = value.to_le_bytes();
    for (place, octet) in octets[at..at + bytes].iter_mut().zip(value.iter().cycle()) {
        *place = *octet;
    }
}

fn is_taken(sample: &Sample, at: usize, octets: usize, value: u64) -> bool {
    let mut head = sample.head.clone();
    put(&mut head, HEADER_BYTES + at, octets, value);
    reseal(&mut head);
    head.extend_from_slice(&sample.body);
    check(&head).is_ok()
}

#[test]
fn each_bound_is_where_the_decoder_begins_to_refuse() {
    let mut tried = 0;
    for sample in samples() {
        let (before, entry) = parts(sample.kind);
        let end = sample.head.len() - HEADER_BYTES;
        let has_entries = !entry.is_empty() && end > bytes(&before);
        for field in before.iter().chain(entry.iter().filter(|_| has_entries)) {
            let base = if field.repeats { bytes(&before) } else { 0 };
            let (taken, refused) = trials(field);
            // Sums and ranges of the other fields forbid some of what a run's own bounds allow.
            let others = ["count", "blob_bytes", "name_bytes", "offset_max", "mark"];
            let in_order = field.name == "lane" && sample.kind == Kind::Landed;
            let alone = !in_order && !others.contains(&field.name.as_str());
            for value in taken.into_iter().filter(|_| alone) {
                let is_taken = is_taken(&sample, base + field.offset, field.octets, value);
                assert!(
                    is_taken,
                    "{}: {} = {value} is refused",
                    sample.name, field.name
                );
                tried += 1;
            }
            for value in refused {
                let is_taken = is_taken(&sample, base + field.offset, field.octets, value);
                assert!(
                    !is_taken,
                    "{}: {} = {value} is taken",
                    sample.name, field.name
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 200, "only {tried} values were tried");
}

#[test]
fn each_bound_of_hello_and_reply_is_where_the_decoder_begins_to_refuse() {
    type Taken = fn(&[u8]) -> bool;
    let hello: Taken = |octets| Hello::decode(octets.try_into().unwrap()).is_ok();
    let reply: Taken = |octets| HelloReply::decode(octets.try_into().unwrap()).is_ok();
    for (heading, vector, is_taken) in [
        ("## 5. Hello\n", "hello-join", hello),
        ("### 5.1 The reply\n", "reply-accepted", reply),
    ] {
        let vector = vectors().into_iter().find(|v| v.name == vector).unwrap();
        for field in fields(heading) {
            let (taken, refused) = trials(&field);
            for (value, expected) in taken
                .into_iter()
                .map(|value| (value, true))
                .chain(refused.into_iter().map(|value| (value, false)))
            {
                let mut octets = vector.octets.clone();
                put(&mut octets, field.offset, field.octets, value);
                reseal_hello(&mut octets);
                assert_eq!(
                    is_taken(&octets),
                    expected,
                    "{heading}{} = {value}",
                    field.name
                );
            }
        }
    }
}

/// A bound that is a rule has a vector that breaks it.
#[test]
fn each_rule_that_is_a_bound_has_a_vector_that_is_refused() {
    let broken: BTreeSet<String> = vectors()
        .into_iter()
        .filter(|vector| vector.structure != "session" && vector.expect != "accept")
        .flat_map(|vector| vector.spec)
        .collect();
    let mut rows = [
        fields("## 5. Hello\n"),
        fields("### 5.1 The reply\n"),
        fields("## 6. Frames\n"),
        fields("### 4.1 Parameters\n"),
    ]
    .concat();
    rows.extend(Kind::ALL.iter().flat_map(|kind| of_kind(*kind)));
    let missing: BTreeSet<String> = rows
        .into_iter()
        .filter_map(|field| match field.bound {
            Bound::Rule(rule) => (!broken.contains(&rule)).then_some(rule),
            _ => None,
        })
        .collect();
    assert!(missing.is_empty(), "no vector breaks {missing:?}");
}
