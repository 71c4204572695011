//! Addresses of channels as text: `tcp:HOST:PORT`, `HOST:PORT`, `[v6]:PORT`, `tls:HOST:PORT`, `rdma:HOST:PORT`, `unix:/path`,
//! `vsock:CONTEXT:PORT`.
//!
//! Rule: what is printed can be parsed and gives the same address.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a channel connects to or a listener listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// TCP.
    Tcp(HostPort),
    /// TLS over TCP; needs the feature `tls` to be used.
    Tls(HostPort),
    /// RDMA, where the host and port belong to the connection manager; needs the feature `rdma` to be used.
    Rdma(HostPort),
    /// A Unix stream socket at a path; one that begins with `@` is a name in the abstract namespace.
    Unix(PathBuf),
    /// vsock, between a host and its virtual machines.
    Vsock(VsockPlace),
}

/// A context of vsock and a port there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VsockPlace {
    /// The context: 2 is the host, 1 this machine itself, others are virtual machines; `u32::MAX` listens on all of this side.
    pub context: u32,
    /// The port; `u32::MAX` asks a listener for any free one.
    pub port: u32,
}

/// A host and a TCP port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// Why a text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an address: {reason}. Accepted are tcp:HOST:PORT, HOST:PORT, [IPv6]:PORT and unix:/PATH, vsock:CONTEXT:PORT, and with tls: or rdma: before HOST:PORT"
)]
pub struct AddressError {
    text: String,
    reason: &'static str,
}

/// The longest path of a Unix socket, in bytes: `sockaddr_un` has room for 108 with the NUL at the end.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// The longest host name, in bytes (RFC 1035 §2.3.4).
pub const HOST_BYTES_MAX: usize = 255;

impl HostPort {
    /// The host: a name, an IPv4 address, or an IPv6 address without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; 0 asks a listener for any free one.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(address: std::net::SocketAddr) -> Self {
        // A scope is part of an IPv6 address's text but not of its value as an IpAddr.
        let host = match address {
            std::net::SocketAddr::V6(v6) if v6.scope_id() != 0 => {
                format!("{}%{}", v6.ip(), v6.scope_id())
            }
            _ => address.ip().to_string(),
        };
        Self::Tcp(HostPort {
            host,
            port: address.port(),
        })
    }
}

/// The kinds that an address can be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AddressKind {
    /// TCP.
    Tcp,
    /// TLS over TCP.
    Tls,
    /// RDMA.
    Rdma,
    /// A Unix socket.
    Unix,
    /// vsock.
    Vsock,
}

impl AddressKind {
    /// All of them, the default first.
    pub const ALL: [Self; 5] = [Self::Tcp, Self::Tls, Self::Rdma, Self::Unix, Self::Vsock];

    /// What stands before the colon.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Rdma => "rdma",
            Self::Unix => "unix",
            Self::Vsock => "vsock",
        }
    }
}

impl fmt::Display for AddressKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Address {
    /// The address's kind.
    #[must_use]
    pub fn kind(&self) -> AddressKind {
        match self {
            Self::Tcp(_) => AddressKind::Tcp,
            Self::Tls(_) => AddressKind::Tls,
            Self::Rdma(_) => AddressKind::Rdma,
            Self::Unix(_) => AddressKind::Unix,
            Self::Vsock(_) => AddressKind::Vsock,
        }
    }

