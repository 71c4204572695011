//! The other end, for programs that ask: one call after the other, or events as they come.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zlink_core::{Call, Connection};

use crate::NAME;
use crate::socket::{Patience, Stream, now};

/// What is answered at once is here after this.
const PATIENCE: Patience = Patience {
    write: Duration::from_secs(5),
    idle: Duration::from_secs(10),
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens there, or not for this user.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The connection is gone, or what came is no message.
    #[error("the migration does not answer: {0}")]
    Connection(#[from] zlink_core::Error),
    /// It was refused.
    #[error("{}", refusal(name, parameters))]
    Refused {
        /// The name of the error.
        name: String,
        /// What it says.
        parameters: Value,
    },
}

fn refusal(name: &str, parameters: &Value) -> String {
    match (name.rsplit('.').next(), &parameters["text"]) {
        (_, Value::String(text)) => text.clone(),
        (Some("NotHere"), _) => "only the source can do that".to_owned(),
        (Some("Over"), _) => format!("it is over: {}", parameters["end"]["outcome"]),
        _ if parameters.as_object().is_none_or(serde_json::Map::is_empty) => name.to_owned(),
        _ => format!("{name}: {parameters}"),
    }
}

#[derive(Debug, Serialize)]
struct Method<'a> {
    method: String,
    parameters: &'a Value,
}

/// Any error, as it is.
#[derive(Debug, Deserialize)]
struct Failed {
    error: String,
    #[serde(default)]
    parameters: Value,
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct Client {
    connection: Connection<Stream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or not for this user.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = Stream::new(UnixStream::connect(path)?, Arc::default(), PATIENCE)?;
        Ok(Self {
            connection: Connection::new(stream),
        })
    }

    /// Calls a method of the interface, and gives what it answers.
    ///
    /// # Errors
    /// It is refused, or nobody answers.
    pub fn call(&mut self, method: &str, parameters: &Value) -> Result<Value, ClientError> {
        self.ask(&format!("{NAME}.{method}"), parameters, false)?;
        self.next().map(|(answer, _)| answer)
    }

    /// The same of a method of any interface, by its whole name.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_whole(&mut self, method: &str, parameters: &Value) -> Result<Value, ClientError> {
        self.ask(method, parameters, false)?;
        self.next().map(|(answer, _)| answer)
    }

    /// Hears what happens from now on, until `heard` has enough or it is over.
    ///
    /// # Errors
    /// It is refused, or nobody says anything any more.
    pub fn watch(&mut self, mut heard: impl FnMut(&Value) -> Heard) -> Result<(), ClientError> {
        self.ask(&format!("{NAME}.Watch"), &json!({}), true)?;
        loop {
            let (event, continues) = self.next()?;
            if heard(&event) == Heard::Enough || !continues {
                return Ok(());
            }
        }
    }

    fn ask(&mut self, method: &str, parameters: &Value, more: bool) -> Result<(), ClientError> {
        let method = method.to_owned();
        let call = Call::new(Method { method, parameters }).set_more(more);
        Ok(now(self.connection.send_call(&call, Vec::new()))?)
    }

    fn next(&mut self) -> Result<(Value, bool), ClientError> {
        let answered = now(self.connection.receive_reply::<Value, Failed>());
        match answered {
            Ok((Ok(reply), _)) => {
                let continues = reply.continues().unwrap_or(false);
                Ok((reply.into_parameters().unwrap_or_default(), continues))
            }
            Ok((
                Err(Failed {
                    error: name,
                    parameters,
                }),
                _,
            )) => Err(ClientError::Refused { name, parameters }),
            // The errors that every service has: under their own names as well.
            Err(zlink_core::Error::VarlinkService(error)) => {
                let mut said = serde_json::to_value(&error).unwrap_or_default();
                Err(ClientError::Refused {
                    name: said["error"].as_str().unwrap_or_default().to_owned(),
                    parameters: said["parameters"].take(),
                })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether who watches wants to hear more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Yes.
    More,
    /// No.
    Enough,
}
