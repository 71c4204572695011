//! Two sides in one thread, over a made-up network that loses lanes, stands still, reorders, and loses the session.
//!
//! What is claimed after every step: what is held is within what was granted, and at the end every byte is in its place. That it comes to
//! an end at all is the claim that nothing locks up.

use std::collections::VecDeque;
use std::time::Duration;

use multifd_wire::frame::{StreamCredit, StreamEnd, StreamEndKind};
use multifd_wire::{Incarnation, LaneId, StreamId};
use proptest::prelude::*;

use super::*;
use crate::piece::Piece;

/// xorshift64*: the same numbers for the same seed everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }
}

/// The byte at a place of a stream, in a direction.
fn octet(side: usize, stream: u32, at: u64) -> u8 {
    let mixed = (at ^ (u64::from(stream) << 40) ^ ((side as u64) << 50))
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 56) as u8
}

struct Side {
    streams: Streams,
    /// What its monitor still has to say, and has said, per stream.
    left: Vec<u64>,
    said: Vec<u64>,
    heard: Vec<u64>,
}

/// Words on a control channel.
enum Word {
    Open(StreamId),
    Credit(StreamCredit),
    End(StreamEnd),
}

struct World {
    random: Random,
    now: Duration,
    sides: [Side; 2],
    /// Per direction: what is on the way on each lane, and on the control channel.
    lanes: [Vec<VecDeque<Outbound>>; 2],
    words: [VecDeque<Word>; 2],
    incarnations: Vec<u32>,
    initial: u64,
}

