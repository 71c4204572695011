//! The reader of one device: a thread that leads the device through its states as it is told, and reads its state in chunks.
//!
//! What it must never do: let go of bytes that it read before they are in the queue, or keep a command waiting for credit or for a
//! buffer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::Sender;
use multifd_wire::DeviceState;
use multifd_wire::frame::{DeviceFlags, Mark, Section};
use multifd_wire::limits::BLOB_BYTES_MAX;

use super::stream::DeviceStream;
use super::table::DeviceTable;
use super::{DeviceCommand, DeviceNote};
use crate::device::stream::{BufferPool as _, Item};
use crate::device::{DeviceError, DeviceSource, Read};
use crate::driver::Note;
use crate::error::Fault;

/// How often a device that has nothing to say is asked again.
const POLL: Duration = Duration::from_millis(10);

/// How often one without pre-copy is asked how much it would have.
const POLL_IDLE: Duration = Duration::from_millis(100);

/// Bytes that changed in a device are read once there is a chunk of them, or after this time.
const LINGER: Duration = Duration::from_millis(50);

/// What a reader does between commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Nothing: it runs without pre-copy, or everything was read, or it failed.
    Idle,
    PreCopy,
    StopCopy,
}

/// The reader of one device.
pub(super) struct DeviceReader {
    pub(super) stream: Arc<DeviceStream>,
    pub(super) source: Box<dyn DeviceSource>,
    pub(super) table: Arc<DeviceTable>,
    pub(super) notes: Sender<Note>,
    pub(super) chunk: usize,
    pub(super) mode: Mode,
    /// Read and not placed yet.
    pub(super) pending: Option<(Section, Vec<u8>)>,
    /// Bytes of the initial ones that were announced and not read yet.
    pub(super) initial_left: u64,
    /// The end of the newest generation was marked.
    pub(super) initial_marked: bool,
    pub(super) linger: Option<Instant>,
    /// Its configuration, once it was read, and how much of it was cut.
    pub(super) config: Option<(Bytes, usize)>,
}

impl DeviceReader {
    /// Until it is told to end; gives the device back.
    pub(super) fn run(mut self) -> Box<dyn DeviceSource> {
        let mut wait = Duration::ZERO;
        loop {
            match self.stream.take_command(wait) {
                Some(DeviceCommand::End) => return self.source,
                Some(command) => {
                    let begun = Instant::now();
                    match self.carry_out(command) {
                        Ok(()) => self.done(command, begun.elapsed()),
                        Err(fault) => self.failed(command, fault),
                    }
                    wait = Duration::ZERO;
                }
                None => {
                    wait = match self.turn() {
                        Ok(wait) => wait,
                        Err(fault) => {
                            self.mode = Mode::Idle;
                            self.tell(DeviceNote::Failed(fault));
                            POLL_IDLE
                        }
                    };
                }
            }
        }
    }

    fn done(&self, command: DeviceCommand, took: Duration) {
        let state = self.source.state();
        self.stream.note(|stats| {
            stats.state = Some(state);
            match command {
                DeviceCommand::Quiesce => stats.quiesce = took,
                DeviceCommand::Stop => {
                    stats.stop = took;
                    stats.stopped_at = Some(Instant::now());
                }
                _ => {}
            }
        });
        self.stream.answer(command);
        self.tell(DeviceNote::Done {
            device: self.stream.id,
            command,
        });
    }

    fn failed(&mut self, command: DeviceCommand, fault: Fault) {
        self.mode = Mode::Idle;
        let (state, text) = (self.source.state(), fault.to_string());
        self.stream.note(|stats| {
            stats.state = Some(state);
            stats.trouble.get_or_insert(text);
        });
        // Whoever waits for it looks at the state; one that failed is as far as it gets.
        self.stream.answer(command);
        self.tell(DeviceNote::Failed(fault));
    }

    /// Says it, unless nobody listens any more.
    fn tell(&self, note: DeviceNote) {
        let mut note = Note::Device(note);
        while let Err(error) = self.notes.send_timeout(note, POLL) {
            if error.is_disconnected() || self.stream.has_command() {
                return;
            }
            note = error.into_inner();
        }
    }

    /// Where it stood in a stream that is void.
    pub(super) fn forget(&mut self) {
        self.let_go();
        (self.config, self.linger) = (None, None);
        (self.initial_left, self.initial_marked) = (0, false);
    }

