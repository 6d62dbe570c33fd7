//! What other threads tell a vCPU: interrupt lines, kicks, and requests of its peers.

use std::{
    sync::{
        Condvar, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// The interrupt controller's IRQ output for this vCPU is high.
pub(crate) const IRQ: u32 = 1 << 0;
/// The interrupt controller's FIQ output for this vCPU is high.
pub(crate) const FIQ: u32 = 1 << 1;
/// Someone wants the vCPU's thread to leave the guest.
pub(crate) const KICK: u32 = 1 << 2;
/// A peer asks for maintenance of translations or decoded code.
pub(crate) const MAINTENANCE: u32 = 1 << 3;

/// Lines into one vCPU, set from any thread.
#[derive(Debug, Default)]
pub struct Signals {
    bits: AtomicU32,
    sleeping: Mutex<()>,
    wake: Condvar,
}

impl Signals {
    /// Drives the IRQ line.
    pub fn set_irq(&self, level: bool) {
        self.drive(IRQ, level);
    }

    /// Drives the FIQ line.
    pub fn set_fiq(&self, level: bool) {
        self.drive(FIQ, level);
    }

    /// Makes the current or the next [`run`](crate::Cpu::run) return [`Exit::Kicked`](crate::Exit::Kicked).
    pub fn kick(&self) {
        self.raise(KICK);
    }

    /// Sleeps until an interrupt line is high, a kick or a request arrives, or `timeout` passes.
    /// This is how a thread carries out [`Exit::Wfi`](crate::Exit::Wfi).
    pub fn wait(&self, timeout: Option<Duration>) {
        let guard = self.sleeping.lock().unwrap_or_else(|poison| poison.into_inner());
        let asleep = |_: &mut ()| self.bits() == 0;
        match timeout {
            // The condition variable's own result tells nothing that the caller does not look up anew.
            Some(timeout) => drop(self.wake.wait_timeout_while(guard, timeout, asleep)),
            None => drop(self.wake.wait_while(guard, asleep)),
        }
    }

    /// All bits.
    #[inline]
    pub(crate) fn bits(&self) -> u32 {
        self.bits.load(Ordering::Acquire)
    }

    /// Sets `bit` and wakes the vCPU.
    pub(crate) fn raise(&self, bit: u32) {
        if self.bits.fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            // Taking the lock orders the change against a thread that is about to sleep.
            drop(self.sleeping.lock().unwrap_or_else(|poison| poison.into_inner()));
            self.wake.notify_all();
        }
    }

    /// Clears `bit`; true if it was set.
    pub(crate) fn take(&self, bit: u32) -> bool {
        self.bits.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    fn drive(&self, bit: u32, level: bool) {
        if level {
            self.raise(bit);
        } else {
            self.take(bit);
        }
    }
}
