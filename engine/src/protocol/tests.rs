use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;

use multifd::Blob;
use proptest::prelude::*;

use super::*;

/// Sizes of the bodies that are read, by what they are read as.
type Read = fn(&[u8]) -> Result<(), Malformed>;

fn hello() -> Vec<u8> {
    Hello::of(Role::Source).encode()
}

fn welcome() -> Vec<u8> {
    Welcome {
        version: VERSION,
        state: State::Undecided,
        ticket: [7; TICKET_BYTES],
    }
    .encode()
}

fn regions() -> Vec<u8> {
    let region = |guest_address, descriptor| RegionEntry {
        guest_address,
        bytes: 1 << 20,
        offset: 4096,
        descriptor,
    };
    write_regions(&[region(0, 1), region(1 << 32, 0)])
}

fn layout() -> Vec<u8> {
    let mut out = Writer::default();
    write_layout(&mut out, &[(0, 1 << 20), (1 << 32, 4096)]);
    out.finish()
}

fn trackers() -> Vec<u8> {
    let process = |region| TrackerEntry {
        kind: TrackerKind::Process,
        descriptor: 0,
        region,
        first_page: 1,
        address: 0x7000_0000,
        pages: 16,
    };
    let bitmap = TrackerEntry {
        kind: TrackerKind::Bitmap,
        descriptor: 2,
        region: 0,
        first_page: 0,
        address: 0,
        pages: 0,
    };
    write_trackers(&[process(0), process(1), bitmap])
}

/// Each body whose length is fixed by what it says, and how it is read.
fn bodies() -> Vec<(Vec<u8>, Read)> {
    vec![
        (hello(), |body| Hello::decode(body).map(drop)),
        (welcome(), |body| Welcome::decode(body).map(drop)),
        (Collect::Paused.encode(), |body| {
            Collect::decode(body).map(drop)
        }),
        (word(1), |body| read_word("GUEST", body).map(drop)),
        (vec![3; TICKET_BYTES], |body| {
            read_array::<TICKET_BYTES>("a ticket", body).map(drop)
        }),
        (regions(), |body| read_regions(body, 2).map(drop)),
        (layout(), |body| {
            let mut reader = Reader::new("PREPARE", body);
            read_layout(&mut reader)?;
            reader.end()
        }),
        (trackers(), |body| read_trackers(body, 3).map(drop)),
    ]
}

#[test]
fn bodies_are_read_whole_and_neither_shorter_nor_longer() {
    for (body, read) in bodies() {
        read(&body).unwrap();
        for end in 0..body.len() {
            let error = read(&body[..end]).unwrap_err();
            assert!(matches!(error, Malformed::Short { .. }), "{error}");
        }
        let longer = [&body[..], &[0]].concat();
        let error = read(&longer).unwrap_err();
        assert!(matches!(error, Malformed::Trailing { .. }), "{error}");
    }
}

#[test]
fn what_was_written_is_read() {
    let body = regions();
    let read = read_regions(&body, 2).unwrap();
    assert_eq!(write_regions(&read), body);
    let body = trackers();
    let read = read_trackers(&body, 3).unwrap();
    assert_eq!(write_trackers(&read), body);
    let read = Welcome::decode(&welcome()).unwrap();
    assert_eq!(read.encode(), welcome());
    assert!(
        !format!("{read:?}").contains('7'),
        "the secret is not printed"
    );
    let ended = Ended {
        outcome: Outcome::Stranded,
        text: "no vCPU".into(),
    };
    assert_eq!(Ended::decode(&ended.encode()).unwrap(), ended);
    let read = Hello::decode(&hello()).unwrap();
    assert_eq!(read, Hello::of(Role::Source));
    for step in [
        Collect::Start,
        Collect::Running,
        Collect::Paused,
        Collect::Stop,
    ] {
        assert_eq!(Collect::decode(&step.encode()).unwrap(), step);
    }
}