    /// What was read and not placed is not wanted any more.
    pub(super) fn let_go(&mut self) {
        if let Some((_, octets)) = self.pending.take() {
            self.stream.take_back(octets);
        }
    }

    /// The stream that was read is void, since the device runs again; it is read anew (SPEC: RESUME-8).
    pub(super) fn restart(&mut self) {
        self.forget();
        let mut state = self.stream.lock();
        state.stats.runs_again();
        (state.stats.loaded_bytes, state.stats.loaded_time) = (0, Duration::ZERO);
        if self.stream.flags.contains(DeviceFlags::SWITCHOVER_ACK) {
            // What is loaded of the generations before is void as well.
            state.stats.announced = state.machine.generation().value() + 1;
        }
        let begun = state.machine.index() > 0;
        state.stats.restarts += u32::from(begun);
        drop(state);
        if begun {
            self.mark(Mark::Restart);
        }
    }

    /// A bounded piece of work; gives how long to wait for a command before the next.
    fn turn(&mut self) -> Result<Duration, Fault> {
        if let Some((section, octets)) = self.pending.take() {
            match self.stream.place(section, octets) {
                Ok(item) => self.table.queue.push(item),
                Err(octets) => self.pending = Some((section, octets)),
            }
            return Ok(Duration::ZERO);
        }
        match self.mode {
            Mode::Idle => {
                if self.source.state() == DeviceState::Running {
                    self.estimate();
                }
                Ok(POLL_IDLE)
            }
            Mode::PreCopy => self.pre_copy_turn(),
            Mode::StopCopy => self.stop_copy_turn(),
        }
    }

    fn pre_copy_turn(&mut self) -> Result<Duration, Fault> {
        if self.initial_left > 0 {
            let read = self.read(self.initial_left, false)?;
            self.initial_left -= read.min(self.initial_left);
            self.stream.note(|stats| {
                stats.initial_bytes += read;
                stats.stop_bytes = stats.stop_bytes.saturating_sub(read);
            });
            // A device that said that there is more and gives nothing is asked again, in a while.
            return Ok(if read == 0 { POLL } else { Duration::ZERO });
        }
        let info = self.call("say what it has to give", |source| source.pre_copy_info())?;
        if info.reinit {
            self.announce();
        }
        self.estimate();
        self.initial_left = info.initial_bytes;
        if info.initial_bytes > 0 {
            return Ok(Duration::ZERO);
        }
        if !self.initial_marked {
            self.initial_marked = true;
            self.mark(Mark::InitialEnd);
        }
        if info.dirty_bytes == 0 {
            self.linger = None;
            return Ok(POLL);
        }
        let since = *self.linger.get_or_insert_with(Instant::now);
        if info.dirty_bytes < self.chunk as u64 && since.elapsed() < LINGER {
            return Ok(POLL);
        }
        self.linger = None;
        let read = self.read(info.dirty_bytes, false)?;
        Ok(if read == 0 { POLL } else { Duration::ZERO })
    }

    /// New initial bytes: the destination has to load them before the guest is paused, unless it is about to be.
    fn announce(&mut self) {
        let mut state = self.stream.lock();
        if state.closed {
            return;
        }
        if self.stream.flags.contains(DeviceFlags::SWITCHOVER_ACK) {
            state.stats.announced = state.machine.generation().value() + 1;
        }
        drop(state);
        if !self.initial_marked {
            // The batch before was not even complete: both are one.
            return;
        }
        self.initial_marked = false;
    }

    fn stop_copy_turn(&mut self) -> Result<Duration, Fault> {
        if let Some((config, cut)) = &mut self.config {
            let rest = config.get(*cut..).unwrap_or(&[]);
            if rest.is_empty() {
                self.mark(Mark::ConfigEnd);
                self.mode = Mode::Idle;
                self.stream
                    .note(|stats| stats.saved_at = Some(Instant::now()));
                self.tell(DeviceNote::Saved {
                    device: self.stream.id,
                });
                return Ok(Duration::ZERO);
            }
            let bytes = rest.len().min(self.chunk);
            if let Some(mut buffer) = self.stream.buffer(bytes) {
                buffer.copy_from_slice(&rest[..bytes]);
                *cut += bytes;
                self.pending = Some((Section::Config, buffer));
            }
            return Ok(Duration::ZERO);
        }
        if self.read(u64::MAX, true)? > 0 || self.pending.is_some() || self.stream.has_command() {
            return Ok(Duration::ZERO);
        }
        Ok(Duration::from_millis(1))
    }

