//! The devices at the source: what each has to give, read as its thread would, and the outbox from which lanes take it.
//!
//! A reader numbers an item only when the credit reaches so far. What was read since the stream began anew is kept, since that is what
//! the destination must have loaded when the guest runs there.

use std::collections::VecDeque;
use std::sync::Arc;

use multifd_wire::frame::{
    Device, DeviceFlags, DeviceMark, Mark, RawDevice, Section, SwitchoverAck,
};
use multifd_wire::{DeviceId, Misbehaved, Phase, Text};

use super::dice::Dice;
use super::plan::DevicePlan;
use super::{Pair, What};
use crate::source::event::Event;
use crate::source::session::DeviceOutlook;
use crate::source::stream::{BufferPool, Item, Stream};

/// Buffers are not used again here.
struct NoPool;

impl BufferPool for NoPool {
    fn take_back(&self, _: Vec<u8>) {}
}

/// What lanes take from.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) held: bool,
    again: VecDeque<Arc<Item>>,
    queues: Vec<VecDeque<Arc<Item>>>,
    over: Vec<bool>,
}

impl Outbox {
    pub(super) fn again(&mut self, items: Vec<Arc<Item>>) {
        items
            .into_iter()
            .rev()
            .for_each(|item| self.again.push_front(item));
    }

    pub(super) fn take(&mut self, dice: &mut Dice) -> Option<Arc<Item>> {
        if self.held {
            return None;
        }
        if let Some(item) = self.again.pop_front() {
            return Some(item);
        }
        let full: Vec<usize> = (0..self.queues.len())
            .filter(|place| !self.queues[*place].is_empty())
            .collect();
        let place = *full.get(dice.place(full.len()))?;
        let item = self.queues[place].pop_front()?;
        self.over[place] = (self.over[place] || item.is_last()) && !item.is_restart();
        Some(item)
    }

    pub(super) fn is_drained(&self) -> bool {
        let drained = |(queue, over): (&VecDeque<_>, &bool)| *over && queue.is_empty();
        self.again.is_empty() && self.queues.iter().zip(&self.over).all(drained)
    }

    fn bytes(&self) -> u64 {
        let items = self.again.iter().chain(self.queues.iter().flatten());
        items.map(|item| item.octets().len() as u64).sum()
    }

    fn clear(&mut self) {
        self.again.clear();
        self.queues.iter_mut().for_each(VecDeque::clear);
        self.over.iter_mut().for_each(|over| *over = false);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    Running,
    /// It can be read while it runs; also once it is quiescent.
    PreCopy,
    Quiescent,
    Stopped,
}

/// What there is to read of a device.
#[derive(Debug, Clone, Copy, Default)]
struct Left {
    /// Bytes of the initial batch, and that change afterwards.
    initial: u64,
    changed: u64,
    /// New initial bytes are to be announced.
    reinit: bool,
    /// With the device stopped: bytes of its data and its configuration.
    data: Option<u64>,
    config: u64,
}

pub(super) struct Reader {
    id: DeviceId,
    plan: DevicePlan,
    stream: Stream,
    stands: Stands,
    announced: u32,
    acked: u32,
    /// The newest acknowledgement may come again (SPEC: RESUME-12).
    repeats: bool,
    /// No device announces anything any more.
    closed: bool,
    initial_marked: bool,
    left: Left,
    /// Read, and not numbered for want of credit.
    pending: Option<(Section, Vec<u8>)>,
    /// What was read since the stream began anew: data, and configuration.
    pub(super) record: [Vec<u8>; 2],
    woken: bool,
}

impl Reader {
    fn new(id: DeviceId, plan: DevicePlan, window: u64) -> Self {
        Self {
            id,
            plan,
            stream: Stream::new(id, window),
            stands: Stands::Running,
            announced: u32::from(plan.flags.contains(DeviceFlags::SWITCHOVER_ACK)),
            acked: 0,
            repeats: false,
            closed: false,
            initial_marked: false,
            left: Left::default(),
            pending: None,
            record: Default::default(),
            woken: false,
        }
    }

    fn has(&self, flag: DeviceFlags) -> bool {
        self.plan.flags.contains(flag)
    }

    fn name(&self) -> String {
        format!("device{}", self.id)
    }

