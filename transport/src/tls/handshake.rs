//! The handshake, under a deadline, and what its failures mean.
//!
//! Rule: a peer that is refused is told why, and the farewell is not destroyed by our own close.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{AlertDescription, CertificateError, Connection, Error, IoState};
use socket2::Socket;

use super::channel::{Flushed, flush};
use crate::error::{ChannelError, EstablishError};
use crate::stranger::{Stranger, WithoutTls};
use crate::sys::{self, Ready};

/// How long a peer that was refused is given to read why.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Bytes that are read at a time.
const READ_BYTES: usize = 4096;

/// What is read of a peer that was refused, at most.
const FAREWELL_BYTES_MAX: usize = 64 << 10;

/// How far a handshake is when nothing more can be done without waiting.
pub(super) enum Step {
    /// It is over, and as many bytes as were asked for are here.
    Done,
    /// The socket has to become ready first.
    Wait(Ready),
}

/// Does the whole handshake on a nonblocking socket.
pub(super) fn run(
    connection: &mut Connection,
    socket: &Socket,
    deadline: Instant,
) -> Result<(), EstablishError> {
    let result = steps(connection, socket, deadline);
    if let Err(error) = &result {
        refuse(connection, socket, error, deadline);
    }
    result
}

/// Tells a peer with which the handshake failed why, if it is this side that refused.
pub(super) fn refuse(
    connection: &mut Connection,
    socket: &Socket,
    error: &EstablishError,
    deadline: Instant,
) {
    if matches!(
        error,
        EstablishError::Certificate(_) | EstablishError::Protocol { .. }
    ) {
        farewell(connection, socket, deadline);
    }
}

fn steps(
    connection: &mut Connection,
    socket: &Socket,
    deadline: Instant,
) -> Result<(), EstablishError> {
    while let Step::Wait(ready) = advance(connection, socket, 0)? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(EstablishError::Deadline);
        }
        sys::wait(socket.as_fd(), ready, Some(left)).map_err(|error| ended(&error))?;
    }
    Ok(())
}

/// Goes on without waiting, until the handshake is over and `bytes` bytes of the peer are here to be received.
pub(super) fn advance(
    connection: &mut Connection,
    socket: &Socket,
    bytes: usize,
) -> Result<Step, EstablishError> {
    let dialled = matches!(connection, Connection::Client(_));
    let mut octets = [0; READ_BYTES];
    let mut state = connection
        .process_new_packets()
        .map_err(|error| meaning(&error, &[], dialled))?;
    loop {
        let flushed = flush(connection, socket).map_err(|error| ended(&error))?;
        if let Flushed::Some(_) = flushed {
            return Ok(Step::Wait(Ready::Send));
        }
        if !connection.is_handshaking() && state.plaintext_bytes_to_read() >= bytes {
            return Ok(Step::Done);
        }
        match (&*socket).read(&mut octets) {
            Ok(0) => return Err(EstablishError::Channel(ChannelError::Closed)),
            Ok(count) => {
                let octets = &octets[..count];
                state = take(connection, octets).map_err(|error| {
                    // Before the two sides agreed on anything, this is the first that the peer said.
                    let unknown = connection.protocol_version().is_none();
                    let first = if unknown { octets } else { &[] };
                    meaning(&error, first, dialled)
                })?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Step::Wait(Ready::Receive));
            }
            Err(error) => return Err(ended(&error)),
        }
    }
}

/// Gives rustls what came from the socket, all of it.
fn take(connection: &mut Connection, mut octets: &[u8]) -> Result<IoState, Error> {
    let mut state = connection.process_new_packets()?;
    while !octets.is_empty() {
        if connection.read_tls(&mut octets).is_err() {
            return Err(Error::General("more came than a handshake has".to_owned()));
        }
        state = connection.process_new_packets()?;
    }
    Ok(state)
}

/// Sends the alert that rustls made, and reads until the peer closes, so that the alert is not destroyed by a reset.
fn farewell(connection: &mut Connection, socket: &Socket, deadline: Instant) {
    // Everything here is for the peer's sake: that it fails changes nothing on this side.
    let _ = flush(connection, socket);
    let _ = socket.shutdown(Shutdown::Write);
    let until = deadline.min(Instant::now() + FAREWELL_MAX);
    let (mut octets, mut total) = ([0; 4096], 0);
    while total < FAREWELL_BYTES_MAX {
        match (&*socket).read(&mut octets) {
            Ok(0) => return,
            Ok(count) => total += count,
            Err(error) if is_try_again(&error) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() || sys::wait(socket.as_fd(), Ready::Receive, Some(left)).is_err()
                {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

fn is_try_again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn ended(error: &io::Error) -> EstablishError {
    EstablishError::Channel(match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            ChannelError::Reset { bytes_done: 0 }
        }
        kind => ChannelError::Io(Arc::new(io::Error::new(kind, error.to_string()))),
    })
}

/// What an error of rustls means for somebody who wants to mend it. `first`: what the peer said first.
fn meaning(error: &Error, first: &[u8], dialled: bool) -> EstablishError {
    match (error, Stranger::look_at(first)) {
        (Error::InvalidMessage(_), Some(stranger @ Stranger::Other { .. })) => {
            let stranger = &stranger;
            EstablishError::Protocol {
                protocol: "TLS",
                text: WithoutTls { stranger, dialled }.to_string(),
            }
        }
        _ => meaning_of(error),
    }
}

fn meaning_of(error: &Error) -> EstablishError {
    match error {
        Error::InvalidCertificate(wrong) => EstablishError::Certificate(certificate(wrong)),
        Error::NoCertificatesPresented => {
            EstablishError::Certificate("it showed none, and this side asks for one".to_owned())
        }
        Error::AlertReceived(alert) => EstablishError::Refused(explain(*alert)),
        other => EstablishError::Protocol {
            protocol: "TLS",
            text: other.to_string(),
        },
    }
}

fn certificate(wrong: &CertificateError) -> String {
    match wrong {
        CertificateError::UnknownIssuer => {
            "no authority (CA) that was given here signed it".to_owned()
        }
        CertificateError::BadSignature => {
            "its signature is wrong, or of another authority (CA) with the same name".to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("it has expired, or this host's clock is wrong ({wrong}): renew it at the peer")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("it is not valid yet, or this host's clock is wrong ({wrong})")
        }
        CertificateError::Other(other) => other.0.to_string(),
        other => other.to_string(),
    }
}

/// What the peer says by an alert (RFC 8446 section 6.2).
pub(super) fn explain(alert: AlertDescription) -> String {
    let text = match alert {
        AlertDescription::CertificateRequired => {
            "the peer asks for a certificate, and this side has none to show"
        }
        AlertDescription::UnknownCA => {
            "the peer does not know the authority (CA) that signed this side's certificate"
        }
        AlertDescription::CertificateExpired => {
            "the peer says that this side's certificate has expired: renew it"
        }
        AlertDescription::CertificateRevoked => {
            "the peer says that this side's certificate is revoked"
        }
        AlertDescription::DecryptError => {
            "the peer finds this side's certificate signed wrongly, or by another authority (CA) of the same name"
        }
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => {
            "the peer does not accept this side's certificate"
        }
        AlertDescription::NoApplicationProtocol => "the peer speaks TLS, but is no multifd",
        AlertDescription::ProtocolVersion => "the peer does not speak TLS 1.3",
        AlertDescription::BadRecordMac => "the peer got bytes that were changed on the way",
        other => return format!("the peer sent the alert {other:?}"),
    };
    text.to_owned()
}
