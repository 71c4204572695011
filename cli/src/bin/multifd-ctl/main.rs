//! `multifd-ctl`: asks a running multifd-send or multifd-receive how far it is, watches it, and steers it.
#[macro_use]
extern crate multifd_cli;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use multifd_cli::flags::NotConverging;
use multifd_cli::units::{self, Rate, Size, Time};
use multifd_control::client::{Client, ClientError, Heard};
use serde_json::{Map, Value, json};

/// Watch and steer a migration, by the socket of multifd-send --control or multifd-receive --control
///
/// Only the user who runs the program, and root, may connect. The socket speaks Varlink, so varlinkctl does as well.
#[derive(Debug, Parser)]
#[command(name = "multifd-ctl", version, after_help = EXIT_STATUS)]
struct Args {
    /// The socket: unix:/path or a path
    // Not needed for `completion`; any other command refuses an empty one.
    #[arg(value_name = "SOCKET", default_value = "", hide_default_value = true)]
    socket: String,

    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Examples:
  multifd-ctl /run/vm7.sock status
  multifd-ctl /run/vm7.sock set --bandwidth 2GB/s --downtime-limit 500ms
  multifd-ctl /run/vm7.sock watch

Exit status: 0 done; 1 refused, with the reason; 2 wrong usage; 3 nobody listens there. watch: 0 if it was done, 1 if it failed.";

#[derive(Debug, Subcommand)]
enum Command {
    /// How far it is, and when it will end
    Status {
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
    /// What happens, line by line, until it is over
    Watch {
        /// As a JSON object in each line
        #[arg(long)]
        json: bool,
    },
    /// Change limits
    Set(Set),
    /// Send next to nothing, and begin no switchover, until go-on
    Hold,
    /// Go on after hold
    GoOn,
    /// Switch over when the round under way is over, whatever the forecast says
    SwitchOver,
    /// End it; the guest runs on at the source
    Cancel,
    /// Print a completion script for a shell
    Completion {
        /// Which
        shell: Shell,
    },
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
struct Set {
    /// Cap on the bandwidth of all data channels together (such as 100MB/s; 0: none)
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    bandwidth: Option<u64>,
    /// Longest downtime (such as 300ms, 2s)
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    downtime_limit: Option<Duration>,
    /// Pre-copy rounds before --if-not-converging decides
    #[arg(long, value_name = "N")]
    max_rounds: Option<u32>,
    /// What to do then
    #[arg(long, value_name = "WHAT", value_enum)]
    if_not_converging: Option<NotConverging>,
    /// How much of the guest's time may be held back (such as 80%; 0%: nothing)
    #[arg(long, value_name = "PERCENT", value_parser = units::percent)]
    throttle_limit: Option<u8>,
}

impl Set {
    fn parameters(&self) -> Value {
        let when = self.if_not_converging.map(NotConverging::name);
        let given = [
            ("bandwidth_cap_bytes_per_s", json!(self.bandwidth)),
            (
                "downtime_limit_ms",
                json!(self.downtime_limit.map(|limit| limit.as_secs_f64() * 1e3)),
            ),
            ("max_rounds", json!(self.max_rounds)),
            ("if_not_converging", json!(when)),
            ("throttle_limit_percent", json!(self.throttle_limit)),
        ];
        let given = given.into_iter().filter(|(_, value)| !value.is_null());
        let given: Map<String, Value> = given
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        Value::Object(given)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Command::Completion { shell } = args.command {
        clap_complete::generate(
            shell,
            &mut Args::command(),
            "multifd-ctl",
            &mut std::io::stdout(),
        );
        return ExitCode::SUCCESS;
    }
    if args.socket.is_empty() {
        err!("multifd-ctl: name the socket first: multifd-ctl /run/vm7.sock status");
        return ExitCode::from(2);
    }
    let path = PathBuf::from(args.socket.trim_start_matches("unix:"));
    match run(&path, &args.command) {
        Ok(status) => status,
        Err(error) => {
            err!("multifd-ctl: {}: {error}", path.display());
            ExitCode::from(match error {
                ClientError::Refused { .. } => 1,
                _ => 3,
            })
        }
    }
}

fn run(path: &Path, command: &Command) -> Result<ExitCode, ClientError> {
    let mut client = Client::connect(path)?;
    let nothing = json!({});
    match command {
        Command::Status { json } => {
            let status = client.call("GetStatus", &nothing)?["status"].take();
            if *json {
                out!("{status}");
            } else {
                out!("{}", table(&status));
            }
            return Ok(ExitCode::SUCCESS);
        }
        Command::Watch { json } => return watch(&mut client, *json),
        Command::Set(set) => client.call("SetLimits", &set.parameters())?,
        Command::Hold => client.call("Hold", &nothing)?,
        Command::GoOn => client.call("GoOn", &nothing)?,
        Command::SwitchOver => client.call("SwitchOverNow", &nothing)?,
        Command::Cancel => client.call("Cancel", &nothing)?,
        Command::Completion { .. } => Value::Null,
    };
    Ok(ExitCode::SUCCESS)
}

fn watch(client: &mut Client, as_json: bool) -> Result<ExitCode, ClientError> {
    let mut last = Value::Null;
    client.watch(|event| {
        if as_json {
            out!("{event}");
        } else {
            out!("{}", line(event));
        }
        last = event["event"].clone();
        Heard::More
    })?;
    Ok(if last == "done" {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

/// One event in words.
fn line(event: &Value) -> String {
    let status = &event["status"];
    let name = event["event"].as_str().unwrap_or_default();
    let end = &status["end"];
    let rest = match name {
        "done" | "failed" => {
            let text = end["text"].as_str().map(|text| format!(": {text}"));
            let code = end["code"].as_str().map(|code| format!(" [{code}]"));
            format!(
                "{}{}{}",
                end["outcome"].as_str().unwrap_or_default(),
                text.unwrap_or_default(),
                code.unwrap_or_default()
            )
        }
        "limits" => limits(&status["limits"]),
        "throttle" => format!(
            "{} % of the guest's time held back",
            status["throttle_percent"]
        ),
        "forecast" => forecast(&status["forecast"]),
        _ => format!(
            "{}, round {}, {}",
            word(&status["phase"]),
            status["round"],
            moved(status)
        ),
    };
    format!("{name:<13} {rest}")
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn bytes(value: &Value) -> String {
    value
        .as_u64()
        .map_or_else(|| "?".into(), |bytes| Size(bytes).to_string())
}

fn moved(status: &Value) -> String {
    if status["side"] == "source" {
        format!(
            "{} left, {} sent, {} channels",
            bytes(&status["round_left_bytes"]),
            bytes(&status["sent_bytes"]),
            status["channels_open"]
        )
    } else {
        format!(
            "{} received, {} channels",
            bytes(&status["received_bytes"]),
            status["channels_open"]
        )
    }
}

fn time(value: &Value) -> String {
    value
        .as_f64()
        .map_or_else(|| "?".into(), |ms| Time::ms(ms).to_string())
}

fn forecast(forecast: &Value) -> String {
    let downtime = time(&forecast["downtime_ms"]);
    if forecast["converges"] == true {
        let within = time(&forecast["within_ms"]);
        return format!("switchover in {within}, downtime {downtime}");
    }
    if forecast.is_null() {
        return "none yet".to_owned();
    }
    let ways = [
        forecast["bandwidth_needed_bytes_per_s"]
            .as_u64()
            .map(|rate| Rate(rate).to_string()),
        forecast["throttle_percent"]
            .as_u64()
            .map(|percent| format!("a throttle of {percent} %")),
        Some(format!("a downtime limit of {downtime}")),
    ];
    let ways: Vec<String> = ways.into_iter().flatten().collect();
    format!("will not converge without {}", ways.join(" or "))
}

fn limits(limits: &Value) -> String {
    let cap = limits["bandwidth_cap_bytes_per_s"].as_u64();
    format!(
        "{}, downtime {}, {} rounds, then {}, throttle {} %{}",
        cap.map_or_else(|| "no cap".into(), |cap| format!("cap {}", Rate(cap))),
        time(&limits["downtime_limit_ms"]),
        limits["max_rounds"],
        word(&limits["if_not_converging"]),
        limits["throttle_limit_percent"],
        if limits["sending_held"] == true {
            ", sending held"
        } else {
            ""
        }
    )
}

/// The status for people.
fn table(status: &Value) -> String {
    let mut lines = vec![
        ("side", word(&status["side"]).to_owned()),
        ("phase", word(&status["phase"]).to_owned()),
        ("round", format!("{}, {}", status["round"], moved(status))),
    ];
    if let Some(rate) = status["bandwidth_bytes_per_s"].as_u64() {
        lines.push(("bandwidth", Rate(rate).to_string()));
    }
    if status["side"] == "source" {
        lines.push(("forecast", forecast(&status["forecast"])));
        lines.push(("limits", limits(&status["limits"])));
        lines.push(("throttle", format!("{} %", status["throttle_percent"])));
    }
    if let Some(left) = status["reconnect"]["gives_up_in_ms"].as_f64() {
        lines.push(("link", format!("lost; given up in {}", Time::ms(left))));
    }
    let lines: Vec<String> = lines
        .iter()
        .map(|(label, text)| format!("{label:<10} {text}"))
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_in_order() {
        Args::command().debug_assert();
    }

    #[test]
    fn only_what_is_given_is_changed() {
        let set = |flags: &[&str]| {
            let args = ["multifd-ctl", "/s", "set"].iter().chain(flags);
            let Command::Set(set) = Args::try_parse_from(args).unwrap().command else {
                panic!("set");
            };
            set.parameters()
        };
        assert_eq!(
            set(&["--bandwidth", "0", "--throttle-limit", "80%"]),
            json!({ "bandwidth_cap_bytes_per_s": 0, "throttle_limit_percent": 80 })
        );
        assert_eq!(
            set(&[
                "--downtime-limit=1.5s",
                "--if-not-converging=switch",
                "--max-rounds=7"
            ]),
            json!({ "downtime_limit_ms": 1500.0, "if_not_converging": "switch", "max_rounds": 7 })
        );
        Args::try_parse_from(["multifd-ctl", "/s", "set"]).unwrap_err();
    }
}
