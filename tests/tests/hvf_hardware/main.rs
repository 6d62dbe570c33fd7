//! The hvf backend on Hypervisor.framework itself: the tests that the stand-in runs everywhere, from the same
//! files. See docs/macos.md.
#![cfg(all(target_os = "macos", target_arch = "aarch64"))]

#[path = "../../hvf/tests/it/common.rs"]
mod common;
#[path = "../../hvf/tests/it/machine.rs"]
mod machine;
#[path = "../../hvf/tests/it/snapshots.rs"]
mod snapshots;
#[path = "../../hvf/tests/it/told.rs"]
mod told;

use std::sync::{Mutex, MutexGuard, PoisonError};

static ALONE: Mutex<()> = Mutex::new(());

/// The time in which one test has the framework for itself: there is one virtual machine a process.
struct Session {
    _alone: MutexGuard<'static, ()>,
}

impl Session {
    /// Waits for its turn, also after a test that has failed.
    fn begin() -> Self {
        Self { _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Nobody can ask that of the framework: its runs end as they end.
    fn cancel_every(&self, _n: u32) {}
}
