//! The programs as other processes: where they were built, and how a test starts, interrupts, kills and reads them.
//!
//! The rule this file keeps: no test leaves a process behind, and none waits without a bound. A [`Process`] is killed when it
//! is dropped.
//!
//! `cargo test --workspace` builds `multifd-send` and `multifd-receive` next to the tests, because their package has
//! integration tests of its own; `cargo test -p multifd-tests` alone does not, and [`path`] then says what to do.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, kill_process_group, prlimit};
use serde_json::Value;

/// Longest wait for anything that a process does in a second or two on a quiet host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the program was built: `target/<profile>/<name>`, beside the running program, or above the running test's own file.
///
/// # Panics
/// If it is not there; with the command that builds it.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    let ours = std::env::current_exe().expect("a process knows its own file");
    let found = ours
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|program| program.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "there is no {name} beside {}: build the programs with `cargo build -p multifd-cli` and the \
             options of this run (such as --release), or run `cargo test --workspace`, which builds them",
            ours.display()
        )
    })
}

/// Whether this host has KVM; if not, `test` is skipped by name, or fails if `MULTIFD_REQUIRE_KVM` is 1.
///
/// # Panics
/// If there is no KVM and `MULTIFD_REQUIRE_KVM` is 1.
#[must_use]
#[allow(clippy::print_stdout)] // a skipped test says so
pub fn kvm_or_skip(test: &str) -> bool {
    if Path::new("/dev/kvm").exists() {
        return true;
    }
    assert!(
        std::env::var("MULTIFD_REQUIRE_KVM").as_deref() != Ok("1"),
        "{test}: /dev/kvm missing, and MULTIFD_REQUIRE_KVM=1"
    );
    println!("SKIPPED {test}: /dev/kvm missing");
    false
}

/// A number from the environment, for the long forms of tests.
///
/// # Panics
/// If the variable is set to something that is no number.
#[must_use]
pub fn number_from_environment(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text}: give a number")))
}

/// The seed of a test that draws at random: `MULTIFD_SEED`, or a new one. Whoever asks prints it.
#[must_use]
pub fn seed() -> u64 {
    let fresh = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(1, |time| u64::from(time.subsec_nanos()) ^ time.as_secs())
    };
    number_from_environment("MULTIFD_SEED").unwrap_or_else(fresh)
}

/// How a program is started.
#[derive(Debug)]
pub struct Launch {
    name: String,
    before: Vec<OsString>,
    arguments: Vec<OsString>,
    log: String,
    output: Option<File>,
    held: bool,
}

