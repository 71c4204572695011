//! The made-up network: channels that keep their order, each with a delay, a rate and room for what is not read yet; all can be cut.
//!
//! What is on its way when a channel is cut is lost. While the network is down nothing arrives; what was sent arrives afterwards, as
//! with TCP, unless the channel was closed meanwhile.

use std::time::Duration;

use multifd_wire::{Incarnation, LaneId, Role};

use super::dice::Dice;
use super::{Pair, What};

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    Control,
    Lane(LaneId, Incarnation),
}

/// One connection.
pub(super) struct Channel {
    pub(super) carries: Carries,
    delay: Duration,
    /// Bytes a second.
    rate: u64,
    /// Bytes that may be on their way, or wait for the destination, before whoever sends has to wait.
    room: u64,
    pub(super) open: bool,
    /// Per sender, source first: until when what was sent occupies the link, and when it arrives.
    busy: [Duration; 2],
    arrives: [Duration; 2],
    /// Bytes that went forth and were not read.
    unread: u64,
    /// The source's lane waits for room.
    pub(super) awaits_room: bool,
    /// Frames of the source that the destination has handled: what it may acknowledge.
    pub(super) handled: u64,
    /// Frames of a liar, by sender.
    pub(super) said: [u64; 2],
}

/// A frame on its way: the bytes of its head, and its body (for PAGES one number per page).
#[derive(Debug, Clone, Default)]
pub(super) struct Message {
    pub(super) head: Vec<u8>,
    pub(super) body: Vec<u8>,
    pub(super) pages: Vec<u64>,
}

impl Message {
    pub(super) fn head(head: Vec<u8>) -> Self {
        Self {
            head,
            ..Self::default()
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.head.len() + self.body.len() + self.pages.len() * multifd_wire::PAGE_BYTES) as u64
    }
}

/// All channels that there ever were.
#[derive(Default)]
pub(super) struct Network {
    pub(super) channels: Vec<Channel>,
    /// Nothing arrives before this.
    pub(super) down_until: Duration,
    /// Messages of which one bit will be changed.
    pub(super) flips: u32,
}

impl Network {
    pub(super) fn get(&self, channel: usize) -> Option<&Channel> {
        self.channels.get(channel)
    }

    pub(super) fn is_open(&self, channel: usize) -> bool {
        self.get(channel).is_some_and(|channel| channel.open)
    }

    /// The channels that are open.
    pub(super) fn open_now(&self) -> Vec<usize> {
        let all = self.channels.iter().enumerate();
        all.filter(|(_, it)| it.open)
            .map(|(place, _)| place)
            .collect()
    }

    /// Whether more may be sent forth.
    pub(super) fn has_room(&self, channel: usize) -> bool {
        self.get(channel)
            .is_some_and(|channel| channel.unread < channel.room)
    }
}

impl Channel {
    /// When a message of this size arrives that is sent now.
    fn send(&mut self, sender: usize, bytes: u64, now: Duration, stall: Duration) -> Duration {
        let takes = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.rate);
        self.busy[sender] = now.max(self.busy[sender]) + takes;
        let at = (self.busy[sender] + self.delay + stall).max(self.arrives[sender]);
        self.arrives[sender] = at;
        at
    }
}

/// The place of a sender in a channel's lists.
fn place(sender: Role) -> usize {
    usize::from(sender == Role::Destination)
}

impl Pair {
    pub(super) fn connect(&mut self, carries: Carries) -> usize {
        let rate = self.plan.rate(&mut self.dice);
        self.network.channels.push(Channel {
            carries,
            delay: self.dice.ms(5),
            rate,
            room: 16_384 << self.dice.below(5),
            open: true,
            busy: [Duration::ZERO; 2],
            arrives: [Duration::ZERO; 2],
            unread: 0,
            awaits_room: false,
            handled: 0,
            said: [0; 2],
        });
        self.network.channels.len() - 1
    }

    /// How long something of this size takes from now, so that it arrives after what was sent before.
    pub(super) fn transit(&mut self, channel: usize, sender: Role, bytes: u64) -> Duration {
        let stall = if self.dice.one_in(40) {
            self.dice.ms(60)
        } else {
            Duration::ZERO
        };
        let (now, down) = (self.now, self.network.down_until);
        let Some(channel) = self.network.channels.get_mut(channel) else {
            return stall;
        };
        let place = place(sender);
        let at = channel.send(place, bytes, now, stall);
        if at < down {
            channel.arrives[place] = down + channel.delay;
        }
        channel.arrives[place].saturating_sub(now)
    }

    /// Sends a frame. A liar's frame may be another one by the time it is on its way.
    pub(super) fn send(&mut self, channel: usize, sender: Role, message: Message) {
        if self.plan.liar == Some(sender) {
            for message in self.lie(channel, sender, message) {
                self.post(channel, sender, message);
            }
        } else {
            self.post(channel, sender, message);
        }
    }

    fn post(&mut self, channel: usize, sender: Role, mut message: Message) {
        if self.network.flips > 0 && self.dice.one_in(3) {
            self.network.flips -= 1;
            flip(&mut message, &mut self.dice);
        }
        let bytes = message.bytes();
        let wait = self.transit(channel, sender, bytes);
        let what = match sender {
            Role::Source => {
                if let Some(channel) = self.network.channels.get_mut(channel) {
                    channel.unread += bytes;
                }
                What::Forth(channel, message)
            }
            Role::Destination => What::Back(channel, message),
        };
        self.later(wait, what);
    }

    /// The destination has read so much of a lane: its source may go on.
    pub(super) fn was_read(&mut self, channel: usize, bytes: u64) {
        let Some(it) = self.network.channels.get_mut(channel) else {
            return;
        };
        it.unread = it.unread.saturating_sub(bytes);
        if it.awaits_room && it.unread < it.room {
            it.awaits_room = false;
            if let Carries::Lane(lane, _) = it.carries {
                self.wake_lane(lane, channel);
            }
        }
    }

    /// Ends a channel: what is on its way is lost, and each side sees it in its own time.
    pub(super) fn cut(&mut self, channel: usize) {
        let Some(it) = self.network.channels.get_mut(channel) else {
            return;
        };
        if std::mem::replace(&mut it.open, false) {
            let (here, there) = (self.dice.ms(20), self.dice.ms(20));
            self.later(here, What::SourceSeesEnd(channel));
            self.later(there, What::DestinationSeesEnd(channel));
        }
    }

    /// A link gets another rate.
    pub(super) fn change_rate(&mut self, channel: usize) {
        let rate = self.plan.rate(&mut self.dice);
        if let Some(channel) = self.network.channels.get_mut(channel) {
            channel.rate = rate;
        }
    }
}

/// Changes one bit of a message: of its head, its body, or a page.
fn flip(message: &mut Message, dice: &mut Dice) {
    if !message.pages.is_empty() && !dice.one_in(3) {
        let place = dice.place(message.pages.len());
        message.pages[place] ^= 1 << dice.below(31);
        return;
    }
    let body = !message.body.is_empty() && dice.one_in(2);
    let bytes = if body {
        &mut message.body
    } else {
        &mut message.head
    };
    let place = dice.place(bytes.len());
    bytes[place] ^= 1 << dice.below(8);
}
