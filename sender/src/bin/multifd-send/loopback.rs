//! `--loopback`: a multifd-receive of our own on this host.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use multifd_transport::Address;

/// A receiver process that was started for this migration. Ended when dropped.
pub(crate) struct Receiver {
    child: Child,
    /// Where it listens.
    pub(crate) address: Address,
    report: Option<JoinHandle<String>>,
}

impl Receiver {
    /// Starts multifd-receive from beside this program, on a free port of the loopback interface.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let program = beside_us()?;
        let mut child = Command::new(&program)
            .args(["--listen", "127.0.0.1:0", "--report", "json"])
            // It ends with us, however we end: nobody else knows where it listens.
            .arg("--until-stdin-closes")
            .stdin(Stdio::piped())
            // Ctrl-C is for us, who cancel and tell it; a terminal would send it to the whole group.
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut errors = BufReader::new(child.stderr.take().context("its standard error is ours")?);
        let mut line = String::new();
        errors.read_line(&mut line)?;
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            let mut rest = String::new();
            let _ = errors.read_to_string(&mut rest);
            let _ = child.kill();
            let _ = child.wait();
            bail!("multifd-receive did not start: {}{}", line, rest);
        };
        let address = address.parse()?;
        // Its log goes where ours goes.
        std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::stderr()));
        let mut output = child.stdout.take().context("its standard output is ours")?;
        let report = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = output.read_to_string(&mut text);
            text
        });
        Ok(Self {
            child,
            address,
            report: Some(report),
        })
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
