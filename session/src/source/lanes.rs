//! The lanes: whether each is dialling, alive, dying, dead or dialled again, and what follows (SPEC: section 14, ROUND-6).
//!
//! ```text
//!   Dialling ──up──► Alive ──lost here──► Dying ──settled by LANE_DOWN──► Dead ──due──► Redialling ──up──► Alive
//!                      └──────────lost there, LANE_DOWN────────────────────►│ ◄──failed────┘
//! ```
//! The rules it keeps: a lane is dialled again only when both sides have settled what its last connection carried; it
//! takes part in the round that is open, after it has ended those that the destination may not have closed; and lanes that are lost
//! and opened again, however often, are no progress: only acknowledged bytes are.

use std::time::Duration;

use multifd_wire::frame::LaneDown;
use multifd_wire::{ChannelRef, Incarnation, LaneId, Misbehaved, Phase, Reason, Round};

use super::error::{Error, Fault};
use super::redial::{Next, Redial};
use super::session::Effect;

/// A lost lane is settled when the destination has read what the other lanes' sockets hold of the round before; this many
/// times the longest silence of a channel is more than that takes.
const SETTLE_STALLS: u32 = 3;

/// How often it is looked whether the destination takes what lanes carry.
const WATCH_PERIOD: Duration = Duration::from_millis(100);

/// When nothing but silent lanes is waited for, with the guest paused or at the end of a round, a lane from which nothing was taken
/// for this long is not waited for any longer: what it carried is sent again on the others, which takes less time.
const LAST_LANE_STALL: Duration = Duration::from_millis(500);

/// So many times as long as a body should take at the measured bandwidth: a slow lane is not a dead one.
const LAST_BODIES: u32 = 8;

/// With the guest paused and no lane left the guest is let run again after this (SPEC: SWITCH-4).
const PAUSED_ALONE_MAX: Duration = Duration::from_millis(300);

/// A lane that has just come back has this long for its first acknowledgement, before time that is used up ends the migration.
const FIRST_ACK: Duration = Duration::from_millis(500);

/// What the rest of the session says about this moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) phase: Phase,
    /// Something may still have to travel on a lane.
    pub(super) needs_lanes: bool,
    /// A new control channel is open, and the rounds do not go on yet.
    pub(super) rejoining: bool,
    /// The destination was ready once.
    pub(super) begun: bool,
    /// The session outlives its channels.
    pub(super) kept: bool,
    pub(super) committed: bool,
    pub(super) rounds_closed: u32,
    /// The first round with the guest paused.
    pub(super) paused_from: Option<Round>,
    pub(super) bandwidth: Option<f64>,
    pub(super) body_bytes: f64,
    pub(super) reconnect: Duration,
    pub(super) stall: Duration,
}

impl View {
    /// Whether lanes carry something that has to be taken.
    fn in_rounds(&self) -> bool {
        matches!(self.phase, Phase::Rounds | Phase::Switchover)
    }

    /// Whether a session that was under way comes back, with whatever lanes there are (SPEC: RESUME-14).
    pub(super) fn comes_back(&self) -> bool {
        self.begun && self.rejoining
    }

    /// Whether the destination has not been ready yet.
    fn first_set_up(&self) -> bool {
        self.phase == Phase::Setup && !self.begun
    }

    /// Whether lanes that are lost are dialled again.
    fn dials_again(&self) -> bool {
        !self.reconnect.is_zero() && (self.in_rounds() && self.needs_lanes || self.comes_back())
    }
}

/// What follows for the session as a whole.
#[derive(Debug)]
pub(super) enum End {
    /// All channels count as lost.
    Lost(Error),
    /// It is over.
    Failed(Error),
}

/// What the driver must do, and whether the session goes on.
#[derive(Debug, Default)]
pub(super) struct Steps {
    pub(super) effects: Vec<Effect>,
    pub(super) end: Option<End>,
    /// Why a lane could not be opened.
    pub(super) not_opened: Option<Error>,
}

