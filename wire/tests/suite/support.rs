//! Reading vectors, and small helpers that several files need.

use std::fs;
use std::path::{Path, PathBuf};

use multifd_wire::exercise::{Sample, Vector, check, reseal, samples};
use multifd_wire::header::HEADER_BYTES;
use multifd_wire::{Header, Malformed};

/// A file or folder of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join(path)
}

/// All committed vectors.
pub(crate) fn vectors() -> Vec<Vector> {
    let folder = repository("tests/vectors");
    let mut vectors: Vec<Vector> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap();
            Vector::parse(name, &fs::read_to_string(&path).unwrap())
        })
        .collect();
    vectors.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!vectors.is_empty(), "no vectors in {}", folder.display());
    vectors
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
