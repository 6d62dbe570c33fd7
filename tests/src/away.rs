//! Linux that was away: what it says of its own time, and whether it takes that for a hang.

use std::{
    cell::Cell,
    io::{self, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use squib::kit::Kit;
use squib_devices::rtc::RtcState;
use squib_vmm::machine::{self, ClockPolicy, Identity, Machine};
use tempfile::TempDir;

use crate::{
    console::Capture,
    linux::{self, Shell},
    retime::{edit, retime},
};

/// Longer than the slowest host takes for a boot.
const PATIENCE: Duration = Duration::from_secs(240);

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// What makes Linux notice every hang: the kernel panics at a soft lockup, and RCU waits no longer
/// than by default.
pub const STRICT: &str =
    "softlockup_panic=1 rcupdate.rcu_cpu_stall_timeout=21 rcupdate.rcu_exp_cpu_stall_timeout=21000";

/// Times away, in seconds. The first is none, to compare with; for the next the counter makes up.
pub const DISTANCES: [u64; 7] = [0, 3, 12, 45, 3600, 24 * 3600, 365 * 24 * 3600];

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
    /// By how many seconds its wall clock was ahead of the right time when it first answered.
    pub first: i64,
    /// The same, some seconds later.
    pub later: i64,
    /// How long it believes to be up.
    pub uptime: Duration,
    /// Timer interrupts of all vCPUs since its boot.
    pub interrupts: u64,
}

/// Whether the counter of a machine that has just been resumed gets ahead of the host's clock by
/// `away` nanoseconds, at most after `patience`. It was `saved`.
pub fn makes_up_for(machine: &Machine, saved: u64, away: u64, patience: Duration) -> bool {
    let resumed = Instant::now();
    while resumed.elapsed() < patience {
        let expected = resumed.elapsed() + Duration::from_nanos(away);
        let time = machine.time();
        let moved = u128::from(time.counter - saved) * 1_000_000_000 / u128::from(time.frequency);
        if moved >= expected.as_nanos() {
            return true;
        }
        thread::sleep(Duration::from_millis(10));
    }
    false
}

/// The host's wall clock.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// Lets `snap`, of a guest with [`STRICT`], go on as if it had been away for `seconds`, with its
/// disk in the new directory `disks`.
pub fn send_away(snap: &Path, disks: &Path, seconds: u64, clock: ClockPolicy) -> Result<Shell> {
    retime(snap, |time| time.wall_ns = wall_ns() - seconds * SECOND)?;
    // The host's clock cannot be moved: the guest's RTC is.
    edit(snap, |rtc: &mut RtcState| {
        let now = wall_ns() / SECOND;
        rtc.offset = seconds as u32;
        rtc.due = now + u64::from(rtc.alarm.wrapping_sub((now as u32).wrapping_add(rtc.offset)));
    })?;
    let options = machine::RestoreOptions { identity: Identity::Same, clock };
    let shell = Shell::restore(snap, disks, options)?;
    shell.machine.resume()?;
    Ok(shell)
}

/// Asks a guest that was at `moment` and has just come back. An error if it has noticed a hang, or
/// does not go on.
///
/// It was away for `seconds`, by which its RTC is ahead of the host's clock from now on.
pub fn come_back(shell: &Shell, moment: Moment, seconds: u64) -> Result<Return> {
    if moment == Moment::Boot {
        shell.wait_for_prompt()?;
    }
    let back = question(shell, seconds)?;
    let outcome = shell.machine.wait_timeout(Duration::ZERO);
    ensure!(outcome.is_none(), "{outcome:?}: {}", shell.text());
    Ok(back)
}

fn question(shell: &impl Guest, ahead: u64) -> Result<Return> {
    let started = Instant::now();
    let first = wall_offset(shell, ahead)?;
    let answer = started.elapsed();
    // Linux looks for lockups every 4 seconds.
    thread::sleep(Duration::from_secs(5));
    let later = wall_offset(shell, ahead)?;
    let interrupts = timer_interrupts(shell)?;
    let uptime = shell.ask("cut -d. -f1 /proc/uptime")?.parse().context("an uptime")?;
    let hangs = shell.ask(&format!("dmesg | grep -iE '{HANGS}'"))?;
    ensure!(hangs.is_empty(), "{hangs}");
    Ok(Return { answer, first, later, uptime: Duration::from_secs(uptime), interrupts })
}

/// Boots the kit's Linux in a process of its own, `squib run` of `program`, stops that for
/// `seconds`, and asks the guest when it goes on.
pub fn stopped(program: &Path, seconds: u64, busy: bool) -> Result<Return> {
    let guest = Process::boot(program)?;
    if busy {
        guest.ask(BUSY)?;
        thread::sleep(Duration::from_secs(3));
    }
    kill_process(guest.pid, Signal::STOP)?;
    thread::sleep(Duration::from_secs(seconds));
    kill_process(guest.pid, Signal::CONT)?;
    question(&guest, 0)
}

/// By how many seconds the guest's wall clock is ahead of what it should show, which is `ahead` of
/// the host's. Zero if it may be right.
fn wall_offset(shell: &impl Guest, ahead: u64) -> Result<i64> {
    let before = (wall_ns() / SECOND + ahead) as i64;
    let guest: i64 = shell.ask("date +%s")?.parse().context("a date")?;
    let after = (wall_ns() / SECOND + ahead) as i64;
    Ok((guest - after).max(0) + (guest - before).min(0))
}

/// Timer interrupts of all vCPUs since the boot.
fn timer_interrupts(shell: &impl Guest) -> Result<u64> {
    let line = shell.ask("grep arch_timer /proc/interrupts")?;
    let counts = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
    Ok(counts.sum())
}

/// A guest that can be asked.
trait Guest {
    fn ask(&self, command: &str) -> Result<String>;
}

impl Guest for Shell {
    fn ask(&self, command: &str) -> Result<String> {
        Self::ask(self, command)
    }
}

/// A guest in a process of its own, which ends with it.
struct Process {
    child: Child,
    pid: Pid,
    console: Capture,
    asked: Cell<u32>,
    _home: TempDir,
}

impl Process {
    fn boot(program: &Path) -> Result<Self> {
        let kit = Kit::cached()?.context("the guest kit is not in the cache")?;
        let home = tempfile::tempdir()?;
        let mut child = Command::new(program)
            .args(["run", "--name", "away", "--memory", "256M", "--kernel"])
            .arg(&kit.kernel)
            .arg("--initrd")
            .arg(&kit.initrd)
            .args(["--cmdline", &format!("console=ttyS0 quiet panic=-1 {STRICT}")])
            .env("SQUIB_HOME", home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let console = Capture::default();
        let (mut output, mut kept) = (child.stdout.take().context("no stdout")?, console.clone());
        // It ends with the process.
        thread::spawn(move || io::copy(&mut output, &mut kept));
        let pid = Pid::from_child(&child);
        let guest = Self { child, pid, console, asked: Cell::new(0), _home: home };
        let prompt = guest.console.wait_for(PATIENCE, |text| text.contains("/ # ").then_some(()));
        prompt.with_context(|| format!("no prompt: {}", guest.console.text()))?;
        Ok(guest)
    }
}

impl Guest for Process {
    fn ask(&self, command: &str) -> Result<String> {
        let n = self.asked.replace(self.asked.get() + 1);
        linux::ask(&self.console, n, command, |line| {
            let mut input = self.child.stdin.as_ref().context("no stdin")?;
            input.write_all(line).with_context(|| format!("it has ended: {}", self.console.text()))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