const HORIZON: Duration = Duration::from_millis(20);

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let (streams, lanes) = (1 + random.below(4) as u32, 1 + random.below(3) as usize);
        let initial = [1, 100, 4096, WINDOW_BYTES_MIN][random.below(4) as usize];
        let mut side = |streams: u32| Side {
            streams: Streams::new(initial, HORIZON),
            left: (0..streams).map(|_| random.below(200_000)).collect(),
            said: vec![0; streams as usize],
            heard: vec![0; streams as usize],
        };
        let mut sides = [side(streams), side(streams)];
        for _ in 0..streams {
            sides[0].streams.open();
        }
        let mut world = Self {
            random,
            now: Duration::ZERO,
            sides,
            lanes: [0, 1].map(|_| vec![VecDeque::new(); lanes]),
            words: [VecDeque::new(), VecDeque::new()],
            incarnations: vec![0; lanes],
            initial,
        };
        world.words[0].push_back(Word::Open(StreamId::new(streams - 1)));
        world
    }

    fn via(&self, lane: usize) -> Via {
        Via {
            lane: LaneId::new(lane as u32),
            incarnation: Incarnation::new(self.incarnations[lane]),
        }
    }

    /// A monitor says something, if there is room.
    fn read(&mut self, side: usize, stream: u32) {
        let id = StreamId::new(stream);
        let here = &mut self.sides[side];
        let Some(outgoing) = here.streams.outgoing(id) else {
            return;
        };
        let (left, room) = (here.left[stream as usize], outgoing.room());
        if left == 0 {
            if outgoing.ended().is_none() {
                here.streams.end(id, StreamEndKind::Clean);
            }
            return;
        }
        let most = left.min(room).min(5000);
        if most == 0 {
            return;
        }
        let bytes = 1 + self.random.below(most);
        let at = here.said[stream as usize];
        let octets = (at..at + bytes).map(|at| octet(side, stream, at)).collect();
        here.streams.push(id, Piece::new(octets));
        here.said[stream as usize] += bytes;
        here.left[stream as usize] -= bytes;
        // Bounded memory at the side that sends.
        let outgoing = here.streams.outgoing(id).unwrap();
        assert!(outgoing.held() <= WINDOW_BYTES_MAX.max(self.initial));
    }

    fn send(&mut self, side: usize, lane: usize) {
        let via = self.via(lane);
        if let Some(outbound) = self.sides[side].streams.next(via, false, self.now) {
            self.lanes[side][lane].push_back(outbound);
        }
    }

    fn arrive(&mut self, from: usize, lane: usize) {
        let Some(outbound) = self.lanes[from][lane].pop_front() else {
            return;
        };
        let there = &mut self.sides[1 - from];
        if from == 0 {
            there.streams.open_up_to(outbound.stream);
        }
        let (stream, offset) = (outbound.stream, outbound.offset);
        let admit = there
            .streams
            .admit(stream, offset, outbound.piece.bytes())
            .unwrap();
        if admit == Admit::Take {
            there.streams.data(stream, offset, outbound.piece).unwrap();
        }
        let incoming = there.streams.incoming(stream).unwrap();
        // Bounded memory at the side that receives.
        assert!(incoming.held() <= WINDOW_BYTES_MAX.max(self.initial) * 2);
    }

    fn write(&mut self, side: usize, stream: u32) {
        let id = StreamId::new(stream);
        let here = &mut self.sides[side];
        if let Some(piece) = here.streams.hand(id) {
            for (place, seen) in (here.heard[stream as usize]..).zip(piece.iter()) {
                assert_eq!(
                    *seen,
                    octet(1 - side, stream, place),
                    "stream {stream} at {place}"
                );
            }
            here.heard[stream as usize] += piece.bytes();
            here.streams.taken(id, piece.bytes(), self.now);
        }
    }

    fn speak(&mut self, side: usize) {
        let words = &mut self.words[side];
        words.extend(
            self.sides[side]
                .streams
                .credits(false)
                .into_iter()
                .map(Word::Credit),
        );
        words.extend(
            self.sides[side]
                .streams
                .take_ends()
                .into_iter()
                .map(Word::End),
        );
    }

    fn listen(&mut self, from: usize) {
        let Some(word) = self.words[from].pop_front() else {
            return;
        };
        let there = &mut self.sides[1 - from].streams;
        let opened = |there: &mut Streams, stream| {
            if from == 0 {
                there.open_up_to(stream);
            }
        };
        match word {
            Word::Open(stream) => opened(there, stream),
            Word::Credit(credit) => {
                opened(there, credit.stream);
                there.credit(credit).unwrap();
            }
            Word::End(end) => {
                opened(there, end.stream);
                there.peer_end(end).unwrap();
            }
        }
    }

    /// What was on the way is gone, or some of it arrived.
    fn lose_lane(&mut self, lane: usize) {
        for from in 0..2 {
            let arrived = self.random.below(3);
            for _ in 0..arrived {
                self.arrive(from, lane);
            }
            self.lanes[from][lane].clear();
            let via = self.via(lane);
            self.sides[from].streams.lane_lost(via);
        }
        self.incarnations[lane] += 1;
    }

    fn lose_session(&mut self) {
        for lane in 0..self.incarnations.len() {
            self.lose_lane(lane);
        }
        for side in 0..2 {
            self.words[side].clear();
            self.sides[side].streams.session_lost();
        }
        let newest = StreamId::new(self.sides[0].streams.count() - 1);
        self.words[0].push_back(Word::Open(newest));
        for side in 0..2 {
            let again = self.sides[side].streams.credits(true);
            self.words[side].extend(again.into_iter().map(Word::Credit));
        }
    }

    fn step(&mut self, faults: bool) {
        self.now += Duration::from_micros(self.random.below(3000));
        let side = self.random.below(2) as usize;
        let stream = self.random.below(u64::from(self.sides[0].streams.count())) as u32;
        let lane = self.random.below(self.incarnations.len() as u64) as usize;
        match self.random.below(if faults { 100 } else { 98 }) {
            0..25 => self.read(side, stream),
            25..45 => self.send(side, lane),
            45..65 => self.arrive(side, lane),
            65..80 => self.write(side, stream),
            80..89 => self.speak(side),
            89..98 => self.listen(side),
            98 => self.lose_lane(lane),
            _ => self.lose_session(),
        }
    }

    fn is_done(&self) -> bool {
        (0..2).all(|side| {
            let (here, there) = (&self.sides[side], &self.sides[1 - side]);
            here.left.iter().all(|left| *left == 0)
                && here.said == there.heard
                && (0..here.said.len() as u32).all(|number| {
                    let incoming = here.streams.incoming(StreamId::new(number));
                    incoming.is_some_and(|incoming| incoming.ended() == Some(StreamEndKind::Clean))
                })
        })
    }

    /// Whether every piece was acknowledged, so that nothing is kept.
    fn keeps_nothing(&self) -> bool {
        self.sides
            .iter()
            .all(|side| side.streams.held() == Held::default())
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let mut steps = 0_u64;
    while !(world.is_done() && world.keeps_nothing()) {
        steps += 1;
        // Faults stop at some point: nobody promises to get through a link that is lost for ever.
        world.step(steps < 100_000);
        assert!(steps < 20_000_000, "seed {seed}: it locked up");
    }
}

