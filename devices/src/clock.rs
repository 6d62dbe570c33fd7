//! Time as devices see it, injected so that a deterministic machine can own it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// The host's clock that counts suspensions: on Darwin that is what CLOCK_MONOTONIC does.
#[cfg(target_os = "macos")]
const CONTINUOUS: ClockId = ClockId::Monotonic;
#[cfg(not(target_os = "macos"))]
const CONTINUOUS: ClockId = ClockId::Boottime;

/// A source of time for devices.
pub trait Clock: Send + Sync {
    /// Nanoseconds since an arbitrary fixed point; never steps back.
    fn monotonic_ns(&self) -> u64;
    /// As [`monotonic_ns`](Self::monotonic_ns), and it goes on while the host is suspended.
    fn continuous_ns(&self) -> u64 {
        self.monotonic_ns()
    }
    /// Nanoseconds since 1970-01-01 00:00 UTC.
    fn wall_ns(&self) -> u64;
}

/// The host's clocks.
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock whose monotonic time starts at zero now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn monotonic_ns(&self) -> u64 {
        // 2^64 ns are 584 years.
        self.start.elapsed().as_nanos() as u64
    }

    fn continuous_ns(&self) -> u64 {
        let now = clock_gettime(CONTINUOUS);
        // Neither is negative: the clock starts at zero when the host boots.
        (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
    }

    fn wall_ns(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
    }
}