#[test]
fn a_header_says_what_the_message_is_and_nothing_else() {
    for kind in Kind::ALL {
        for (is_answer, status) in [(false, Status::Done), (true, Status::Failed)] {
            let header = Header {
                kind,
                is_answer,
                serial: 77,
                status,
            };
            let message = header.encode(b"body");
            assert_eq!(Header::decode(&message), Ok((header, &b"body"[..])));
        }
    }
    let header = Header {
        kind: Kind::Pause,
        is_answer: false,
        serial: 1,
        status: Status::Done,
    };
    let message = header.encode(b"body");
    for end in 0..HEADER_BYTES {
        let error = Header::decode(&message[..end]).unwrap_err();
        assert!(matches!(error, Malformed::Short { .. }));
    }
    // Lengths that are not the packet's.
    for end in HEADER_BYTES..message.len() {
        let error = Header::decode(&message[..end]).unwrap_err();
        assert!(matches!(error, Malformed::Length { said: 4, .. }));
    }
    let mut huge = message.clone();
    huge[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        Header::decode(&huge),
        Err(Malformed::Length {
            said: u32::MAX,
            there: 4
        })
    );
    let mut unknown = message.clone();
    unknown[0] = 99;
    assert_eq!(Header::decode(&unknown), Err(Malformed::Kind(99)));
    assert_eq!(Header::serial_of_unknown(&unknown), Some(1));
    unknown[3] = 0x80;
    assert_eq!(Header::serial_of_unknown(&unknown), None);
    let mut status = message.clone();
    status[8] = 4;
    let error = Header::decode(&status).unwrap_err();
    assert_eq!(error.to_string(), "the status of a question can't be 4");
    status[3] = 0x80;
    Header::decode(&status).unwrap();
    status[8] = 6;
    let error = Header::decode(&status).unwrap_err();
    assert_eq!(error.to_string(), "a status can't be 6");
}

/// Puts a number into a body.
fn with(mut body: Vec<u8>, at: usize, value: u32) -> Vec<u8> {
    body[at..at + 4].copy_from_slice(&value.to_le_bytes());
    body
}

#[test]
fn numbers_that_mean_nothing_are_refused_by_name() {
    let text = |error: Malformed| error.to_string();
    let no = |body: Vec<u8>| text(Hello::decode(&body).unwrap_err());
    assert_eq!(Hello::decode(&with(hello(), 0, 1)), Err(Malformed::Magic));
    assert_eq!(no(with(hello(), 4, 0)), "the oldest version can't be 0");
    assert_eq!(no(with(hello(), 4, 2)), "the oldest version can't be 2");
    assert_eq!(no(with(hello(), 12, 3)), "a role can't be 3");
    let no = |body: Vec<u8>| text(Welcome::decode(&body).unwrap_err());
    assert_eq!(
        no(with(welcome(), 0, 2)),
        "the version of an answer can't be 2"
    );
    assert_eq!(no(with(welcome(), 4, 5)), "a VMM's state can't be 5");
    let no = |body: Vec<u8>| text(Collect::decode(&body).unwrap_err());
    assert_eq!(no(word(4)), "the step of COLLECT can't be 4");
    assert_eq!(no(with(word(1), 4, 1)), "a reserved word can't be 1");
    let no = |body: Vec<u8>| text(Ended::decode(&body).unwrap_err());
    assert_eq!(no(word(2)), "an outcome can't be 2");
    assert_eq!(
        no([&word(0)[..], &[0xff]].concat()),
        "the text is not UTF-8"
    );
    let long = [&word(0)[..], &[b'a'; TEXT_BYTES_MAX + 1]].concat();
    assert_eq!(no(long), "1025 bytes of text: at most 1024");
}

#[test]
fn lists_are_bounded_before_they_are_read() {
    let max = u32::try_from(memory::REGIONS_MAX).unwrap();
    let count = |what, count: u32, max: u32| Malformed::Count {
        what,
        count: count.into(),
        max: max.into(),
    };
    for more in [max + 1, u32::MAX] {
        let error = read_regions(&with(regions(), 0, more), 2);
        assert_eq!(error, Err(count("regions", more, max)));
        let body = with(layout(), 0, more);
        let error = read_layout(&mut Reader::new("PREPARE", &body));
        assert_eq!(error, Err(count("regions", more, max)));
    }
    let error = read_regions(&with(regions(), 0, max), 2).unwrap_err();
    assert!(matches!(error, Malformed::Short { .. }));
    let max = u32::try_from(trackers::TRACKERS_MAX).unwrap();
    let error = read_trackers(&with(trackers(), 0, max + 1), 3);
    assert_eq!(error, Err(count("trackers", max + 1, max)));
    // The longest lists fit into a message.
    const { assert!(8 + memory::REGIONS_MAX * 32 + HEADER_BYTES <= MESSAGE_BYTES_MAX) };
    const { assert!(8 + trackers::TRACKERS_MAX * 40 + HEADER_BYTES <= MESSAGE_BYTES_MAX) };
}