impl Steps {
    fn then(mut self, more: Self) -> Self {
        self.effects.extend(more.effects);
        self.end = self.end.or(more.end);
        self.not_opened = self.not_opened.or(more.not_opened);
        self
    }

    fn lost(error: Error) -> Self {
        Self {
            end: Some(End::Lost(error)),
            ..Self::default()
        }
    }

    fn failed(error: Error) -> Self {
        Self {
            end: Some(End::Failed(error)),
            ..Self::default()
        }
    }
}

impl<const N: usize> From<[Effect; N]> for Steps {
    fn from(effects: [Effect; N]) -> Self {
        Self {
            effects: effects.into(),
            ..Self::default()
        }
    }
}

/// What a living lane's ledger says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Which lane.
    pub lane: LaneId,
    /// Frames that were acknowledged.
    pub acked: u64,
    /// The round of the oldest frame that is not acknowledged.
    pub oldest: Option<Round>,
    /// Bytes that are not acknowledged.
    pub unacked_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Dialling,
    Alive,
    /// The channel failed; what the destination has of it is not known yet.
    Dying {
        since: Duration,
    },
    /// Settled. It may be dialled again.
    Dead,
    /// It was lost, and a new connection is being made.
    Redialling {
        /// The destination has let it in and lost it again.
        given_up: bool,
    },
}

#[derive(Debug)]
struct Lane {
    incarnation: Incarnation,
    life: Life,
    /// The newest round that it has encoded.
    encoded: Option<Round>,
    /// While it is lost and to be dialled again.
    redial: Option<Redial>,
    /// It was lost with all the others, and has not come back: that counts as one suspension.
    with_all: bool,
    /// How far it was acknowledged when that last changed, and when that was.
    acked: (u64, Duration),
    /// Why this side gave it up, until its thread has ended.
    failing: Option<Fault>,
    /// While a resume is under way: the connection that was lost, which LANDED settles.
    before: Option<Incarnation>,
}

/// Bytes are on their way and none of them is acknowledged.
#[derive(Debug, Clone, Copy)]
struct Starving {
    since: Duration,
    /// Channels that were lost meanwhile.
    losses: u32,
}

/// All lanes of a session.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    /// The round that is under way, as long as not all lanes have encoded it.
    open: Option<Round>,
    /// The round that was opened last.
    current: Option<Round>,
    /// Since when no lane lives.
    alone_since: Option<Duration>,
    /// When lanes are looked at next; none outside the rounds.
    watch_due: Option<Duration>,
    starving: Option<Starving>,
    /// When a lane was opened last.
    up_at: Duration,
}

impl Lanes {
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.lanes.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn alive(&self) -> u32 {
        let alive = self.lanes.iter().filter(|lane| lane.life == Life::Alive);
        u32::try_from(alive.count()).unwrap_or(u32::MAX)
    }

    /// Whether a first connection is still being made.
    pub(super) fn dialling(&self) -> bool {
        self.lanes.iter().any(|lane| lane.life == Life::Dialling)
    }

    fn numbered(&self) -> impl Iterator<Item = (LaneId, &Lane)> {
        (0..).map(LaneId::new).zip(&self.lanes)
    }

    fn get(&mut self, id: LaneId) -> Option<&mut Lane> {
        self.lanes.get_mut(usize::try_from(id.value()).ok()?)
    }

    /// The lane that the destination speaks of.
    pub(super) fn known(&self, id: LaneId, incarnation: Incarnation) -> Result<(), Misbehaved> {
        let lane = usize::try_from(id.value())
            .ok()
            .and_then(|place| self.lanes.get(place));
        lane.filter(|lane| lane.incarnation == incarnation)
            .map(|_| ())
            .ok_or_else(|| unknown(id, incarnation))
    }

    /// This connection of the lane, or one before it.
    pub(super) fn was_known(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
    ) -> Result<(), Misbehaved> {
        match self.get(id) {
            Some(lane) if incarnation <= lane.incarnation => Ok(()),
            _ => Err(unknown(id, incarnation)),
        }
    }

