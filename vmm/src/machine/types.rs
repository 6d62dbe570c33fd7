//! What a machine is told and what it answers.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use squib_devices::{
    bus::BusOverlap,
    device::PauseError,
    granules::Unavailable,
    memory::GuestRam,
    virtio::block::{BlockError, DiskGranules},
};
use squib_formats::{first_version, persist::PersistError};

use crate::{
    boot::{BootError, PageSize},
    config::{BackendKind, ConfigError},
    hypervisor::HypervisorError,
};

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked, and asked for a reset then. Linux tells the one from the other with
    /// [`config::WARM_PANIC`](crate::config::WARM_PANIC) on its command line; without it a panic is a
    /// [`Reset`](Self::Reset).
    Panic,
    /// [`Machine::stop`](super::Machine::stop) was called.
    Stopped,
    /// It cannot go on.
    Crashed(Crash),
    /// A part of its memory or of a disk cannot be had, or is not what it was. The guest has seen nothing in
    /// its place.
    Damaged(Unavailable),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Panic => f.write_str("the guest's kernel panicked"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Crashed(crash) => crash.fmt(f),
            Self::Damaged(why) => why.fmt(f),
        }
    }
}

/// Why a machine cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {vcpu} failed at pc {}: {why}", pc.map_or("unknown".to_owned(), |pc| format!("{pc:#x}")))]
pub struct Crash {
    /// The vCPU.
    pub vcpu: u32,
    /// Its next instruction, if it can be told.
    pub pc: Option<u64>,
    /// What the backend said.
    pub why: String,
}

/// Whether a machine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// No vCPU runs, devices rest.
    Paused,
    /// The guest runs.
    Running,
    /// It has ended.
    Ended(Outcome),
}

/// Where [`Machine::run_until`](super::Machine::run_until) stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunUntil {
    /// The count of retired instructions is exactly the one asked for (or was above it before).
    Reached,
    /// The guest sleeps, and only input from outside could wake it.
    Idle,
    /// The machine ended before.
    Ended(Outcome),
}

/// Whether a restored machine is the one and only copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Identity {
    /// It goes on as the machine that was saved.
    #[default]
    Same,
    /// It is one of several: it gets a new generation id, and the interrupt that tells of it, before its
    /// first instruction.
    Clone,
}

/// What the virtual counter makes of the time in which the guest could not run: between a save and a restore,
/// while the process was stopped, while the host was suspended. It never steps back, and a
/// [pause](super::Machine::pause) is no such time. The RTC shows the host's wall clock in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ClockPolicy {
    /// It goes on from where it was.
    #[default]
    Freeze,
    /// It is moved by the wall-clock time that passed if that is at most 3 seconds, in steps that the guest does not
    /// take for a hang. A longer time is left to the guest's RTC. Not on a deterministic machine.
    Advance,
}

/// What a restore made of the time since the save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeAway {
    /// The counter goes on from the saved value, as [`ClockPolicy::Freeze`] says.
    Frozen,
    /// [`ClockPolicy::Advance`] does nothing to a deterministic machine, which has a time of its own.
    Deterministic,
    /// The counter is moved.
    Advanced {
        /// The wall-clock time since the save.
        away: Duration,
        /// By how much the counter is moved, in the first second or two that the guest runs: by all of it, or not.
        counter: Duration,
    },
    /// The host's wall clock is behind the one of the save: the counter goes on from the saved value.
    WentBack {
        /// By so much.
        by: Duration,
    },
    /// The counter is too near its end to be moved, and goes on from the saved value.
    CounterAtEnd,
}

/// Choices of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RestoreOptions {
    /// What the machine is.
    pub identity: Identity,
    /// What time it is.
    pub clock: ClockPolicy,
}

/// What a restored machine's memory and disks hold.
pub struct Contents {
    /// Its memory.
    pub ram: GuestRam,
    /// Disks by id, open and locked. Those of the configuration that are not among them are opened at their
    /// paths.
    pub disks: BTreeMap<String, Arc<DiskGranules>>,
}

impl From<GuestRam> for Contents {
    /// Memory, and disks that are opened at their paths.
    fn from(ram: GuestRam) -> Self {
        Self { ram, disks: BTreeMap::new() }
    }
}