#[test]
fn a_descriptor_that_did_not_come_is_refused() {
    let no = |index, count| Malformed::Descriptor { index, count };
    assert_eq!(read_regions(&regions(), 1), Err(no(1, 1)));
    // A page map that did not come with its userfaultfd, and a bitmap's file.
    assert_eq!(read_trackers(&trackers(), 1), Err(no(1, 1)));
    assert_eq!(read_trackers(&trackers(), 2), Err(no(2, 2)));
    let last = with(trackers(), 12, u32::MAX);
    assert_eq!(read_trackers(&last, 3), Err(no(u32::MAX, 3)));
    let bitmap = 8 + 2 * 40;
    let error = read_trackers(&with(trackers(), bitmap + 8, 1), 3).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a field that a bitmap has not can't be 1"
    );
    let error = read_trackers(&with(trackers(), bitmap, 3), 3).unwrap_err();
    assert_eq!(error.to_string(), "the kind of a tracker can't be 3");
}

fn written(blobs: &[Blob]) -> (Vec<u8>, Option<OwnedFd>) {
    let mut out = Writer::default();
    let file = write_blobs(&mut out, blobs).unwrap();
    (out.finish(), file)
}

fn read_back(body: &[u8], file: Option<OwnedFd>) -> Result<Vec<Blob>, Malformed> {
    read_blobs(Reader::new("LOAD", body), &mut file.into_iter().collect())
}

#[test]
fn blobs_come_back_as_they_went() {
    let blobs = [
        Blob::new(1, 2, "first"),
        Blob::new(3, 4, ""),
        Blob::new(5, 6, vec![9; 100_000]),
    ];
    let (body, file) = written(&blobs);
    assert_eq!(read_back(&body, file).unwrap(), blobs);
    let (body, file) = written(&[]);
    assert!(file.is_none());
    assert_eq!(read_back(&body, None).unwrap(), []);
}

#[test]
fn blobs_that_do_not_lie_in_their_file_are_refused() {
    let blob = Blob::new(1, 1, "state");
    let (body, file) = written(std::slice::from_ref(&blob));
    let no_file = read_back(&body, None).unwrap_err();
    assert!(matches!(no_file, Malformed::Descriptor { .. }));
    let longer = read_back(&with(body.clone(), 24, 6), file).unwrap_err();
    assert_eq!(
        longer.to_string(),
        "6 bytes at offset 0 do not lie in a file of 5"
    );
    let file = || written(std::slice::from_ref(&blob)).1;
    // An offset whose sum with the size overflows.
    let mut far = body.clone();
    far[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    let error = read_back(&far, file()).unwrap_err();
    assert!(matches!(error, Malformed::OutsideFile { .. }));
    let mut huge = body.clone();
    huge[24..32].copy_from_slice(&(BLOB_BYTES_MAX_FOR_TESTS + 1).to_le_bytes());
    let error = read_back(&huge, file()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "16777217 bytes of blobs: at most 16777216"
    );
    let error = read_back(&with(body.clone(), 0, 65), file()).unwrap_err();
    assert_eq!(error.to_string(), "65 blobs: at most 64");
    // Reading a pipe would last for ever.
    let (pipe, _writes) = std::io::pipe().unwrap();
    let error = read_back(&body, Some(pipe.into())).unwrap_err();
    assert!(matches!(error, Malformed::File(_)), "{error}");
    let mut five = File::from(file().unwrap());
    five.write_all(b"more").unwrap();
    assert_eq!(read_back(&body, Some(five.into())).unwrap().len(), 1);
}

const BLOB_BYTES_MAX_FOR_TESTS: u64 = blobs::BLOB_BYTES_MAX;

#[test]
fn all_blobs_together_are_bounded() {
    let mut out = Writer::default();
    out.count(5);
    for _ in 0..5 {
        out.u32(1);
        out.u32(1);
        out.u64(0);
        out.u64(BLOB_BYTES_MAX_FOR_TESTS);
    }
    let error = read_back(&out.finish(), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "83886080 bytes of blobs: at most 67108864"
    );
}

#[test]
fn kinds_have_the_names_of_the_specification() {
    let names: Vec<_> = Kind::ALL.iter().map(ToString::to_string).collect();
    assert!(names.contains(&"TAKE_OVER".to_owned()), "{names:?}");
    let specification = include_str!("../../PROTOCOL.md");
    for kind in Kind::ALL {
        let row = format!("| {} | {kind} |", kind.value());
        assert!(specification.contains(&row), "PROTOCOL.md has no row {row}");
    }
}

/// `#define MFDE_NAME number` in the header for C.
fn defined(name: &str) -> u64 {
    let header = include_str!("../../include/multifd_engine.h");
    let line = header
        .lines()
        .find_map(|line| line.strip_prefix(&format!("#define MFDE_{name} ")));
    let line = line.unwrap_or_else(|| panic!("the header does not define MFDE_{name}"));
    let value = line.split("/*").next().unwrap_or_default().trim();
    let value = value.trim_matches(['(', ')']);
    let number = |text: &str| {
        let text = text.trim().trim_end_matches('u');
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
            None => text.parse().unwrap(),
        }
    };
    match value.split_once("<<") {
        Some((base, shift)) => number(base) << number(shift),
        None => number(value),
    }
}