    // ── dialling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    /// For the first time: everything that is wrong is found here, so it may take its time.
    pub(super) fn dial(&mut self, count: u32) -> Vec<Effect> {
        (0..count)
            .map(|lane| {
                self.lanes.push(Lane {
                    incarnation: Incarnation::new(0),
                    life: Life::Dialling,
                    encoded: None,
                    redial: None,
                    with_all: false,
                    acked: (0, Duration::ZERO),
                    failing: None,
                    before: None,
                });
                Effect::DialLane {
                    lane: LaneId::new(lane),
                    incarnation: Incarnation::new(0),
                    again: false,
                }
            })
            .collect()
    }

    /// Dials all lanes of a resumed session (SPEC: RESUME-5).
    pub(super) fn dial_all_again(&mut self, view: &View, now: Duration) -> Vec<Effect> {
        let redial = Redial::at_once(now, now + view.reconnect);
        let all = !view.comes_back();
        let ids: Vec<LaneId> = self.numbered().map(|(id, _)| id).collect();
        let mut effects = Vec::new();
        for id in ids {
            effects.extend(self.redial(id));
            if let Some(lane) = self.get(id) {
                if all {
                    lane.life = Life::Dialling;
                } else {
                    lane.redial = Some(redial);
                }
            }
        }
        effects
    }

    fn redial(&mut self, id: LaneId) -> Option<Effect> {
        let lane = self.get(id)?;
        // SPEC: JOIN-3
        lane.incarnation = Incarnation::new(lane.incarnation.value().saturating_add(1));
        lane.life = Life::Redialling { given_up: false };
        lane.encoded = None;
        Some(Effect::DialLane {
            lane: id,
            incarnation: lane.incarnation,
            again: true,
        })
    }

    /// A connection is open and its hello was accepted.
    pub(super) fn up(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
        view: &View,
        now: Duration,
    ) -> Steps {
        let Some(lane) = self.get(id).filter(|lane| lane.incarnation == incarnation) else {
            return Steps::default();
        };
        match lane.life {
            Life::Dialling => {
                lane.life = Life::Alive;
                self.up_at = now;
                Steps::default()
            }
            Life::Redialling { given_up: true } => {
                let lost = Fault::LaneDown {
                    reason: Reason::ChannelsLost,
                };
                self.not_opened(id, lost, view, now)
            }
            Life::Redialling { given_up: false } => {
                lane.life = Life::Alive;
                lane.redial = None;
                lane.acked = (0, now);
                let by_itself = !std::mem::replace(&mut lane.with_all, false);
                self.alone_since = None;
                self.up_at = now;
                let was_paused = |round| view.paused_from.is_some_and(|from| round >= from);
                let until = self.current.map_or(0, Round::value);
                let behind = (view.rounds_closed..until)
                    .map(Round::new)
                    .map(|round| (round, was_paused(round)))
                    .collect();
                Steps::from([Effect::LaneBack {
                    lane: id,
                    behind,
                    by_itself,
                }])
            }
            // The destination gave it up before this was known.
            Life::Alive | Life::Dying { .. } | Life::Dead => {
                Steps::from([Effect::CloseLane { lane: id }])
            }
        }
    }

    /// An attempt came to nothing.
    fn not_opened(&mut self, id: LaneId, fault: Fault, view: &View, now: Duration) -> Steps {
        let Some(lane) = self.get(id) else {
            return Steps::default();
        };
        lane.life = Life::Dead;
        let incarnation = lane.incarnation;
        if lane.redial.as_mut().map(|redial| redial.failed(now)) == Some(Next::GiveUp) {
            lane.redial = None;
        }
        // The destination may have let it in: nothing came on it, and nothing will (SPEC: LANE-1).
        let mut steps = Steps::from([
            Effect::CloseLane { lane: id },
            Effect::SendLaneDown(LaneDown {
                lane: id,
                incarnation,
                reason: Reason::ChannelsLost,
            }),
        ]);
        steps.not_opened = Some(Error::new(view.phase, fault).at(ChannelRef::Lane(id)));
        steps.then(self.check_alone(view, now))
    }