    /// Reads up to a chunk, and leaves it pending. Gives how much.
    fn read(&mut self, most: u64, last: bool) -> Result<u64, Fault> {
        let wanted = usize::try_from(most).unwrap_or(usize::MAX).min(self.chunk);
        let Some(mut buffer) = self.stream.buffer(wanted) else {
            return Ok(0);
        };
        let (mut filled, mut ended) = (0, false);
        let began = Instant::now();
        while filled < wanted {
            let room = buffer.get_mut(filled..).unwrap_or(&mut []);
            match self.call("be read", |source| source.read(room)) {
                Ok(Read::Bytes(count)) if count <= wanted - filled => filled += count,
                Ok(Read::Bytes(_)) => {
                    return Err(self.fault("be read", DeviceError::new("it gave more than asked")));
                }
                Ok(Read::NothingNow) => break,
                Ok(Read::End) => {
                    ended = true;
                    break;
                }
                Err(fault) => return Err(fault),
            }
            if self.stream.has_command() {
                break;
            }
        }
        let (took, read) = (began.elapsed(), filled as u64);
        self.stream.note(|stats| {
            if read > 0 {
                stats.read_bytes += read;
                stats.read_time += took;
            }
            if last {
                stats.read += took;
                stats.stop_copy_bytes += read;
            } else {
                stats.pre_copy_bytes += read;
            }
        });
        if filled > 0 {
            buffer.truncate(filled);
            self.pending = Some((Section::Data, buffer));
        } else {
            self.stream.take_back(buffer);
        }
        if ended && last {
            // What is pending goes first.
            if let Some((section, octets)) = self.pending.take() {
                match self.stream.place(section, octets) {
                    Ok(item) => self.table.queue.push(item),
                    Err(octets) => {
                        // A command came: the end is found again after it.
                        self.pending = Some((section, octets));
                        return Ok(read);
                    }
                }
            }
            self.end_of_data()?;
        }
        Ok(read)
    }

    fn end_of_data(&mut self) -> Result<(), Fault> {
        self.mark(Mark::DataEnd);
        let config = self.call("give its configuration", |source| source.config())?;
        if config.len() as u64 > BLOB_BYTES_MAX {
            let text = format!("it has {} bytes, {BLOB_BYTES_MAX} at most", config.len());
            return Err(self.fault("give its configuration", DeviceError::new(text)));
        }
        let bytes = config.len() as u64;
        // SPEC: CREDIT-5
        if bytes > self.stream.window {
            let text = format!(
                "it has {bytes} bytes, and the destination holds {} of a device at most (its device window)",
                self.stream.window
            );
            return Err(self.fault("give its configuration", DeviceError::new(text)));
        }
        self.stream.note(|stats| stats.config_bytes = bytes);
        self.config = Some((config, 0));
        Ok(())
    }

    /// How much it would give if it were stopped now, if it can say.
    fn estimate(&mut self) {
        let asked = self.call("say how much it has", |source| source.stop_copy_bytes());
        if let Ok(bytes) = asked {
            self.stream.note(|stats| stats.stop_bytes = bytes);
        }
    }

    /// Asks the device for something. It is the device's own code, which may never return: the control thread sees since when.
    pub(super) fn call<T>(
        &mut self,
        step: &'static str,
        ask: impl FnOnce(&mut dyn DeviceSource) -> Result<T, DeviceError>,
    ) -> Result<T, Fault> {
        self.stream.lock().call = Some((step, Instant::now()));
        let answer = ask(&mut *self.source);
        self.stream.lock().call = None;
        answer.map_err(|source| self.fault(step, source))
    }

    fn mark(&self, mark: Mark) {
        let placed = self.stream.lock().machine.mark(mark);
        self.table.queue.push(Item::mark(placed));
    }

    pub(super) fn fault(&self, step: &'static str, source: DeviceError) -> Fault {
        Fault::Device {
            device: self.stream.name.clone(),
            step,
            source,
        }
    }
}
