//! One client: its calls are answered one after the other, on its own thread.

use std::time::{Duration, Instant};

use multifd_sender::{Sending, Steer, WhenNotConverging};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zlink_core::{Connection, Reply};

use crate::door::Shared;
use crate::socket::{Stream, now};
use crate::status::{SWITCHOVER, Seen};
use crate::subject::Refused;
use crate::{INTERFACE, NAME};

/// How often a watcher looks.
const LOOK: Duration = Duration::from_millis(20);

/// How often it is told something when nothing else happens.
const PERIOD: Duration = Duration::from_secs(1);

/// What a client calls.
#[derive(Debug, Deserialize)]
struct Called {
    method: String,
    #[serde(default)]
    parameters: Option<Value>,
}

/// What it is told instead of an answer.
#[derive(Debug, Serialize)]
struct Failure {
    error: String,
    parameters: Value,
}

/// What becomes of the connection.
enum Then {
    Goes,
    Ends,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SetLimits {
    bandwidth_cap_bytes_per_s: Option<u64>,
    downtime_limit_ms: Option<f64>,
    max_rounds: Option<u32>,
    if_not_converging: Option<Choice>,
    throttle_limit_percent: Option<u8>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Choice {
    Fail,
    Switch,
}

impl SetLimits {
    fn changes(&self) -> Result<Vec<Steer>, Failure> {
        let limit = self.downtime_limit_ms.map(|ms| {
            Duration::try_from_secs_f64(ms / 1e3)
                .map_err(|error| out_of_range(&format!("downtime limit: {error}")))
        });
        let limit = limit.transpose()?;
        let when = self.if_not_converging.map(|choice| match choice {
            Choice::Fail => WhenNotConverging::Fail,
            Choice::Switch => WhenNotConverging::Switch,
        });
        let cap = self.bandwidth_cap_bytes_per_s;
        let changes = [
            cap.map(|cap| Steer::Bandwidth((cap > 0).then_some(cap))),
            limit.map(Steer::DowntimeLimit),
            self.max_rounds.map(Steer::MaxRounds),
            when.map(Steer::WhenNotConverging),
            self.throttle_limit_percent.map(Steer::ThrottleLimit),
        ];
        Ok(changes.into_iter().flatten().collect())
    }
}

/// Serves one client until it leaves, or takes too long.
pub(crate) fn serve(shared: &Shared, stream: Stream) {
    let mut session = Session {
        shared,
        connection: Connection::new(stream),
    };
    if let Err(error) = session.run() {
        tracing::debug!(%error, "a client of the control socket has left");
    }
}

struct Session<'s> {
    shared: &'s Shared,
    connection: Connection<Stream>,
}

impl Session<'_> {
    fn run(&mut self) -> zlink_core::Result<()> {
        loop {
            let (call, _) = now(self.connection.receive_call::<Called>())?;
            let (oneway, more) = (call.oneway(), call.more());
            let Called { method, parameters } = call.method();
            let parameters = parameters.clone().unwrap_or_else(|| json!({}));
            let then = match self.answer(method, parameters, more) {
                Ok(Answer::Value(value)) if !oneway => self.reply(value, None),
                Ok(Answer::Value(_)) => Ok(Then::Goes),
                Ok(Answer::Events) => self.watch(),
                Err(_) if oneway => Ok(Then::Goes),
                Err(failure) => {
                    now(self.connection.send_error(&failure, Vec::new())).map(|()| Then::Goes)
                }
            };
            if let Then::Ends = then? {
                return Ok(());
            }
        }
    }

    fn reply(&mut self, value: Value, continues: Option<bool>) -> zlink_core::Result<Then> {
        let reply = Reply::new(Some(value)).set_continues(continues);
        now(self.connection.send_reply(&reply, Vec::new()))?;
        Ok(Then::Goes)
    }

