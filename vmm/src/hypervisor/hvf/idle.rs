//! Waiting for an interrupt outside the guest.
//!
//! A WFI is the framework's own affair: its interrupt controller knows what a vCPU waits for, and the vCPU
//! stays in the guest. Only a call of PSCI's CPU_SUSPEND comes here, and a WFI where a framework lets it
//! through. What the interrupt controller has for the vCPU by then, nobody here can see: so it waits for a
//! line, its timer or a kick, and goes and looks after [`LOOK_AGAIN`] at the latest.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// How late an interrupt may be seen.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What all vCPUs of a machine share.
pub(super) struct Idle {
    look_again: Duration,
    /// How often those who wait were woken.
    wakes: Mutex<u64>,
    changed: Condvar,
    /// vCPUs in [`wait`](Self::wait).
    waiting: AtomicU32,
}

impl Default for Idle {
    fn default() -> Self {
        Self::new(LOOK_AGAIN)
    }
}

impl Idle {
    fn new(look_again: Duration) -> Self {
        let waiting = AtomicU32::new(0);
        Self { look_again, wakes: Mutex::default(), changed: Condvar::new(), waiting }
    }

    /// Makes those who wait look again.
    pub(super) fn wake(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            *self.wakes.lock() += 1;
            self.changed.notify_all();
        }
    }

    /// Waits until there may be an interrupt, at most `timer`, or `kicked` is set.
    pub(super) fn wait(&self, timer: Option<Duration>, kicked: &AtomicBool) {
        // One that has fired already did not end the guest's wait: its interrupt is disabled.
        let timer = timer.filter(|left| !left.is_zero());
        let until =
            Instant::now() + timer.map_or(self.look_again, |left| left.min(self.look_again));
        let mut wakes = self.wakes.lock();
        let before = *wakes;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while !kicked.load(Ordering::SeqCst)
            && *wakes == before
            && !self.changed.wait_until(&mut wakes, until).timed_out()
        {}
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_itself() {
        let (idle, kicked) = (Idle::default(), AtomicBool::new(false));
        for timer in [None, Some(Duration::ZERO), Some(Duration::MAX)] {
            idle.wait(timer, &kicked);
        }
    }

    #[test]
    fn a_kick_and_a_line_end_a_wait_at_once() {
        let idle = Idle::new(Duration::from_secs(3600));
        idle.wait(None, &AtomicBool::new(true));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| idle.wait(None, &AtomicBool::new(false)));
            while !waiting.is_finished() {
                idle.wake();
                std::thread::yield_now();
            }
        });
    }
}
