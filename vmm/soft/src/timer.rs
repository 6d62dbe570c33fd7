//! The generic timers, CNTV and CNTP (Arm ARM D11.2), and the counter as this vCPU sees it.

use std::time::Duration;

use crate::{CNTFRQ_HZ, cpu::Cpu, op::Op};

/// Outputs of the two timers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TimerLines {
    pub(crate) virt: bool,
    pub(crate) phys: bool,
}

/// CNTx_CTL_EL0.ENABLE.
const ENABLE: u64 = 1 << 0;
/// CNTx_CTL_EL0.IMASK.
const IMASK: u64 = 1 << 1;
/// CNTx_CTL_EL0.ISTATUS, read-only.
const ISTATUS: u64 = 1 << 2;

impl Cpu {
    /// Counter value at which the first timer that is armed and not masked fires, in ticks; in the
    /// past if one has fired.
    pub fn next_timer(&self) -> Option<u64> {
        let sys = &self.sys;
        let armed = |ctl: u64| ctl & (ENABLE | IMASK) == ENABLE;
        let virt = armed(sys.cntv_ctl).then_some(sys.cntv_cval);
        let phys = armed(sys.cntp_ctl).then_some(sys.cntp_cval);
        virt.into_iter().chain(phys).min()
    }

    /// How long until [`next_timer`](Self::next_timer), on a counter that follows the host's clock.
    pub fn until_timer(&self) -> Option<Duration> {
        const { assert!(CNTFRQ_HZ == 1_000_000_000, "a tick is a nanosecond") };
        let now = self.shared.counter.now();
        self.next_timer().map(|at| Duration::from_nanos(at.saturating_sub(now)))
    }

    /// The outputs at counter value `now`.
    pub(crate) fn timer_lines(&self, now: u64) -> TimerLines {
        let fires = |ctl: u64, cval: u64| ctl & (ENABLE | IMASK) == ENABLE && now >= cval;
        TimerLines {
            virt: fires(self.sys.cntv_ctl, self.sys.cntv_cval),
            phys: fires(self.sys.cntp_ctl, self.sys.cntp_cval),
        }
    }

    /// The next counter value after `now` at which an output changes by itself.
    pub(crate) fn next_line_change(&self, now: u64) -> Option<u64> {
        let sys = &self.sys;
        [(sys.cntv_ctl, sys.cntv_cval), (sys.cntp_ctl, sys.cntp_cval)]
            .into_iter()
            .filter(|(ctl, cval)| ctl & (ENABLE | IMASK) == ENABLE && *cval > now)
            .map(|(_, cval)| cval)
            .min()
    }

    /// The counter while no block executes.
    pub(crate) fn ticks_between_blocks(&self) -> u64 {
        if self.deterministic {
            self.retired().wrapping_add(self.skipped)
        } else {
            self.shared.counter.now()
        }
    }

    /// The counter at `op`, which executes now.
    pub(crate) fn ticks_at(&self, op: &Op) -> u64 {
        if self.deterministic {
            // Its block is paid for to the end.
            let ahead = u64::from(op.rem) + 1;
            self.retired().wrapping_sub(ahead).wrapping_add(self.skipped)
        } else {
            self.shared.counter.now()
        }
    }

    /// Lets devices see the time up to which a deterministic vCPU has come.
    pub(crate) fn publish_time(&self) {
        if self.deterministic {
            self.shared.counter.set(self.retired().wrapping_add(self.skipped));
        }
    }

    /// CNTx_CTL_EL0 as read.
    pub(crate) fn read_ctl(&self, ctl: u64, cval: u64, now: u64) -> u64 {
        ctl & (ENABLE | IMASK) | if ctl & ENABLE != 0 && now >= cval { ISTATUS } else { 0 }
    }

    /// CNTx_CTL_EL0 as written.
    pub(crate) fn written_ctl(value: u64) -> u64 {
        value & (ENABLE | IMASK)
    }
}
