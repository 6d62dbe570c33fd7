//! The VM of this process, as the control API and the console see it.

use std::{
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};

use squib_formats::image::Progress;
use squib_vmm::machine::{Machine, RunState};

use crate::{
    api::{
        server::{Controlled, Fault},
        types::{
            InstanceInfo, InstanceState, SnapshotCreateParams, SnapshotProgress, SnapshotReport,
        },
    },
    capture,
    events::Event,
};

/// How long a guest has to come to rest.
pub(crate) const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// A VM that may be restarted, and with that be another machine of the same name.
pub(crate) struct Vm {
    name: String,
    machine: RwLock<Arc<Machine>>,
    events: Sender<Event>,
    /// Held while a snapshot is written, and while the run state is changed from outside.
    control: Mutex<()>,
    progress: Gauge,
}

/// How far a snapshot is, for whoever asks.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress for Gauge {
    fn advanced(&self, done: u64, total: u64, _stored: u64) {
        self.total.store(total, Ordering::Relaxed);
        // Threads report out of order.
        self.done.fetch_max(done, Ordering::Relaxed);
    }
}

impl Gauge {
    fn reset(&self) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(0, Ordering::Relaxed);
    }
}

impl Vm {
    pub(crate) fn new(name: &str, machine: Arc<Machine>, events: Sender<Event>) -> Self {
        Self {
            name: name.to_owned(),
            machine: RwLock::new(machine),
            events,
            control: Mutex::new(()),
            progress: Gauge::default(),
        }
    }

    /// The machine that runs now.
    pub(crate) fn machine(&self) -> Arc<Machine> {
        self.machine.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another machine in its place.
    pub(crate) fn replace(&self, machine: Arc<Machine>) {
        *self.machine.write().unwrap_or_else(PoisonError::into_inner) = machine;
    }
}

impl Controlled for Vm {
    fn info(&self) -> InstanceInfo {
        let machine = self.machine();
        let state = match machine.state() {
            RunState::Paused if machine.timings().first_instruction().is_none() => {
                InstanceState::NotStarted
            }
            RunState::Paused => InstanceState::Paused,
            // The process is about to end.
            RunState::Running | RunState::Ended(_) => InstanceState::Running,
        };
        InstanceInfo {
            app_name: "squib".into(),
            id: self.name.clone(),
            state,
            vmm_version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn pause(&self) -> Result<(), Fault> {
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.machine().pause(PAUSE_DEADLINE).map_err(|e| Fault(e.to_string()))
    }

    fn resume(&self) -> Result<(), Fault> {
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.machine().resume().map_err(|e| Fault(e.to_string()))
    }

    fn snapshot(&self, params: SnapshotCreateParams) -> Result<SnapshotReport, Fault> {
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.progress.reset();
        let report = capture::capture(&self.machine(), &params, &self.progress);
        self.progress.reset();
        report.map_err(|e| Fault(format!("{e:#}")))
    }

    fn progress(&self) -> SnapshotProgress {
        SnapshotProgress {
            done: self.progress.done.load(Ordering::Relaxed),
            total: self.progress.total.load(Ordering::Relaxed),
        }
    }

    fn stop(&self) {
        // Nobody to tell: the VM is already ending.
        let _ = self.events.send(Event::Stop);
    }
}
