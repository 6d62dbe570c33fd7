//! The VM of this process, as the control API and the console see it.

use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc::Sender};

use squib_vmm::machine::{Machine, RunState};

use crate::{
    api::{
        server::{Controlled, Fault},
        types::{
            InstanceInfo, InstanceState, SnapshotCreateParams, SnapshotProgress, SnapshotReport,
        },
    },
    capture::{self, Gauge, PAUSE_DEADLINE},
    events::Event,
    exit::Failure,
};

/// A VM that may be restarted, and with that be another machine of the same name.
pub(crate) struct Vm {
    name: String,
    machine: RwLock<Arc<Machine>>,
    events: Sender<Event>,
    /// Held while a snapshot is written, and while the run state is changed from outside.
    control: Mutex<()>,
    progress: Gauge,
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

    /// The VM is ending: a snapshot that is being written is given up, and leaves nothing behind.
    pub(crate) fn cancel(&self) {
        self.progress.cancel();
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
        capture::write(&self.machine(), &params, &self.progress)
            .map_err(|e| Fault(Failure::from(e).to_string()))
    }

    fn progress(&self) -> SnapshotProgress {
        self.progress.read()
    }

    fn stop(&self) {
        // Nobody to tell: the VM is already ending.
        let _ = self.events.send(Event::Stop);
    }
}
