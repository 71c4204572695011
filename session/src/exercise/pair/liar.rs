//! A peer that lies: an honest one whose frames are dropped, repeated, changed or replaced on their way out, with numbers and checksums
//! put right, so that what it says gets as far as the rules of the protocol.

use std::collections::VecDeque;
use std::sync::OnceLock;

use multifd_wire::exercise::{Sample, reseal, samples};
use multifd_wire::{ChannelKind, HEADER_BYTES, Role};

use super::network::{Carries, Message};
use super::{MS, Pair};

/// Frames that were sent before, of which one is said again.
const REMEMBERED: usize = 24;

/// What a liar remembers.
#[derive(Default)]
pub(super) struct Liar {
    frames: u64,
    silent_for: u64,
    said: VecDeque<Message>,
    /// Lies so far.
    pub(super) lies: u32,
}

fn sample_of(from: Role, on: ChannelKind, which: u64) -> Option<Message> {
    static SAMPLES: OnceLock<Vec<Sample>> = OnceLock::new();
    let all = SAMPLES.get_or_init(samples);
    let fitting: Vec<&Sample> = all
        .iter()
        .filter(|it| it.kind.may_travel(from, on) && it.body.len() < 4096)
        .collect();
    let sample = fitting.get(which as usize % fitting.len().max(1))?;
    Some(Message {
        head: sample.head.clone(),
        body: sample.body.clone(),
        pages: Vec::new(),
    })
}

impl Pair {
    /// What goes out instead of this message.
    pub(super) fn lie(&mut self, channel: usize, from: Role, message: Message) -> Vec<Message> {
        self.liar.frames += 1;
        let (begun, one_in) = (self.plan.lies_from, self.plan.lies_one_in);
        self.liar.said.push_back(message.clone());
        if self.liar.said.len() > REMEMBERED {
            self.liar.said.pop_front();
        }
        if self.liar.silent_for > 0 {
            self.liar.silent_for -= 1;
            return Vec::new();
        }
        let mut out = vec![message];
        if self.liar.frames > begun && self.dice.one_in(one_in) {
            self.liar.lies += 1;
            out = self.told(channel, from, out);
        }
        for message in &mut out {
            self.number(channel, from, message);
        }
        out
    }

    fn told(&mut self, channel: usize, from: Role, mut out: Vec<Message>) -> Vec<Message> {
        let on = match self.network.channels[channel].carries {
            Carries::Control => ChannelKind::Control,
            Carries::Lane(..) => ChannelKind::Data,
        };
        let which = self.dice.next();
        match self.dice.below(10) {
            0 => out.clear(),
            1 => out.push(out[0].clone()),
            2 | 3 => self.alter(&mut out[0]),
            4 => out.extend(self.remembered()),
            5 => out = self.remembered().into_iter().collect(),
            6 => out.extend(sample_of(from, on, which)),
            7 => {
                out = sample_of(from, on, which).into_iter().collect();
                out.iter_mut().for_each(|it| self.alter(it));
            }
            8 => {
                // For a moment, or for good.
                self.liar.silent_for = 1 + self.dice.below(40);
                if self.dice.one_in(4) {
                    self.liar.silent_for = u64::MAX;
                }
            }
            _ => {
                // A number that is not the next.
                self.network.channels[channel].said[usize::from(from == Role::Destination)] += 1;
            }
        }
        out
    }

    /// Something that was said before; on this channel or another.
    fn remembered(&mut self) -> Option<Message> {
        let place = self.dice.place(self.liar.said.len());
        self.liar.said.get(place).cloned()
    }

    /// Changes a few bytes of the table to something near, or far.
    fn alter(&mut self, message: &mut Message) {
        let table = &mut message.head[HEADER_BYTES..];
        if table.is_empty() {
            return;
        }
        for _ in 0..=self.dice.below(2) {
            let place = self.dice.place(table.len());
            table[place] = match self.dice.below(4) {
                0 => table[place].wrapping_add(1),
                1 => table[place].wrapping_sub(1),
                2 => 0,
                _ => self.dice.next() as u8,
            };
        }
        reseal(&mut message.head);
    }

    /// Frames of a channel are numbered without gaps.
    fn number(&mut self, channel: usize, from: Role, message: &mut Message) {
        let said = &mut self.network.channels[channel].said[usize::from(from == Role::Destination)];
        message.head[8..16].copy_from_slice(&said.to_le_bytes());
        *said += 1;
        reseal(&mut message.head);
    }

    /// A liar sends of its own accord, too.
    pub(super) fn liar_speaks(&mut self) {
        let Some(from) = self.plan.liar else { return };
        let channels = self.network.open_now();
        let place = self.dice.place(channels.len());
        let Some(channel) = channels.get(place).copied() else {
            return;
        };
        let lane = self.network.channels[channel].carries != Carries::Control;
        if lane && from == Role::Destination {
            return;
        }
        let on = if lane {
            ChannelKind::Data
        } else {
            ChannelKind::Control
        };
        let which = self.dice.next();
        if let Some(message) = self.remembered().or_else(|| sample_of(from, on, which)) {
            self.send(channel, from, message);
        }
        let wait = MS * 10 + self.dice.ms(400);
        self.later(wait, super::What::LiarSpeaks);
    }
}
