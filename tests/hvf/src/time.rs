//! The host's counter, and how far a deterministic guest may go.
//!
//! With a real clock no two runs are equal. In a [deterministic](Session::count_instructions) session the host's
//! counter stands still but for the instructions that the only vCPU retires and the time that it sleeps, and
//! the guest goes exactly as far as [`Session::run_for`] lets it.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use squib_soft::{CNTFRQ_HZ, Counter, Cpu};

use crate::{host::host, rules::Session};

/// A host is never just booted.
const UP: u64 = 1_000_000_000_000;
/// Longer than any guest takes for what it may do.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(1);

static COUNTS: AtomicBool = AtomicBool::new(false);
static TICKS: AtomicU64 = AtomicU64::new(UP);
/// Instructions that the guest may still retire.
static LEFT: AtomicU64 = AtomicU64::new(0);

impl Session {
    /// Makes the host's counter one of instructions. Machines have one vCPU from now on, and stand still until
    /// [`run_for`](Self::run_for).
    pub fn count_instructions(&self) {
        COUNTS.store(true, Ordering::SeqCst);
    }

    /// Lets the guest retire `instructions` more, waits until it has, and answers whether it did: not if it
    /// ended before or sleeps for ever. It stands there, and the machine can be paused.
    pub fn run_for(&self, instructions: u64) -> bool {
        LEFT.store(instructions, Ordering::SeqCst);
        let start = Instant::now();
        while LEFT.load(Ordering::SeqCst) > 0 && start.elapsed() < PATIENCE {
            thread::sleep(LOOK_AGAIN);
        }
        LEFT.load(Ordering::SeqCst) == 0
    }
}

/// Forgets what a test wanted.
pub(crate) fn reset() {
    COUNTS.store(false, Ordering::SeqCst);
    TICKS.store(UP, Ordering::SeqCst);
    LEFT.store(0, Ordering::SeqCst);
}

/// What a new virtual machine's CPUs count.
pub(crate) fn new_counter() -> Counter {
    match COUNTS.load(Ordering::SeqCst) {
        true => Counter::instructions(0),
        false => Counter::host(0),
    }
}

/// How many instructions `cpu` may retire, if they are counted.
pub(crate) fn allowance() -> Option<u64> {
    COUNTS.load(Ordering::SeqCst).then(|| LEFT.load(Ordering::SeqCst))
}

/// Does `work` on `cpu`, and moves the host's counter on by as much as the guest's.
pub(crate) fn account<T>(cpu: &mut Cpu, counter: &Counter, work: impl FnOnce(&mut Cpu) -> T) -> T {
    if !COUNTS.load(Ordering::SeqCst) {
        return work(cpu);
    }
    let (ticks, retired) = (counter.now(), cpu.retired());
    let result = work(cpu);
    TICKS.fetch_add(counter.now() - ticks, Ordering::SeqCst);
    LEFT.fetch_sub(cpu.retired() - retired, Ordering::SeqCst);
    result
}

/// Stands still until the caller of the framework wants something, or more instructions are allowed.
pub(crate) fn stand_still(wanted: &AtomicBool) {
    while !wanted.load(Ordering::SeqCst) && LEFT.load(Ordering::SeqCst) == 0 {
        thread::sleep(LOOK_AGAIN);
    }
}

/// The host's counter: nanoseconds, since that is what the software CPU counts.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn mach_absolute_time() -> u64 {
    static START: Mutex<Option<Instant>> = Mutex::new(None);
    match COUNTS.load(Ordering::SeqCst) {
        true => TICKS.load(Ordering::SeqCst),
        false => UP + START.lock().get_or_insert_with(Instant::now).elapsed().as_nanos() as u64,
    }
}

const _: () = assert!(CNTFRQ_HZ == 1_000_000_000);

#[unsafe(no_mangle)]
unsafe extern "C" fn mach_timebase_info(info: *mut [u32; 2]) -> i32 {
    let Some((numerator, denominator)) = host().timebase else { return 5 };
    // SAFETY: the caller gives a place for both.
    unsafe { info.write([numerator, denominator]) };
    0
}
