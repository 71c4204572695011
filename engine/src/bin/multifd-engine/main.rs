//! `multifd-engine`: migrates the guest of a VMM that is another process.
#[macro_use]
extern crate multifd_cli;

mod args;
mod ask;
mod help;
mod receive;
mod report;
mod send;

use std::os::fd::AsFd as _;
use std::process::ExitCode;

use anyhow::Context as _;
use args::{Args, Common, Role};
use multifd_cli::flags::ReportKind;
use multifd_cli::start;
use multifd_engine::link::Link;
use multifd_engine::protocol::Outcome;
use multifd_engine::socket::Socket;

fn main() -> ExitCode {
    let args: Args = match start::arguments(report::not_begun) {
        Ok(args) => args,
        Err(status) => return status,
    };
    start::log();
    let (common, ended) = match &args.role {
        Role::Send(args) => (&args.common, send::run(args)),
        Role::Receive(args) => (&args.common, receive::run(args)),
    };
    match ended {
        Ok(outcome) => ExitCode::from(u8::try_from(outcome.value()).unwrap_or(1)),
        Err(NotBegun {
            code,
            status,
            error,
        }) => {
            let text = start::words(&error);
            if common.output.report() == ReportKind::Json {
                out!("{}", report::not_begun(start::fault(code, &text)));
            }
            err!("multifd-engine: {text}");
            ExitCode::from(status)
        }
    }
}

/// What was found wrong before anything was moved.
struct NotBegun {
    code: &'static str,
    status: u8,
    error: anyhow::Error,
}

impl NotBegun {
    /// The flags.
    fn usage(error: anyhow::Error) -> Self {
        let (code, status) = (start::USAGE, 2);
        Self {
            code,
            status,
            error,
        }
    }
}

impl From<anyhow::Error> for NotBegun {
    fn from(error: anyhow::Error) -> Self {
        let (code, status) = (start::NOT_BEGUN, 1);
        Self {
            code,
            status,
            error,
        }
    }
}

type Ended = Result<Outcome, NotBegun>;

/// The socket to the VMM, before this process gives up what it may need to reach it.
fn connect(common: &Common) -> anyhow::Result<Socket> {
    let socket = if common.vmm.as_os_str() == "-" {
        let inherited = std::io::stdin().as_fd().try_clone_to_owned();
        inherited
            .and_then(Socket::from_fd)
            .context("standard input is not the VMM's socket")?
    } else {
        Socket::connect(&common.vmm)
            .with_context(|| format!("no VMM at {}", common.vmm.display()))?
    };
    socket.check_peer().context("the VMM's socket")?;
    Ok(socket)
}

/// From here on there is a thread, so what is to be given up is given up.
fn link(common: &Common, socket: Socket) -> anyhow::Result<Link> {
    Link::new(socket, common.vmm_deadline).context("no thread for the VMM's socket")
}
