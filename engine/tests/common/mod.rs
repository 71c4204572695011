//! Engines and the example in C as processes of a test. None outlives its test, and none is waited for without a bound.
#![allow(dead_code, clippy::print_stdout)] // each test uses its part; a skipped one says so

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use multifd::tracking::process::Permission;

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A process whose output is read.
pub(crate) struct Process {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    lines: Arc<(Mutex<Lines>, Condvar)>,
}

#[derive(Default)]
struct Lines {
    all: Vec<String>,
    open: usize,
}

impl Process {
    pub(crate) fn start<A: AsRef<OsStr>>(name: &str, program: &Path, arguments: &[A]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let lines = Arc::<(Mutex<Lines>, Condvar)>::default();
        let outputs: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("it is piped")),
            Box::new(child.stderr.take().expect("it is piped")),
        ];
        for output in outputs {
            lines.0.lock().unwrap().open += 1;
            let theirs = Arc::clone(&lines);
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    theirs.0.lock().unwrap().all.push(line);
                    theirs.1.notify_all();
                }
                theirs.0.lock().unwrap().open -= 1;
                theirs.1.notify_all();
            });
        }
        Self {
            name: name.to_owned(),
            input: child.stdin.take(),
            child,
            lines,
        }
    }

    /// Waits for the first line from the `from`th on that begins so; gives its place and itself. `None` if the process ends before.
    pub(crate) fn line(&self, from: usize, begin: &str) -> Option<(usize, String)> {
        let until = Instant::now() + PATIENCE;
        let mut lines = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut all = lines.all.iter().enumerate().skip(from);
            if let Some((place, line)) = all.find(|(_, line)| line.starts_with(begin)) {
                return Some((place, line.clone()));
            }
            if lines.open == 0 {
                return None;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{}: no line {begin:?} after {from}: {:#?}",
                self.name,
                lines.all
            );
            lines = self.lines.1.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// As [`Process::line`], of a process that is expected to say it.
    pub(crate) fn says(&self, from: usize, begin: &str) -> String {
        match self.line(from, begin) {
            Some((_, line)) => line,
            None => panic!(
                "{} ended without {begin:?}: {:#?}",
                self.name,
                self.output()
            ),
        }
    }

    /// The first line so far that begins so.
    pub(crate) fn said(&self, begin: &str) -> Option<(usize, String)> {
        let output = self.output();
        let mut lines = output.into_iter().enumerate();
        lines.find(|(_, line)| line.starts_with(begin))
    }

    /// All lines so far.
    pub(crate) fn output(&self) -> Vec<String> {
        let lines = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.all.clone()
    }

    /// Tells it something, and waits for the line that answers.
    pub(crate) fn ask(&mut self, what: &str, begin: &str) -> String {
        let from = self.output().len();
        let input = self.input.as_mut().expect("its input is open");
        // In one piece: what comes in two is read as two.
        let line = format!("{what}\n");
        input.write_all(line.as_bytes()).expect("it reads");
        self.says(from, begin)
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub(crate) fn status(&mut self) -> i32 {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status.code().unwrap_or(-1);
            }
            assert!(
                Instant::now() < until,
                "{} does not end: {:#?}",
                self.name,
                self.output()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A folder of a test, which is removed with it.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        // Short: the path of a socket has 107 bytes at most.
        let path = std::env::temp_dir().join(format!("mfde-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("a folder for sockets");
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("it is UTF-8").to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The program, as this run built it.
pub(crate) fn engine_program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_multifd-engine"))
}

/// An engine that receives, and where it listens.
pub(crate) fn receiving(vmm: &str, listen: &str, more: &[&str]) -> (Process, String) {
    let all = [&["receive", "--vmm", vmm, "--listen", listen], more].concat();
    let engine = Process::start("receiving engine", engine_program(), &all);
    let line = engine.says(0, "listening on ");
    let address = line.trim_start_matches("listening on ").to_owned();
    (engine, address)
}

/// An engine that sends.
pub(crate) fn sending(vmm: &str, connect: &str, more: &[&str]) -> Process {
    let all = [&["send", "--vmm", vmm, "--connect", connect], more].concat();
    Process::start("sending engine", engine_program(), &all)
}

/// The example in C, built; `None` if this host can't build or run it, which is said under the test's name.
pub(crate) fn example_or_skip(test: &str) -> Option<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        Permission::of_this_process().map_err(|error| error.to_string())?;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let out =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("process-{}", std::process::id()));
        let compiled = Command::new("cc")
            .args([
                "-std=gnu11",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-pthread",
                "-I",
            ])
            .arg(folder.join("include"))
            .arg(folder.join("examples/process.c"))
            .arg("-o")
            .arg(&out)
            .output()
            .map_err(|error| format!("no C compiler (cc): {error}"))?;
        let said = String::from_utf8_lossy(&compiled.stderr);
        assert!(
            compiled.status.success(),
            "the example is not built: {said}"
        );
        Ok(out)
    });
    match built {
        Ok(program) => Some(program),
        Err(missing) => {
            println!("SKIPPED {test}: {missing}");
            None
        }
    }
}

/// The number behind `name=` in a line.
pub(crate) fn number(line: &str, name: &str) -> u64 {
    let word = line.split(' ').find_map(|word| word.strip_prefix(name));
    word.and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {line:?}"))
}
