//! The test vectors' own form, as `tests/vectors/README.md` describes it: text in, octets out. Whoever has the files reads them.

use crate::role::Role;

/// One vector.
#[derive(Debug)]
pub struct Vector {
    /// The file's name without its ending.
    pub name: String,
    /// What its octets are.
    pub structure: String,
    /// Whether it is taken, or how it is refused.
    pub expect: String,
    /// The rules that it is about.
    pub spec: Vec<String>,
    /// Its octets; none of a session and of the digest.
    pub octets: Vec<u8>,
    /// The lines after the last key, for structures that are not octets.
    pub lines: Vec<String>,
}

/// A step of a session.
#[derive(Debug)]
pub enum Block {
    /// One side writes a hello, a reply or a frame.
    Said {
        /// Which side.
        side: Role,
        /// The name of the channel.
        channel: String,
        /// What it writes.
        octets: Vec<u8>,
        /// Whether the other side reads it.
        is_read: bool,
    },
    /// This channel ends for both sides.
    Lost(String),
}

impl Vector {
    /// Reads one vector; panics with its name where it does not follow the form.
    #[must_use]
    pub fn parse(file: &str, text: &str) -> Self {
        let mut lines = text.lines();
        let mut key = |wanted: &str| {
            let line = lines.next().unwrap_or_default();
            let value = line
                .strip_prefix(wanted)
                .and_then(|rest| rest.strip_prefix(": "));
            value
                .unwrap_or_else(|| panic!("{file}: {wanted} expected"))
                .to_string()
        };
        let (name, structure, expect) = (key("name"), key("structure"), key("expect"));
        let spec = key("spec").split(' ').map(str::to_string).collect();
        assert_eq!(file, name);
        let lines: Vec<String> = lines
            .map(|line| line.split(';').next().unwrap().trim().to_string())
            .filter(|line| !line.is_empty())
            .collect();
        let (section, lines) = lines.split_first().expect("a section");
        let octets = match section.as_str() {
            "octets:" => lines.iter().flat_map(|line| octets(file, line)).collect(),
            "terms:" | "blocks:" => Vec::new(),
            other => panic!("{file}: section {other} is not known"),
        };
        Self {
            name,
            structure,
            expect,
            spec,
            octets,
            lines: lines.to_vec(),
        }
    }

    /// The steps of a session.
    #[must_use]
    pub fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for line in &self.lines {
            let said = line.strip_prefix("> ").or(line.strip_prefix("? "));
            if let Some(rest) = said {
                let (side, channel) = rest.split_once(' ').unwrap();
                let side = match side {
                    "source" => Role::Source,
                    "destination" => Role::Destination,
                    other => panic!("{}: side {other}", self.name),
                };
                blocks.push(Block::Said {
                    side,
                    channel: channel.to_string(),
                    octets: Vec::new(),
                    is_read: line.starts_with('>'),
                });
            } else if let Some(rest) = line.strip_prefix("! ") {
                let channel = rest.strip_suffix(" is lost").unwrap();
                blocks.push(Block::Lost(channel.to_string()));
            } else if let Some(Block::Said { octets: said, .. }) = blocks.last_mut() {
                said.extend(octets(&self.name, line));
            }
        }
        blocks
    }
}

/// The octets of one line: pairs of hexadecimal digits, or one pair, `*` and a count.
fn octets(file: &str, line: &str) -> Vec<u8> {
    let octet = |pair: &str| {
        assert_eq!(pair.len(), 2, "{file}: {line}");
        u8::from_str_radix(pair, 16).unwrap_or_else(|_| panic!("{file}: {line}"))
    };
    match line.split_once(" * ") {
        Some((pair, count)) => vec![octet(pair); count.parse().unwrap()],
        None => line.split(' ').map(octet).collect(),
    }
}