    fn begin_pre_copy(&mut self) {
        if self.has(DeviceFlags::PRE_COPY) {
            self.stands = Stands::PreCopy;
            self.left = Left {
                initial: self.plan.state_bytes / 2,
                ..Left::default()
            };
        }
    }

    /// It runs again, and what was read of it is void.
    fn begin_anew(&mut self) -> Option<DeviceMark> {
        (self.pending, self.left) = (None, Left::default());
        self.initial_marked = false;
        self.record = Default::default();
        self.stands = Stands::Running;
        if self.has(DeviceFlags::SWITCHOVER_ACK) {
            self.announced = self.stream.generation().value() + 1;
        }
        (self.stream.index() > 0).then(|| self.stream.mark(Mark::Restart))
    }

    fn mark(&mut self, mark: Mark) -> Arc<Item> {
        Item::mark(self.stream.mark(mark))
    }

    /// Reads a piece of what is left of something.
    fn read(&mut self, section: Section, left: u64, dice: &mut Dice) -> u64 {
        let bytes = left.min(self.plan.chunk);
        let octets = vec![dice.next() as u8; bytes as usize];
        self.record[usize::from(section == Section::Config)].extend(&octets);
        self.pending = Some((section, octets));
        left - bytes
    }

    /// The next item, if there is one and the credit reaches so far.
    fn turn(&mut self, dice: &mut Dice) -> Option<Arc<Item>> {
        if self.pending.is_none() && self.stands == Stands::PreCopy && self.left.data.is_none() {
            if self.left.initial == 0 && std::mem::take(&mut self.left.reinit) {
                self.announce();
            }
            if self.left.initial > 0 {
                self.left.initial = self.read(Section::Data, self.left.initial, dice);
            } else if !self.initial_marked {
                self.initial_marked = true;
                return Some(self.mark(Mark::InitialEnd));
            } else if self.left.changed > 0 {
                self.left.changed = self.read(Section::Data, self.left.changed, dice);
            }
        }
        if self.pending.is_none() && self.stands == Stands::Stopped {
            match self.left.data {
                Some(0) => {
                    self.left.data = None;
                    return Some(self.mark(Mark::DataEnd));
                }
                Some(left) => self.left.data = Some(self.read(Section::Data, left, dice)),
                None if self.left.config == 1 => {
                    self.left.config = 0;
                    return Some(self.mark(Mark::ConfigEnd));
                }
                None if self.left.config > 1 => {
                    self.left.config = 1 + self.read(Section::Config, self.left.config - 1, dice);
                }
                None => {}
            }
        }
        let (section, octets) = self.pending.take()?;
        match self.stream.chunk(section, octets.len() as u64) {
            Some(chunk) => Some(Item::chunk(chunk, octets, Arc::new(NoPool))),
            None => {
                self.pending = Some((section, octets));
                None
            }
        }
    }

    fn announce(&mut self) {
        if self.closed {
            return;
        }
        if self.has(DeviceFlags::SWITCHOVER_ACK) {
            self.announced = self.stream.generation().value() + 1;
        }
        if self.initial_marked {
            self.initial_marked = false;
            self.left.initial = 1 + self.plan.state_bytes / 4;
        }
    }

    fn acked(&mut self, ack: &SwitchoverAck) -> Result<(), Misbehaved> {
        let (newest, found) = (self.stream.generation(), ack.generation);
        if self.repeats && found.value() == self.acked {
            self.repeats = false;
            return Ok(());
        }
        if found > newest || found.value() <= self.acked {
            return Err(Misbehaved::Amount {
                field: "switchover_ack.generation",
                expected: newest.value().into(),
                found: found.value().into(),
            });
        }
        self.acked = found.value();
        Ok(())
    }
}

/// All devices of the source.
pub(super) struct Readers {
    plans: Vec<DevicePlan>,
    readers: Vec<Reader>,
    pub(super) outbox: Outbox,
    /// How much may be sent before the first credit.
    pub(super) window: u64,
    /// Which order of the control thread is under way.
    order: u32,
}

impl Readers {
    pub(super) fn new(plans: Vec<DevicePlan>) -> Self {
        Self {
            plans,
            readers: Vec::new(),
            outbox: Outbox::default(),
            window: 0,
            order: 0,
        }
    }

