//! What an embedder gets back, under which type, and when.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread::JoinHandle;
use std::time::Duration;

use multifd::tracking::VmmWrites;
use multifd::transport::{GuestMemory, RegionLayout, Spawner, pair};
use multifd::{Blob, VmmError, destination, source};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

struct Machine(&'static str);

impl source::Vmm for Machine {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(vec![Blob::new(1, 1, "")])
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }

    fn resume(&mut self, _: source::Reclaimed) -> Result<(), VmmError> {
        Ok(())
    }
}

impl destination::Vmm for Machine {
    fn prepare(&mut self, _: Vec<Blob>, _: &multifd::Layout) -> Result<GuestMemory, VmmError> {
        Err(VmmError::new("no room"))
    }

    fn load(&mut self, _: Vec<Blob>) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&mut self, _: destination::Ownership) -> Result<(), VmmError> {
        Ok(())
    }
}

fn memory() -> GuestMemory {
    let region = RegionLayout {
        guest_address: 0,
        bytes: 1 << 20,
    };
    GuestMemory::anonymous(&[region]).expect("a little memory")
}

/// Starts no thread of this name.
struct Without(&'static str);

impl Spawner for Without {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        if name == self.0 {
            return Err(io::Error::other("none left"));
        }
        std::thread::Builder::new().spawn(body)
    }
}

fn nowhere() -> impl source::Dial {
    source::dial_by(|_, _| Err("nobody is there".into()))
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&now)).expect("one descriptor") == 1
}

#[test]
fn a_source_that_cannot_start_gives_every_part_back_under_its_type() {
    let parts = source::Parts::new(Machine("mine"), memory(), nowhere())
        .source(VmmWrites::named("my writes"))
        .spawner(Without("mfd-control"));
    let failed = source::Migration::start(parts).err().expect("no thread");
    assert_eq!(failed.error.code(), "sender.system");
    let source::Parts {
        vmm,
        memory,
        sources,
        dial,
        spawner,
        ..
    } = failed.parts;
    let vmm: Machine = vmm;
    assert_eq!((vmm.0, memory.layouts().count()), ("mine", 1));
    assert!(spawner.is_some());
    let given = sources.into_iter().next().expect("it is there");
    let writes: VmmWrites = source::downcast(given).expect("its own type");
    // And they can be used again.
    let mut again = source::Parts::new(vmm, memory, nowhere()).source(writes);
    again.dial = dial;
    let finished = source::Migration::start(again).expect("threads").wait();
    assert_eq!(finished.vmm.expect("it came back").0, "mine");
    let error = finished.error.expect("nobody is there");
    assert_eq!(error.code(), "sender.channel.dial");
    assert_eq!(finished.sources[0].name(), "my writes");
}

#[test]
fn memory_that_cannot_be_moved_is_the_callers_fault_and_comes_back() {
    let overlapping = [0, 4096].map(|guest_address| RegionLayout {
        guest_address,
        bytes: 1 << 20,
    });
    let memory = GuestMemory::anonymous(&overlapping).expect("a little memory");
    let parts = source::Parts::new(Machine("mine"), memory, nowhere());
    let failed = source::Migration::start(parts).err().expect("overlapping");
    assert_eq!(failed.error.code(), "sender.misuse.memory");
    assert!(!failed.to_string().contains("destination"), "{failed}");
    assert_eq!(failed.parts.vmm.0, "mine");
}

#[test]
fn a_destination_that_cannot_start_gives_its_vmm_back() {
    for thread in ["mfd-vmm", "mfd-control"] {
        let parts = destination::Parts::new(Machine("theirs")).spawner(Without(thread));
        let failed = destination::Reception::start(parts)
            .err()
            .expect("no thread");
        assert_eq!(failed.error.code(), "receiver.system", "{thread}");
        assert_eq!(failed.parts.0, "theirs", "{thread}");
    }
}

#[test]
fn the_descriptor_of_the_end_is_readable_when_and_only_when_it_is_over() {
    let parts = destination::Parts::new(Machine("theirs"));
    let reception = destination::Reception::start(parts).expect("threads");
    assert!(!reception.is_finished() && !readable(reception.ended()));
    let there = reception.handle();
    let dial = source::dial_by(move |_, _| {
        let (ours, theirs) = pair(1 << 16);
        there.offer(theirs)?;
        Ok(ours)
    });
    let parts = source::Parts::new(Machine("mine"), memory(), dial).source(VmmWrites::new());
    let migration = source::Migration::start(parts).expect("threads");
    while !migration.is_finished() || !reception.is_finished() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(readable(migration.ended()) && readable(reception.ended()));
    let (left, arrived) = (migration.wait(), reception.wait());
    let theirs = arrived.vmm.expect("it came back");
    let mine = left.vmm.expect("it came back");
    assert_eq!((mine.0, theirs.0), ("mine", "theirs"));
    let error = left.error.expect("it was refused");
    assert!(error.to_string().contains("no room"), "{error}");
}