    // ── losing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    /// A lane's thread has ended; with a fault unless it ended in peace.
    pub(super) fn ended(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
        fault: Option<Fault>,
        view: &View,
        now: Duration,
    ) -> Steps {
        let Some(lane) = self.get(id).filter(|lane| lane.incarnation == incarnation) else {
            return Steps::default();
        };
        let Some(fault) = lane.failing.take().or(fault) else {
            return Steps::default();
        };
        let error = |fault| Error::new(view.phase, fault).at(ChannelRef::Lane(id));
        match lane.life {
            Life::Dying { .. } | Life::Dead => Steps::default(),
            Life::Redialling { .. } => self.not_opened(id, fault, view, now),
            // The first set-up is made with all lanes at once, or again from the start.
            Life::Dialling if view.rejoining && view.first_set_up() => Steps::lost(error(fault)),
            // Lost like the control channel may be: the set-up is made again, if it can be.
            Life::Alive if view.first_set_up() => Steps::lost(error(fault)),
            Life::Dialling if matches!(fault, Fault::Channel(_)) => Steps::lost(error(fault)),
            // The destination has lost the control channel whose ticket it was; this side sees that in a moment (SPEC: RESUME-13).
            Life::Dialling if fault.is_bad_ticket() => Steps::lost(error(fault)),
            // What may pass was tried again until the hello's deadline: a migration begins with all its lanes or not at all.
            Life::Dialling => Steps::failed(error(fault)),
            Life::Alive => {
                lane.life = Life::Dying { since: now };
                self.count_loss();
                let why = fault.to_string();
                let gone = Steps::from([Effect::LaneGone { lane: id, why }]);
                if view.needs_lanes && !view.dials_again() && self.alive() == 0 {
                    let last = fault.to_string();
                    return gone.then(Steps::failed(error(Fault::AllLanesLost { last })));
                }
                gone.then(Steps::from([Effect::SendLaneDown(LaneDown {
                    lane: id,
                    incarnation,
                    reason: Reason::ChannelsLost,
                })]))
                .then(self.check_alone(view, now))
            }
        }
    }

    /// The destination lost a lane, or has settled one that this side lost.
    pub(super) fn down(
        &mut self,
        down: LaneDown,
        view: &View,
        now: Duration,
    ) -> Result<Steps, Misbehaved> {
        let (id, incarnation) = (down.lane, down.incarnation);
        // About a connection before this one: it was settled before the lane was dialled again.
        if self
            .get(id)
            .is_some_and(|lane| incarnation < lane.incarnation)
        {
            return Ok(Steps::default());
        }
        self.known(id, incarnation)?;
        if view.first_set_up() {
            // It is made with all lanes at once, or again from the start.
            let error = Error::new(
                view.phase,
                Fault::LaneDown {
                    reason: down.reason,
                },
            );
            return Ok(Steps::lost(error.at(ChannelRef::Lane(id))));
        }
        let Some(lane) = self.get(id) else {
            return Ok(Steps::default());
        };
        Ok(match lane.life {
            // It was let in, and lost before this side knew.
            Life::Redialling { .. } => {
                lane.life = Life::Redialling { given_up: true };
                Steps::default()
            }
            // Both sides know: what the destination has of it was acknowledged before this frame, the rest comes back.
            Life::Dying { .. } => self.settle(id, view, now),
            Life::Dead => Steps::default(),
            Life::Dialling | Life::Alive => {
                lane.failing = None;
                lane.encoded = None;
                self.count_loss();
                // SPEC: LANE-2
                let why = format!("the destination lost it: {}", down.reason);
                Steps::from([
                    Effect::LaneGone { lane: id, why },
                    Effect::SendLaneDown(down),
                ])
                .then(self.settle(id, view, now))
            }
        })
    }

