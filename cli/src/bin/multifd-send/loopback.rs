//! `--loopback`: a multifd-receive of our own on this host.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use multifd_cli::flags::Transport;
use multifd_transport::Address;

use crate::args::Args;

/// A receiver process that was started for this migration. Ended when dropped.
pub(crate) struct Receiver {
    child: Child,
    /// Where it listens, a place for each kind of channel that was asked for, in that order.
    addresses: Vec<Address>,
    report: Option<JoinHandle<String>>,
}

impl Receiver {
    /// Starts multifd-receive from beside this program, at free ports of the loopback interface or of the host that was given.
    pub(crate) fn start(args: &Args) -> anyhow::Result<Self> {
        let program = beside_us()?;
        let mut command = Command::new(&program);
        for kind in &args.transport {
            command.arg("--listen").arg(match kind {
                Transport::Unix => std::env::temp_dir()
                    .join(format!("multifd-loopback-{}", std::process::id()))
                    .to_str()
                    .map(|path| format!("unix:{path}"))
                    .context("the folder for temporary files is not UTF-8")?,
                kind => {
                    let host = &args.loopback_host;
                    let host = if host.contains(':') {
                        format!("[{host}]")
                    } else {
                        host.clone()
                    };
                    format!("{}:{host}:0", kind.kind())
                }
            });
        }
        let tls = [
            ("--tls-ca", &args.tls.tls_ca),
            ("--tls-cert", &args.tls.tls_cert),
            ("--tls-key", &args.tls.tls_key),
            ("--tls-dir", &args.tls.tls_dir),
        ];
        for (flag, path) in tls {
            if let Some(path) = path {
                command.arg(flag).arg(path);
            }
        }
        let mut child = command
            .args(["--report", "json"])
            // It ends with us, however we end: nobody else knows where it listens.
            .args(["--until-stdin-closes", "--one-attempt", "--clear-text"])
            .stdin(Stdio::piped())
            // Ctrl-C is for us, who cancel and tell it; a terminal would send it to the whole group.
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut errors = BufReader::new(child.stderr.take().context("its standard error is ours")?);
        let (mut addresses, mut said) = (Vec::new(), String::new());
        while addresses.len() < args.transport.len() {
            let mut line = String::new();
            if errors.read_line(&mut line)? == 0 {
                let _ = child.kill();
                let _ = child.wait();
                bail!("multifd-receive did not start: {}", said.trim());
            }
            match line.trim().strip_prefix("listening on ") {
                Some(address) => addresses.push(address.parse()?),
                // Its log, or why it does not start.
                None => said += &line,
            }
        }
        if !said.is_empty() {
            err!("{}", said.trim_end());
        }
        // Its log goes where ours goes.
        let thread = || std::thread::Builder::new();
        thread().spawn(move || std::io::copy(&mut errors, &mut std::io::stderr()))?;
        let mut output = child.stdout.take().context("its standard output is ours")?;
        let report = thread().spawn(move || {
            let mut text = String::new();
            let _ = output.read_to_string(&mut text);
            text
        })?;
        Ok(Self {
            child,
            addresses,
            report: Some(report),
        })
    }

    /// Where the control channel and the data channels go.
    pub(crate) fn addresses(&self) -> (Address, Vec<Address>) {
        // There is one for each kind, and at least one kind.
        (self.addresses[0].clone(), self.addresses.clone())
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for it to end, and gives its report; null if it left none.
    pub(crate) fn wait(mut self, longest: Duration) -> serde_json::Value {
        let until = Instant::now() + longest;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let text = self
            .report
            .take()
            .and_then(|report| report.join().ok())
            .unwrap_or_default();
        serde_json::from_str(text.trim()).unwrap_or_default()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn beside_us() -> anyhow::Result<PathBuf> {
    let ours = std::env::current_exe()?;
    let program = ours.with_file_name("multifd-receive");
    if !program.exists() {
        bail!(
            "there is no {}: build it with `cargo build --release`, or use --connect",
            program.display()
        );
    }
    Ok(program)
}
