//! What a user reads in a bad situation: the whole sentence, at the side where somebody reads it, as the programs print it.
//!
//! Each situation is made for real. A sentence that changes on purpose changes here.

use std::fs;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use multifd_sender as tx;
use multifd_tests::model::SourceMachine;
use multifd_tests::programs::{Process, path};
use multifd_transport::GuestMemory;
use multifd_transport::memory::RegionLayout;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::Value;

/// A guest that is there at once, and needs no KVM.
const GUEST: &[&str] = &[
    "--memory",
    "64M",
    "--working-set",
    "1M",
    "--warm-up",
    "0s",
    "--tracking",
    "marks",
    "--quiet",
];

/// Runs a program to its end, as a shell that writes into files does.
fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(path(program))
        .args(arguments)
        .env_remove("RUST_LOG")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .output()
        .expect("the programs are built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `multifd-send` says of a migration that failed: the reason in its report, with code and place.
fn reason(arguments: &[&str]) -> String {
    let output = run("multifd-send", &[arguments, GUEST].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = text(&output.stdout);
    let line = report
        .lines()
        .find_map(|line| line.trim().strip_prefix("reason"));
    line.unwrap_or_else(|| panic!("no reason in {report}"))
        .trim()
        .to_owned()
}

/// What a program says that does not even begin.
fn refusal(program: &str, arguments: &[&str], status: i32) -> String {
    let output = run(program, arguments);
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    text(&output.stderr).trim_end().to_owned()
}

/// An address without the port that is another one each time.
fn without_ports(sentence: &str) -> String {
    let words = sentence
        .split(' ')
        .map(|word| match word.split_once("127.0.0.1:") {
            Some((before, rest)) => {
                let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
                format!("{before}127.0.0.1:PORT{rest}")
            }
            None => word.to_owned(),
        });
    words.collect::<Vec<_>>().join(" ")
}

/// Listens, and says this to everybody.
fn speaks(words: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    std::thread::spawn(move || {
        let mut kept: Vec<TcpStream> = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(words);
            kept.push(stream);
        }
    });
    address
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("multifd-texts-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }

    fn file(&self, name: &str, content: &str) -> String {
        let file = self.0.join(name);
        fs::write(&file, content).expect("a file");
        file.to_string_lossy().into_owned()
    }

    /// A certificate that is its own authority, and its key.
    fn certificate(&self) -> (String, String) {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        (
            self.file("cert.pem", &cert.pem()),
            self.file("key.pem", &signing_key.serialize_pem()),
        )
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn memory_that_our_own_caller_got_wrong_is_no_fault_of_the_peers() {
    let region = |guest_address| RegionLayout {
        guest_address,
        bytes: 1 << 20,
    };
    let memory = GuestMemory::anonymous(&[region(0), region(0x8_0000)]).expect("memory");
    let machine = SourceMachine::start(memory.clone(), 0, 0, 1);
    let sources = vec![machine.source()];
    let parts = tx::Parts {
        vmm: Box::new(machine),
        memory,
        sources,
        dial: Box::new(tx::Dialer {
            address: "127.0.0.1:1".parse().expect("an address"),
            options: Default::default(),
        }),
        config: tx::Config::default(),
        spawner: None,
    };
    let Err(failed) = tx::Migration::start(parts) else {
        panic!("it began")
    };
    assert_eq!(
        failed.error.to_string(),
        "this guest's memory can't be moved: region 1 overlaps another region (phase: hello)"
    );
}

#[test]
fn a_local_path_is_told_to_its_user_and_not_to_the_peer() {
    let (receiver, address) = Process::receiver(&[]);
    let said = reason(&[
        "--connect",
        &address,
        "--state-file",
        "/no-such-folder/vm.state",
    ]);
    assert_eq!(
        said,
        "the VMM could not keep what is needed to ask for the outcome: state file /no-such-folder/vm.state can't be made; if it is there \
         already, it is of a migration whose outcome may be unknown: use --ask /no-such-folder/vm.state or remove it: No such file or \
         directory (os error 2) [sender.vmm.refused] in phase set-up, control channel"
    );
    let report = receiver.end().report();
    assert_eq!(
        report["error"]["text"],
        "the source ended it: the machine monitor refused: the VMM could not keep what is needed to ask for the outcome: state file <path> \
         can't be made; if it is there already, it is of a migration whose outcome may be unknown: use --ask <path> or remove it: No such \
         file or directory (os error 2)"
    );
}

#[test]
fn another_service_is_named_by_what_it_says() {
    let ssh = speaks(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3 xx\r\n");
    assert_eq!(
        without_ports(&reason(&["--connect", &ssh])),
        "no multifd-receive answers at tcp 127.0.0.1:PORT → 127.0.0.1:PORT: it began with \"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3 \
         xx\\r\\n\", as an SSH server does; check host and port [channel-stranger] in phase hello, control channel"
    );
}

#[test]
fn silence_is_told_from_an_answer() {
    let silent = speaks(b"");
    assert_eq!(
        without_ports(&reason(&["--connect", &silent])),
        "no multifd-receive answers at tcp 127.0.0.1:PORT → 127.0.0.1:PORT: the deadline passed after 0 bytes. Perhaps it is busy with \
         others, or another service listens there, or only one of the two sides uses TLS [channel-deadline] in phase hello, control \
         channel"
    );
}

#[test]
fn a_plain_sender_hears_that_the_receiver_speaks_tls() {
    let folder = Folder::new("tls");
    let (certificate, key) = folder.certificate();
    let receiver = Process::start(
        "multifd-receive",
        &[
            "--listen",
            "tls:127.0.0.1:0",
            "--report",
            "json",
            "--tls-ca",
            &certificate,
            "--tls-cert",
            &certificate,
            "--tls-key",
            &key,
        ],
    );
    let address = receiver.announced().replace("tls:", "tcp:");
    assert_eq!(
        without_ports(&reason(&["--connect", &address])),
        "no multifd-receive answers at tcp 127.0.0.1:PORT → 127.0.0.1:PORT: it speaks TLS: dial it as tls:HOST:PORT, with the certificate \
         of its authority (CA) [channel-stranger] in phase hello, control channel"
    );
    receiver.interrupt();
    let _ = receiver.end();
}

#[test]
fn a_key_with_a_password_is_called_so() {
    let folder = Folder::new("key");
    let (certificate, key) = folder.certificate();
    let plain = fs::read_to_string(&key).expect("the key");
    let locked = folder.file(
        "locked.pem",
        &plain.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"),
    );
    let files = [
        "--tls-ca",
        &certificate,
        "--tls-cert",
        &certificate,
        "--tls-key",
        &locked,
    ];
    assert_eq!(
        refusal(
            "multifd-receive",
            &[&["--listen", "tls:127.0.0.1:0"], &files[..]].concat(),
            2
        ),
        "multifd-receive: the key: it is protected by a password, and nobody is asked for one here: `openssl pkey -in KEY -out PLAIN` \
         takes the password away; keep the result readable by this user only"
    );
}

#[test]
#[allow(clippy::print_stdout)] // A skipped test says so.
fn kvm_that_may_not_be_used_is_told_from_no_kvm() {
    let root = rustix::process::geteuid().is_root();
    if !root || !Path::new("/dev/kvm").exists() {
        println!(
            "SKIPPED: kvm_that_may_not_be_used_is_told_from_no_kvm (needs root, setpriv and /dev/kvm)"
        );
        return;
    }
    let folder = Folder::new("kvm");
    // Where somebody without rights may read it.
    for program in ["multifd-send", "multifd-receive"] {
        fs::copy(path(program), folder.0.join(program)).expect("a copy");
    }
    let program = folder.0.join("multifd-send");
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups"])
        .arg(&program)
        .args([
            "--loopback",
            "--memory",
            "64M",
            "--working-set",
            "1M",
            "--tracking",
            "ring",
            "--quiet",
        ])
        .env_remove("RUST_LOG")
        .output()
        .expect("setpriv");
    assert_eq!(
        text(&output.stderr).trim_end(),
        "multifd-send: the guest can't be made: no KVM here: this process has no read and write access to /dev/kvm. Mend that, or choose \
         tracking `process`"
    );
}

#[test]
fn a_link_local_address_needs_its_interface() {
    assert_eq!(
        reason(&["--connect", "[fe80::1]:4444"]),
        "could not connect: cannot resolve fe80::1: it is a link-local address, which every interface has its own of: name the interface, \
         as in [fe80::1%eth0]:4444 [sender.channel.dial] in phase hello, control channel"
    );
}

#[test]
fn a_port_that_is_taken_is_told_once() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    assert_eq!(
        refusal("multifd-receive", &["--listen", &address], 1),
        format!(
            "multifd-receive: cannot listen on tcp:{address}: Address already in use (os error 98)"
        )
    );
}

#[test]
fn a_log_in_a_file_has_no_colours() {
    let output = Command::new(path("multifd-send"))
        .args(["--loopback"])
        .args(GUEST)
        .env("RUST_LOG", "debug")
        .env_remove("NO_COLOR")
        .output()
        .expect("the programs are built");
    let log = text(&output.stderr);
    assert!(log.contains("DEBUG") && !log.contains('\x1b'), "{log}");
}

#[test]
fn a_program_gets_its_object_also_for_wrong_usage() {
    let output = run(
        "multifd-send",
        &["--loopback", "--report", "json", "--chanels", "3"],
    );
    assert_eq!(output.status.code(), Some(2));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(report["error"]["code"], "cli.usage");
    assert_eq!(
        report["error"]["text"],
        "unexpected argument '--chanels' found\n\n  tip: a similar argument exists: '--channels'"
    );
}