impl Launch {
    /// As [`Process::start`] does it.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            before: Vec::new(),
            arguments: Vec::new(),
            log: "info".to_owned(),
            output: None,
            held: false,
        }
    }

    /// With these arguments.
    #[must_use]
    pub fn arguments<S: AsRef<OsStr>>(mut self, arguments: &[S]) -> Self {
        let arguments = arguments.iter().map(|word| word.as_ref().to_owned());
        self.arguments.extend(arguments);
        self
    }

    /// By way of another program, which has to become it with exec (such as `ip netns exec NAME`).
    #[must_use]
    pub fn by<S: AsRef<OsStr>>(mut self, words: &[S]) -> Self {
        self.before
            .extend(words.iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// With this filter of its log.
    #[must_use]
    pub fn log(mut self, filter: &str) -> Self {
        filter.clone_into(&mut self.log);
        self
    }

    /// With standard output and standard error there; the test then reads neither.
    #[must_use]
    pub fn output(mut self, file: File) -> Self {
        self.output = Some(file);
        self
    }

    /// With a standard input that [`Process::release`] writes.
    #[must_use]
    pub fn held(mut self) -> Self {
        self.held = true;
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it was not built, or cannot be started.
    #[must_use]
    pub fn start(self) -> Process {
        let program = path(&self.name).into_os_string();
        let mut words = self
            .before
            .into_iter()
            .chain([program])
            .chain(self.arguments);
        let mut command = Command::new(words.next().expect("the program itself at least"));
        command
            .args(words)
            .env("RUST_LOG", self.log)
            .env("NO_COLOR", "1")
            .stdin(if self.held {
                Stdio::piped()
            } else {
                Stdio::null()
            });
        let piped = self.output.is_none();
        if let Some(file) = self.output {
            let copy = file.try_clone().expect("a descriptor");
            command.stdout(file).stderr(copy);
        }
        Process::spawn(&self.name, command, piped)
    }
}

/// A running program, its output collected as it comes.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    began: Instant,
    output: Option<JoinHandle<String>>,
    errors: Arc<Lines>,
    errors_reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts one of the programs of this workspace with `RUST_LOG=info`, so that a test can read what happens inside.
    ///
    /// # Panics
    /// If it was not built, or cannot be started.
    #[must_use]
    pub fn start<S: AsRef<OsStr>>(name: &str, arguments: &[S]) -> Self {
        Launch::new(name).arguments(arguments).start()
    }

    fn spawn(name: &str, mut command: Command, piped: bool) -> Self {
        if piped {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let began = Instant::now();
        let output = child.stdout.take().map(|mut output| {
            std::thread::spawn(move || {
                let mut text = String::new();
                let _ = output.read_to_string(&mut text);
                text
            })
        });
        let errors = Arc::new(Lines::default());
        let lines = Arc::clone(&errors);
        let errors_reader = child.stderr.take().map(|source| {
            std::thread::spawn(move || {
                for line in BufReader::new(source).lines().map_while(Result::ok) {
                    lines.push(line);
                }
                lines.end();
            })
        });
        Self {
            name: name.to_owned(),
            input: child.stdin.take(),
            child,
            began,
            output,
            errors,
            errors_reader,
        }
    }

    /// Starts `multifd-receive --report json` on a free port of the loopback interface, for one source, and gives its address.
    #[must_use]
    pub fn receiver(arguments: &[&str]) -> (Self, String) {
        let fixed = [
            "--listen",
            "127.0.0.1:0",
            "--report",
            "json",
            "--one-attempt",
        ];
        let receiver = Self::start("multifd-receive", &[&fixed, arguments].concat());
        let address = receiver.announced();
        (receiver, address)
    }

    /// The address that a receiver with `--report json` says it listens on.
    #[must_use]
    pub fn announced(&self) -> String {
        let line = self.wait_for("listening on ");
        line.trim_start_matches("listening on ").to_owned()
    }

    /// Waits for a line on standard error that contains `text`.
    ///
    /// # Panics
    /// If the process ends without one, or takes longer than [`PATIENCE`].
    #[must_use]
    pub fn wait_for(&self, text: &str) -> String {
        match self.wait_for_line_or_end(text) {
            Some(line) => line,
            None => panic!("{} never said {text:?}:\n{}", self.name, self.errors.text()),
        }
    }

    /// As [`Self::wait_for`], but `None` if the process ends, or [`PATIENCE`] is over, before there is such a line.
    #[must_use]
    pub fn wait_for_line_or_end(&self, text: &str) -> Option<String> {
        self.wait_for_line_within(text, PATIENCE)
    }

    /// As [`Self::wait_for_line_or_end`], with a bound of the caller's own.
    #[must_use]
    pub fn wait_for_line_within(&self, text: &str, longest: Duration) -> Option<String> {
        self.errors.wait_for(text, Instant::now() + longest)
    }

    /// Sends SIGINT to it and to what it started, as Ctrl-C at a terminal does.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn interrupt(&self) {
        kill_process_group(Pid::from_child(&self.child), Signal::INT)
            .unwrap_or_else(|error| panic!("{} cannot be interrupted: {error}", self.name));
    }

    /// `kill -9`, and what it had is free again. Without effect on a process that has ended.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The processes that it started and that live.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    pub fn children(&self) -> Vec<Stranger> {
        let tasks = format!("/proc/{}/task", self.child.id());
        let tasks = std::fs::read_dir(tasks).expect("it lives").flatten();
        let children = tasks.map(|task| std::fs::read_to_string(task.path().join("children")));
        let children: String = children.map(Result::unwrap_or_default).collect();
        children.split_whitespace().map(Stranger::new).collect()
    }

    /// Time since it was started.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Stops it as if its host stood still, until [`Self::go_on`]. Without effect on a process that has ended.
    pub fn stand_still(&self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::STOP);
    }

    /// Tells a multifd-send to switch over now.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn switch_over(&self) {
        kill_process(Pid::from_child(&self.child), Signal::USR1)
            .unwrap_or_else(|error| panic!("{} can't be told: {error}", self.name));
    }

    /// Lets it go on.
    pub fn go_on(&self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::CONT);
    }

    /// Ends what `--hold-at` began. Without effect on a process that was not held.
    pub fn release(&mut self) {
        if let Some(mut input) = self.input.take() {
            let _ = input.write_all(b"\n");
        }
    }

    /// From now on it may open no descriptor with a number from `most` on; gives the limit that it had. `None` if it has ended.
    #[must_use]
    pub fn limit_descriptors(&self, most: u64) -> Option<u64> {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", self.child.id())).ok()?;
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max open files"))?;
        // The hard limit stays.
        let limit = Rlimit {
            current: Some(most),
            maximum: line.split_whitespace().nth(4)?.parse().ok(),
        };
        let old = prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit);
        old.ok()?.current
    }

    /// Whether it has said a line with `text` on standard error by now.
    #[must_use]
    pub fn said(&self, text: &str) -> bool {
        self.errors.wait_for(text, Instant::now()).is_some()
    }

    /// All that it said on standard error by now.
    #[must_use]
    pub fn words(&self) -> String {
        self.errors.text()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has ended, and gives all that it said.
    ///
    /// # Panics
    /// If that takes longer than [`PATIENCE`].
    #[must_use]
    pub fn end(self) -> Ended {
        self.end_within(PATIENCE)
            .unwrap_or_else(|what| panic!("{what}"))
    }

    /// As [`Self::end`], with a bound of the caller's own.
    ///
    /// # Errors
    /// It did not end; with all that it said. It is killed.
    pub fn end_within(mut self, longest: Duration) -> Result<Ended, String> {
        let asked = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                break status;
            }
            if asked.elapsed() >= longest {
                let (name, said) = (&self.name, self.errors.text());
                return Err(format!("{name} does not end; so far it said:\n{said}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let took = self.began.elapsed();
        if let Some(reader) = self.errors_reader.take() {
            let _ = reader.join();
        }
        let output = self.output.take().map(|output| output.join());
        Ok(Ended {
            name: self.name.clone(),
            status: status.code(),
            output: output.and_then(Result::ok).unwrap_or_default(),
            errors: self.errors.text(),
            took,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that this test did not start itself.
#[derive(Debug)]
pub struct Stranger {
    folder: PathBuf,
    /// With its number this names the process for good, also when the number is given to another one.
    started: Option<String>,
}

impl Stranger {
    fn new(id: &str) -> Self {
        let folder = Path::new("/proc").join(id);
        let started = start_time(&folder);
        Self { folder, started }
    }

    /// Whether it is still there, and not just waiting to be reaped.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.started.is_some() && start_time(&self.folder) == self.started
    }
}

/// When the process was started, in the kernel's ticks; `None` if it has ended.
fn start_time(folder: &Path) -> Option<String> {
    let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
    // The name in brackets may hold anything; after it come the state and, nineteen fields on, the start time.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match fields[..] {
        ["Z" | "X", ..] => None,
        _ => fields.get(19).map(|&ticks| ticks.to_owned()),
    }
}

/// What a program left behind.
#[derive(Debug)]
pub struct Ended {
    name: String,
    /// Its exit status; `None` if a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
    /// How long it lived.
    pub took: Duration,
}

impl Ended {
    /// Its JSON report: the one object, and the only thing, on standard output.
    ///
    /// # Panics
    /// If standard output is anything else.
    #[must_use]
    pub fn report(&self) -> Value {
        match serde_json::from_str(&self.output) {
            Ok(report @ Value::Object(_)) => report,
            other => panic!(
                "the standard output of {} is not one JSON object: {other:?}\n{self}",
                self.name
            ),
        }
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} ended with status {:?} after {:?}",
            self.name, self.status, self.took
        )?;
        writeln!(f, "standard output:\n{}", self.output)?;
        write!(f, "standard error:\n{}", self.errors)
    }
}

/// Lines that one thread reads and others wait for.
#[derive(Debug, Default)]
struct Lines {
    state: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
}

impl Lines {
    fn push(&self, line: String) {
        self.lock().0.push(line);
        self.changed.notify_all();
    }

    fn end(&self) {
        self.lock().1 = true;
        self.changed.notify_all();
    }

    fn text(&self) -> String {
        self.lock().0.join("\n")
    }

    fn wait_for(&self, text: &str, until: Instant) -> Option<String> {
        let mut state = self.lock();
        loop {
            if let Some(line) = state.0.iter().find(|line| line.contains(text)) {
                return Some(line.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Vec<String>, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
