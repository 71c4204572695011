//! A peer that means harm, with the connection's own queue pair in its hands: keys, addresses, messages and credit of its choice. Whatever
//! it does is refused, and nothing outside the agreed landing changes.
//!
//! Needs devices, as `tests/rdma.rs` does: `MULTIFD_RDMA` lists an address of each.
#![allow(clippy::print_stdout)] // says what is skipped

use std::thread;

use super::super::Listening;
use super::super::sys::{Sge, Signaled};
use super::super::wire::{Credit, HEADER_BYTES, Header, Kind};
use super::*;
use crate::listener::Listen;
use crate::memory::{GuestMemory, RegionLayout};

fn devices(test: &str) -> Vec<String> {
    match std::env::var("MULTIFD_RDMA") {
        Ok(list) => list.split(',').map(str::to_owned).collect(),
        Err(_) => {
            assert!(
                std::env::var("MULTIFD_REQUIRE_RDMA").as_deref() != Ok("1"),
                "{test}: MULTIFD_RDMA names no device, and MULTIFD_REQUIRE_RDMA=1"
            );
            println!("SKIPPED {test}: no RDMA device (MULTIFD_RDMA=address,... names them)");
            Vec::new()
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// The peer that means harm, and what its victim told it.
struct Attacker {
    fresh: Fresh,
    victim: Greeting,
}

/// Both ends of a connection that was made by the rules.
fn meet(host: &str) -> (Attacker, Link) {
    let address: SocketAddr = format!("{host}:0").parse().expect("an address");
    let listening = Listening::bind_one(address).expect("a listener");
    let address = listening.id.addresses().0.expect("bound");
    thread::scope(|scope| {
        let victim = scope.spawn(|| {
            let event = loop {
                match listening.id.events().next().expect("an event") {
                    Some(event) if event.happened == Happened::Request => break event,
                    _ => thread::sleep(Duration::from_millis(5)),
                }
            };
            let request = event.request.expect("a request");
            let made = RdmaChannel::accept(request, &event.private, soon());
            made.map(|(link, _)| link)
                .map_err(|error| error.to_string())
        });
        let mut fresh = connected(address);
        fresh.send_greeting().expect("a greeting");
        let greeted = greeting(&mut fresh, soon(), Sent::Greeting).expect("the victim's greeting");
        let attacker = Attacker {
            fresh,
            victim: greeted.peer,
        };
        let victim = victim.join().expect("no panic").expect("a channel");
        (attacker, victim)
    })
}

fn connected(address: SocketAddr) -> Fresh {
    let go = || -> Result<Fresh, DialError> {
        let id = Id::new(Arc::new(Events::new()?))?;
        id.resolve_address(address, left(soon())?)?;
        expect(&id, Happened::AddressResolved, soon())?;
        id.resolve_route(left(soon())?)?;
        expect(&id, Happened::RouteResolved, soon())?;
        let fresh = fresh(id, Sizes::DIALLING, None)?;
        fresh.endpoint.id().connect(PRIVATE)?;
        expect(fresh.endpoint.id(), Happened::Established, soon())?;
        Ok(fresh)
    };
    go().unwrap_or_else(|_| panic!("no connection to {address}"))
}

/// What the attacker writes everywhere.
const POISON: u8 = 0xEE;

impl Attacker {
    fn poison(&self, bytes: usize) -> Sge {
        self.fresh
            .buffers
            .staging(0, 0, bytes)
            .copy_from(&vec![POISON; bytes]);
        staged(&self.fresh, bytes)
    }

    /// Writes to an address with a key; returns the status.
    fn write(&mut self, address: u64, key: u32, bytes: usize) -> u32 {
        let piece = self.poison(bytes);
        let posted = self
            .fresh
            .endpoint
            .post_write(77, &[piece], address, key, Signaled::Yes);
        posted.expect("posting asks nobody");
        self.outcome(77)
    }

    /// Makes a write that must be refused: it completes with an error, or, on a device that completes before the peer has answered
    /// (iWARP), the connection ends for it.
    fn write_is_refused(&mut self, address: u64, key: u32, bytes: usize) {
        if self.write(address, key, bytes) == 0 {
            assert!(self.is_cut_off(), "a write to {address:#x} was let through");
        }
    }

    /// Whether the victim ends the connection soon.
    fn is_cut_off(&mut self) -> bool {
        let until = soon();
        while Instant::now() < until {
            match self.fresh.endpoint.id().events().next() {
                Ok(Some(event)) if event.happened != Happened::Established => return true,
                Err(_) => return true,
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
        false
    }

    /// Sends bytes as a message, whatever they are.
    fn send(&mut self, octets: &[u8], id: u64) -> io::Result<()> {
        self.fresh
            .buffers
            .staging(0, 0, octets.len())
            .copy_from(octets);
        let piece = staged(&self.fresh, octets.len());
        self.fresh.endpoint.post_send(id, piece)
    }

    /// The status of the work with this number.
    fn outcome(&mut self, id: u64) -> u32 {
        let until = soon();
        let mut found = [Completion::default()];
        while Instant::now() < until {
            while self.fresh.endpoint.poll(&mut found).expect("a queue") == 1 {
                if found[0].id == id {
                    return found[0].status;
                }
            }
            thread::sleep(Duration::from_millis(2));
        }
        panic!("work {id} never completed");
    }
}

fn staged(fresh: &Fresh, bytes: usize) -> Sge {
    fresh.staged(bytes)
}

/// Bytes of all the victim's buffers but the landing itself, and a guest's memory beside them.
struct Canaries {
    guest: GuestMemory,
    before: Vec<Vec<u8>>,
}

fn everything(memory: &GuestMemory) -> Vec<Vec<u8>> {
    memory
        .layouts()
        .zip(0..)
        .map(|(layout, region)| {
            let mut octets = vec![0; layout.bytes as usize];
            let span = memory.span(region, 0, layout.bytes).expect("inside");
            span.copy_to(&mut octets);
            octets
        })
        .collect()
}

impl Canaries {
    fn new(victim: &Link) -> Self {
        let layout = RegionLayout {
            guest_address: 0,
            bytes: 1 << 20,
        };
        let guest = GuestMemory::anonymous(&[layout]).expect("a little memory");
        let all = guest.span(0, 0, 1 << 20).expect("inside");
        all.copy_from(&vec![0xA5; 1 << 20]);
        Self {
            guest,
            before: everything(victim.buffers.memory()),
        }
    }

    fn guest_address(&self) -> u64 {
        self.guest.span(0, 0, 0).expect("inside").as_ptr() as u64
    }

    /// Nothing changed anywhere.
    fn assert_whole(&self, victim: &Link) {
        assert!(
            everything(victim.buffers.memory()) == self.before,
            "the victim's buffers changed"
        );
        let guest = everything(&self.guest);
        assert!(
            guest[0].iter().all(|octet| *octet == 0xA5),
            "guest memory changed"
        );
    }
}

/// What the victim's receiving half says when it asks for a head.
fn victim_says(victim: Link) -> ChannelError {
    let mut receive = RdmaReceive::new(Arc::new(victim));
    receive.set_deadline(Some(soon()));
    receive.receive(&mut [0; 32]).expect_err("nothing was sent")
}

#[test]
fn a_write_with_a_wrong_key_is_refused_and_changes_nothing() {
    for device in devices("a_write_with_a_wrong_key_is_refused_and_changes_nothing") {
        for wrong in [0x5555, 1, 0x100, u32::MAX] {
            let (mut attacker, victim) = meet(&device);
            let canaries = Canaries::new(&victim);
            let (address, key) = (attacker.victim.landing_address, attacker.victim.landing_key);
            attacker.write_is_refused(address, key ^ wrong, 4096);
            canaries.assert_whole(&victim);
        }
    }
}

#[test]
fn a_write_outside_the_landing_is_refused_and_changes_nothing() {
    for device in devices("a_write_outside_the_landing_is_refused_and_changes_nothing") {
        for place in 0..6 {
            let (mut attacker, victim) = meet(&device);
            let canaries = Canaries::new(&victim);
            let Greeting {
                landing_address,
                landing_key,
                slots,
                slot_bytes,
                ..
            } = attacker.victim;
            let end = landing_address + u64::from(slots) * slot_bytes;
            let message = victim.buffers.message(0, 0, 0).as_ptr() as u64;
            let (address, bytes) = match place {
                0 => (end, 64),
                1 => (end - 32, 64),
                2 => (landing_address - 64, 64),
                3 => (landing_address - 32, 64),
                4 => (message, 64),
                _ => (canaries.guest_address(), 4096),
            };
            attacker.write_is_refused(address, landing_key, bytes);
            canaries.assert_whole(&victim);
            // The key for credit covers no more either.
            let (mut attacker, victim) = meet(&device);
            let canaries = Canaries::new(&victim);
            let key = attacker.victim.credit_key;
            let address = attacker.victim.landing_address;
            attacker.write_is_refused(address, key, 64);
            canaries.assert_whole(&victim);
        }
    }
}

#[test]
fn a_write_after_the_key_was_withdrawn_is_refused_and_changes_nothing() {
    for device in devices("a_write_after_the_key_was_withdrawn_is_refused_and_changes_nothing") {
        let (mut attacker, victim) = meet(&device);
        let (address, key) = (attacker.victim.landing_address, attacker.victim.landing_key);
        // While it is valid it works: the refusal below is about the withdrawal.
        assert_eq!(attacker.write(address, key, 64), 0, "{device}");
        let victim = Arc::new(victim);
        // The receiving half ends, the connection lives.
        drop(RdmaReceive::new(Arc::clone(&victim)));
        let canaries = Canaries::new(&victim);
        attacker.write_is_refused(address + 4096, key, 64);
        canaries.assert_whole(&victim);
        // The channel is given up from another thread.
        let (mut attacker, victim) = meet(&device);
        let (address, key) = (attacker.victim.landing_address, attacker.victim.landing_key);
        victim.shutdown();
        let canaries = Canaries::new(&victim);
        let piece = attacker.poison(64);
        let posted = attacker
            .fresh
            .endpoint
            .post_write(78, &[piece], address, key, Signaled::Yes);
        drop(posted);
        assert!(attacker.is_cut_off(), "{device}: after the abort");
        // Whatever was on its way has arrived or never will.
        thread::sleep(Duration::from_millis(200));
        canaries.assert_whole(&victim);
    }
}

#[test]
fn messages_without_credit_find_no_room_and_cost_the_victim_nothing() {
    for device in devices("messages_without_credit_find_no_room_and_cost_the_victim_nothing") {
        let (mut attacker, victim) = meet(&device);
        let mut refused = false;
        for number in 0..MESSAGES + 40 {
            let header = Header {
                kind: Kind::Data,
                inline_bytes: 0,
                landed_bytes: 0,
                slot: 0,
                number,
            };
            let id = 100 + u64::from(number);
            if attacker.send(&header.encode(), id).is_err() || attacker.outcome_soon(id) != Some(0)
            {
                refused = true;
                break;
            }
        }
        // An iWARP device says that a message has left before it has arrived, so the refusal may come later.
        if !refused {
            thread::sleep(Duration::from_secs(1));
            let header = [0; HEADER_BYTES];
            refused = attacker.send(&header, 99).is_err() || attacker.outcome_soon(99) != Some(0);
        }
        assert!(refused, "{device}: as many messages as it likes");
        // What had credit is there, the rest is not; nobody waits without end.
        let error = victim_says(victim);
        assert!(!matches!(error, ChannelError::Closed), "{device}: {error}");
    }
}

// SPEC: BELOW-6, BELOW-9
#[test]
fn messages_that_break_the_agreement_end_the_channel_with_the_reason() {
    let good = Header {
        kind: Kind::Data,
        inline_bytes: 0,
        landed_bytes: 0,
        slot: 0,
        number: 0,
    };
    let long = Header {
        landed_bytes: (256 << 10) + 1,
        ..good
    };
    let turn = Header {
        landed_bytes: 64,
        slot: 1,
        ..good
    };
    let far = Header {
        landed_bytes: 64,
        slot: u32::MAX,
        ..good
    };
    let number = Header { number: 5, ..good };
    let lies = Header {
        inline_bytes: 100,
        ..good
    };
    let mut unknown = good.encode();
    unknown[0] = 9;
    let cases: [(&[u8], &str); 7] = [
        (&long.encode(), "out of turn or more than fit"),
        (&turn.encode(), "out of turn or more than fit"),
        (&far.encode(), "out of turn or more than fit"),
        (&number.encode(), "message 5 came where 0"),
        (&lies.encode(), "other bytes than it says"),
        (&unknown, "unknown kind 9"),
        (&[1, 0, 0], "no whole header"),
    ];
    for device in devices("messages_that_break_the_agreement_end_the_channel_with_the_reason") {
        for (octets, word) in cases {
            let (mut attacker, victim) = meet(&device);
            attacker.send(octets, 5).expect("posting asks nobody");
            let error = victim_says(victim);
            assert!(matches!(error, ChannelError::Lost(_)), "{device}: {error}");
            assert!(error.to_string().contains(word), "{device}: {error}");
        }
    }
}

#[test]
fn credit_for_what_was_not_sent_ends_the_channel_with_the_reason() {
    for device in devices("credit_for_what_was_not_sent_ends_the_channel_with_the_reason") {
        let (mut attacker, victim) = meet(&device);
        let credit = Credit {
            messages: 7,
            slots: 7,
        };
        let octets = credit.encode();
        attacker
            .fresh
            .buffers
            .staging(0, 0, octets.len())
            .copy_from(&octets);
        let piece = staged(&attacker.fresh, octets.len());
        let (address, key) = (attacker.victim.credit_address, attacker.victim.credit_key);
        let posted = attacker
            .fresh
            .endpoint
            .post_write(6, &[piece], address, key, Signaled::Yes);
        posted.expect("posting asks nobody");
        assert_eq!(attacker.outcome(6), 0, "{device}: the place is for credit");
        // An iWARP write may arrive after its completion.
        thread::sleep(Duration::from_millis(300));
        let mut send = RdmaSend::new(Arc::new(victim));
        send.set_deadline(Some(soon()));
        let error = send.send(b"anything", &[]).expect_err("bad credit");
        assert!(
            error.to_string().contains("gave credit"),
            "{device}: {error}"
        );
    }
}

// SPEC: BELOW-4
#[test]
fn a_greeting_of_something_else_and_silence_end_accepting_in_time() {
    for device in devices("a_greeting_of_something_else_and_silence_end_accepting_in_time") {
        for silent in [false, true] {
            let address: SocketAddr = format!("{device}:0").parse().expect("an address");
            let listening = Listening::bind_one(address).expect("a listener");
            let address = listening.id.addresses().0.expect("bound");
            thread::scope(|scope| {
                let victim = scope.spawn(|| {
                    let mut channel = loop {
                        match listening.try_accept().expect("a request") {
                            Some((channel, _)) => break channel,
                            None => thread::sleep(Duration::from_millis(5)),
                        }
                    };
                    let start = Instant::now();
                    let error = channel.establish(start + Duration::from_secs(2));
                    (error.expect_err("no greeting"), start.elapsed())
                });
                let mut fresh = connected(address);
                if !silent {
                    fresh.buffers.outgoing(0, 64).copy_from(&[0x42; 64]);
                    let piece = fresh.outgoing_piece(64);
                    fresh.endpoint.post_send(1, piece).expect("a message");
                }
                let (error, took) = victim.join().expect("no panic");
                let expected = if silent {
                    "establish-deadline"
                } else {
                    "establish-protocol"
                };
                assert_eq!(error.code(), expected, "{device}: {error}");
                assert!(took < Duration::from_secs(10), "{device}: {took:?}");
            });
        }
    }
}

impl Attacker {
    /// As `outcome`, without patience: a message without credit may be repeated for a while.
    fn outcome_soon(&mut self, id: u64) -> Option<u32> {
        let until = Instant::now() + Duration::from_secs(5);
        let mut found = [Completion::default()];
        while Instant::now() < until {
            while self.fresh.endpoint.poll(&mut found).expect("a queue") == 1 {
                if found[0].id == id || found[0].status != 0 {
                    return Some(found[0].status);
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        None
    }
}
