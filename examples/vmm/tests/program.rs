//! The program as a user has it, with a guest of a dozen instructions: on a host whose KVM runs no distribution's kernel as well. That it
//! boots and moves one is for the lab (`tests/lab/suites/linux.sh`).
#![allow(clippy::print_stderr)] // a test that is skipped is named

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_multifd-vmm");

/// How long anything may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

/// Says the alphabet on the serial line for ever, and writes memory between two letters.
const ALPHABET: [u8; 36] = [
    0xbb, 0x00, 0x00, 0x20, 0x00, //     mov ebx, 0x200000
    0xba, 0xf8, 0x03, 0x00, 0x00, //     mov edx, 0x3f8
    0xb8, 0x61, 0x00, 0x00, 0x00, // a:  mov eax, 'a'
    0xb9, 0x00, 0x08, 0x00, 0x00, // b:  mov ecx, 0x800
    0xff, 0x03, //                   c:  inc dword [rbx]
    0xff, 0xc9, //                       dec ecx
    0x75, 0xfa, //                       jnz c
    0xee, //                             out dx, al
    0xff, 0xc0, //                       inc eax
    0x83, 0xf8, 0x7b, //                 cmp eax, 'z' + 1
    0x75, 0xed, //                       jne b
    0xeb, 0xe6, //                       jmp a
];

/// A bzImage with that program at its 64-bit entry.
fn image(name: &str) -> PathBuf {
    let mut image = vec![0; 1024 + 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // sectors of the real-mode part, beside the first
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes()); // version of the protocol
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // the initial file system's last byte
    put(0x238, &255_u32.to_le_bytes()); // characters of the command line
    image.extend_from_slice(&ALPHABET);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    File::create(&path)
        .and_then(|mut file| file.write_all(&image))
        .expect("a file");
    path
}

/// The program, ended with the test.
struct Vmm(Child);

impl Vmm {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).stdin(Stdio::null());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().expect("the program starts"))
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, signal).expect("it lives");
    }

    /// Its exit status when it is told to stop. Nobody reads its console any more, which must not hold it up.
    fn stops(&mut self) -> Option<i32> {
        drop(self.0.stdout.take());
        self.signal(Signal::TERM);
        self.ends()
    }

    /// Its exit status.
    fn ends(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(status) = self.0.try_wait().expect("it is ours") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }

    /// The first line that it says which contains `words`.
    fn says(&mut self, words: &str) -> String {
        let said = self.0.stderr.as_mut().expect("piped");
        let mut lines = BufReader::new(said).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains(words));
        line.unwrap_or_else(|| panic!("it never says {words:?}"))
    }

    /// The next `count` bytes of its guest's console.
    fn console(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let console = self.0.stdout.as_mut().expect("piped");
        console.read_exact(&mut bytes).expect("the guest goes on");
        bytes
    }

    /// What is left of it.
    fn rest_of_console(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let console = self.0.stdout.as_mut().expect("piped");
        console.read_to_end(&mut bytes).expect("its end");
        bytes
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether this host has a KVM; if not the test is skipped by name, or fails where one was promised.
fn kvm(test: &str) -> bool {
    let there = File::options().read(true).write(true).open("/dev/kvm");
    if there.is_err() {
        assert!(
            std::env::var_os("MULTIFD_REQUIRE_KVM").is_none(),
            "{test}: there is no /dev/kvm"
        );
        eprintln!("SKIPPED {test}: there is no /dev/kvm");
    }
    there.is_ok()
}

fn moves(image: &Path, tracking: &str) {
    let at = "tcp:127.0.0.1:0";
    let mut there = Vmm::start(&["--incoming", at, "--tracking", tracking]);
    let line = there.says("listening on ");
    let address = line.rsplit(' ').next().expect("a word");
    let image = image.to_str().expect("a name");
    let mut here = Vmm::start(&[
        "--kernel",
        image,
        "--memory",
        "16M",
        "--tracking",
        tracking,
        "--migrate-to",
        address,
        "--downtime-limit",
        "3000",
        "--stall",
        "60",
    ]);
    let mut letters = here.console(30);
    here.signal(Signal::USR1);
    letters.extend(here.rest_of_console());
    assert_eq!(here.ends(), Some(0), "{}", here.says("multifd-vmm"));
    letters.extend(there.console(60));
    let alphabet = (b'a'..=b'z').cycle().take(letters.len());
    assert!(
        alphabet.eq(letters.iter().copied()),
        "a letter is missing, or comes twice: {}",
        String::from_utf8_lossy(&letters)
    );
    assert_eq!(there.stops(), Some(3));
}

#[test]
fn a_guest_is_moved_by_the_dirty_ring_and_no_letter_is_lost() {
    if kvm("a_guest_is_moved_by_the_dirty_ring_and_no_letter_is_lost") {
        moves(&image("ring"), "ring");
    }
}

#[test]
fn a_guest_is_moved_by_the_dirty_log_and_no_letter_is_lost() {
    if kvm("a_guest_is_moved_by_the_dirty_log_and_no_letter_is_lost") {
        moves(&image("log"), "log");
    }
}

#[test]
fn a_guest_whose_destination_is_not_there_goes_on() {
    if !kvm("a_guest_whose_destination_is_not_there_goes_on") {
        return;
    }
    let image = image("alone");
    let image = image.to_str().expect("a name");
    // Nobody listens at the port of discarding.
    let nowhere = "tcp:127.0.0.1:9";
    let mut here = Vmm::start(&[
        "--kernel",
        image,
        "--memory",
        "16M",
        "--migrate-to",
        nowhere,
    ]);
    here.console(30);
    for _ in 0..2 {
        here.signal(Signal::USR1);
        let why = here.says("it runs on here");
        assert!(why.contains("sender.channel.dial"), "{why}");
        here.console(30);
    }
    assert_eq!(here.stops(), Some(3));
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    if !kvm("what_is_no_kernel_is_refused_by_name") {
        return;
    }
    let mut here = Vmm::start(&["--kernel", PROGRAM]);
    assert_eq!(here.ends(), Some(1));
    assert!(here.says("multifd-vmm").contains("is no bzImage"));
}

#[test]
fn wrong_usage_has_its_own_exit_status() {
    let mut here = Vmm::start(&["--cpus", "2"]);
    assert_eq!(here.ends(), Some(2));
    assert!(here.says("--kernel").contains("--kernel"));
}