    /// What the destination has of a lost lane is known: everything else of it comes back.
    fn settle(&mut self, id: LaneId, view: &View, now: Duration) -> Steps {
        let Some(lane) = self.get(id) else {
            return Steps::default();
        };
        lane.life = Life::Dead;
        let settle = Steps::from([Effect::SettleLane { lane: id }]);
        let gone = |lane: &Lane| matches!(lane.life, Life::Dead | Life::Dying { .. });
        if view.needs_lanes && !view.dials_again() && self.lanes.iter().all(gone) {
            let last = "closed by the destination".to_owned();
            let error = Error::new(view.phase, Fault::AllLanesLost { last });
            return settle.then(Steps::failed(error.at(ChannelRef::Lane(id))));
        }
        if let Some(lane) = self.get(id) {
            lane.redial = view
                .dials_again()
                .then(|| Redial::at_once(now, now + view.reconnect));
        }
        settle.then(self.check_alone(view, now))
    }

    /// Whether no lane is left, and what follows: a wait for one to come back, or the end.
    fn check_alone(&mut self, view: &View, now: Duration) -> Steps {
        // On the way back the time is that of the resume.
        if !view.needs_lanes || view.rejoining || self.alive() > 0 {
            return Steps::default();
        }
        let hope = |lane: &Lane| lane.life != Life::Dead || lane.redial.is_some();
        if view.dials_again() && self.lanes.iter().any(hope) {
            self.alone_since.get_or_insert(now);
            return Steps::default();
        }
        if !view.in_rounds() {
            return Steps::default();
        }
        let last = "it could not be opened again".to_owned();
        Steps::failed(Error::new(view.phase, Fault::AllLanesLost { last }))
    }

    /// All channels are lost. What the lanes carried is settled by LANDED.
    pub(super) fn disconnect(&mut self) {
        for lane in &mut self.lanes {
            lane.life = Life::Dead;
            lane.redial = None;
            lane.failing = None;
            lane.with_all = true;
            // A resume that came to nothing has left no ledger of its own behind.
            lane.before.get_or_insert(lane.incarnation);
        }
        self.count_loss();
        (self.open, self.current, self.alone_since) = (None, None, None);
    }

    /// The frames that LANDED settles, of each lane's connection before the resume.
    pub(super) fn landed(
        &mut self,
        mark: impl Fn(LaneId) -> Option<(Incarnation, u64)>,
    ) -> Result<Vec<(LaneId, u64)>, Misbehaved> {
        let mut settled = Vec::new();
        for (id, lane) in self.numbered() {
            let Some(before) = lane.before else { continue };
            let frames = match mark(id) {
                Some((incarnation, _)) if incarnation > before => {
                    return Err(unknown(id, incarnation));
                }
                Some((incarnation, frames)) if incarnation == before => frames,
                _ => 0,
            };
            settled.push((id, frames));
        }
        for lane in &mut self.lanes {
            lane.before = None;
        }
        Ok(settled)
    }

    // ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    /// All living lanes are given this round.
    pub(super) fn opened(&mut self, round: Round) {
        self.open = Some(round);
        self.current = Some(round);
    }

    /// The newest round that a lane was given; none before the first and after a loss of all channels.
    pub(super) fn current(&self) -> Option<Round> {
        self.current
    }

    pub(super) fn encoded(&mut self, id: LaneId, incarnation: Incarnation, round: Round) {
        if let Some(lane) = self.get(id).filter(|lane| lane.incarnation == incarnation) {
            lane.encoded = Some(round);
        }
    }

    /// Says once that the present round is encoded: by every living lane, with no lane's fate unsettled.
    pub(super) fn check_encoded(&mut self) -> Option<Effect> {
        let round = self.open?;
        let done = |lane: &Lane| match lane.life {
            Life::Alive => lane.encoded == Some(round),
            Life::Dying { .. } | Life::Dialling => false,
            Life::Dead | Life::Redialling { .. } => true,
        };
        // Without any lane the round stays open: the next one ends it.
        if self.alive() == 0 || !self.lanes.iter().all(done) {
            return None;
        }
        self.open = None;
        Some(Effect::RoundEncoded)
    }

