//! A real QEMU with the small guest of `guest.S`, told what to do by QMP.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The guest's memory.
pub(crate) const MEMORY_MIB: usize = 128;

/// Pages of the working set, and where it and the pages that tell where they lie are (see `guest.S`).
const WORKING_SET: usize = 2048;
const WORKING_SET_AT: usize = 1 << 20;
const FILLED: std::ops::Range<usize> = 16 << 20..112 << 20;
const COUNTER_AT: usize = 0x2000;

/// Where QEMU is, and what it needs.
pub(crate) struct Program {
    path: PathBuf,
    root: Option<PathBuf>,
}

impl Program {
    /// The QEMU of `MULTIFD_QEMU` (a program, or a folder that `get` filled), or the installed one.
    pub(crate) fn find() -> Option<Self> {
        if let Some(place) = std::env::var_os("MULTIFD_QEMU").map(PathBuf::from) {
            let inside = place.join("usr/bin/qemu-system-x86_64");
            return Some(if inside.is_file() {
                Self {
                    path: inside,
                    root: Some(place),
                }
            } else {
                Self {
                    path: place,
                    root: None,
                }
            });
        }
        let path = std::env::var_os("PATH")?;
        let found = std::env::split_paths(&path)
            .map(|folder| folder.join("qemu-system-x86_64"))
            .find(|path| path.is_file())?;
        Some(Self {
            path: found,
            root: None,
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        if let Some(root) = &self.root {
            let libraries = root.join("usr/lib/x86_64-linux-gnu");
            command.env(
                "LD_LIBRARY_PATH",
                format!(
                    "{0}:{0}/pulseaudio:{1}",
                    libraries.display(),
                    root.join("lib/x86_64-linux-gnu").display()
                ),
            );
            for folder in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(folder));
            }
        }
        command
    }
}

/// Assembles the guest.
pub(crate) fn firmware(folder: &Path) -> PathBuf {
    let source = folder.join("guest.S");
    fs::write(&source, include_str!("guest.S")).unwrap();
    let (object, image) = (folder.join("guest.o"), folder.join("guest.bin"));
    let run = |command: &mut Command| {
        let status = command.status().expect("as and ld (binutils) are there");
        assert!(status.success());
    };
    run(Command::new("as")
        .arg("--32")
        .arg(source)
        .arg("-o")
        .arg(&object));
    run(Command::new("ld")
        .args([
            "-m",
            "elf_i386",
            "-Ttext",
            "0xffff0000",
            "-e",
            "0",
            "--oformat",
            "binary",
            "-o",
        ])
        .arg(&image)
        .arg(&object));
    image
}

/// A running QEMU.
pub(crate) struct Machine {
    child: Child,
    lines: BufReader<UnixStream>,
    folder: PathBuf,
    name: String,
}

impl Machine {
    pub(crate) fn start(program: &Program, folder: &Path, name: &str, extra: &[&str]) -> Self {
        let socket = folder.join(format!("{name}.qmp"));
        let accelerator = if fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
        {
            "kvm"
        } else {
            "tcg"
        };
        let child = program
            .command()
            .args(["-machine", &format!("q35,accel={accelerator}")])
            .args([
                "-m",
                &MEMORY_MIB.to_string(),
                "-nodefaults",
                "-display",
                "none",
                "-vga",
                "none",
            ])
            .args(["-uuid", "11111111-2222-3333-4444-555555555555"])
            .arg("-bios")
            .arg(folder.join("guest.bin"))
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join(format!("{name}.err"))).unwrap())
            .spawn()
            .expect("qemu starts");
        let deadline = Instant::now() + Duration::from_secs(30);
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => panic!("{name}: no QMP: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut machine = Self {
            child,
            lines: BufReader::new(stream),
            folder: folder.to_owned(),
            name: name.to_owned(),
        };
        machine.line().expect("QMP greets");
        machine.run("qmp_capabilities", json!({}));
        machine
    }

    /// A line of QMP; the error is that QEMU is gone.
    fn line(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        read.map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|error| format!("QMP said {line:?}: {error}"))
    }

    /// Runs a command; the error is QEMU's.
    pub(crate) fn try_run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.lines
            .get_mut()
            .write_all(text.as_bytes())
            .map_err(|error| error.to_string())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(error.to_string());
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        let name = self.name.clone();
        self.try_run(command, arguments)
            .unwrap_or_else(|error| panic!("{name}: {command}: {error}"))
    }

    /// What QEMU itself said on standard error.
    pub(crate) fn complaints(&self) -> String {
        fs::read_to_string(self.folder.join(format!("{}.err", self.name))).unwrap_or_default()
    }

    /// Whether the guest runs, as QEMU says; `None` when QEMU is gone.
    pub(crate) fn is_running(&mut self) -> Option<bool> {
        if self.child.try_wait().ok()?.is_some() {
            return None;
        }
        let status = self.try_run("query-status", json!({})).ok()?;
        status["running"].as_bool()
    }

    /// The state of the migration.
    pub(crate) fn migration(&mut self) -> String {
        let state = self.run("query-migrate", json!({}));
        state["status"].as_str().unwrap_or("none").to_owned()
    }

    /// All of the guest's memory.
    pub(crate) fn memory(&mut self) -> Vec<u8> {
        let file = self.folder.join(format!("{}.mem", self.name));
        self.run(
            "pmemsave",
            json!({ "val": 0, "size": MEMORY_MIB << 20, "filename": file }),
        );
        let memory = fs::read(&file).unwrap();
        let _ = fs::remove_file(&file);
        memory
    }

    /// How many pages the guest has written, after stopping it and checking all that it wrote.
    pub(crate) fn stop_and_check(&mut self) -> u32 {
        self.run("stop", json!({}));
        let memory = self.memory();
        check(&memory)
    }

    /// Waits until the guest has filled its memory and writes on.
    pub(crate) fn wait_until_it_writes(&mut self, least: u32) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let file = self.folder.join(format!("{}.word", self.name));
            self.run(
                "pmemsave",
                json!({ "val": COUNTER_AT, "size": 4, "filename": file }),
            );
            let octets = fs::read(&file).unwrap();
            let count = octets
                .first_chunk()
                .map_or(0, |word| u32::from_le_bytes(*word));
            if count >= least {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{}: the guest stands still at {count}: {}",
                self.name,
                self.complaints()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn word(memory: &[u8], at: usize) -> u32 {
    memory[at..]
        .first_chunk()
        .map_or(0, |word| u32::from_le_bytes(*word))
}

/// Checks every page that the guest wrote, from what `guest.S` promises. Returns the guest's counter.
pub(crate) fn check(memory: &[u8]) -> u32 {
    let count = word(memory, COUNTER_AT);
    assert!(count > 0, "the guest has not begun");
    let newest = |index: u32, count: u32| {
        let set = WORKING_SET as u32;
        let newest = count - (count.wrapping_sub(index) % set).min(count);
        if newest % set == index { newest } else { 0 }
    };
    for index in 0..WORKING_SET as u32 {
        let seen = word(memory, WORKING_SET_AT + index as usize * 4096);
        // It may have been stopped between the page and the counter.
        let expected = [newest(index, count), newest(index, count + 1)];
        assert!(
            expected.contains(&seen),
            "page {index} has {seen} instead of {expected:?} at {count}"
        );
    }
    for at in FILLED.step_by(4096) {
        assert_eq!(word(memory, at) as usize, at, "a filled page");
    }
    count
}