// SPEC: CARRY-3, CARRY-6, CARRY-13
proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_octet_arrives_in_its_place_whatever_the_network_does(seed: u64) {
        run(seed);
    }
}

#[test]
#[ignore = "minutes: 100,000 seeds"]
fn every_octet_arrives_for_many_seeds() {
    for seed in 0..100_000 {
        run(seed);
    }
}

/// SPEC: CARRY-5, CARRY-7, CARRY-8
#[test]
fn refuses_what_was_not_granted_overlaps_or_was_never_sent() {
    let mut streams = Streams::new(100, HORIZON);
    let stream = streams.open().unwrap();
    let piece = |bytes: usize| Piece::new(vec![7; bytes]);
    assert!(matches!(
        streams.admit(stream, 1, 100),
        Err(Wrong::PastCredit {
            end: 101,
            granted: 100,
            ..
        })
    ));
    assert!(matches!(
        streams.admit(stream, u64::MAX, 100),
        Err(Wrong::PastCredit { .. })
    ));
    assert_eq!(streams.admit(stream, 0, 100), Ok(Admit::Take));
    assert_eq!(streams.data(stream, 10, piece(10)), Ok(false));
    assert_eq!(
        streams.data(stream, 10, piece(10)),
        Ok(false),
        "the same piece again is dropped"
    );
    for (offset, bytes) in [(5, 6), (15, 10), (0, 100)] {
        assert!(
            matches!(
                streams.data(stream, offset, piece(bytes)),
                Err(Wrong::Overlap { .. })
            ),
            "{offset}"
        );
    }
    assert_eq!(streams.data(stream, 0, piece(10)), Ok(true));
    assert!(matches!(
        streams.data(stream, 19, piece(5)),
        Err(Wrong::Overlap { .. })
    ));
    let credit = StreamCredit {
        stream,
        received: 1,
        offset_max: 100,
    };
    assert!(matches!(
        streams.credit(credit),
        Err(Wrong::NeverSent {
            received: 1,
            sent: 0,
            ..
        })
    ));
    let end = |offset| StreamEnd {
        stream,
        how: StreamEndKind::Clean,
        offset,
    };
    assert!(matches!(streams.peer_end(end(19)), Err(Wrong::End { .. })));
    assert_eq!(streams.peer_end(end(25)), Ok(()));
    assert!(matches!(streams.peer_end(end(26)), Err(Wrong::End { .. })));
    assert!(matches!(
        streams.data(stream, 20, piece(6)),
        Err(Wrong::End { .. })
    ));
    assert_eq!(streams.data(stream, 20, piece(5)), Ok(true));
    let unknown = StreamId::new(1);
    assert!(matches!(
        streams.admit(unknown, 0, 1),
        Err(Wrong::Unknown { .. })
    ));
}

#[test]
fn what_somebody_waits_for_goes_first_and_a_lane_is_kept_free_for_it() {
    let mut streams = Streams::new(WINDOW_BYTES_MIN, HORIZON);
    let ids = [Class::Bulk, Class::Main, Class::Urgent].map(|class| {
        let stream = streams.open().unwrap();
        streams.set_class(stream, class);
        streams.push(stream, Piece::new(vec![1; 10]));
        stream
    });
    let via = Via {
        lane: LaneId::new(0),
        incarnation: Incarnation::new(0),
    };
    let mut order = Vec::new();
    while let Some(outbound) = streams.next(via, true, HORIZON) {
        order.push(outbound.stream);
    }
    assert_eq!(
        order,
        [ids[2], ids[1]],
        "the lane that is kept free takes no bulk"
    );
    assert_eq!(streams.next(via, false, HORIZON).unwrap().stream, ids[0]);
}