    /// Parses an address of which the kind may be left out: it is then `kind`.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn parse_with(text: &str, kind: AddressKind) -> Result<Self, AddressError> {
        Self::parse_as(text, kind).map_err(|reason| AddressError {
            text: text.to_owned(),
            reason,
        })
    }

    fn parse_as(text: &str, kind: AddressKind) -> Result<Self, &'static str> {
        let prefixed = AddressKind::ALL.into_iter().find_map(|kind| {
            let rest = text.strip_prefix(kind.name())?.strip_prefix(':')?;
            Some((kind, rest))
        });
        let (kind, rest) = prefixed.unwrap_or((kind, text));
        match kind {
            AddressKind::Tcp => parse_host_port(rest).map(Self::Tcp),
            AddressKind::Tls => parse_host_port(rest).map(Self::Tls),
            AddressKind::Rdma => parse_host_port(rest).map(Self::Rdma),
            AddressKind::Unix => check_path(rest).map(|()| Self::Unix(rest.into())),
            AddressKind::Vsock => rest.parse().map(Self::Vsock),
        }
    }

    /// A Unix socket's address.
    ///
    /// # Errors
    /// [`AddressError`] for a path that is empty, too long, holds a NUL or is not UTF-8.
    pub fn unix(path: &Path) -> Result<Self, AddressError> {
        let refuse = |reason| AddressError {
            text: path.display().to_string(),
            reason,
        };
        let text = path
            .to_str()
            .ok_or_else(|| refuse("the path is not UTF-8"))?;
        check_path(text).map_err(refuse)?;
        Ok(Self::Unix(path.to_owned()))
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::parse_with(text, AddressKind::Tcp)
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse_host_port(text).map_err(|reason| AddressError {
            text: text.to_owned(),
            reason,
        })
    }
}

