//! "Compromised" code tries what it must not be able to do. What is taken from a process can't be given back, so each test does its
//! tries in a process of its own: this test program again, with one test and [`CHILD`] set.

#![allow(clippy::print_stdout)] // a part that is skipped says so

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use multifd_confine::{
    Capabilities, Capability, Confined, Dumpable, Exec, Files, Policy, Ports, Restricted, Side,
    capabilities, process,
};
use multifd_transport::{Spawner as _, StdSpawner};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getppid, pidfd_getfd, pidfd_open};

const CHILD: &str = "MULTIFD_CONFINE_CHILD";

/// Runs `tries` in a process of its own.
fn in_a_process_of_its_own(test: &str, tries: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        return tries();
    }
    let ran = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&ran.stdout) + String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{words}");
    assert!(words.contains("1 passed"), "it ran: {words}");
}

fn refused<T>(what: &str, result: io::Result<T>) {
    match result {
        Ok(_) => panic!("{what} was let through"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}"),
    }
}

/// A line of what the kernel says of this thread.
fn status(field: &str) -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap_or_default().trim().to_owned()
}

fn steal_a_descriptor(of: Pid) -> io::Result<()> {
    let process = pidfd_open(of, PidfdFlags::empty())?;
    pidfd_getfd(process, 0, PidfdGetfdFlags::empty())?;
    Ok(())
}

#[test]
fn a_confined_process_reaches_only_what_was_named() {
    in_a_process_of_its_own("a_confined_process_reaches_only_what_was_named", || {
        let folder = std::env::temp_dir().join(format!("confine-{}", std::process::id()));
        let (open, shut) = (folder.join("open"), folder.join("shut"));
        for made in [&open, &shut] {
            fs::create_dir_all(made).unwrap();
            fs::write(made.join("file"), "secret").unwrap();
        }
        let [allowed, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let policy = Policy {
            files: Files::of_a_host().and_write(&open),
            ports: Ports {
                bind: Vec::new(),
                connect: vec![port(&allowed)],
            },
            exec: Exec::Forbidden,
        };
        let parent = getppid().unwrap();
        capabilities(Capabilities::NONE).unwrap();
        let applied = process(&policy).unwrap();
        // What is in reach stays so.
        fs::write(open.join("new"), "x").unwrap();
        File::open("/etc/hosts").unwrap();
        TcpStream::connect(allowed.local_addr().unwrap()).unwrap();
        // Nothing else is.
        refused("a program", Command::new("/bin/true").status());
        refused("another process' descriptor", steal_a_descriptor(parent));
        if applied.files == Restricted::Not {
            println!("SKIPPED files and ports: this kernel has no landlock");
        } else {
            refused("another folder", File::open(shut.join("file")));
            refused("a new file there", File::create(shut.join("new")));
            refused("its removal", fs::remove_file(shut.join("file")));
        }
        if applied.files == Restricted::Fully {
            let address = other.local_addr().unwrap();
            refused("another port", TcpStream::connect(address));
            refused("a new listener", TcpListener::bind("127.0.0.1:0"));
        }
        assert_eq!(status("CapEff:"), "0000000000000000");
        assert_eq!(status("CapPrm:"), "0000000000000000");
        assert_eq!(status("Seccomp:"), "2");
        assert_eq!(status("NoNewPrivs:"), "1");
        if applied.dumpable == Dumpable::No {
            let limits = fs::read_to_string("/proc/self/limits").unwrap();
            let core = limits.lines().find(|line| line.contains("core file"));
            assert!(core.unwrap().contains(" 0 "), "{core:?}");
        }
    });
}

#[test]
fn a_thread_that_reads_a_peers_octets_can_do_nothing_else() {
    in_a_process_of_its_own(
        "a_thread_that_reads_a_peers_octets_can_do_nothing_else",
        || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let parent = getppid().unwrap();
            let (told, hear) = std::sync::mpsc::channel();
            let spawner = Confined::new(StdSpawner, Side::Destination).unwrap();
            let body = move || {
                // As a lane does: memory, time, words to another thread.
                let much = vec![1_u8; 64 << 20];
                std::thread::sleep(std::time::Duration::from_millis(1));
                // As a lane that somebody took over would.
                refused("a file", File::open("/etc/hosts"));
                refused("a connection", TcpStream::connect(address));
                refused("a listener", TcpListener::bind("127.0.0.1:0"));
                refused("a program", Command::new("/bin/true").status());
                refused("another process' descriptor", steal_a_descriptor(parent));
                refused("a thread", std::thread::Builder::new().spawn(|| ()));
                let code = memmap2::MmapMut::map_anon(4096).unwrap();
                refused("memory that runs", code.make_exec());
                told.send(much.len()).unwrap();
            };
            let thread = spawner.spawn("mfd-lane0", Box::new(body)).unwrap();
            thread.join().expect("each was refused");
            assert_eq!(hear.recv(), Ok(64 << 20));
            // The threads beside it are as before.
            File::open("/etc/hosts").unwrap();
            let body = || drop(File::open("/etc/hosts").unwrap());
            let thread = spawner.spawn("mfd-vmm", Box::new(body)).unwrap();
            thread.join().expect("an embedder's code is not restricted");
        },
    );
}

#[test]
fn capabilities_that_are_needed_are_kept_as_far_as_they_were_had() {
    in_a_process_of_its_own(
        "capabilities_that_are_needed_are_kept_as_far_as_they_were_had",
        || {
            let had = u64::from_str_radix(&status("CapPrm:"), 16).unwrap();
            let kept = Capabilities::NONE
                .and_if(true.into(), Capability::IPC_LOCK)
                .and_if(false.into(), Capability::NET_BIND_SERVICE);
            capabilities(kept).unwrap();
            let has = u64::from_str_radix(&status("CapPrm:"), 16).unwrap();
            assert_eq!(has, had & Capability::IPC_LOCK.bits());
            assert!(Path::new("/proc/self").exists());
        },
    );
}
