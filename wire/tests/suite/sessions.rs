//! The vectors of whole sessions, followed as an onlooker who sees every channel would: hellos are answered as they must be, frames
//! come from the right side in the right phase with the right number, and digests and counts are those of the pages that went by.

use std::collections::BTreeMap;
use std::path::Path;

use multifd_wire::digest::page_value;
use multifd_wire::exercise::check;
use multifd_wire::negotiate::accept;
use multifd_wire::{
    ChannelKind, Digest, Features, Frame, Hello, HelloReply, Intent, Kind, Layout, PageIndex,
    Phase, RegionId, Role, Sequence, SessionId,
};

use crate::support::{Vector, octets, vectors};

/// What one side writes to one channel, whether or not the other reads it, or that a channel is lost.
enum Block {
    Said(Role, String, Vec<u8>, bool),
    Lost(String),
}

fn blocks(vector: &Vector) -> Vec<Block> {
    let path = Path::new(&vector.name);
    let mut blocks = Vec::new();
    for line in &vector.lines {
        let said = line.strip_prefix("> ").or(line.strip_prefix("? "));
        if let Some(rest) = said {
            let (side, channel) = rest.split_once(' ').unwrap();
            let side = match side {
                "source" => Role::Source,
                "destination" => Role::Destination,
                other => panic!("{}: side {other}", vector.name),
            };
            blocks.push(Block::Said(
                side,
                channel.to_string(),
                Vec::new(),
                line.starts_with('>'),
            ));
        } else if let Some(rest) = line.strip_prefix("! ") {
            let channel = rest.strip_suffix(" is lost").unwrap();
            blocks.push(Block::Lost(channel.to_string()));
        } else if let Some(Block::Said(_, _, said, _)) = blocks.last_mut() {
            said.extend(octets(path, line));
        }
    }
    blocks
}

/// A channel, from its hello on.
#[derive(Default)]
struct Channel {
    hello: Option<Hello>,
    is_open: bool,
    next: BTreeMap<bool, Sequence>,
}

/// What an onlooker knows.
struct Onlooker {
    name: String,
    channels: BTreeMap<String, Channel>,
    phase: Phase,
    is_resumed: bool,
    features: Features,
    layout: Option<Layout>,
    /// The value of each page that is not zero, as it lies at the destination.
    values: BTreeMap<(u32, u64), u32>,
    landed: (u64, u64),
    frames: BTreeMap<(u32, u32), u64>,
    finals: u32,
}