    /// Bytes were acknowledged.
    pub(super) fn took(&mut self) {
        self.starving = None;
    }

    /// Until when bytes must have been acknowledged, if they are waited for and channels were lost meanwhile. Channels that are opened
    /// again do not move it.
    pub(super) fn starves_at(&self, view: &View) -> Option<Duration> {
        let starving = self.starving.filter(|starving| starving.losses > 0)?;
        Some(starving.since + view.stall + view.reconnect)
    }

    /// The error when that time is over.
    pub(super) fn starved(&self, view: &View, now: Duration, last: String) -> Error {
        let (since, losses) = self
            .starving
            .map_or((now, 0), |starving| (starving.since, starving.losses));
        let waited_ms = now.saturating_sub(since).as_millis();
        let fault = Fault::NothingTaken {
            waited_ms,
            losses,
            last,
        };
        Error::new(view.phase, fault)
    }

    fn count_loss(&mut self) {
        if let Some(starving) = &mut self.starving {
            starving.losses += 1;
        }
    }

    // ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    /// When the destination must have said at the latest what it has of a lost lane.
    fn settle_deadline(&self, view: &View) -> Option<Duration> {
        // It does not say so once it has said PREPARED (SPEC: PREP-2).
        if view.committed {
            return None;
        }
        let dying = self.lanes.iter().filter_map(|lane| match lane.life {
            Life::Dying { since } => Some(since),
            _ => None,
        });
        Some(dying.min()? + view.stall * SETTLE_STALLS)
    }

    fn starving_due(&self, view: &View) -> Option<Duration> {
        let watched = view.in_rounds() && view.needs_lanes && !view.reconnect.is_zero();
        let at = self.starves_at(view).filter(|_| watched)?;
        Some(at.max(self.up_at + FIRST_ACK))
    }

    /// When [`Self::tick`] is due next.
    pub(super) fn due(&self, view: &View) -> Duration {
        let watch = if view.in_rounds() {
            Some(self.watch_due.unwrap_or_default())
        } else {
            None
        };
        let redials = self
            .lanes
            .iter()
            .filter(|lane| lane.life == Life::Dead && view.dials_again())
            .filter_map(|lane| lane.redial.map(|redial| redial.due));
        let alone = self.alone_since.filter(|_| view.dials_again());
        let alone = alone.map(|since| since + view.reconnect);
        let paused = self.alone_since.filter(|_| self.ends_pause(view));
        let paused = paused.map(|since| since + PAUSED_ALONE_MAX);
        redials
            .chain(watch)
            .chain(alone)
            .chain(paused)
            .chain(self.settle_deadline(view))
            .chain(self.starving_due(view))
            .min()
            .unwrap_or(Duration::MAX)
    }

    fn ends_pause(&self, view: &View) -> bool {
        view.kept && view.phase == Phase::Switchover
    }