    fn answer(&self, method: &str, parameters: Value, more: bool) -> Result<Answer, Failure> {
        let of_service = method.strip_prefix("org.varlink.service.");
        if let Some(method) = of_service {
            return about_the_service(method, &parameters).map(Answer::Value);
        }
        let ours = method
            .strip_prefix(NAME)
            .and_then(|rest| rest.strip_prefix('.'));
        let Some(ours) = ours else {
            let interface = method.rsplit_once('.').map_or(method, |(name, _)| name);
            return Err(service(
                "InterfaceNotFound",
                json!({ "interface": interface }),
            ));
        };
        match ours {
            "GetStatus" => Ok(Answer::Value(json!({ "status": self.shared.status() }))),
            "Watch" if more => Ok(Answer::Events),
            "Watch" => Err(service("ExpectedMore", json!({}))),
            "SetLimits" => {
                let limits: SetLimits = serde_json::from_value(parameters).map_err(|error| {
                    service(
                        "InvalidParameter",
                        json!({ "parameter": error.to_string() }),
                    )
                })?;
                self.steer(&limits.changes()?)
            }
            "Hold" => self.steer(&[Steer::Sending(Sending::Held)]),
            "GoOn" => self.steer(&[Steer::Sending(Sending::On)]),
            "SwitchOverNow" => {
                self.goes_on()?;
                self.shared.subject.switch_over_now().map_err(refused)?;
                Ok(Answer::Value(json!({})))
            }
            "Cancel" => {
                self.goes_on()?;
                self.shared.subject.cancel();
                Ok(Answer::Value(json!({})))
            }
            _ => Err(service("MethodNotFound", json!({ "method": method }))),
        }
    }

    /// All of the changes, or none of them.
    fn steer(&self, changes: &[Steer]) -> Result<Answer, Failure> {
        self.goes_on()?;
        for change in changes {
            change
                .check()
                .map_err(|error| out_of_range(&error.to_string()))?;
        }
        for change in changes {
            self.shared.subject.steer(*change).map_err(refused)?;
        }
        Ok(Answer::Value(json!({})))
    }

    fn goes_on(&self) -> Result<(), Failure> {
        match self.shared.end() {
            None => Ok(()),
            Some(end) => Err(ours("Over", json!({ "end": end }))),
        }
    }

    /// Tells what happens until it is over, or the client does not take it.
    fn watch(&mut self) -> zlink_core::Result<Then> {
        let _watching = self.shared.watching();
        let (mut before, mut told): (Option<Seen>, _) = (None, Instant::now());
        let mut switched_over = false;
        loop {
            // First, so that what is looked at afterwards is the last.
            let end = self.shared.end();
            let seen = self.shared.subject.look();
            let mut news = seen.news(before.as_ref());
            if news.is_empty() && told.elapsed() >= PERIOD {
                news.push("progress");
            }
            for event in news {
                switched_over |= event == SWITCHOVER;
                told = Instant::now();
                self.event(event, seen.status(), true)?;
            }
            if let Some(end) = end {
                // It was shorter than the time between two looks.
                if end.event() == "done" && !switched_over {
                    self.event(SWITCHOVER, seen.status(), true)?;
                }
                self.event(end.event(), self.shared.status(), false)?;
                return Ok(Then::Goes);
            }
            if self.shared.is_closing() {
                return Ok(Then::Ends);
            }
            before = Some(seen);
            self.shared.wait_for_end(LOOK);
        }
    }

    fn event(&mut self, event: &str, status: Value, continues: bool) -> zlink_core::Result<()> {
        let value = json!({ "event": event, "status": status });
        self.reply(value, Some(continues)).map(|_| ())
    }
}

enum Answer {
    Value(Value),
    Events,
}

/// The interface that every Varlink service has.
fn about_the_service(method: &str, parameters: &Value) -> Result<Value, Failure> {
    match method {
        "GetInfo" => Ok(json!({
            "vendor": "multifd",
            "product": "multifd",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "https://varlink.org",
            "interfaces": ["org.varlink.service", NAME],
        })),
        "GetInterfaceDescription" => match parameters["interface"].as_str() {
            Some(NAME) => Ok(json!({ "description": INTERFACE })),
            other => Err(service("InterfaceNotFound", json!({ "interface": other }))),
        },
        _ => Err(service(
            "MethodNotFound",
            json!({ "method": format!("org.varlink.service.{method}") }),
        )),
    }
}

fn service(error: &str, parameters: Value) -> Failure {
    Failure {
        error: format!("org.varlink.service.{error}"),
        parameters,
    }
}

fn ours(error: &str, parameters: Value) -> Failure {
    Failure {
        error: format!("{NAME}.{error}"),
        parameters,
    }
}

fn out_of_range(text: &str) -> Failure {
    ours("OutOfRange", json!({ "text": text }))
}

fn refused(why: Refused) -> Failure {
    match why {
        Refused::OutOfRange(error) => out_of_range(&error.to_string()),
        Refused::NotHere => ours("NotHere", json!({})),
    }
}