impl Onlooker {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_string(),
            channels: BTreeMap::new(),
            phase: Phase::Hello,
            is_resumed: false,
            features: Features::NONE,
            layout: None,
            values: BTreeMap::new(),
            landed: (0, 0),
            frames: BTreeMap::new(),
            finals: 0,
        }
    }

    fn digest(&self) -> Digest {
        let mut digest = Digest::EMPTY;
        for ((region, page), value) in &self.values {
            digest.replace(RegionId::new(*region), PageIndex::new(*page), 0, *value);
        }
        digest
    }

    fn said(&mut self, side: Role, name: &str, said: &[u8]) {
        let at = format!("{}: {name}", self.name);
        let channel = self.channels.entry(name.to_string()).or_default();
        match (channel.hello, channel.is_open) {
            (None, _) => {
                assert_eq!(side, Role::Source, "{at}: the source speaks first");
                if let Ok(hello) = Hello::decode(said.try_into().unwrap()) {
                    channel.hello = Some(hello);
                } else {
                    // Refused in the next block.
                    channel.hello = Some(Hello::start(
                        SessionId::new([1; 16]),
                        Features::NONE,
                        Features::NONE,
                    ));
                }
            }
            (Some(hello), false) => {
                assert_eq!(side, Role::Destination, "{at}");
                let reply = HelloReply::decode(said.try_into().unwrap()).unwrap();
                if let HelloReply::Refused { .. } = reply {
                    return;
                }
                let agreed = accept(&hello, &reply).unwrap().features;
                channel.is_open = true;
                match hello.intent {
                    Intent::Start | Intent::Resume => {
                        self.features = agreed;
                        self.phase = Phase::Setup;
                        self.is_resumed = hello.intent == Intent::Resume;
                        self.frames.clear();
                    }
                    // SPEC: JOIN-2
                    Intent::Join => assert_eq!(agreed, self.features, "{at}"),
                    // SPEC: ASK-1
                    Intent::Ask => self.phase = Phase::Setup,
                }
            }
            (Some(hello), true) => {
                let on = hello.intent.channel();
                let due = channel.next.entry(side == Role::Source);
                let due = due.or_insert(Sequence::FIRST);
                let (header, frame, rest) = check(said).unwrap().unwrap();
                assert!(rest.is_empty(), "{at}: a block is one frame");
                // SPEC: HEAD-8
                header.check_sequence(*due).unwrap();
                *due = due.next();
                if on == ChannelKind::Data {
                    let lane = (hello.lane.value(), hello.incarnation.value());
                    *self.frames.entry(lane).or_default() += 1;
                }
                // SPEC: KIND-1
                header.kind().check_direction(side, on).unwrap();
                let body = &said[said.len() - header.body_bytes()..];
                self.frame(&at, &frame, body);
            }
        }
    }

    fn frame(&mut self, at: &str, frame: &Frame<'_>, body: &[u8]) {
        let kind = frame.kind();
        // SPEC: KIND-2, and RUNNING-2 for what comes behind RUNNING.
        let farewell = self.phase == Phase::Done && kind == Kind::KeepAlive;
        let crossing = matches!(kind, Kind::Switchover | Kind::Final);
        assert!(
            kind.may_come_in(self.phase) || farewell || crossing,
            "{at}: {kind} in {}",
            self.phase
        );
        match frame {
            Frame::Regions(regions) => self.layout = Some(Layout::from_frame(regions).unwrap()),
            Frame::Devices(devices) if !self.features.contains(Features::DEVICE_STATE) => {
                // SPEC: FEAT-4
                assert!(devices.devices.is_empty(), "{at}");
            }
            Frame::Ready(_) if !self.is_resumed => self.phase = Phase::Rounds,
            Frame::Landed(_) => self.phase = Phase::Rounds,
            Frame::Switchover(_) => self.phase = Phase::Switchover,
            Frame::Pages(pages) => {
                let mut contents = body.chunks_exact(4096).zip(pages.checksums);
                for raw in pages.runs {
                    // SPEC: RUN-1, RUN-3
                    let run = self.layout.as_ref().unwrap().admit(raw).unwrap();
                    for page in raw.first.get()..raw.first.get() + u64::from(run.count()) {
                        let (content, crc) = contents.next().unwrap();
                        let found = crc32fast::hash(content);
                        // SPEC: DIGEST-6, PAGES-6
                        self.values
                            .insert((raw.region.get(), page), page_value(found));
                        self.landed.0 += u64::from(found == crc.get());
                    }
                }
            }
            Frame::Zeros(zeros) => {
                for raw in zeros.runs {
                    self.layout.as_ref().unwrap().admit(raw).unwrap();
                    for page in raw.first.get()..raw.first.get() + u64::from(raw.count.get()) {
                        self.values.remove(&(raw.region.get(), page));
                    }
                }
                self.landed.1 += zeros.page_count();
            }
            Frame::Ack(acks) => {
                for mark in acks.iter() {
                    // SPEC: ACK-3
                    let sent = self
                        .frames
                        .get(&(mark.lane.value(), mark.incarnation.value()));
                    assert!(
                        sent.is_some_and(|sent| mark.frames <= *sent),
                        "{at}: {mark:?}"
                    );
                }
            }
            Frame::RoundClosed(closed) => {
                // SPEC: CLOSED-1
                assert_eq!((closed.pages, closed.zero_pages), self.landed, "{at}");
                assert_eq!(closed.digest, self.digest(), "{at}");
                self.landed = (0, 0);
            }
            Frame::Final(last) => {
                // SPEC: FINAL-1
                assert_eq!(last.digest, self.digest(), "{at}");
                self.finals += 1;
            }
            Frame::Prepared(prepared) => {
                // SPEC: PREP-1
                assert!(self.finals > 0, "{at}");
                assert_eq!(prepared.digest, self.digest(), "{at}");
                self.phase = Phase::Commit;
            }
            // SPEC: COMMIT-2
            Frame::Commit(commit) => assert_eq!(commit.digest, self.digest(), "{at}"),
            Frame::Running(_) | Frame::Abort(_) | Frame::Outcome(_) => self.phase = Phase::Done,
            _ => {}
        }
    }

    fn lost(&mut self, name: &str) {
        assert!(
            self.channels.remove(name).is_some(),
            "{}: {name} was not there",
            self.name
        );
    }
}

#[test]
fn each_session_is_what_an_onlooker_expects() {
    let mut kinds = 0;
    for vector in vectors()
        .iter()
        .filter(|vector| vector.structure == "session")
    {
        let mut onlooker = Onlooker::new(&vector.name);
        for block in blocks(vector) {
            match block {
                Block::Said(side, channel, said, true) => onlooker.said(side, &channel, &said),
                // It is a frame, and nothing follows from it.
                Block::Said(_, _, said, false) => assert!(check(&said).unwrap().is_some()),
                Block::Lost(channel) => onlooker.lost(&channel),
            }
        }
        if vector.name != "session-refusals" {
            assert_eq!(onlooker.phase, Phase::Done, "{}", vector.name);
        }
        kinds += 1;
    }
    assert!(kinds >= 9, "only {kinds} sessions");
}
