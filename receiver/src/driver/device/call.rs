//! Calls of a device's own code, which may never return: since when, so that nobody waits for them for ever.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use multifd_transport::join_within;

use crate::device::{DeviceError, DeviceSink};
use crate::driver::{Shared, lock};
use crate::error::Fault;

/// How often it is checked whether a device's code is stuck.
const CALL_POLL: Duration = Duration::from_millis(50);

/// What a device's own code is asked for, and since when. It may never return; whoever waits for it looks here.
#[derive(Debug, Default)]
pub(in crate::driver) struct CallWatch(Mutex<Option<(String, &'static str, Instant)>>);

impl CallWatch {
    pub(super) fn call<T>(
        &self,
        sink: &mut dyn DeviceSink,
        step: &'static str,
        ask: impl FnOnce(&mut dyn DeviceSink) -> Result<T, DeviceError>,
    ) -> Result<T, Fault> {
        let device = sink.name().to_owned();
        *lock(&self.0) = Some((device.clone(), step, Instant::now()));
        let answer = ask(sink);
        *lock(&self.0) = None;
        answer.map_err(|source| Fault::Device {
            device,
            step,
            source,
        })
    }

    pub(super) fn is_idle(&self) -> bool {
        lock(&self.0).is_none()
    }

    pub(super) fn stuck(&self, limit: Duration) -> Option<Fault> {
        let watch = lock(&self.0);
        let (device, step, since) = watch.as_ref()?;
        let waited = since.elapsed();
        (waited >= limit).then(|| Fault::DeviceStuck {
            device: device.clone(),
            step,
            waited_ms: waited.as_millis(),
        })
    }
}

/// Does something with all devices, in a thread of its own, so that one whose code does not return keeps nobody else. Without
/// an answer within the deadline of each call the devices stay with that thread.
pub(in crate::driver) fn with_all(
    shared: &Shared,
    mut sinks: Vec<Box<dyn DeviceSink>>,
    how: impl FnOnce(&mut [Box<dyn DeviceSink>], &CallWatch) -> Result<(), Fault> + Send + 'static,
) -> (Result<(), Fault>, Vec<Box<dyn DeviceSink>>) {
    if sinks.is_empty() {
        return (how(&mut sinks, &CallWatch::default()), sinks);
    }
    let watch = Arc::new(CallWatch::default());
    let (give, back) = crossbeam_channel::bounded(1);
    let theirs = Arc::clone(&watch);
    let body = Box::new(move || {
        let done = how(&mut sinks, &theirs);
        let _ = give.send((done, sinks));
    });
    let spawned = shared.spawner.spawn("mfd-devices", body);
    let thread = match spawned {
        Ok(thread) => thread,
        Err(source) => {
            let step = "start a thread";
            return (Err(Fault::System { step, source }), Vec::new());
        }
    };
    let limit = shared.config.device_deadline();
    let mut idle_since = Instant::now();
    loop {
        match back.recv_timeout(limit.min(CALL_POLL)) {
            Ok(done) => {
                let _ = join_within(thread, limit, || {
                    std::thread::sleep(Duration::from_millis(1))
                });
                return done;
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(stuck) = watch.stuck(limit) {
                    return (Err(stuck), Vec::new());
                }
                if !watch.is_idle() {
                    idle_since = Instant::now();
                } else if idle_since.elapsed() >= limit {
                    let thread = "the thread that leads the devices".to_owned();
                    let waited_ms = limit.as_millis();
                    return (Err(Fault::ThreadStuck { thread, waited_ms }), Vec::new());
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                let text = "the code of one panicked".to_owned();
                return (Err(Fault::Devices { text }), Vec::new());
            }
        }
    }
}