fn parse_host_port(text: &str) -> Result<HostPort, &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest
                .split_once("]:")
                .ok_or("an IPv6 address needs ']:' and a port after it")?;
            let bare = host.split('%').next().unwrap_or(host);
            bare.parse::<std::net::Ipv6Addr>()
                .map_err(|_| "what is in brackets is not an IPv6 address")?;
            (host, port)
        }
        None => {
            let (host, port) = text.rsplit_once(':').ok_or("the port is missing")?;
            if host.contains(':') {
                return Err(
                    "a host with ':' is either an IPv6 address without brackets or of an unknown kind",
                );
            }
            (host, port)
        }
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    if host.len() > HOST_BYTES_MAX {
        return Err("the host is longer than 255 bytes");
    }
    if host
        .chars()
        .any(|c| c.is_whitespace() || c.is_control() || "/[]@".contains(c))
    {
        return Err("the host holds a character that no host has");
    }
    if port.is_empty() || !port.bytes().all(|octet| octet.is_ascii_digit()) {
        return Err("the port is not a number");
    }
    let port = port.parse().map_err(|_| "the port is above 65535")?;
    Ok(HostPort {
        host: host.to_owned(),
        port,
    })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(target) => write!(f, "tcp:{target}"),
            Self::Tls(target) => write!(f, "tls:{target}"),
            Self::Rdma(target) => write!(f, "rdma:{target}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock(place) => write!(f, "vsock:{place}"),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("the path is missing");
    }
    if path.len() > UNIX_PATH_BYTES_MAX {
        return Err("the path is longer than 107 bytes");
    }
    if path.contains('\0') {
        return Err("the path holds a NUL");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp(HostPort {
            host: host.to_owned(),
            port,
        })
    }

    #[test]
    fn accepts_every_form_and_prints_one() {
        let forms = [
            (
                "tcp:example.org:4000",
                tcp("example.org", 4000),
                "tcp:example.org:4000",
            ),
            ("example.org:0", tcp("example.org", 0), "tcp:example.org:0"),
            (
                "127.0.0.1:65535",
                tcp("127.0.0.1", 65535),
                "tcp:127.0.0.1:65535",
            ),
            ("[::1]:80", tcp("::1", 80), "tcp:[::1]:80"),
            (
                "tcp:[fe80::1%eth0]:80",
                tcp("fe80::1%eth0", 80),
                "tcp:[fe80::1%eth0]:80",
            ),
            (
                "tls:example.org:4444",
                Address::Tls("example.org:4444".parse().unwrap()),
                "tls:example.org:4444",
            ),
            (
                "rdma:[::1]:80",
                Address::Rdma("[::1]:80".parse().unwrap()),
                "rdma:[::1]:80",
            ),
            (
                "unix:/run/multifd.sock",
                Address::Unix("/run/multifd.sock".into()),
                "unix:/run/multifd.sock",
            ),
            (
                "unix:relative:with:colons",
                Address::Unix("relative:with:colons".into()),
                "unix:relative:with:colons",
            ),
            (
                "vsock:3:4444",
                Address::Vsock(VsockPlace {
                    context: 3,
                    port: 4444,
                }),
                "vsock:3:4444",
            ),
            (
                "vsock:any:4444",
                Address::Vsock(VsockPlace {
                    context: u32::MAX,
                    port: 4444,
                }),
                "vsock:any:4444",
            ),
        ];
        for (text, address, printed) in forms {
            assert_eq!(text.parse(), Ok(address.clone()), "{text}");
            assert_eq!(address.to_string(), printed);
        }
    }

    #[test]
    fn refuses_with_a_reason_and_what_is_accepted() {
        let long_path = format!("unix:/{}", "x".repeat(UNIX_PATH_BYTES_MAX));
        let long_host = format!("{}:1", "h".repeat(HOST_BYTES_MAX + 1));
        let refused = [
            ("", "the port is missing"),
            ("host", "the port is missing"),
            (":80", "the host is missing"),
            ("tcp::80", "the host is missing"),
            ("host:", "the port is not a number"),
            ("host:+80", "the port is not a number"),
            ("host:80 ", "the port is not a number"),
            ("host:65536", "the port is above 65535"),
            ("::1:80", "an IPv6 address without brackets"),
            ("quic:host:80", "of an unknown kind"),
            ("tls:rdma:host:80", "of an unknown kind"),
            ("rdma:host", "the port is missing"),
            ("tls::80", "the host is missing"),
            ("[::1]80", "needs ']:'"),
            ("[::1:80", "needs ']:'"),
            ("[host]:80", "not an IPv6 address"),
            ("a b:80", "a character that no host has"),
            ("http//x:80", "a character that no host has"),
            ("vsock:3", "the port is missing"),
            ("vsock:host:1", "neither a number nor `any`"),
            ("vsock:3:+1", "the port is not a number"),
            ("unix:", "the path is missing"),
            ("unix:a\0b", "the path holds a NUL"),
            (&long_path, "longer than 107 bytes"),
            (&long_host, "longer than 255 bytes"),
        ];
        for (text, reason) in refused {
            let error = text.parse::<Address>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(
                error.contains("tcp:HOST:PORT, HOST:PORT, [IPv6]:PORT and unix:/PATH"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_kind_that_is_left_out_is_the_one_given() {
        for kind in AddressKind::ALL {
            let bare = match kind {
                AddressKind::Unix => "/run/x",
                AddressKind::Vsock => "2:1",
                _ => "host:1",
            };
            let address = Address::parse_with(bare, kind).unwrap();
            assert_eq!(address.kind(), kind);
            assert_eq!(address.to_string(), format!("{kind}:{bare}"));
            // One that is there counts.
            let other = Address::parse_with("tls:host:1", kind).unwrap();
            assert_eq!(other.kind(), AddressKind::Tls);
        }
    }

    #[test]
    fn longest_path_and_host_are_accepted() {
        let path = format!("unix:/{}", "x".repeat(UNIX_PATH_BYTES_MAX - 1));
        assert_eq!(path.parse::<Address>().unwrap().to_string(), path);
        let host = format!("tcp:{}:1", "h".repeat(HOST_BYTES_MAX));
        assert_eq!(host.parse::<Address>().unwrap().to_string(), host);
    }

    #[test]
    fn socket_addresses_keep_their_scope() {
        for text in ["127.0.0.1:5", "[2001:db8::1]:6", "[fe80::1%3]:7"] {
            let address = Address::from(text.parse::<std::net::SocketAddr>().unwrap());
            assert_eq!(address.to_string(), format!("tcp:{text}"));
            assert_eq!(address.to_string().parse(), Ok(address));
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_accepted_prints_as_itself(text in ".{0,40}|(tcp:|tls:|rdma:|unix:|vsock:)?[a-z0-9.:%/\\[\\]]{0,30}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