/// When things first happened.
#[derive(Debug, Default)]
pub struct Timings {
    first_instruction: OnceLock<Instant>,
    first_console_byte: OnceLock<Instant>,
}

impl Timings {
    /// Just before the first guest instruction of this machine object.
    pub fn first_instruction(&self) -> Option<Instant> {
        self.first_instruction.get().copied()
    }

    /// When the guest wrote the first byte to its console.
    pub fn first_console_byte(&self) -> Option<Instant> {
        self.first_console_byte.get().copied()
    }

    pub(super) fn mark_first_instruction(&self) {
        self.first_instruction.get_or_init(Instant::now);
    }

    pub(super) fn mark_first_console_byte(&self) {
        self.first_console_byte.get_or_init(Instant::now);
    }
}

/// Why a machine cannot be made, or cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// Kernel, initrd or device tree.
    #[error("{0}")]
    Boot(#[from] BootError),
    /// The kernel's pages are of a size that the CPU lacks.
    #[error("the kernel is built for {pages:?} pages, which the {backend} backend does not have")]
    Granule {
        /// The kernel's.
        pages: PageSize,
        /// The backend.
        backend: BackendKind,
    },
    /// RAM could not be had.
    #[error("{size} bytes of guest memory: {source}")]
    Memory {
        /// Bytes asked for.
        size: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// The RAM that was handed over is not of the configuration's size.
    #[error("{size} bytes of guest memory instead of {expected}")]
    MemorySize {
        /// Bytes handed over.
        size: u64,
        /// Bytes that the configuration demands.
        expected: u64,
    },
    /// The moment of another capture is still being read.
    #[error("another capture of the machine is under way")]
    Frozen,
    /// The backend.
    #[error("{0}")]
    Hypervisor(#[from] HypervisorError),
    /// Two devices claim one address.
    #[error("{0}")]
    Bus(#[from] BusOverlap),
    /// A disk cannot be had.
    #[error("{0}")]
    Disk(#[from] BlockError),
    /// There is no entropy for a seed.
    #[error("the host gives no random numbers: {0}")]
    Entropy(#[from] getrandom::Error),
    /// A thread could not be started.
    #[error("thread `{name}`: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// vCPUs did not leave the guest in time. The machine runs on.
    #[error("vCPUs {vcpus:?} did not stop within {deadline:?}; the machine runs on")]
    VcpuDeadline {
        /// Those that did not.
        vcpus: Vec<u32>,
        /// The time they had.
        deadline: Duration,
    },
    /// A device did not come to rest in time. The machine runs on.
    #[error("{0}; the machine runs on")]
    DevicePause(#[from] PauseError),
    /// The machine has ended.
    #[error("the machine has ended: {0}")]
    Ended(Outcome),
    /// Only a paused machine can do this.
    #[error("the machine must be paused to {what}")]
    NotPaused {
        /// What was asked for.
        what: &'static str,
    },
    /// Only a deterministic machine can do this.
    #[error("only a deterministic machine can {what}")]
    NotDeterministic {
        /// What was asked for.
        what: &'static str,
    },
    /// A state could not be saved or taken over.
    #[error("{instance}: {source}")]
    State {
        /// Kind and instance of the section.
        instance: String,
        /// Why.
        source: PersistError,
    },
    /// A section that this machine has no place for.
    #[error("the snapshot holds a section {section} that this machine has no place for")]
    UnknownSection {
        /// Kind and instance.
        section: String,
    },
    /// A section that this machine needs.
    #[error("the snapshot lacks the section {section}")]
    MissingSection {
        /// Kind and instance.
        section: String,
    },
    /// Two sections of one name.
    #[error("the snapshot holds the section {section} twice")]
    DuplicateSection {
        /// Kind and instance.
        section: String,
    },
    /// A vCPU's thread is gone.
    #[error("the thread of vCPU {vcpu} has ended")]
    VcpuGone {
        /// The vCPU.
        vcpu: u32,
    },
}

/// The saved form of the machine's time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeState {
    /// Value of the virtual counter.
    pub counter: u64,
    /// Its ticks a second.
    pub frequency: u64,
    /// The host's wall clock at the save, nanoseconds since 1970-01-01 00:00 UTC. A deterministic machine
    /// saves what its own clock shows.
    pub wall_ns: u64,
}

first_version!(TimeState, "time");
