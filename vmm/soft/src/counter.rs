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
    Host {
        epoch: Instant,
        running: AtomicBool,
        value_at_start: AtomicU64,
        started_at: AtomicU64,
        /// The last lease's length and end: see [`Counter::lease`].
        lease: AtomicU64,
        end: AtomicU64,
    },
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
                lease: AtomicU64::new(u64::MAX),
                end: AtomicU64::new(u64::MAX),
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
            Mode::Host { epoch, running, value_at_start, started_at, end, .. } => {
                // In this order: `lease` moves the start before the end, and by a reading of the host's
                // clock that is older than the start that is seen here. The end of an earlier run may lie
                // below the base.
                let end = end.load(Ordering::Acquire);
                let base = value_at_start.load(Ordering::Acquire);
                if !running.load(Ordering::Acquire) {
                    return base;
                }
                let start = started_at.load(Ordering::Acquire);
                base.wrapping_add(host_ns(*epoch).saturating_sub(start)).min(end).max(base)
            }
        }
    }

    /// Lets a host counter run from its present value, for a lease as long as the last one. Called while no vCPU
    /// runs. Idempotent.
    pub fn start(&self) {
        if let Mode::Host { epoch, running, value_at_start, started_at, lease, end } = &self.mode
            && !running.load(Ordering::Acquire)
        {
            let base = value_at_start.load(Ordering::Acquire);
            end.store(base.saturating_add(lease.load(Ordering::Acquire)), Ordering::Release);
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

    /// Lets a running host counter come `ticks` further than it is now, and then stand still; a stopped one, when it
    /// is started. One that stands at the end of its last lease goes on from there: vCPUs see nothing of the time
    /// in which no thread of the process ran. vCPUs may run; two calls at once, or one beside `start`, `stop` or
    /// `set`, may not.
    pub fn lease(&self, ticks: u64) {
        let Mode::Host { epoch, running, value_at_start, started_at, lease, end } = &self.mode
        else {
            return;
        };
        lease.store(ticks, Ordering::Release);
        if !running.load(Ordering::Acquire) {
            // It begins with the start.
            return;
        }
        let start = started_at.load(Ordering::Acquire);
        let elapsed = host_ns(*epoch).saturating_sub(start);
        let free = value_at_start.load(Ordering::Acquire).wrapping_add(elapsed);
        let excess = free.saturating_sub(end.load(Ordering::Acquire));
        started_at.store(start + excess, Ordering::Release);
        end.store((free - excess).saturating_add(ticks), Ordering::Release);
    }
}

fn host_ns(epoch: Instant) -> u64 {
    // 2^64 ns are 584 years.
    epoch.elapsed().as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    const LONG: u64 = 3600 * CNTFRQ_HZ;

    #[test]
    fn a_counter_stands_at_the_end_of_its_lease_and_goes_on_from_there() {
        let counter = Counter::host(1000);
        counter.start();
        counter.lease(5_000_000);
        while counter.now() < 5_000_000 {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(10));
        let end = counter.now();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(counter.now(), end);
        let before = Instant::now();
        counter.lease(LONG);
        let now = counter.now();
        assert!((end..=end + host_ns(before)).contains(&now), "{end} then {now}");
        thread::sleep(Duration::from_millis(1));
        assert!(counter.now() > now);
    }

    #[test]
    fn a_lease_that_has_not_ended_takes_no_time_away() {
        let counter = Counter::host(0);
        let before = Instant::now();
        counter.start();
        counter.lease(LONG);
        let after = Instant::now();
        thread::sleep(Duration::from_millis(2));
        counter.lease(LONG);
        let least = host_ns(after);
        let now = counter.now();
        assert!((least..=host_ns(before)).contains(&now), "{least}, {now}");
    }

    #[test]
    fn a_counter_never_steps_back_while_its_lease_is_renewed() {
        let counter = Counter::host(0);
        counter.start();
        counter.lease(20_000);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut last = 0;
                while last < 20_000_000 {
                    let now = counter.now();
                    assert!(now >= last, "{last} then {now}");
                    last = now;
                }
            });
            while !reader.is_finished() {
                thread::sleep(Duration::from_micros(50));
                counter.lease(20_000);
            }
            reader.join().unwrap();
        });
    }

    #[test]
    fn a_counter_that_is_started_has_a_lease_as_long_as_the_last_one() {
        let counter = Counter::host(0);
        counter.lease(1000);
        for value in [5, LONG] {
            counter.set(value);
            counter.start();
            thread::sleep(Duration::from_millis(1));
            assert_eq!(counter.now(), value + 1000);
            counter.stop();
            assert_eq!(counter.now(), value + 1000);
        }
    }
}
