//! What is counted, injected and forbidden.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use applevisor_sys::{hv_error_t, hv_return_t};
use parking_lot::{Mutex, MutexGuard};

use crate::{system, time, vm};

static SESSION: Mutex<()> = Mutex::new(());
static LOG: Mutex<Log> =
    Mutex::new(Log { calls: BTreeMap::new(), injected: BTreeMap::new(), violations: Vec::new() });
static CANCEL_EVERY: AtomicU32 = AtomicU32::new(0);
static RUNS: AtomicU32 = AtomicU32::new(0);
static NO_ISV: AtomicBool = AtomicBool::new(false);
static WFI: AtomicBool = AtomicBool::new(false);

struct Log {
    calls: BTreeMap<&'static str, u32>,
    /// By call: how many succeed before, and the code of all that follow.
    injected: BTreeMap<&'static str, (u32, hv_return_t)>,
    violations: Vec<String>,
}

/// The time in which one test has the stand-in for itself. When it ends, there must be no virtual machine
/// and no violation.
pub struct Session {
    _alone: MutexGuard<'static, ()>,
}

impl Session {
    /// Waits for its turn; nothing is injected.
    pub fn begin() -> Self {
        let alone = SESSION.lock();
        squib_vmm::hypervisor::hvf::use_stand_in();
        let session = Self { _alone: alone };
        session.clear();
        session
    }

    /// Lets `call` fail with `code` from now on, but for the next `after` times.
    pub fn inject(&self, call: &'static str, after: u32, code: hv_error_t) {
        LOG.lock().injected.insert(call, (after, code as hv_return_t));
    }

    /// Ends what [`inject`](Self::inject) began.
    pub fn heal(&self) {
        LOG.lock().injected.clear();
    }

    /// Lets each `n`th run return at once as if it had been cancelled; zero for none.
    pub fn cancel_every(&self, n: u32) {
        CANCEL_EVERY.store(n, Ordering::SeqCst);
    }

    /// Lets the next access to a device leave the guest without a description of its instruction.
    pub fn hide_next_access(&self) {
        NO_ISV.store(true, Ordering::SeqCst);
    }

    /// Lets a WFI leave the guest. With an interrupt controller of its own the framework sleeps itself, at least
    /// on the systems where that was seen.
    pub fn show_wfi(&self) {
        WFI.store(true, Ordering::SeqCst);
    }

    /// How often each call was made since the session began.
    pub fn calls(&self) -> BTreeMap<&'static str, u32> {
        LOG.lock().calls.clone()
    }

    /// What was done against the framework's rules; forgotten with this call.
    pub fn violations(&self) -> Vec<String> {
        std::mem::take(&mut LOG.lock().violations)
    }

    fn clear(&self) {
        let mut log = LOG.lock();
        log.calls.clear();
        log.injected.clear();
        log.violations.clear();
        drop(log);
        CANCEL_EVERY.store(0, Ordering::SeqCst);
        NO_ISV.store(false, Ordering::SeqCst);
        WFI.store(false, Ordering::SeqCst);
        system::reset();
        time::reset();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut found = self.violations();
        if vm::exists() {
            found.push("the virtual machine was not destroyed".to_owned());
            vm::forget();
        }
        self.clear();
        if !std::thread::panicking() {
            assert!(found.is_empty(), "against the framework's rules: {found:#?}");
        }
    }
}

/// What a call answers.
pub(crate) type Answer<T = ()> = Result<T, hv_return_t>;

/// Begins `call`: counts it, and fails if that is wanted.
pub(crate) fn begin(call: &'static str) -> Answer {
    let mut log = LOG.lock();
    *log.calls.entry(call).or_default() += 1;
    match log.injected.get_mut(call) {
        Some((0, code)) => Err(*code),
        Some((left, _)) => {
            *left -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}

/// Notes something that must not be done, and answers what the framework might.
pub(crate) fn violation(what: impl Into<String>) -> hv_return_t {
    let what = what.into();
    eprintln!("Hypervisor.framework stand-in: {what}");
    LOG.lock().violations.push(what);
    BAD_ARGUMENT
}

pub(crate) const BAD_ARGUMENT: hv_return_t = hv_error_t::HV_BAD_ARGUMENT as hv_return_t;

/// Whether this run is to be cancelled for no reason.
pub(crate) fn cancel_this_run() -> bool {
    let every = CANCEL_EVERY.load(Ordering::SeqCst);
    every > 0 && RUNS.fetch_add(1, Ordering::SeqCst) % every == every - 1
}

/// Whether this abort is to have no description.
pub(crate) fn hide_this_access() -> bool {
    NO_ISV.swap(false, Ordering::SeqCst)
}

/// Whether a WFI leaves the guest.
pub(crate) fn shows_wfi() -> bool {
    WFI.load(Ordering::SeqCst)
}

/// A call's answer as a C function gives it.
pub(crate) fn code(answer: Answer) -> hv_return_t {
    answer.err().unwrap_or(hv_error_t::HV_SUCCESS as hv_return_t)
}

/// Puts what `value` answers to `out`.
///
/// # Safety
///
/// `out` must be valid for a write.
pub(crate) unsafe fn give<T>(
    call: &'static str,
    out: *mut T,
    value: impl FnOnce() -> Answer<T>,
) -> hv_return_t {
    // SAFETY: as the caller promises.
    code(begin(call).and_then(|()| value()).map(|value| unsafe { out.write(value) }))
}
