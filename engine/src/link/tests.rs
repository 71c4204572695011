use std::thread::JoinHandle;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// A VMM that receives one question and then does as it is told.
fn vmm(act: impl FnOnce(&Socket, Header) + Send + 'static) -> (Link, JoinHandle<Socket>) {
    vmm_within(DEADLINE, act)
}

fn vmm_within(
    deadline: Duration,
    act: impl FnOnce(&Socket, Header) + Send + 'static,
) -> (Link, JoinHandle<Socket>) {
    let (engine, vmm) = Socket::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let packet = vmm.receive().unwrap().unwrap();
        let (header, _) = Header::decode(&packet.bytes).unwrap();
        act(&vmm, header);
        vmm
    });
    (Link::new(engine, deadline).unwrap(), thread)
}

fn answer(to: Header, status: Status) -> Header {
    Header {
        is_answer: true,
        status,
        ..to
    }
}

#[test]
fn an_answer_is_that_of_its_question() {
    let (link, thread) = vmm(|socket, question| {
        let late = Header {
            serial: question.serial.wrapping_sub(1),
            ..answer(question, Status::Failed)
        };
        socket.send(&late.encode(b"too late"), &[]).unwrap();
        let done = answer(question, Status::Done);
        socket.send(&done.encode(&[]), &[]).unwrap();
    });
    link.tell(Kind::Pause, &[]).unwrap();
    drop(thread.join());
}

#[test]
fn what_the_vmm_refuses_is_told_in_its_words() {
    let (link, thread) = vmm(|socket, question| {
        let no = answer(question, Status::Failed);
        socket.send(&no.encode(b"no disk"), &[]).unwrap();
    });
    let error = link.tell(Kind::Save, &[]).unwrap_err();
    assert_eq!(error.to_string(), "the VMM refuses SAVE (Failed): no disk");
    drop(thread.join());
}

#[test]
fn an_answer_that_cannot_be_is_an_error_of_the_call() {
    let (link, thread) = vmm(|socket, question| {
        let done = answer(question, Status::Done);
        socket.send(&done.encode(b"x"), &[]).unwrap();
    });
    let error = link.tell(Kind::Pause, &[]).unwrap_err();
    let LinkError::Malformed { kind, source } = error else {
        panic!("{error}");
    };
    assert!(matches!(source, Malformed::Trailing { bytes: 1, .. }));
    assert_eq!(kind, Kind::Pause);
    drop(thread.join());

    let (link, thread) = vmm(|socket, question| {
        let other = Header {
            kind: Kind::Save,
            ..answer(question, Status::Done)
        };
        socket.send(&other.encode(&[]), &[]).unwrap();
    });
    let error = link.tell(Kind::Pause, &[]).unwrap_err();
    assert!(matches!(error, LinkError::Malformed { .. }), "{error}");
    drop(thread.join());
}

#[test]
fn a_vmm_that_dies_is_seen_at_once_and_one_that_is_silent_at_the_deadline() {
    let (link, thread) = vmm(|socket, _| socket.shutdown());
    let error = link.tell(Kind::Pause, &[]).unwrap_err();
    assert!(matches!(error, LinkError::Closed { kind: Kind::Pause }));
    assert!(link.said().wants_end());
    let error = link.tell(Kind::Resume, &[]).unwrap_err();
    assert!(matches!(error, LinkError::Closed { .. }), "{error}");
    drop(thread.join());

    let (link, thread) = vmm_within(Duration::from_millis(30), |_, _| {});
    let error = link.tell(Kind::Pause, &[]).unwrap_err();
    assert!(matches!(error, LinkError::Silent { .. }), "{error}");
    assert!(!link.said().wants_end());
    drop(thread.join());
}

#[test]
fn bytes_that_are_no_message_end_the_link() {
    let questions: [(&[u8], &str); 3] = [
        (b"nonsense", "no header"),
        (&[0xff; 16], "no kind"),
        (
            &[20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            "PAUSE by a VMM",
        ),
    ];
    for (bytes, what) in questions {
        let (link, thread) = vmm(move |socket, _| socket.send(bytes, &[]).unwrap());
        let error = link.tell(Kind::Pause, &[]).unwrap_err();
        assert!(matches!(error, LinkError::Closed { .. }), "{what}: {error}");
        drop(thread.join());
    }
}

#[test]
fn what_the_vmm_wants_is_heard_between_question_and_answer() {
    let (link, thread) = vmm(|socket, question| {
        for kind in [Kind::SwitchOver, Kind::GuestGone, Kind::Cancel] {
            crate::client::say(socket, kind).unwrap();
        }
        crate::client::say(socket, Kind::Pause).unwrap_err();
        let done = answer(question, Status::Done);
        socket.send(&done.encode(&[]), &[]).unwrap();
    });
    link.tell(Kind::Pause, &[]).unwrap();
    let said = link.said();
    assert!(said.wants_end() && !said.is_closed());
    assert!(said.take_switch_over() && !said.take_switch_over());
    assert!(said.take_guest_gone() && !said.take_guest_gone());
    drop(thread.join());
}
