//! Time as devices see it, injected so that a deterministic machine can own it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A source of time for devices.
pub trait Clock: Send + Sync {
    /// Nanoseconds since an arbitrary fixed point; never steps back.
    fn monotonic_ns(&self) -> u64;
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

    fn wall_ns(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
    }
}
