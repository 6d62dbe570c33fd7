//! Telling the caller how far a capture or a restore is.

use std::{num::NonZeroUsize, sync::atomic::AtomicBool};

use squib_formats::image::{Control, Progress};

/// What a capture or a restore is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The machine is brought to rest.
    Pause,
    /// The state of devices and vCPUs is written.
    State,
    /// Guest memory is written or read.
    Memory,
    /// The bytes of the disk of that id are written, read or digested.
    Disk(String),
    /// The snapshot is made durable and put in its place.
    Publish,
    /// Header, manifest and sections of the snapshot are checked.
    Open,
    /// The machine is put together.
    Machine,
}

/// Told how far a capture or a restore is. Called from any thread.
pub trait Observer: Sync {
    /// A phase begins.
    fn begin(&self, phase: &Phase) {
        let _ = phase;
    }

    /// `done` of `total` raw bytes of the phase are through, for which `stored` bytes were written or
    /// read on disk.
    fn advanced(&self, phase: &Phase, done: u64, total: u64, stored: u64) {
        let _ = (phase, done, total, stored);
    }
}

/// Nobody looks.
impl Observer for () {}

/// How a capture or a restore runs.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Told how far it is.
    pub observer: &'a dyn Observer,
    /// Set by anyone to make it end with an error.
    pub cancel: &'a AtomicBool,
    /// Worker threads.
    pub threads: NonZeroUsize,
}

impl Default for Run<'_> {
    /// Unobserved, never cancelled, on all cores.
    fn default() -> Self {
        let Control { cancel, threads, .. } = Control::default();
        Self { observer: &(), cancel, threads }
    }
}

impl Run<'_> {
    /// Begins `phase` and runs `work` with its control.
    pub(crate) fn phase<R>(&self, phase: Phase, work: impl FnOnce(Control<'_>) -> R) -> R {
        self.observer.begin(&phase);
        let progress = Advance { observer: self.observer, phase };
        work(Control { threads: self.threads, progress: &progress, cancel: self.cancel })
    }
}

struct Advance<'a> {
    observer: &'a dyn Observer,
    phase: Phase,
}

impl Progress for Advance<'_> {
    fn advanced(&self, done: u64, total: u64, stored: u64) {
        self.observer.advanced(&self.phase, done, total, stored);
    }
}