/// Notes what it is told about the commit, and may refuse it.
struct Outliving {
    refuses: bool,
    heard: Vec<&'static str>,
}

impl source::Vmm for Outliving {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }

    fn granted(&mut self, _: &source::AskTicket) -> Result<(), VmmError> {
        self.heard.push("granted");
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.heard.push("pause");
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(Vec::new())
    }

    fn committing(&mut self) -> Result<(), VmmError> {
        self.heard.push("committing");
        match self.refuses {
            true => Err(VmmError::new("not now")),
            false => Ok(()),
        }
    }

    fn resume(&mut self, _: source::Reclaimed) -> Result<(), VmmError> {
        self.heard.push("resume");
        Ok(())
    }

    fn migrated(&mut self) {
        self.heard.push("migrated");
    }
}

/// Keeps its ticket, and runs whatever comes.
#[derive(Default)]
struct Arriving(Option<destination::AskTicket>);

impl destination::Vmm for Arriving {
    fn granted(&mut self, ticket: &destination::AskTicket) -> Result<(), VmmError> {
        self.0 = Some(ticket.clone());
        Ok(())
    }

    fn prepare(&mut self, _: Vec<Blob>, _: &multifd::Layout) -> Result<GuestMemory, VmmError> {
        assert!(self.0.is_some(), "the ticket comes first");
        Ok(memory())
    }

    fn load(&mut self, _: Vec<Blob>) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&mut self, _: destination::Ownership) -> Result<(), VmmError> {
        Ok(())
    }
}

fn migrate(refuses: bool) -> (source::Finished<Outliving>, destination::Finished<Arriving>) {
    let reception = destination::Reception::start(destination::Parts::new(Arriving::default()));
    let reception = reception.expect("threads");
    let there = reception.handle();
    let dial = source::dial_by(move |_, _| {
        let (ours, theirs) = pair(1 << 20);
        there.offer(theirs)?;
        Ok(ours)
    });
    let vmm = Outliving {
        refuses,
        heard: Vec::new(),
    };
    let parts = source::Parts::new(vmm, memory(), dial).source(VmmWrites::new());
    let left = source::Migration::start(parts).expect("threads").wait();
    // A destination that may be asked for a minute is not waited for.
    reception.handle().cancel();
    (left, reception.wait())
}

#[test]
fn a_vmm_is_told_before_the_commit_and_can_refuse_it() {
    let (left, arrived) = migrate(false);
    assert_eq!(left.report.outcome, source::OutcomeKind::Migrated);
    let heard = left.vmm.expect("it comes back").heard;
    assert_eq!(heard, ["granted", "pause", "committing", "migrated"]);
    assert_eq!(arrived.report.outcome, destination::OutcomeKind::Running);

    let (left, arrived) = migrate(true);
    assert_eq!(left.report.outcome, source::OutcomeKind::Failed);
    let text = left.error.expect("why").to_string();
    assert!(text.contains("not now"), "{text}");
    let heard = left.vmm.expect("it comes back").heard;
    assert_eq!(heard, ["granted", "pause", "committing", "resume"]);
    assert_eq!(arrived.report.outcome, destination::OutcomeKind::Failed);
}

#[test]
fn another_process_answers_for_a_session_that_ended() {
    let (left, arrived) = migrate(false);
    assert_eq!(left.report.outcome, source::OutcomeKind::Migrated);
    let ticket = arrived.vmm.and_then(|vmm| vmm.0).expect("it was granted");
    let path = std::env::temp_dir().join(format!("multifd-answer-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let place: multifd::transport::Address = format!("unix:{}", path.display())
        .parse()
        .expect("an address");
    for state in [
        source::OutcomeState::Running,
        source::OutcomeState::NotCommitted,
    ] {
        let options = multifd::transport::ChannelOptions::default();
        let listener = multifd::transport::Listener::bind_with(&place, &options).expect("a place");
        let theirs = ticket.clone();
        let answering = std::thread::spawn(move || {
            let config = destination::Config::default();
            let patience = Duration::from_secs(30);
            destination::answer(
                vec![listener],
                &theirs,
                state,
                config,
                None,
                patience,
                &|| false,
            )
        });
        let dial = source::SpreadDialer {
            control: place.clone(),
            data: Vec::new(),
            options,
        };
        let asked = source::ask(&dial, &ticket, Duration::from_secs(30));
        assert_eq!(asked.expect("an answer"), state);
        let answered = answering.join().expect("it does not panic");
        assert_eq!(answered.expect("threads"), destination::Answered::Source);
    }
    let _ = std::fs::remove_file(&path);
}
