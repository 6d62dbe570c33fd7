//! Waiting for an interrupt outside the guest.
//!
//! The interrupt controller is the framework's: it does not tell when it has something for a vCPU that is not
//! in the guest. What can give it something is a device's line, the vCPU's own timer, and another vCPU, whose
//! software-generated interrupts nobody here sees. So a vCPU waits for a line, its timer or a kick; and while
//! another vCPU is in the guest, or has been there since, it goes and looks every [`LOOK_AGAIN`].

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// How late an interrupt from another vCPU may be seen.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What all vCPUs of a machine share.
#[derive(Default)]
pub(super) struct Idle {
    lock: Mutex<()>,
    changed: Condvar,
    /// Lines that were raised.
    rings: AtomicU64,
    /// vCPUs in [`wait`](Self::wait).
    waiting: AtomicU32,
    /// vCPUs in the guest.
    inside: AtomicU32,
    /// Times that a vCPU has left the guest.
    left: AtomicU64,
}

/// What a vCPU knew when it last entered the guest. What happened after that, it may not have seen there.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    rings: u64,
    left: u64,
}

impl Idle {
    /// A line was raised.
    pub(super) fn ring(&self) {
        self.rings.fetch_add(1, Ordering::SeqCst);
        self.wake();
    }

    /// Makes those who wait look again.
    pub(super) fn wake(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            // Taking the lock orders the change against a thread that is about to wait.
            drop(self.lock.lock());
            self.changed.notify_all();
        }
    }

    /// Runs `guest`, and answers what was known before.
    pub(super) fn inside<R>(&self, guest: impl FnOnce() -> R) -> (Seen, R) {
        let rings = self.rings.load(Ordering::SeqCst);
        // Its own leaving is the one that is added.
        let seen = Seen { rings, left: self.left.load(Ordering::SeqCst) + 1 };
        if self.inside.fetch_add(1, Ordering::SeqCst) == 0 {
            self.wake();
        }
        let result = guest();
        self.left.fetch_add(1, Ordering::SeqCst);
        self.inside.fetch_sub(1, Ordering::SeqCst);
        (seen, result)
    }

    /// Waits until there may be an interrupt, `deadline` has passed or `kicked` is set.
    pub(super) fn wait(&self, seen: Seen, deadline: Option<Instant>, kicked: &AtomicBool) {
        let mut guard = self.lock.lock();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let look_again = Instant::now() + LOOK_AGAIN;
        while !kicked.load(Ordering::SeqCst) && self.rings.load(Ordering::SeqCst) == seen.rings {
            let alone = self.inside.load(Ordering::SeqCst) == 0
                && self.left.load(Ordering::SeqCst) == seen.left;
            let look = (!alone).then_some(look_again);
            let until = deadline.into_iter().chain(look).min();
            let late = match until {
                Some(until) => self.changed.wait_until(&mut guard, until).timed_out(),
                None => {
                    self.changed.wait(&mut guard);
                    false
                }
            };
            if late {
                break;
            }
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_raised_since_the_guest_was_entered_ends_the_wait_at_once() {
        let (idle, kicked) = (Idle::default(), AtomicBool::new(false));
        let (seen, ()) = idle.inside(|| idle.ring());
        idle.wait(seen, None, &kicked);
    }

    #[test]
    fn another_vcpu_in_the_guest_makes_the_waiting_one_look_again() {
        let (idle, kicked) = (Idle::default(), AtomicBool::new(false));
        let (seen, ()) = idle.inside(|| ());
        // It was there and has left: it may have sent something.
        idle.inside(|| ());
        idle.wait(seen, None, &kicked);
        let (seen, ()) = idle.inside(|| ());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| idle.wait(seen, None, &kicked));
            idle.inside(|| waiting.join().unwrap());
        });
    }

    #[test]
    fn a_kick_ends_a_wait_without_end() {
        let (idle, kicked) = (Idle::default(), AtomicBool::new(false));
        let (seen, ()) = idle.inside(|| ());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| idle.wait(seen, None, &kicked));
            kicked.store(true, Ordering::SeqCst);
            idle.wake();
            waiting.join().unwrap();
        });
    }
}