    pub(super) fn is_started(&self) -> bool {
        !self.readers.is_empty()
    }

    pub(super) fn get(&mut self, device: DeviceId) -> Result<&mut Reader, Misbehaved> {
        let device = device.value();
        self.readers
            .get_mut(device as usize)
            .ok_or(Misbehaved::UnknownDevice { device })
    }

    pub(super) fn all(&self) -> &[Reader] {
        &self.readers
    }

    pub(super) fn table(&self) -> Vec<RawDevice> {
        let entry = |(id, plan): (u32, &DevicePlan)| {
            let pre_copy = plan.flags.contains(DeviceFlags::PRE_COPY);
            RawDevice::from(Device {
                id: DeviceId::new(id),
                flags: plan.flags,
                initial_bytes: if pre_copy { plan.state_bytes / 2 } else { 0 },
                state_bytes: plan.state_bytes,
                chunk_bytes_max: plan.chunk,
                name: Text::name(&format!("device{id}")),
            })
        };
        (0..).zip(&self.plans).map(entry).collect()
    }

    fn unacked(&self) -> Vec<String> {
        let unacked = self.readers.iter().filter(|it| it.acked < it.announced);
        unacked.map(Reader::name).collect()
    }

    fn outlook(&self) -> DeviceOutlook {
        let left = self
            .readers
            .iter()
            .map(|it| it.left.initial + it.left.changed);
        DeviceOutlook {
            stop_bytes: self.outbox.bytes() + left.sum::<u64>(),
            unacked: self.unacked(),
            ..DeviceOutlook::default()
        }
    }
}

impl Pair {
    pub(super) fn start_readers(&mut self) {
        let readers = &mut self.source.readers;
        readers.outbox.held = false;
        let window = readers.window;
        if readers.is_started() {
            // Begun again, for a destination that has nothing.
            for reader in &mut readers.readers {
                let _ = reader.stream.grant(window);
            }
        } else {
            let plans = (0..).map(DeviceId::new).zip(&readers.plans);
            readers.readers = plans
                .map(|(id, plan)| Reader::new(id, *plan, window))
                .collect();
            let count = readers.readers.len();
            readers.outbox.queues.resize_with(count, VecDeque::new);
            readers.outbox.over.resize(count, false);
        }
        readers.readers.iter_mut().for_each(Reader::begin_pre_copy);
        self.wake_readers();
    }

    pub(super) fn wake_readers(&mut self) {
        for place in 0..self.source.readers.readers.len() {
            self.wake_reader(place);
        }
    }

    fn wake_reader(&mut self, place: usize) {
        if let Some(reader) = self.source.readers.readers.get_mut(place)
            && !std::mem::replace(&mut reader.woken, true)
        {
            let wait = self.dice.ms(1);
            self.later(wait, What::Reads(place));
        }
    }

    /// A reader's thread goes on.
    pub(super) fn reads(&mut self, place: usize) {
        let over = self.source.outcome.is_some();
        let Some(reader) = self.source.readers.readers.get_mut(place) else {
            return;
        };
        reader.woken = false;
        if over {
            return;
        }
        let Some(item) = reader.turn(&mut self.dice) else {
            return;
        };
        let last = item.is_last();
        self.put_out(place, item);
        self.wake_reader(place);
        if last && self.source.readers.all().iter().all(|it| it.is_saved()) {
            let order = self.source.readers.order;
            let wait = self.dice.ms(1);
            self.later(wait, What::Devices(order, Event::DevicesSaved));
        }
    }

    fn put_out(&mut self, place: usize, item: Arc<Item>) {
        self.source.readers.outbox.queues[place].push_back(item);
        self.wake_lanes();
    }

    /// A device changes, or announces new initial bytes.
    pub(super) fn device_changes(&mut self) {
        let place = self.dice.place(self.source.readers.readers.len());
        let reinit = self.dice.one_in(4);
        let bytes = 1 + self.dice.below(500);
        if let Some(reader) = self.source.readers.readers.get_mut(place)
            && reader.stands == Stands::PreCopy
        {
            reader.left.changed += bytes;
            reader.left.reinit |= reinit;
            self.wake_reader(place);
        }
    }

