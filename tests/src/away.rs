//! Linux that was away: what it says of its own time, and whether it takes that for a hang.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use squib_vmm::machine::{self, ClockPolicy, Identity};

use crate::{linux::Shell, retime::retime};

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// What makes Linux notice every hang: the kernel panics at a soft lockup, and RCU waits no longer than by default.
pub const STRICT: &str =
    "softlockup_panic=1 rcupdate.rcu_cpu_stall_timeout=21 rcupdate.rcu_exp_cpu_stall_timeout=21000";

/// Times away, in seconds: the counter makes up for the first two.
pub const DISTANCES: [u64; 6] = [3, 5, 45, 3600, 24 * 3600, 365 * 24 * 3600];

/// What the kernel logs of a hang.
const HANGS: &str = "detected stall|self-detected|soft lockup|hard lockup|blocked for more|starved for|throttling \
     activated|call trace";

/// Makes the guest busy: two programs, the kernel's random numbers, and the disk.
pub const BUSY: &str = "for n in 1 2; do while :; do :; done & done; \
     cat /dev/urandom > /dev/null & \
     (while :; do dd if=/dev/zero of=/dev/vda bs=64k count=64 conv=fsync 2>/dev/null; done) & :";

/// Where a guest was when its snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It boots: there is no shell yet.
    Boot,
    /// Its shell waits.
    Idle,
    /// It is [busy](BUSY).
    Busy,
}

/// What a guest did after it was away.
#[derive(Clone, Copy, Debug)]
pub struct Return {
    /// How long it took to answer; for a guest that boots, from its prompt on.
    pub answer: Duration,
    /// By how many seconds its wall clock was ahead of the host's when it first answered.
    pub first: i64,
    /// The same, some seconds later.
    pub later: i64,
    /// How long it believes to be up.
    pub uptime: Duration,
    /// Timer interrupts of all vCPUs since its boot.
    pub interrupts: u64,
}

/// The host's wall clock.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// Lets `snap`, of a guest with [`STRICT`], go on as if it had been away for `seconds`, with its disk in the new directory
/// `disks`.
pub fn send_away(snap: &Path, disks: &Path, seconds: u64, clock: ClockPolicy) -> Result<Shell> {
    retime(snap, |time| time.wall_ns = wall_ns() - seconds * SECOND)?;
    let options = machine::RestoreOptions { identity: Identity::Same, clock };
    let shell = Shell::restore(snap, disks, options)?;
    shell.machine.resume()?;
    Ok(shell)
}

/// Asks a guest that was at `moment` and has just come back. An error if it has noticed a hang, or does not go on.
pub fn come_back(shell: &Shell, moment: Moment) -> Result<Return> {
    if moment == Moment::Boot {
        shell.wait_for_prompt()?;
    }
    let started = Instant::now();
    let first = wall_offset(shell)?;
    let answer = started.elapsed();
    // Linux looks for lockups every 4 seconds.
    thread::sleep(Duration::from_secs(5));
    let later = wall_offset(shell)?;
    let interrupts = timer_interrupts(shell)?;
    let uptime = shell.ask("cut -d. -f1 /proc/uptime")?.parse().context("an uptime")?;
    let hangs = shell.ask(&format!("dmesg | grep -iE '{HANGS}'"))?;
    ensure!(hangs.is_empty(), "{hangs}\n{}", shell.text());
    let outcome = shell.machine.wait_timeout(Duration::ZERO);
    ensure!(outcome.is_none(), "{outcome:?}: {}", shell.text());
    Ok(Return { answer, first, later, uptime: Duration::from_secs(uptime), interrupts })
}

/// By how many seconds the guest's wall clock is ahead of the host's. Zero if it may be right.
pub fn wall_offset(shell: &Shell) -> Result<i64> {
    let before = (wall_ns() / SECOND) as i64;
    let guest: i64 = shell.ask("date +%s")?.parse().context("a date")?;
    let after = (wall_ns() / SECOND) as i64;
    Ok((guest - after).max(0) + (guest - before).min(0))
}

/// Timer interrupts of all vCPUs since the boot.
pub fn timer_interrupts(shell: &Shell) -> Result<u64> {
    let line = shell.ask("grep arch_timer /proc/interrupts")?;
    let counts = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
    Ok(counts.sum())
}
