//! Short texts for people, held in place: bounded, UTF-8, without characters that nobody sees.
//!
//! A peer's text ends on an operator's terminal and in logs, so a text that could move a cursor, end a line, turn the direction of
//! what follows or hide something in what looks the same is not a text (SPEC TEXT-1). Nothing is decided from a text, ever: codes carry meaning.

use core::fmt;

use crate::error::{Malformed, Misuse};

/// A clean text of at most `MAX` octets, on the stack.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Text<const MAX: usize> {
    octets: [u8; MAX],
    bytes: usize,
}

impl<const MAX: usize> Text<MAX> {
    /// No text.
    pub const EMPTY: Self = Self {
        octets: [0; MAX],
        bytes: 0,
    };

    /// Takes a text as it is.
    ///
    /// # Errors
    /// [`Misuse::Text`] when it is longer than `MAX` or holds a character that TEXT-1 forbids.
    pub fn new(text: &str) -> Result<Self, Misuse> {
        let refused = Misuse::Text {
            bytes: text.len(),
            max: MAX,
        };
        if !is_clean(text) {
            return Err(refused);
        }
        let mut octets = [0; MAX];
        let place = octets.get_mut(..text.len()).ok_or(refused)?;
        place.copy_from_slice(text.as_bytes());
        Ok(Self {
            octets,
            bytes: text.len(),
        })
    }

    /// Makes a text for the peer of any text: as much as fits, cut between characters, with a space for each character that TEXT-1
    /// forbids and `<path>` for each absolute path. How a host names its files is nothing that another one needs to know.
    #[must_use]
    pub fn clip(text: &str) -> Self {
        let mut clean = Self::EMPTY;
        let mut rest = text;
        while let Some((before, after)) = split_at_path(rest) {
            clean.append(before);
            clean.append("<path>");
            rest = after;
        }
        clean.append(rest);
        clean
    }

    /// The same of a name, which both sides have to know: it is left as it is but for its length and control characters.
    #[must_use]
    pub fn name(name: &str) -> Self {
        let mut clean = Self::EMPTY;
        clean.append(name);
        clean
    }

    /// As much as fits, with a space for each control character.
    fn append(&mut self, text: &str) {
        for character in text.chars() {
            let clean = if is_visible(character) {
                character
            } else {
                ' '
            };
            let end = self.bytes.saturating_add(clean.len_utf8());
            let Some(place) = self.octets.get_mut(self.bytes..end) else {
                break;
            };
            clean.encode_utf8(place);
            self.bytes = end;
        }
    }

    /// Reads a text that fills `field` from its start and is followed by zeros to the end of the field.
    // SPEC: TEXT-1, TEXT-2
    pub(crate) fn from_field(
        field: &'static str,
        octets: &[u8; MAX],
        bytes: usize,
    ) -> Result<Self, Malformed> {
        let (used, rest) = octets
            .split_at_checked(bytes)
            .ok_or(Malformed::Text { field })?;
        read(field, used)?;
        if rest.iter().any(|octet| *octet != 0) {
            return Err(Malformed::Reserved { field });
        }
        Ok(Self {
            octets: *octets,
            bytes,
        })
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Both doors take only UTF-8, so the fallback is never used; it is here because this crate has no panics.
        self.octets
            .get(..self.bytes)
            .and_then(|used| core::str::from_utf8(used).ok())
            .unwrap_or("")
    }

    /// The whole field, zeros included.
    #[must_use]
    pub const fn field(&self) -> &[u8; MAX] {
        &self.octets
    }

    /// The size of the text in octets.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is no text.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl<const MAX: usize> fmt::Debug for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// What stands before the first absolute path in a text, and what stands after it.
///
/// A path begins with a slash that no word, number or other slash precedes (so `MB/s` is none) and that a name follows; it goes
/// on to a space, a quote, a bracket, a comma, or a colon that ends a clause.
fn split_at_path(text: &str) -> Option<(&str, &str)> {
    let mut previous = ' ';
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        let names = |next: char| next.is_alphanumeric() || "._-~".contains(next);
        if character == '/'
            && !previous.is_alphanumeric()
            && previous != '/'
            && characters.peek().is_some_and(|(_, next)| names(*next))
        {
            let (before, path) = text.split_at_checked(at)?;
            let (_, after) = path.split_at_checked(path_bytes(path))?;
            return Some((before, after));
        }
        previous = character;
    }
    None
}

/// The length of the path that a text begins with.
fn path_bytes(text: &str) -> usize {
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        let next = characters.peek().map_or(' ', |(_, next)| *next);
        let ends = character.is_whitespace()
            || "\"'`()[]{}<>,;".contains(character)
            || (":.".contains(character) && (next.is_whitespace() || next == ','));
        if ends {
            return at;
        }
    }
    text.len()
}

/// Reads octets as clean text.
// SPEC: TEXT-1
pub(crate) fn read<'a>(field: &'static str, octets: &'a [u8]) -> Result<&'a str, Malformed> {
    match core::str::from_utf8(octets) {
        Ok(text) if is_clean(text) => Ok(text),
        _ => Err(Malformed::Text { field }),
    }
}

/// Whether a text holds only characters that TEXT-1 allows.
pub(crate) fn is_clean(text: &str) -> bool {
    text.chars().all(is_visible)
}

/// Whether a character is neither a control (Cc) nor a format (Cf) nor a line or paragraph separator (Zl, Zp), which can end
/// lines, move the cursor, turn the direction of writing or hide.
fn is_visible(character: char) -> bool {
    let code = u32::from(character);
    !character.is_control()
        && (character.is_ascii()
            || !UNSEEN
                .iter()
                .any(|(first, last)| (*first..=*last).contains(&code)))
}

/// The code points that TEXT-1 names beside the controls: the general categories Cf, Zl and Zp of Unicode 16.0, with the unassigned
/// points among them.
const UNSEEN: [(u32, u32); 20] = [
    (0x00AD, 0x00AD),
    (0x0600, 0x0605),
    (0x061C, 0x061C),
    (0x06DD, 0x06DD),
    (0x070F, 0x070F),
    (0x0890, 0x0891),
    (0x08E2, 0x08E2),
    (0x180E, 0x180E),
    (0x200B, 0x200F),
    (0x2028, 0x202E),
    (0x2060, 0x206F),
    (0xFEFF, 0xFEFF),
    (0xFFF9, 0xFFFB),
    (0x110BD, 0x110BD),
    (0x110CD, 0x110CD),
    (0x13430, 0x1343F),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE007F),
    (0xFFF0, 0xFFF8),
];
