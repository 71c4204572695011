//! Killing `multifd-send --bridge` at exact moments, between two scripted monitors that say what QEMU says: no QEMU is needed.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use multifd_bridge::tap::SHUT;

/// What QEMU's destination says first: that it has read the source's first question.
const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];

/// Longest wait for anything.
const LONG: Duration = Duration::from_secs(30);

struct Program(Child);

impl Program {
    fn start(program: &str, arguments: &[&str]) -> (Self, String) {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut reader = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        reader.read_line(&mut line).expect("it speaks");
        std::thread::spawn(move || reader.lines().for_each(drop));
        (Self(child), line)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The main stream of a migration: up to memory, and on to the first device.
fn beginning() -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x03pc0".to_vec();
    out.extend([8, 0, 1, 0, 0]);
    out.extend([8, 0, 2, 0, 4, 0, 0, 0, 1]);
    out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    out.extend((0x1000_u64 | 0x04).to_be_bytes());
    out.extend(b"\x03mem");
    out.extend(0x1000_u64.to_be_bytes());
    out.extend(0x10_u64.to_be_bytes());
    out.extend([0x7e, 0, 0, 0, 2]);
    out
}

const DEVICE: &[u8] = b"\x04\0\0\0\x05\x03cpu\0\0\0\0\0\0\0\x0c the state of a device";

struct Scene {
    source: UnixStream,
    destination: UnixStream,
    send: Program,
    receive: Program,
    folder: PathBuf,
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Both monitors are connected through the bridges, and said what they say first.
fn scene(test: &str) -> Scene {
    let folder = std::env::temp_dir().join(format!("mfd-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let uri = |name: &str| format!("unix:{}", folder.join(name).display());
    let incoming = UnixListener::bind(folder.join("in.sock")).unwrap();
    let (receive, line) = Program::start(
        env!("CARGO_BIN_EXE_multifd-receive"),
        &[
            "--bridge",
            &uri("in.sock"),
            "--listen",
            "127.0.0.1:0",
            "--bridge-outage",
            "3s",
        ],
    );
    let port = line
        .split("127.0.0.1:")
        .nth(1)
        .and_then(|rest| rest.split(',').next());
    let connect = format!("127.0.0.1:{}", port.expect(&line));
    let (send, line) = Program::start(
        env!("CARGO_BIN_EXE_multifd-send"),
        &[
            "--bridge",
            &uri("out.sock"),
            "--connect",
            &connect,
            "--bridge-outage",
            "3s",
        ],
    );
    assert!(line.contains("may migrate"), "{line}");
    let mut source = UnixStream::connect(folder.join("out.sock")).unwrap();
    source.set_read_timeout(Some(LONG)).unwrap();
    source.write_all(&beginning()).unwrap();
    let (mut destination, _) = incoming.accept().unwrap();
    destination.set_read_timeout(Some(LONG)).unwrap();
    let mut octets = vec![0; beginning().len()];
    destination.read_exact(&mut octets).unwrap();
    assert_eq!(octets, beginning());
    destination.write_all(&PONG).unwrap();
    let mut pong = [0; 8];
    source.read_exact(&mut pong).unwrap();
    assert_eq!(pong, PONG);
    Scene {
        source,
        destination,
        send,
        receive,
        folder,
    }
}

impl Scene {
    /// The source stopped the guest and sent everything; the destination has it.
    fn send_the_device(&mut self) {
        self.source.write_all(DEVICE).unwrap();
        let mut octets = vec![0; DEVICE.len()];
        self.destination.read_exact(&mut octets).unwrap();
        assert_eq!(octets, DEVICE);
    }

    fn kill(&mut self) {
        self.send.0.kill().unwrap();
        self.send.0.wait().unwrap();
    }

    /// The source's monitor hears nothing, and its connection does not end.
    fn source_hears_nothing(&mut self) {
        self.source
            .set_read_timeout(Some(Duration::from_millis(700)))
            .unwrap();
        let heard = self.source.read(&mut [0; 8]).map_err(|error| error.kind());
        assert_eq!(heard, Err(std::io::ErrorKind::WouldBlock));
        self.source.set_read_timeout(Some(LONG)).unwrap();
    }

    /// All that the source's monitor hears until its connection ends.
    fn source_hears(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        // A reset is an end as well.
        let _ = self.source.read_to_end(&mut heard);
        heard
    }
}

#[test]
fn killed_while_memory_travels_the_source_hears_at_once_that_it_failed() {
    let mut scene = scene("scripted-memory");
    scene.kill();
    assert!(scene.source_hears().is_empty());
}

/// SPEC: CARRY-12
#[test]
fn killed_after_the_guest_was_stopped_the_source_hears_nothing_until_it_runs_there() {
    let mut scene = scene("scripted-runs");
    scene.send_the_device();
    scene.kill();
    scene.source_hears_nothing();
    scene.destination.write_all(&SHUT).unwrap();
    assert_eq!(scene.source_hears(), SHUT);
}

/// A monitor on a busy host takes longer to run the guest than the link is waited for (3 s) and the last word (10 s).
///
/// SPEC: CARRY-12
#[test]
fn a_monitor_that_may_run_the_guest_is_waited_for_as_long_as_it_takes() {
    let mut scene = scene("scripted-slow");
    scene.send_the_device();
    scene.kill();
    for _ in 0..23 {
        scene.source_hears_nothing();
    }
    scene.destination.write_all(&SHUT).unwrap();
    assert_eq!(scene.source_hears(), SHUT);
}

/// SPEC: CARRY-10, CARRY-12
#[test]
fn killed_after_the_guest_was_stopped_the_source_hears_an_end_if_it_can_not_run_there() {
    let mut scene = scene("scripted-fails");
    scene.send_the_device();
    scene.kill();
    scene.source_hears_nothing();
    scene
        .destination
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    assert!(scene.source_hears().is_empty());
}

/// SPEC: CARRY-10, CARRY-11
#[test]
fn the_last_word_reaches_the_source_and_both_programs_end() {
    let mut scene = scene("scripted-whole");
    scene.send_the_device();
    scene.destination.write_all(&SHUT).unwrap();
    let mut last = [0; 8];
    scene.source.read_exact(&mut last).unwrap();
    assert_eq!(last, SHUT);
    scene.source.shutdown(std::net::Shutdown::Both).unwrap();
    let status = scene.send.0.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    let status = scene.receive.0.wait().unwrap();
    assert_eq!(status.code(), Some(0));
}
