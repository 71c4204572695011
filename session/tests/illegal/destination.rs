//! The destination under test: what the source says in a vector goes into its machines, and so do the lanes' frames, as the driver would
//! bring them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use multifd_session::common::Encoded;
use multifd_session::destination::assembler::{Admit, Assembler};
use multifd_session::destination::lane::{Lane, Mark};
use multifd_session::destination::{
    Closed, Config, Counts, Effect, Event, Fault, Incomplete, Outcome, Secrets, Session,
};
use multifd_wire::digest::page_value;
use multifd_wire::exercise::check;
use multifd_wire::frame::{Grant, LaneMark};
use multifd_wire::{
    DeviceId, Digest, Features, Frame, Header, HelloReply, Intent, Kind, LaneId, Layout,
    PAGE_BYTES, PageIndex, Reason, RegionId, Role,
};

use super::{Is, Said, Step, closed_channel};

const NOW: Duration = Duration::from_millis(1);

/// What the destination refuses the steps with, if it does.
pub(super) fn play(steps: &[Step<'_>]) -> Option<Reason> {
    let grants = steps.iter().filter_map(|step| match step {
        Step::Said(said) if matches!(said.is, Is::Frame(_)) => match check(said.octets) {
            Ok(Some((_, Frame::Grant(grant), _))) => Some(grant),
            _ => None,
        },
        _ => None,
    });
    let mut player = Player::new(grants.collect());
    for step in steps {
        player.step(step);
    }
    player.settle();
    player.refused
}

struct Player {
    /// Those of the vector: the machine's own secrets are these.
    grants: VecDeque<Grant>,
    window: u64,
    session: Session,
    features: Features,
    layout: Option<Layout>,
    lanes: BTreeMap<LaneId, (LaneMark, Option<Lane>)>,
    devices: Vec<Assembler>,
    values: BTreeMap<(u32, u64), u32>,
    counts: Counts,
    /// What the machine waits for from this side.
    closes: bool,
    loads: bool,
    refused: Option<Reason>,
}

impl Player {
    fn new(grants: VecDeque<Grant>) -> Self {
        Self {
            window: grants.front().map_or(0, |grant| grant.device_window_bytes),
            grants,
            session: Session::new(Config::default(), Features::NONE, NOW),
            features: Features::NONE,
            layout: None,
            lanes: BTreeMap::new(),
            devices: Vec::new(),
            values: BTreeMap::new(),
            counts: Counts::default(),
            closes: false,
            loads: false,
            refused: None,
        }
    }

    fn secrets(&mut self) -> Secrets {
        let grant = self.grants.pop_front();
        let other = |token| multifd_wire::Token::new([token; 16]);
        Secrets {
            ticket: grant.map_or(other(1), |grant| grant.ticket),
            resume: grant.map_or(other(2), |grant| grant.resume_secret),
        }
    }

    fn step(&mut self, step: &Step<'_>) {
        match step {
            Step::Lost(hello) if hello.intent == Intent::Join => {
                self.lane_ended(hello.lane, closed_channel())
            }
            Step::Lost(_) => self.happen(Event::ControlLost(closed_channel().into())),
            Step::Said(said) => match (said.side, said.is) {
                (Role::Destination, Is::Reply(_)) => self.accepted(said),
                (Role::Destination, Is::Frame(_)) => self.due(said),
                (Role::Source, Is::Frame(hello)) if !said.is_read => {
                    assert_eq!(hello.intent, Intent::Join, "only lanes lose frames here");
                }
                (Role::Source, Is::Frame(hello)) if hello.intent == Intent::Join => {
                    self.on_lane(hello.lane, said.octets);
                }
                (Role::Source, Is::Frame(_)) => self.on_control(said.octets),
                _ => {}
            },
        }
    }

    /// The destination of the vector accepts a hello: this one hears of it.
    fn accepted(&mut self, said: &Said<'_>) {
        let Is::Reply(hello) = said.is else { return };
        let reply = HelloReply::decode(said.octets.try_into().unwrap()).unwrap();
        let HelloReply::Accepted { features, .. } = reply else {
            return;
        };
        match hello.intent {
            Intent::Start => {
                self.features = features;
                let lanes_max = self.grants.front().map_or(16, |grant| grant.lanes_max);
                let config = Config::builder().lanes_max(lanes_max);
                // Smaller ones are for the assembler alone.
                let window = self.window.max(64 << 10);
                let config = config.device_window_bytes(window).build().unwrap();
                self.session = Session::new(config, features, NOW);
                let secrets = self.secrets();
                self.happen(Event::Opened(secrets));
            }
            Intent::Join => self.happen(Event::LaneJoined {
                lane: hello.lane,
                incarnation: hello.incarnation,
                ticket: hello.token,
            }),
            Intent::Resume => {
                let secrets = self.secrets();
                self.happen(Event::Resuming(secrets));
            }
            Intent::Ask => self.happen(Event::Asked),
        }
    }

    /// The destination of the vector says something: what this one's own work waits for is done.
    fn due(&mut self, said: &Said<'_>) {
        let (header, ..) = check(said.octets).unwrap().unwrap();
        match header.kind() {
            Kind::RoundClosed => self.close(),
            Kind::Prepared if std::mem::take(&mut self.loads) => {
                self.happen(Event::Loaded(Ok(())));
            }
            _ => {}
        }
    }

    /// What is still to be done at the end.
    fn settle(&mut self) {
        if self.closes {
            self.close();
        }
    }

    fn close(&mut self) {
        if !std::mem::take(&mut self.closes) {
            return;
        }
        let mut digest = Digest::EMPTY;
        for ((region, page), value) in &self.values {
            digest.replace(RegionId::new(*region), PageIndex::new(*page), 0, *value);
        }
        let incomplete = self.devices.iter().zip(0..).find_map(|(device, number)| {
            let index = device.missing();
            (!device.is_over()).then(|| Incomplete {
                device: DeviceId::new(number),
                name: "net0".into(),
                index,
            })
        });
        let closed = Closed {
            handled: self.marks(),
            digest,
            damaged: 0,
            incomplete,
            restarts: vec![0; self.devices.len()],
            counts: self.counts,
        };
        self.happen(Event::Closed(closed));
    }

    fn marks(&self) -> Vec<LaneMark> {
        self.lanes.values().map(|(mark, _)| *mark).collect()
    }

    fn on_control(&mut self, octets: &[u8]) {
        let (header, frame, _) = check(octets).unwrap().unwrap();
        if let Frame::Regions(regions) = &frame {
            self.layout = Some(Layout::from_frame(regions).unwrap());
        }
        if let Frame::Devices(devices) = &frame {
            let devices = devices.iter().map(Result::unwrap);
            self.devices = devices
                .map(|device| Assembler::new(device.id, device.chunk_bytes_max, self.window))
                .collect();
        }
        let body = &octets[octets.len() - header.body_bytes()..];
        let effects = self.session.frame(&frame, body, NOW);
        self.carry_out(effects);
    }

    fn on_lane(&mut self, id: LaneId, octets: &[u8]) {
        let (header, frame, _) = check(octets).unwrap().unwrap();
        let body = &octets[octets.len() - header.body_bytes()..];
        match self.read(id, &header, &frame, body) {
            Ok(None) => {}
            Ok(Some(event)) => self.happen(event),
            Err(fault) => self.lane_ended(id, fault),
        }
    }

    /// What a lane's thread does with a frame.
    fn read(
        &mut self,
        id: LaneId,
        header: &Header,
        frame: &Frame<'_>,
        body: &[u8],
    ) -> Result<Option<Event>, Fault> {
        let Some((mark, Some(lane))) = self.lanes.get_mut(&id) else {
            return Ok(None);
        };
        lane.header(header)?;
        mark.frames += 1;
        match frame {
            Frame::Pages(pages) => {
                let layout = self.layout.as_ref().unwrap();
                let mut contents = body.chunks_exact(PAGE_BYTES);
                for raw in pages.runs {
                    for page in layout.admit(raw)?.page_indices() {
                        let value = page_value(crc32fast::hash(contents.next().unwrap()));
                        self.values.insert((raw.region.get(), page.value()), value);
                    }
                }
                lane.pages(pages.round, pages.checksums.len() as u64)?;
            }
            Frame::Zeros(zeros) => {
                let layout = self.layout.as_ref().unwrap();
                for raw in zeros.runs {
                    for page in layout.admit(raw)?.page_indices() {
                        self.values.remove(&(raw.region.get(), page.value()));
                    }
                }
                let most = layout.pages_total().value();
                lane.zeros(zeros.round, zeros.page_count(), most)?;
            }
            Frame::RoundEnd(end) => {
                let arrived = lane.round_end(end)? == Mark::Fence;
                return Ok(arrived.then_some(Event::LaneArrived {
                    lane: id,
                    incarnation: mark.incarnation,
                    round: end.round,
                    last: end.final_round,
                }));
            }
            Frame::DeviceChunk(chunk) => {
                if let Some(device) = self.devices.get_mut(chunk.device.value() as usize)
                    && device.admit(chunk, body.len() as u64, header.body_crc())? == Admit::Take
                {
                    device.arrived(chunk.index, body.to_vec())?;
                }
            }
            Frame::DeviceMark(mark) => {
                if let Some(device) = self.devices.get_mut(mark.device.value() as usize) {
                    device.mark(mark)?;
                }
            }
            _ => {}
        }
        Ok(None)
    }

    fn lane_ended(&mut self, id: LaneId, fault: impl Into<Fault>) {
        if let Some((mark, _)) = self.lanes.remove(&id) {
            self.happen(Event::LaneEnded {
                mark,
                fault: fault.into(),
            });
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
            Effect::Send(frame) => self.sent(&frame),
            Effect::Prepare { .. } => self.happen(Event::MachineReady),
            Effect::Admit {
                lane, incarnation, ..
            } => {
                let mark = LaneMark {
                    lane,
                    incarnation,
                    frames: 0,
                };
                self.lanes.insert(lane, (mark, None));
            }
            Effect::TurnAway { reason, .. } | Effect::RefuseResume { reason, .. } => {
                self.refused.get_or_insert(reason);
            }
            Effect::StartLanes(round) => {
                for (_, lane) in self.lanes.values_mut() {
                    *lane = Some(Lane::new(round));
                }
            }
            Effect::CloseLane(lane) => self.lane_ended(lane, closed_channel()),
            Effect::CloseRound(_) => self.closes = true,
            Effect::OpenGate(round) => {
                for lane in self
                    .lanes
                    .values_mut()
                    .filter_map(|(_, lane)| lane.as_mut())
                {
                    lane.gate_opened(round).unwrap();
                }
            }
            Effect::Load { .. } => self.loads = true,
            Effect::Resume(_) => self.happen(Event::Resumed(self.counts)),
            Effect::SettleLanes => {
                let marks = self.marks();
                self.lanes.clear();
                let damaged = Vec::new();
                self.happen(Event::LanesSettled { marks, damaged });
            }
            Effect::Finish(Outcome::Failed(error)) => {
                self.refused.get_or_insert(error.reason());
            }
            _ => {}
        }
    }

    /// The source reads the reason in an ABORT.
    fn sent(&mut self, frame: &Encoded) {
        if let Frame::Abort(abort) = check(frame.bytes()).unwrap().unwrap().1 {
            self.refused.get_or_insert(abort.reason);
        }
    }
}