    pub(super) fn grant(&mut self, device: DeviceId, offset_max: u64) -> Result<(), Misbehaved> {
        self.source.readers.get(device)?.stream.grant(offset_max)?;
        self.wake_reader(device.value() as usize);
        Ok(())
    }

    pub(super) fn device_acked(
        &mut self,
        ack: &SwitchoverAck,
    ) -> Result<DeviceOutlook, Misbehaved> {
        self.source.readers.get(ack.device)?.acked(ack)?;
        Ok(self.source.readers.outlook())
    }

    /// Tells the session what devices would add to the downtime, before it decides.
    pub(super) fn look_at_devices(&mut self) {
        if self.source.readers.is_started() {
            let outlook = Event::Devices(self.source.readers.outlook());
            let _ = self.source.session.handle(outlook, self.now);
        }
    }

    /// The last look at the acknowledgements: from here on no device announces anything.
    pub(super) fn devices_allow_pause(&mut self) -> bool {
        let readers = &mut self.source.readers;
        readers.readers.iter_mut().for_each(|it| it.closed = true);
        if readers.unacked().is_empty() || self.source.session.acks_waived(self.now) {
            return true;
        }
        readers.readers.iter_mut().for_each(|it| it.closed = false);
        false
    }

    /// The guest is paused: no device disturbs another any more.
    pub(super) fn quiesce(&mut self) {
        for reader in &mut self.source.readers.readers {
            if reader.stands == Stands::Running && reader.has(DeviceFlags::P2P) {
                reader.stands = Stands::Quiescent;
            }
        }
        self.ordered(Event::DevicesQuiesced);
    }

    /// All of them stop, and are read to their end.
    pub(super) fn stop_devices(&mut self) {
        for reader in &mut self.source.readers.readers {
            reader.stands = Stands::Stopped;
            let begun = reader.left.initial + reader.left.changed;
            let data = begun + reader.plan.state_bytes / 2;
            reader.left = Left {
                data: Some(data),
                config: 1 + reader.plan.state_bytes % 300,
                ..Left::default()
            };
        }
        self.ordered(Event::DevicesStopped);
        self.wake_readers();
    }

    fn ordered(&mut self, done: Event) {
        self.source.readers.order += 1;
        let order = self.source.readers.order;
        let wait = self.dice.ms(3);
        self.later(wait, What::Devices(order, done));
    }

    /// Every device has done what it was ordered.
    pub(super) fn devices_did(&mut self, order: u32, event: Event) {
        if order == self.source.readers.order {
            self.tell_source(event);
        }
    }

    /// Before the guest runs again: a switchover is broken off, or the migration is over.
    pub(super) fn devices_come_back(&mut self) {
        self.source.readers.order += 1;
        let goes_on = self.source.session.phase() == Phase::Suspended;
        self.source.readers.outbox.held |= goes_on;
        for place in 0..self.source.readers.readers.len() {
            let reader = &mut self.source.readers.readers[place];
            reader.closed = false;
            if !goes_on {
                reader.stands = Stands::Running;
                (reader.left, reader.pending) = (Left::default(), None);
            } else if reader.stands != Stands::PreCopy {
                let restart = reader.begin_anew();
                reader.begin_pre_copy();
                if let Some(mark) = restart {
                    self.put_out(place, Item::mark(mark));
                }
            }
        }
        self.wake_readers();
    }

    /// The destination has nothing of them any more.
    pub(super) fn readers_begin_anew(&mut self) {
        let readers = &mut self.source.readers;
        readers.order += 1;
        readers.outbox.clear();
        for reader in &mut readers.readers {
            *reader = Reader {
                woken: reader.woken,
                ..Reader::new(reader.id, reader.plan, 0)
            };
        }
    }

    /// What the old channels carried is settled.
    pub(super) fn readers_landed(&mut self) {
        let readers = &mut self.source.readers;
        readers.readers.iter_mut().for_each(|it| it.repeats = true);
        readers.outbox.held = false;
        self.wake_lanes();
    }
}

impl Reader {
    /// It was read to its end.
    fn is_saved(&self) -> bool {
        self.stands == Stands::Stopped
            && self.pending.is_none()
            && self.left.data.is_none()
            && self.left.config == 0
    }
}
