//! What the kernel says of a program that waits for a peer, as seen from outside.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `multifd-receive` once it listens.
fn waiting(flags: &[&str]) -> Killed {
    let mut child = Command::new(env!("CARGO_BIN_EXE_multifd-receive"))
        .args(["--listen", "127.0.0.1:0"])
        .args(flags)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = child.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on "), "{line}");
    Killed(child)
}

/// A field of each thread's status.
fn of_each_thread(program: &Killed, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", program.0.id())).unwrap();
    let statuses =
        tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let value = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.unwrap_or_default().trim().to_owned()
    };
    statuses.map(value).collect()
}

#[test]
fn a_waiting_receiver_has_no_rights_that_it_does_not_need() {
    let program = waiting(&[]);
    for capabilities in ["CapEff:", "CapPrm:", "CapAmb:"] {
        let all = of_each_thread(&program, capabilities);
        assert!(all.len() > 1, "it has threads");
        assert!(
            all.iter().all(|held| held == "0000000000000000"),
            "{capabilities} {all:?}"
        );
    }
    let filters = of_each_thread(&program, "Seccomp:");
    assert!(filters.iter().all(|mode| mode == "2"), "{filters:?}");
    let privileges = of_each_thread(&program, "NoNewPrivs:");
    assert!(privileges.iter().all(|none| none == "1"), "{privileges:?}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", program.0.id())).unwrap();
    let core = limits
        .lines()
        .find(|line| line.contains("core file"))
        .unwrap();
    let values: Vec<&str> = core.split_whitespace().collect();
    assert_eq!(values[4..6], ["0", "0"], "{core}");
}

#[test]
fn a_flag_leaves_it_as_it_was_started() {
    let program = waiting(&["--confine", "off"]);
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let ours = ours.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    let filters = of_each_thread(&program, "Seccomp:");
    assert!(
        filters
            .iter()
            .all(|mode| Some(mode.as_str()) == ours.map(str::trim)),
        "{filters:?}"
    );
}
