//! The keeper: a process that has the source monitor's first connection as well, in case the bridge is killed.
//!
//! ```text
//!   bridge lives:   nothing
//!   bridge killed, memory travels:   ends, so that the monitor sees its connection end and the guest runs on
//!   bridge killed, the guest was stopped:   keeps the connection, silent, and asks the destination how it ended
//! ```
//!
//! A monitor that loses its connection after it stopped the guest runs the guest again, although the destination may run it too. So the
//! connection must not end with the bridge's process. The keeper gets the connection as its standard input, and hears from the bridge on a pipe.

use std::fs::File;
use std::io::{BufRead as _, BufReader, PipeWriter, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use multifd_wire::{SessionId, Token};
use socket2::Socket;

/// Makes the command that starts a keeper; what it needs beside its standard streams is up to the program.
pub type MakeKeeper = Box<dyn Fn() -> Command + Send + Sync>;

/// The bridge's end of the pipe.
pub(crate) struct Keeper {
    pipe: PipeWriter,
    holds: bool,
}

impl Keeper {
    /// Starts one for a connection.
    pub(crate) fn start(make: &MakeKeeper, socket: &Socket) -> std::io::Result<Self> {
        let (theirs, ours) = std::io::pipe()?;
        // A process group of its own: what ends the bridge from a terminal must not end it.
        let child = make()
            .stdin(Stdio::from(OwnedFd::from(socket.try_clone()?)))
            .stdout(Stdio::from(theirs))
            .process_group(0)
            .spawn()?;
        tracing::info!(
            pid = child.id(),
            "a keeper has the monitor's first connection as well"
        );
        Ok(Self {
            pipe: ours,
            holds: false,
        })
    }

    /// From now on the connection must not end with this process.
    pub(crate) fn hold(&mut self, session: SessionId, secret: Token) {
        if !std::mem::replace(&mut self.holds, true) {
            let words = format!("hold {session} {}\n", hex(secret.value()));
            self.say(&words);
        }
    }

    /// It is known how the migration ended.
    pub(crate) fn over(&mut self) {
        self.say("over\n");
    }

    fn say(&mut self, words: &str) {
        if let Err(error) = self.pipe.write_all(words.as_bytes()) {
            tracing::error!(%error, "the keeper is gone");
        }
    }
}

fn hex(octets: [u8; 16]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    let octet = |index: usize| u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok();
    let octets: Option<Vec<u8>> = (0..16).map(octet).collect();
    octets?.try_into().ok().filter(|_| text.len() == 32)
}

/// What a keeper has to do.
pub enum Kept {
    /// Nothing: the bridge ended by itself, or the guest can only be the source's.
    Over,
    /// To keep the connection until the destination has said how it ended.
    Hold {
        /// The monitor's first connection.
        socket: Socket,
        /// Whom to ask about.
        session: SessionId,
        /// With what.
        secret: Token,
    },
}

/// In the keeper's process: waits until the bridge has ended.
///
/// # Errors
/// The standard streams are not what a keeper is given.
pub fn wait() -> std::io::Result<Kept> {
    let socket = Socket::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let pipe = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let mut hold = None;
    for line in BufReader::new(pipe).lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        match words.next() {
            Some("hold") => {
                let mut next = || words.next().and_then(unhex);
                hold = next().zip(next());
            }
            Some("over") => return Ok(Kept::Over),
            _ => {}
        }
    }
    Ok(hold.map_or(Kept::Over, |(session, secret)| Kept::Hold {
        socket,
        session: SessionId::new(session),
        secret: Token::new(secret),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_from_their_text() {
        let octets = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(unhex(&hex(octets)), Some(octets));
        for wrong in ["", "00", &"g".repeat(32), &"0".repeat(33), &"é".repeat(16)] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }
}
