//! The VM of this process, as the control API and the console see it.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
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

/// How long those who still look at a machine that has ended may take to let go of it.
const LET_GO: Duration = Duration::from_secs(5);

/// How long a pause or a resume waits for a snapshot that is being written; and a snapshot for another one, before it
/// looks whether anyone still wants it.
const BUSY: Duration = Duration::from_secs(2);

/// A VM that may be restarted, and with that be another machine of the same name.
pub(crate) struct Vm {
    name: String,
    /// None between two machines.
    machine: RwLock<Option<Arc<Machine>>>,
    events: Sender<Event>,
    /// Held while a snapshot is written, and while the run state is changed from outside.
    control: Mutex<()>,
    progress: Gauge,
}

impl Vm {
    pub(crate) fn new(name: &str, machine: Arc<Machine>, events: Sender<Event>) -> Self {
        Self {
            name: name.to_owned(),
            machine: RwLock::new(Some(machine)),
            events,
            control: Mutex::new(()),
            progress: Gauge::default(),
        }
    }

    /// The machine that runs now; none while it is being restarted.
    pub(crate) fn machine(&self) -> Option<Arc<Machine>> {
        self.machine.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The VM is ending: a snapshot that is being written is given up, and leaves nothing behind.
    pub(crate) fn cancel(&self) {
        self.progress.cancel();
    }

    /// Lets go of a machine that has ended, and with it of its disks, which the next one locks again.
    pub(crate) fn retire(&self) {
        let taken = self.machine.write().unwrap_or_else(PoisonError::into_inner).take();
        let deadline = Instant::now() + LET_GO;
        if let Some(machine) = taken {
            while Arc::strong_count(&machine) > 1 && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// The next machine.
    pub(crate) fn replace(&self, machine: Arc<Machine>) {
        *self.machine.write().unwrap_or_else(PoisonError::into_inner) = Some(machine);
    }

    /// The right to change what the machine does.
    fn control(&self) -> Result<MutexGuard<'_, ()>, Fault> {
        self.control.try_lock_for(BUSY).ok_or_else(|| {
            let phase = self.progress.read().phase;
            Fault(format!("a snapshot is being written ({phase}): try again when it is there"))
        })
    }

    fn running(&self) -> Result<Arc<Machine>, Fault> {
        self.machine().ok_or_else(|| Fault("the machine is being restarted".into()))
    }
}

impl Controlled for Vm {
    fn info(&self) -> InstanceInfo {
        let state = self.machine().map_or(InstanceState::NotStarted, |machine| {
            match machine.state() {
                RunState::Paused if machine.timings().first_instruction().is_none() => {
                    InstanceState::NotStarted
                }
                RunState::Paused => InstanceState::Paused,
                // The process is about to end.
                RunState::Running | RunState::Ended(_) => InstanceState::Running,
            }
        });
        InstanceInfo {
            app_name: "squib".into(),
            id: self.name.clone(),
            state,
            vmm_version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn pause(&self) -> Result<(), Fault> {
        let _control = self.control()?;
        self.running()?.pause(PAUSE_DEADLINE).map_err(|e| Fault(e.to_string()))
    }

    fn resume(&self) -> Result<(), Fault> {
        let _control = self.control()?;
        self.running()?.resume().map_err(|e| Fault(e.to_string()))
    }

    fn snapshot(
        &self,
        params: SnapshotCreateParams,
        give_up: &Arc<AtomicBool>,
    ) -> Result<SnapshotReport, Fault> {
        let _control = loop {
            match self.control() {
                Ok(control) => break control,
                Err(busy) if give_up.load(Ordering::Relaxed) => return Err(busy),
                Err(_) => {}
            }
        };
        capture::write(&*self.running()?, &params, &self.progress, give_up)
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
