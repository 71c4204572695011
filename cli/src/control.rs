//! `--control`: the socket by which others of the same user watch and steer a migration.

use std::path::PathBuf;

use anyhow::Context as _;
pub use multifd_control::Door;
use multifd_control::{Control, End, Subject};
use serde_json::{Value, json};

/// The flag.
#[derive(Debug, clap::Args)]
pub struct ControlFlags {
    /// Listen for multifd-ctl (or varlinkctl) at this socket: unix:/path
    ///
    /// Only this user and root may connect. How far it is, what happens, and, of the source, changes of limits, holding the sending and
    /// switching over; the interface is org.multifd.Migration. Not with --bridge.
    #[arg(long, value_name = "SOCKET", value_parser = socket, conflicts_with = "bridge", hide_short_help = true, help_heading = "Output")]
    pub control: Option<PathBuf>,
}

fn socket(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix:").unwrap_or(text);
    if path.starts_with('/') || path.starts_with("./") {
        Ok(PathBuf::from(path))
    } else {
        Err("write for example unix:/run/vm7.sock".to_owned())
    }
}

impl ControlFlags {
    /// Listens, if it was asked for.
    ///
    /// # Errors
    /// The path can't be had.
    pub fn bind(&self) -> anyhow::Result<Option<Door>> {
        let Some(path) = &self.control else {
            return Ok(None);
        };
        let door = Door::bind(path);
        let door = door.with_context(|| format!("--control {}", path.display()))?;
        Ok(Some(door))
    }
}

/// Serves a side, if somebody may ask it. A migration that can't be asked goes on all the same.
pub fn serve(program: &str, door: Option<Door>, side: &(impl Subject + Clone)) -> Option<Control> {
    match door?.serve(side.clone()) {
        Ok(control) => Some(control),
        Err(error) => {
            crate::err!("{program}: the control socket is not served: {error}");
            None
        }
    }
}

/// Tells those who watch how it ended.
pub fn end(
    control: Option<Control>,
    outcome: &impl serde::Serialize,
    error: Option<&impl serde::Serialize>,
) {
    let Some(control) = control else { return };
    let (outcome, error) = (json!(outcome), json!(error));
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let (code, text) = (word(&error["code"]), word(&error["text"]));
    let error = code.as_deref().zip(text.as_deref());
    control.end(End::new(outcome.as_str().unwrap_or("unknown"), error));
}
