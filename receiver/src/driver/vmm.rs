//! The VMM's thread: does one thing after another, so that the control thread never waits for the VMM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use multifd_session::destination::Ownership;
use multifd_transport::{GuestMemory, join_within, spawn_with};
use multifd_wire::Layout;
use multifd_wire::frame::{Device, GuestState};

use super::device::{open, start, with_all};
use super::{Note, Shared};
use crate::device::DeviceSink;
use crate::error::Fault;
use crate::prepared;
use crate::vmm::{AskTicket, Blob, Vmm};

/// The session asks for one thing at a time; more wait only if channels are lost again and again while the VMM is still loading.
const TASKS_MAX: usize = 16;

/// All devices of a machine.
pub(super) type Sinks = Vec<Box<dyn DeviceSink>>;

/// What the VMM is asked for.
pub(super) enum VmmTask {
    Prepare(AskTicket, Vec<Blob>, Layout, Vec<Device>),
    Load(Vec<Blob>),
    Resume(Ownership, Sinks),
    Discard,
}

/// What the VMM answers, with how long it took.
pub(super) enum VmmDone {
    Prepared(Result<(Layout, GuestMemory, Sinks), Fault>, Duration),
    Loaded(Result<(), Fault>, Duration),
    Resumed(Result<(), Fault>, Duration, Sinks),
}

/// The thread.
pub(super) struct VmmThread {
    tasks: Sender<VmmTask>,
    thread: JoinHandle<()>,
    back: Receiver<Box<dyn Vmm>>,
    /// There was no room for the order to discard the machine: it is the last thing to do.
    discard: Arc<AtomicBool>,
}

impl VmmThread {
    /// # Errors
    /// There is no thread; here is the machine again.
    pub(super) fn start(
        shared: &Arc<Shared>,
        vmm: Box<dyn Vmm>,
    ) -> Result<Self, (std::io::Error, Box<dyn Vmm>)> {
        let (tasks, orders) = crossbeam_channel::bounded(TASKS_MAX);
        let (give, back) = crossbeam_channel::bounded(1);
        let discard = Arc::new(AtomicBool::new(false));
        let (theirs, last) = (Arc::clone(shared), Arc::clone(&discard));
        let body = move |vmm| {
            let mut vmm = work(vmm, &orders, &theirs);
            if last.load(Ordering::Relaxed) {
                vmm.discard();
            }
            let _ = give.send(vmm);
        };
        let thread = spawn_with(&*shared.spawner, "mfd-vmm", vmm, body)?;
        Ok(Self {
            tasks,
            thread,
            back,
            discard,
        })
    }

    pub(super) fn ask(&self, task: VmmTask) {
        // A thread that does not come back takes nothing more; the control thread does not wait for it.
        if let Err(TrySendError::Full(VmmTask::Discard)) = self.tasks.try_send(task) {
            self.discard.store(true, Ordering::Relaxed);
        }
    }

    /// Takes the machine back from a thread that was asked for nothing.
    pub(super) fn at_once(self) -> Option<Box<dyn Vmm>> {
        drop(self.tasks);
        self.back.recv().ok()
    }

    /// Ends it and takes the machine back. It may be at work: that is waited for, so long at most.
    ///
    /// # Panics
    /// With the VMM, in its own words.
    pub(super) fn give_back(
        self,
        limit: Duration,
        mut meanwhile: impl FnMut(),
    ) -> Option<Box<dyn Vmm>> {
        drop(self.tasks);
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Ok(vmm) = self.back.recv_timeout(Duration::from_millis(1)) {
                let _ = join_within(self.thread, limit, meanwhile);
                return Some(vmm);
            }
            meanwhile();
            if self.thread.is_finished() && self.back.is_empty() {
                if let Err(panic) = self.thread.join() {
                    std::panic::resume_unwind(panic);
                }
                return None;
            }
        }
        None
    }
}

fn work(mut vmm: Box<dyn Vmm>, orders: &Receiver<VmmTask>, shared: &Shared) -> Box<dyn Vmm> {
    let refused = |step| move |source| Fault::Vmm { step, source };
    for task in orders {
        let began = Instant::now();
        let done = match task {
            VmmTask::Prepare(ticket, configs, layout, devices) => {
                let granted = vmm
                    .granted(&ticket)
                    .map_err(refused("keep what is needed to answer for the session"));
                let machine =
                    granted.and_then(|()| prepare(&mut *vmm, configs, &layout, &devices, shared));
                let machine = machine.map(|(memory, sinks)| (layout, memory, sinks));
                VmmDone::Prepared(machine, began.elapsed())
            }
            VmmTask::Load(states) => {
                let loaded = vmm.load(states).map_err(refused("load the VM state"));
                VmmDone::Loaded(loaded, began.elapsed())
            }
            VmmTask::Resume(proof, sinks) => {
                // SPEC: COMMIT-7
                if proof.guest() == GuestState::Paused {
                    let done = vmm.take_over(proof).map_err(refused("take the guest over"));
                    VmmDone::Resumed(done, began.elapsed(), sinks)
                } else {
                    let (started, sinks) = with_all(shared, sinks, start);
                    let done =
                        started.and_then(|()| vmm.resume(proof).map_err(refused("run the guest")));
                    VmmDone::Resumed(done, began.elapsed(), sinks)
                }
            }
            VmmTask::Discard => {
                vmm.discard();
                continue;
            }
        };
        if shared.notes.send(Note::Vmm(done)).is_err() {
            break;
        }
    }
    vmm
}

/// The machine, its memory, and its devices where they can be written.
fn prepare(
    vmm: &mut dyn Vmm,
    configs: Vec<Blob>,
    layout: &Layout,
    devices: &[Device],
    shared: &Shared,
) -> Result<(GuestMemory, Sinks), Fault> {
    let refused = |step| move |source| Fault::Vmm { step, source };
    let memory = vmm
        .prepare(configs, layout)
        .map_err(refused("build the machine"))?;
    prepared::check(&memory, shared.config.overcommit())?;
    let cleared = prepared::clear(&memory);
    let counters = &shared.counters;
    counters.pages_cleared.store(cleared, Ordering::Relaxed);
    let mut sinks = Vec::new();
    if !devices.is_empty() {
        sinks = vmm
            .devices(devices)
            .map_err(refused("give the machine's devices"))?;
        let table = devices.to_vec();
        let (opened, back) = with_all(shared, sinks, move |sinks, watch| {
            open(&table, sinks, watch)
        });
        sinks = back;
        opened?;
    }
    Ok((memory, sinks))
}