    /// Since when no lane lives although one is needed.
    pub(super) fn alone_since(&self) -> Option<Duration> {
        self.alone_since
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, view: &View, now: Duration) -> Steps {
        if self.settle_deadline(view).is_some_and(|due| now >= due) {
            let what = "the destination to say what it has of a lost lane";
            return Steps::lost(Error::new(view.phase, Fault::Timeout { what }));
        }
        // SPEC: LANE-9
        if !view.needs_lanes {
            self.alone_since = None;
        }
        let mut steps = Steps::default();
        // Whether or not a lane that is lost is dialled again: the others have to know that it is.
        if !view.in_rounds() {
            self.watch_due = None;
        } else if self.watch_due.is_none_or(|due| now >= due) {
            self.watch_due = Some(now + WATCH_PERIOD);
            steps = Steps::from([Effect::LookAtLanes]);
        }
        if let Some(since) = self.alone_since
            && self.ends_pause(view)
            && now >= since + PAUSED_ALONE_MAX
        {
            let last = "the guest is paused, and none came back at once".to_owned();
            let error = Error::new(view.phase, Fault::AllLanesLost { last });
            return steps.then(Steps::lost(error));
        }
        if self.starving_due(view).is_some_and(|due| now >= due) {
            let last = "lanes were lost as often as they were opened again".to_owned();
            return steps.then(Steps::failed(self.starved(view, now, last)));
        }
        if !view.dials_again() {
            return steps;
        }
        let due: Vec<LaneId> = self
            .numbered()
            .filter(|(_, lane)| lane.life == Life::Dead)
            .filter(|(_, lane)| lane.redial.is_some_and(|redial| redial.due <= now))
            .map(|(id, _)| id)
            .collect();
        for id in due {
            steps.effects.extend(self.redial(id));
        }
        if let Some(since) = self.alone_since
            && now >= since + view.reconnect
        {
            let last = format!(
                "none could be opened again within {:?}",
                now.saturating_sub(since)
            );
            let error = Error::new(view.phase, Fault::AllLanesLost { last });
            return steps.then(Steps::failed(error));
        }
        steps
    }

    /// Tells slow lanes from dead ones. A slow lane's acknowledgements move; a dead one's do not, although the destination waits
    /// for nothing else on it: every round before that of its oldest frame is closed.
    pub(super) fn seen(&mut self, seen: &[Seen], view: &View, now: Duration) -> Vec<Effect> {
        if seen.iter().any(|seen| seen.unacked_bytes > 0) {
            let begins = Starving {
                since: now,
                losses: 0,
            };
            self.starving.get_or_insert(begins);
        }
        let alive = self.alive();
        let soon = LAST_LANE_STALL
            .max(self.body_time(view, alive).saturating_mul(LAST_BODIES))
            .min(view.stall);
        let (mut dead, mut silent, mut busy, mut idle) = (Vec::new(), Vec::new(), 0, 0);
        for seen in seen {
            let Some(lane) = self.get(seen.lane).filter(|lane| lane.life == Life::Alive) else {
                continue;
            };
            let waits_for_others = seen
                .oldest
                .is_none_or(|round| round.value() > view.rounds_closed);
            idle += u32::from(waits_for_others);
            if waits_for_others || seen.acked != lane.acked.0 {
                lane.acked = (seen.acked, now);
                busy += u32::from(!waits_for_others);
                continue;
            }
            let silence = now.saturating_sub(lane.acked.1);
            if silence > view.stall {
                dead.push(seen.lane);
            } else if silence > soon {
                silent.push(seen.lane);
            } else {
                busy += 1;
            }
        }
        // The round, and a guest that runs nowhere, wait for them alone; a lane without anything on its way is there to take over.
        let alone = if view.phase == Phase::Switchover {
            alive > 1
        } else {
            busy == 0 && idle > 0 && view.dials_again()
        };
        if alone {
            dead.extend(silent);
        }
        dead.into_iter()
            .map(|id| {
                if let Some(lane) = self.get(id) {
                    let what = "the destination to take anything on this lane";
                    lane.failing = Some(Fault::Timeout { what });
                }
                // Its thread then says that it has ended, and the rest follows.
                Effect::CloseLane { lane: id }
            })
            .collect()
    }

    /// How long one body on each lane takes at the measured bandwidth.
    fn body_time(&self, view: &View, alive: u32) -> Duration {
        view.bandwidth.map_or(Duration::ZERO, |bandwidth| {
            let bodies = view.body_bytes * f64::from(alive);
            Duration::try_from_secs_f64(bodies / bandwidth.max(1.0)).unwrap_or(Duration::MAX)
        })
    }
}

fn unknown(lane: LaneId, incarnation: Incarnation) -> Misbehaved {
    Misbehaved::Lane {
        channel: ChannelRef::Lane(lane),
        incarnation: incarnation.value(),
    }
}

#[cfg(test)]
mod tests;
