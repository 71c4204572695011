//! The small file with which an operator can ask how a migration ended after this program was killed.
//!
//! ```text
//!   granted ──► FILE, mode 0600 ──► removed when the outcome is known         --ask FILE: reads it, and asks
//!                                   left behind when it is not, or nobody was left to remove it
//! ```
//! What it must never do: overwrite the file of another migration, whose outcome may be unknown still.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use multifd_sender::{AskTicket, SpreadDialer, ask};
use multifd_transport::{Address, AddressKind, ChannelOptions};
use multifd_wire::frame::OutcomeState;
use serde_json::{Value, json};

/// The version of what is written.
const VERSION: u64 = 1;

/// Where it is written, for one migration.
#[derive(Debug, Clone)]
pub(crate) struct StateFile {
    path: PathBuf,
    destination: String,
    /// By this migration, whichever clone did it.
    written: Arc<AtomicBool>,
}

impl StateFile {
    pub(crate) fn new(path: &Path, destination: &Address) -> Self {
        Self {
            path: path.to_owned(),
            destination: destination.to_string(),
            written: Arc::default(),
        }
    }

    /// Writes it, so that it is on disk when this returns.
    pub(crate) fn write(&self, ticket: &AskTicket) -> anyhow::Result<()> {
        let text = json!({
            "multifd_state": VERSION,
            "destination": self.destination,
            "session": hex(&ticket.session()),
            "resume_secret": hex(&ticket.secret()),
        });
        if self.written.load(Relaxed) {
            // Our own, of a session that the destination has forgotten.
            std::fs::remove_file(&self.path).with_context(|| self.name())?;
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)
            .with_context(|| {
                format!(
                    "{} can't be made; if it is there already, it is of a migration whose outcome may be unknown: use --ask {} or \
                     remove it",
                    self.name(),
                    self.path.display()
                )
            })?;
        self.written.store(true, Relaxed);
        writeln!(file, "{text}").with_context(|| self.name())?;
        file.sync_all().with_context(|| self.name())?;
        // The name as well; a file system that can't is not the worse for it.
        let folder = self
            .path
            .parent()
            .filter(|path| !path.as_os_str().is_empty());
        if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
            let _ = folder.sync_all();
        }
        Ok(())
    }

    /// The outcome is known. Another migration's file is left alone.
    pub(crate) fn remove(&self) {
        if self.written.swap(false, Relaxed)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(file = %self.path.display(), %error, "the state file could not be removed");
        }
    }

    fn name(&self) -> String {
        format!("state file {}", self.path.display())
    }
}

/// `--ask`: prints how the migration ended; gives the exit status.
pub(crate) fn ask_outcome(
    path: &Path,
    options: ChannelOptions,
    patience: Duration,
) -> anyhow::Result<(u8, Value)> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("state file {}", path.display()))?;
    let (destination, ticket) = read(&text)
        .with_context(|| format!("{} is no state file of multifd-send", path.display()))?;
    let dial = SpreadDialer {
        control: Address::parse_with(&destination, AddressKind::Tcp)?,
        data: Vec::new(),
        options,
    };
    let (status, outcome, words) = match ask(&dial, &ticket, patience) {
        Ok(OutcomeState::Running) => (0, "running", "the guest runs at the destination".to_owned()),
        Ok(OutcomeState::NotCommitted) => (
            1,
            "not-committed",
            "it was not committed and never will be: the guest is the source's".to_owned(),
        ),
        Ok(OutcomeState::FailedAfterCommit) => (
            6,
            "failed-after-commit",
            "the destination has the guest and could not run it: it is paused there".to_owned(),
        ),
        Ok(OutcomeState::CommittedNotRunning) => (
            4,
            "committed",
            "the destination has the guest and does not run it yet: ask again".to_owned(),
        ),
        Err(error) => (4, "unknown", format!("no answer: {error}")),
    };
    Ok((
        status,
        json!({ "outcome": outcome, "text": words, "destination": destination }),
    ))
}

fn read(text: &str) -> anyhow::Result<(String, AskTicket)> {
    let value: Value = serde_json::from_str(text)?;
    anyhow::ensure!(
        value["multifd_state"].as_u64() == Some(VERSION),
        "it has another version"
    );
    let field = |name: &str| {
        value[name]
            .as_str()
            .with_context(|| format!("it has no {name}"))
    };
    let octets = |name: &str| unhex(field(name)?).with_context(|| format!("its {name}"));
    let ticket = AskTicket::new(octets("session")?, octets("resume_secret")?);
    Ok((field("destination")?.to_owned(), ticket))
}

fn hex(octets: &[u8; 16]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

fn unhex(text: &str) -> anyhow::Result<[u8; 16]> {
    anyhow::ensure!(
        text.len() == 32 && text.is_ascii(),
        "must have 32 hexadecimal digits"
    );
    let mut octets = [0; 16];
    for (octet, digits) in octets.iter_mut().zip(text.as_bytes().chunks(2)) {
        *octet = u8::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    }
    Ok(octets)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn ticket() -> AskTicket {
        AskTicket::new([0xab; 16], [7; 16])
    }

    #[test]
    fn what_is_written_is_read_again_and_only_the_owner_can() {
        let folder = std::env::temp_dir().join(format!("multifd-state-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("state");
        let address = Address::parse_with("tcp:dest:4444", AddressKind::Tcp).unwrap();
        let file = StateFile::new(&path, &address);
        file.write(&ticket()).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(read(&text).unwrap(), ("tcp:dest:4444".to_owned(), ticket()));
        // The next session of the same migration takes its place; another migration's does not.
        let next = AskTicket::new([1; 16], [2; 16]);
        file.write(&next).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(read(&text).unwrap().1, next);
        let other = StateFile::new(&path, &address);
        let refused = other.write(&ticket()).unwrap_err();
        assert!(refused.to_string().contains("--ask"), "{refused}");
        other.remove();
        assert!(path.exists());
        file.remove();
        assert!(!path.exists());
        std::fs::remove_dir(&folder).unwrap();
    }

    #[test]
    fn what_is_no_state_file_is_refused_with_the_reason() {
        for (text, words) in [
            ("{}", "another version"),
            (r#"{"multifd_state":1}"#, "no session"),
            (r#"{"multifd_state":1,"session":"xy"}"#, "its session"),
        ] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        assert!(read("nonsense").is_err());
    }

    #[test]
    fn the_secret_is_not_printed() {
        let text = format!("{:?}", ticket());
        assert!(!text.contains('7') && text.contains("ab"), "{text}");
    }
}
