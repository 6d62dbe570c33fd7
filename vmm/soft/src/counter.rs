//! The system counter (Arm ARM D11.1): one for a machine, read by every vCPU.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Frequency of the counter, CNTFRQ_EL0, in hertz: one tick is one nanosecond.
pub const CNTFRQ_HZ: u64 = 1_000_000_000;

/// The counter behind CNTVCT_EL0 and CNTPCT_EL0, in ticks of [`CNTFRQ_HZ`].
#[derive(Debug)]
pub struct Counter {
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    /// Follows the host's monotonic clock while it runs.
    Host { epoch: Instant, running: AtomicBool, value_at_start: AtomicU64, started_at: AtomicU64 },
    /// Advanced by the one vCPU of a deterministic machine: one tick an instruction.
    Instructions { value: AtomicU64 },
}

impl Counter {
    /// A stopped counter at `value` that follows the host's clock once it is started.
    pub fn host(value: u64) -> Self {
        Self {
            mode: Mode::Host {
                epoch: Instant::now(),
                running: AtomicBool::new(false),
                value_at_start: AtomicU64::new(value),
                started_at: AtomicU64::new(0),
            },
        }
    }

    /// A counter at `value` that counts retired instructions.
    pub fn instructions(value: u64) -> Self {
        Self { mode: Mode::Instructions { value: AtomicU64::new(value) } }
    }

    /// True if time is the count of retired instructions.
    pub fn is_deterministic(&self) -> bool {
        matches!(self.mode, Mode::Instructions { .. })
    }

    /// The value now, in ticks.
    pub fn now(&self) -> u64 {
        match &self.mode {
            Mode::Instructions { value } => value.load(Ordering::Relaxed),
            Mode::Host { epoch, running, value_at_start, started_at } => {
                let base = value_at_start.load(Ordering::Acquire);
                if !running.load(Ordering::Acquire) {
                    return base;
                }
                let elapsed = host_ns(*epoch).saturating_sub(started_at.load(Ordering::Acquire));
                base.wrapping_add(elapsed)
            }
        }
    }

    /// Lets a host counter run from its present value. Called while no vCPU runs. Idempotent.
    pub fn start(&self) {
        if let Mode::Host { epoch, running, started_at, .. } = &self.mode
            && !running.load(Ordering::Acquire)
        {
            started_at.store(host_ns(*epoch), Ordering::Release);
            running.store(true, Ordering::Release);
        }
    }

    /// Holds a host counter at its present value. Called while no vCPU runs. Idempotent.
    pub fn stop(&self) {
        let now = self.now();
        if let Mode::Host { running, value_at_start, .. } = &self.mode {
            value_at_start.store(now, Ordering::Release);
            running.store(false, Ordering::Release);
        }
    }

    /// Sets the value. Called while the counter is stopped and no vCPU runs.
    pub fn set(&self, ticks: u64) {
        match &self.mode {
            Mode::Instructions { value } => value.store(ticks, Ordering::Relaxed),
            Mode::Host { value_at_start, .. } => value_at_start.store(ticks, Ordering::Release),
        }
    }
}

fn host_ns(epoch: Instant) -> u64 {
    // 2^64 ns are 584 years.
    epoch.elapsed().as_nanos() as u64
}
