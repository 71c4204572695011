//! Reading vectors, and small helpers that several files need.

use std::fs;
use std::path::{Path, PathBuf};

use multifd_wire::exercise::{Sample, check, reseal, samples};
use multifd_wire::header::HEADER_BYTES;
use multifd_wire::{Header, Malformed};

/// A file or folder of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join(path)
}

/// One vector, as `tests/vectors/README.md` describes it.
pub(crate) struct Vector {
    pub(crate) name: String,
    pub(crate) structure: String,
    pub(crate) expect: String,
    pub(crate) spec: Vec<String>,
    pub(crate) octets: Vec<u8>,
    /// The lines after the last key, for structures that are not octets.
    pub(crate) lines: Vec<String>,
}

/// All committed vectors.
pub(crate) fn vectors() -> Vec<Vector> {
    let folder = repository("tests/vectors");
    let mut vectors: Vec<Vector> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .map(|path| parse(&path))
        .collect();
    vectors.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!vectors.is_empty(), "no vectors in {}", folder.display());
    vectors
}

/// Reads one vector file; panics with the file's name where it does not follow the format.
fn parse(path: &Path) -> Vector {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    let mut key = |wanted: &str| {
        let line = lines.next().unwrap_or_default();
        let value = line
            .strip_prefix(wanted)
            .and_then(|rest| rest.strip_prefix(": "));
        value
            .unwrap_or_else(|| panic!("{}: {wanted} expected", path.display()))
            .to_string()
    };
    let (name, structure, expect) = (key("name"), key("structure"), key("expect"));
    let spec = key("spec").split(' ').map(str::to_string).collect();
    assert_eq!(path.file_stem().unwrap().to_str().unwrap(), name);
    let lines: Vec<String> = lines
        .map(|line| line.split(';').next().unwrap().trim().to_string())
        .filter(|line| !line.is_empty())
        .collect();
    let section = lines.first().map(String::as_str);
    let octets = match section {
        Some("octets:") => lines[1..]
            .iter()
            .flat_map(|line| octets(path, line))
            .collect(),
        Some("terms:" | "blocks:") => Vec::new(),
        other => panic!("{}: section {other:?} is not known", path.display()),
    };
    Vector {
        name,
        structure,
        expect,
        spec,
        octets,
        lines: lines[1..].to_vec(),
    }
}

/// The octets of one line: pairs of hexadecimal digits, or one pair, `*` and a count.
pub(crate) fn octets(path: &Path, line: &str) -> Vec<u8> {
    let octet = |pair: &str| {
        assert_eq!(pair.len(), 2, "{}: {line}", path.display());
        u8::from_str_radix(pair, 16).unwrap_or_else(|_| panic!("{}: {line}", path.display()))
    };
    match line.split_once(" * ") {
        Some((pair, count)) => vec![octet(pair); count.parse().unwrap()],
        None => line.split(' ').map(octet).collect(),
    }
}

/// The sample of a name.
pub(crate) fn sample(name: &str) -> Sample {
    let found = samples().into_iter().find(|sample| sample.name == name);
    found.unwrap_or_else(|| panic!("no sample {name}"))
}

/// A sample's octets as they travel.
pub(crate) fn octets_of(sample: &Sample) -> Vec<u8> {
    [sample.head.as_slice(), &sample.body].concat()
}

/// Checks a head with a body as a reader does, after its checksums were put right.
pub(crate) fn check_sealed(head: &[u8], body: &[u8]) -> Result<(), Malformed> {
    let mut octets = head.to_vec();
    reseal(&mut octets);
    octets.extend_from_slice(body);
    check_octets(&octets)
}

/// Checks octets that hold one whole frame.
pub(crate) fn check_octets(octets: &[u8]) -> Result<(), Malformed> {
    let (_, _, rest) = check(octets)?.expect("a whole frame");
    assert!(rest.is_empty(), "octets after the frame");
    Ok(())
}

/// A header with right checksum and these sizes, for a table and body that need not exist.
pub(crate) fn header_of(
    kind: u16,
    table_bytes: usize,
    body_bytes: usize,
) -> Result<Header, Malformed> {
    let mut octets = [0; HEADER_BYTES];
    octets[0..2].copy_from_slice(&kind.to_le_bytes());
    octets[4..8].copy_from_slice(&u32::try_from(table_bytes).unwrap().to_le_bytes());
    octets[16..20].copy_from_slice(&u32::try_from(body_bytes).unwrap().to_le_bytes());
    let crc = crc32fast::hash(&octets[..28]);
    octets[28..].copy_from_slice(&crc.to_le_bytes());
    Header::decode(&octets)
}
