//! The virtual counter: the host's, less an offset that is the same for all vCPUs.

use parking_lot::Mutex;

use super::sys;
use crate::hypervisor::SystemCounter;

/// CNTVCT_EL0 of all vCPUs.
pub(super) struct HvfCounter {
    frequency: u64,
    state: Mutex<State>,
}

#[derive(Clone, Copy)]
enum State {
    Held(u64),
    /// What is subtracted from the host's counter.
    Running(u64),
}

impl HvfCounter {
    /// A counter held at zero.
    pub(super) fn new(frequency: u64) -> Self {
        Self { frequency, state: Mutex::new(State::Held(0)) }
    }

    /// The offset that vCPUs need. While it is held, one that shows its value now.
    pub(super) fn offset(&self) -> u64 {
        match *self.state.lock() {
            State::Held(ticks) => sys::host_ticks().wrapping_sub(ticks),
            State::Running(offset) => offset,
        }
    }
}

impl SystemCounter for HvfCounter {
    fn frequency(&self) -> u64 {
        self.frequency
    }

    fn now(&self) -> u64 {
        match *self.state.lock() {
            State::Held(ticks) => ticks,
            State::Running(offset) => sys::host_ticks().wrapping_sub(offset),
        }
    }

    fn start(&self) {
        let mut state = self.state.lock();
        if let State::Held(ticks) = *state {
            *state = State::Running(sys::host_ticks().wrapping_sub(ticks));
        }
    }

    fn stop(&self) {
        let mut state = self.state.lock();
        if let State::Running(offset) = *state {
            *state = State::Held(sys::host_ticks().wrapping_sub(offset));
        }
    }

    fn set(&self, ticks: u64) {
        *self.state.lock() = State::Held(ticks);
    }
}
