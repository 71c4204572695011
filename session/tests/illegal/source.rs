//! The source under test: what the destination says in a vector goes into its machine and its lanes' ledgers. What the source of the
//! vector says is what this one has said: its frames are entered in the ledgers, and its rounds are encoded.

use std::collections::BTreeMap;
use std::time::Duration;

use multifd_session::source::event::{DeviceOutlook, Effect, Event, Outcome};
use multifd_session::source::lane::Lane;
use multifd_session::source::stream::{Item, Stream};
use multifd_session::source::{Config, Error, Session};
use multifd_wire::exercise::check;
use multifd_wire::frame::SetupEnd;
use multifd_wire::negotiate::accept;
use multifd_wire::{
    ChannelRef, Features, Frame, Hello, HelloReply, Intent, LaneId, Layout, Misbehaved, PageRun,
    Reason, Role, Round,
};

use super::{Is, Said, Step, closed_channel};

const NOW: Duration = Duration::from_millis(1);

/// More pages than a switchover's limit allows.
const MANY: u64 = 1 << 24;

/// What the source refuses the steps with, if it does.
pub(super) fn play(steps: &[Step<'_>]) -> Option<Reason> {
    let mut player = Player::new(steps);
    for step in steps {
        player.step(step);
    }
    player.refused
}

/// The bytes of the frames in a vector, as they are read.
fn frames<'b>(steps: &'b [Step<'_>]) -> impl Iterator<Item = Frame<'b>> {
    steps.iter().filter_map(|step| match step {
        Step::Said(said) if matches!(said.is, Is::Frame(_)) => {
            check(said.octets).unwrap().map(|(_, frame, _)| frame)
        }
        _ => None,
    })
}

struct Player {
    session: Session,
    features: Features,
    layout: Option<Layout>,
    lanes: BTreeMap<LaneId, Lane>,
    streams: Vec<Stream>,
    /// The first round with the guest paused, and the digest of FINAL, as the vector has them.
    paused_from: Option<Round>,
    digest: Option<u64>,
    next: Round,
    refused: Option<Reason>,
}

impl Player {
    fn new(steps: &[Step<'_>]) -> Self {
        let lanes = frames(steps).find_map(|frame| match frame {
            Frame::SetupEnd(SetupEnd { lanes, .. }) => Some(lanes),
            _ => None,
        });
        let config = Config::builder()
            .channels(lanes.unwrap_or(1))
            .build()
            .unwrap();
        let paused_from = frames(steps).find_map(|frame| match frame {
            Frame::Switchover(switchover) => Some(switchover.final_round),
            _ => None,
        });
        let digest = frames(steps).find_map(|frame| match frame {
            Frame::Final(last) => Some(last.digest.value()),
            _ => None,
        });
        Self {
            session: Session::new(config, 8, Duration::ZERO),
            features: Features::NONE,
            layout: None,
            lanes: BTreeMap::new(),
            streams: Vec::new(),
            paused_from,
            digest,
            next: Round::new(0),
            refused: None,
        }
    }

    fn step(&mut self, step: &Step<'_>) {
        match step {
            Step::Lost(hello) if hello.intent == Intent::Join => {}
            Step::Lost(_) => {
                let error = Error::new(self.session.phase(), closed_channel());
                self.happen(Event::Lost(error));
            }
            Step::Said(said) => match (said.side, said.is) {
                (Role::Destination, Is::Reply(hello)) => self.answered(&hello, said),
                (Role::Destination, Is::Frame(_)) => {
                    let (_, frame, _) = check(said.octets).unwrap().unwrap();
                    self.hears(&frame);
                }
                (Role::Source, Is::Frame(hello)) => {
                    let (header, frame, _) = check(said.octets).unwrap().unwrap();
                    let body = &said.octets[said.octets.len() - header.body_bytes()..];
                    self.has_said(&hello, &frame, body);
                }
                _ => {}
            },
        }
    }

    fn answered(&mut self, hello: &Hello, said: &Said<'_>) {
        let reply = HelloReply::decode(said.octets.try_into().unwrap()).unwrap();
        let agreement = match accept(hello, &reply) {
            Ok(agreement) => agreement,
            Err(error) => {
                self.refused.get_or_insert(error.reason());
                return;
            }
        };
        match hello.intent {
            Intent::Start | Intent::Resume => {
                self.features = agreement.features;
                self.happen(Event::Connected {
                    agreed: agreement.features,
                    round_trip: NOW,
                });
            }
            Intent::Join => self.happen(Event::LaneUp {
                lane: hello.lane,
                incarnation: hello.incarnation,
            }),
            Intent::Ask => {}
        }
    }

    fn hears(&mut self, frame: &Frame<'_>) {
        let effects = self.session.frame(ChannelRef::Control, frame, NOW);
        self.carry_out(effects);
        if let Frame::Credit(credits) = frame {
            for credit in credits.iter() {
                let stream = self.streams.get_mut(credit.device.value() as usize);
                let granted = stream.map_or(Ok(()), |stream| stream.grant(credit.offset_max));
                self.check(granted);
            }
        }
    }

    /// The source's own frames.
    fn has_said(&mut self, hello: &Hello, frame: &Frame<'_>, body: &[u8]) {
        let id = hello.lane;
        let octets = body.len() as u64;
        match frame {
            Frame::Regions(regions) => self.layout = Some(Layout::from_frame(regions).unwrap()),
            Frame::Devices(devices) if self.streams.is_empty() && !devices.devices.is_empty() => {
                self.session.expect_devices();
                let devices = devices.iter().map(Result::unwrap);
                self.streams = devices
                    .map(|device| Stream::new(device.id, 1 << 25))
                    .collect();
            }
            Frame::Pages(pages) => {
                let runs = self.runs(pages.runs);
                self.enter(hello, pages.round).pages(runs, octets).unwrap();
            }
            Frame::Zeros(zeros) => {
                let runs = self.runs(zeros.runs);
                self.enter(hello, zeros.round).zeros(runs, octets).unwrap();
            }
            Frame::RoundEnd(end) => {
                self.enter(hello, end.round).end_round().unwrap();
                self.happen(Event::LaneEncoded {
                    lane: id,
                    incarnation: hello.incarnation,
                    round: end.round,
                });
            }
            Frame::DeviceMark(mark) => {
                self.ledger(hello).item(Item::mark(*mark), 64);
            }
            // To the ledger one item is like another.
            Frame::DeviceChunk(chunk) => {
                let mark = multifd_wire::frame::DeviceMark {
                    device: chunk.device,
                    mark: multifd_wire::frame::Mark::DataEnd,
                    generation: multifd_wire::Generation::new(0),
                    index: chunk.index,
                    offset: chunk.offset,
                };
                self.ledger(hello).item(Item::mark(mark), octets);
            }
            _ => {}
        }
    }

    fn runs(&self, runs: &[multifd_wire::frame::RawRun]) -> Vec<PageRun> {
        let layout = self.layout.as_ref().unwrap();
        runs.iter().map(|raw| layout.admit(raw).unwrap()).collect()
    }

    fn ledger(&mut self, hello: &Hello) -> &mut Lane {
        let fresh = || Lane::new(hello.lane, hello.incarnation);
        self.lanes.entry(hello.lane).or_insert_with(fresh)
    }

    fn enter(&mut self, hello: &Hello, round: Round) -> &mut Lane {
        let lane = self.ledger(hello);
        let _ = lane.begin_round(round, false);
        lane
    }

    /// What a driver finds goes to the session.
    fn check(&mut self, found: Result<(), Misbehaved>) {
        if let Err(misbehaved) = found {
            let error = Error::new(self.session.phase(), misbehaved);
            self.happen(Event::Failed(error));
        }
    }

    fn happen(&mut self, event: Event) {
        let effects = self.session.handle(event, NOW);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.apply(effect);
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Begin { .. } => self.happen(Event::Begun),
            Effect::OpenRound { round, .. } => self.next = round.next().unwrap(),
            Effect::RoundEncoded => self.happen(Event::Encoded {
                octets: 4096,
                unacked_octets: 0,
            }),
            // The guest is paused when it is in the vector.
            Effect::Collect { last } => {
                let paused = last || self.paused_from == Some(self.next);
                let pages = if paused { 0 } else { MANY };
                self.happen(Event::Collected { pages });
            }
            Effect::Pause => self.happen(Event::Paused),
            Effect::Quiesce => self.happen(Event::DevicesQuiesced),
            Effect::StopDevices => {
                self.happen(Event::DevicesStopped);
                self.happen(Event::DevicesSaved);
            }
            Effect::DeviceAcked(_) => self.happen(Event::Devices(DeviceOutlook::default())),
            Effect::Save => self.happen(Event::Saved),
            Effect::SendFinal { .. } => {
                if let Some(digest) = self.digest {
                    self.happen(Event::FinalSent { digest });
                }
            }
            Effect::Acknowledged(marks) => {
                for mark in marks {
                    if let Some(lane) = self.lanes.get_mut(&mark.lane) {
                        let settled = lane.acked(mark.frames).map(drop);
                        self.check(settled);
                    }
                }
            }
            Effect::SettleBefore { lanes } => {
                for (lane, frames) in lanes {
                    let before = self.lanes.remove(&lane);
                    let settled = before.map_or(Ok(()), |mut lane| lane.acked(frames).map(drop));
                    self.check(settled);
                }
            }
            Effect::GiveBack { runs, .. } => {
                let layout = self.layout.as_ref().unwrap();
                let admitted = runs.iter().try_for_each(|raw| layout.admit(raw).map(drop));
                self.check(admitted);
            }
            Effect::Abort { reason, .. } => {
                self.refused.get_or_insert(reason);
            }
            Effect::Finish(Outcome::Failed(error) | Outcome::Unknown(error)) => {
                self.refused.get_or_insert(error.reason());
            }
            _ => {}
        }
    }
}
