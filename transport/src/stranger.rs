//! What answered, when it was not what was expected there: a service of another kind, told from its first bytes, for people.
//!
//! Rule: nothing of a stranger reaches a log as it is. What is shown is short, and escaped.

use std::fmt;

/// First bytes that are looked at, at most.
pub const STRANGER_BYTES: usize = 64;

/// What the first bytes of a stranger look like.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stranger {
    /// An alert of TLS: it expected TLS and got something else.
    TlsAlert,
    /// A handshake of TLS.
    TlsHandshake,
    /// Anything else: the name of a protocol, if it is a known one, and the beginning, escaped.
    Other {
        /// Who speaks so.
        protocol: Option<&'static str>,
        /// Its first bytes.
        beginning: String,
    },
}

/// What a hello of ours begins with (SPEC.md section 4). A pass or a ticket follows, which no log may show.
const OURS: &[u8] = b"MULTIFD\n";

/// Beginnings that people meet at a port that they mistyped.
const KNOWN: &[(&[u8], &str)] = &[
    (b"SSH-", "an SSH server"),
    (b"HTTP/", "a web server"),
    (b"220 ", "a mail or FTP server"),
    (b"220-", "a mail or FTP server"),
    (b"RFB ", "a VNC server"),
    (b"{\"QMP\"", "a QEMU monitor (QMP)"),
    (b"QEVM", "a QEMU migration stream"),
    (b"* OK", "an IMAP server"),
    (b"+OK", "a POP3 server"),
    (OURS, "a multifd without TLS"),
];

impl Stranger {
    /// Looks at the first bytes that came; nothing came if there are none.
    #[must_use]
    pub fn look_at(octets: &[u8]) -> Option<Self> {
        let octets = octets.get(..STRANGER_BYTES).unwrap_or(octets);
        // A record of TLS: its type, and the version's first byte (RFC 8446 section 5.1).
        match octets {
            [] => return None,
            [21, 3, ..] => return Some(Self::TlsAlert),
            [22, 3, ..] => return Some(Self::TlsHandshake),
            _ => {}
        }
        let known = KNOWN.iter().find(|(start, _)| octets.starts_with(start));
        let octets = if octets.starts_with(OURS) {
            OURS
        } else {
            octets
        };
        Some(Self::Other {
            protocol: known.map(|(_, name)| *name),
            beginning: octets.escape_ascii().to_string(),
        })
    }

    /// The longest beginning that has no control character, as words after "it".
    fn began(f: &mut fmt::Formatter<'_>, protocol: Option<&str>, beginning: &str) -> fmt::Result {
        write!(f, "it began with \"{beginning}\"")?;
        match protocol {
            Some(protocol) => write!(f, ", as {protocol} does"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Stranger {
    /// What is there and what to do, for the side that dialled without TLS: to be put behind `no multifd-receive answers there:`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TlsAlert | Self::TlsHandshake => f.write_str(
                "it speaks TLS: dial it as tls:HOST:PORT, with the certificate of its authority (CA)",
            ),
            Self::Other {
                protocol,
                beginning,
            } => {
                Self::began(f, *protocol, beginning)?;
                f.write_str("; check host and port")
            }
        }
    }
}

/// The same for a side that expected TLS.
#[cfg(feature = "tls")]
pub(crate) struct WithoutTls<'s> {
    pub(crate) stranger: &'s Stranger,
    /// Whether this side dialled.
    pub(crate) dialled: bool,
}

#[cfg(feature = "tls")]
impl fmt::Display for WithoutTls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.stranger {
            Stranger::TlsAlert | Stranger::TlsHandshake => f.write_str("it speaks another TLS")?,
            Stranger::Other {
                protocol,
                beginning,
            } => Stranger::began(f, *protocol, beginning)?,
        }
        f.write_str(if self.dialled {
            ". If it is a multifd-receive, it listens without TLS: let it listen at tls: with a certificate, or dial it as tcp:HOST:PORT"
        } else {
            ". If it is a multifd-send, it dialled without TLS: let it dial tls:HOST:PORT"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_of_ours_is_not_shown() {
        let hello = [b"MULTIFD\n".as_slice(), b"ABCDEFGHABCDEFGH"].concat();
        let text = Stranger::look_at(&hello).unwrap().to_string();
        assert!(text.contains("a multifd without TLS"), "{text}");
        assert!(!text.contains("ABC"), "{text}");
    }

    #[test]
    fn what_is_shown_is_short_and_escaped() {
        assert_eq!(Stranger::look_at(&[]), None);
        let long = [b'\x1b'; 5000];
        let text = Stranger::look_at(&long).unwrap().to_string();
        assert!(text.contains("\\x1b\\x1b"), "{text}");
        assert!(text.len() < 400 && text.is_ascii(), "{text}");
        let text = Stranger::look_at("\u{202e}x\r\n\"".as_bytes())
            .unwrap()
            .to_string();
        assert!(text.contains(r#"\xe2\x80\xaex\r\n\""#), "{text}");
    }

    #[test]
    fn protocols_are_told_by_their_beginning() {
        let ssh = b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n";
        let text = Stranger::look_at(ssh).unwrap().to_string();
        assert!(text.contains("OpenSSH_9.2p1"), "{text}");
        assert!(text.contains("as an SSH server does"), "{text}");
        assert_eq!(
            Stranger::look_at(&[21, 3, 3, 0, 2, 2, 10]),
            Some(Stranger::TlsAlert)
        );
        assert_eq!(
            Stranger::look_at(&[22, 3, 1, 2]),
            Some(Stranger::TlsHandshake)
        );
    }
}