#[test]
fn the_header_for_c_has_the_same_numbers() {
    for kind in Kind::ALL {
        assert_eq!(
            defined(&kind.to_string()),
            u64::from(kind.value()),
            "{kind}"
        );
    }
    for status in Status::ALL {
        // Spelt as kinds are.
        let mut name = String::new();
        for (place, letter) in format!("{status:?}").char_indices() {
            if letter.is_uppercase() && place > 0 {
                name.push('_');
            }
            name.push(letter.to_ascii_uppercase());
        }
        assert_eq!(
            defined(&format!("STATUS_{name}")),
            u64::from(status.value())
        );
    }
    for state in State::ALL {
        let name = format!("STATE_{}", format!("{state:?}").to_uppercase());
        assert_eq!(defined(&name), state as u64);
    }
    for outcome in Outcome::ALL {
        let name = format!("OUTCOME_{}", format!("{outcome:?}").to_uppercase());
        assert_eq!(defined(&name), u64::from(outcome.value()));
    }
    for (name, value) in [
        ("VERSION", VERSION as usize),
        ("MAGIC", MAGIC as usize),
        ("ANSWER", ANSWER as usize),
        ("MESSAGE_BYTES_MAX", MESSAGE_BYTES_MAX),
        ("HEADER_BYTES", HEADER_BYTES),
        ("DESCRIPTORS_MAX", DESCRIPTORS_MAX),
        ("TEXT_BYTES_MAX", TEXT_BYTES_MAX),
        ("REGIONS_MAX", memory::REGIONS_MAX),
        ("TRACKERS_MAX", trackers::TRACKERS_MAX),
        ("BLOBS_MAX", blobs::BLOBS_MAX),
        ("BLOB_BYTES_MAX", blobs::BLOB_BYTES_MAX as usize),
        ("BLOBS_BYTES_MAX", blobs::BLOBS_BYTES_MAX as usize),
        ("TICKET_BYTES", TICKET_BYTES),
        ("SESSION_BYTES", SESSION_BYTES),
        ("ROLE_SOURCE", Role::Source as usize),
        ("ROLE_DESTINATION", Role::Destination as usize),
        ("TRACKER_PROCESS", TrackerKind::Process as usize),
        ("TRACKER_BITMAP", TrackerKind::Bitmap as usize),
        ("COLLECT_START", Collect::Start as usize),
        ("COLLECT_RUNNING", Collect::Running as usize),
        ("COLLECT_PAUSED", Collect::Paused as usize),
        ("COLLECT_STOP", Collect::Stop as usize),
    ] {
        assert_eq!(defined(name), value as u64, "{name}");
    }
}

proptest! {
    /// Whatever comes is read or refused, and what is read is written as it came.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok((header, body)) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(body), bytes.clone());
        }
        if let Ok(hello) = Hello::decode(&bytes) {
            prop_assert_eq!(hello.encode(), bytes.clone());
        }
        if let Ok(regions) = read_regions(&bytes, 3) {
            prop_assert_eq!(write_regions(&regions), bytes.clone());
        }
        if let Ok(trackers) = read_trackers(&bytes, 3) {
            prop_assert_eq!(write_trackers(&trackers), bytes.clone());
        }
        let _ = Ended::decode(&bytes);
        let _ = Welcome::decode(&bytes);
        let _ = read_back(&bytes, None);
    }
}
