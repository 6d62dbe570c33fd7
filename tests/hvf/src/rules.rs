//! What is counted, injected and forbidden.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicU32, Ordering},
};

use applevisor_sys::{hv_error_t, hv_exit_reason_t, hv_return_t};
use parking_lot::{Mutex, MutexGuard};

use crate::{
    host::{self, Host},
    object, system, time, vm,
};

static SESSION: Mutex<()> = Mutex::new(());
static LOG: Mutex<Log> = Mutex::new(Log::NONE);
static CANCEL_EVERY: AtomicU32 = AtomicU32::new(0);
static RUNS: AtomicU32 = AtomicU32::new(0);
static LOSES: AtomicU32 = AtomicU32::new(0);
static REPORT: Mutex<Option<Report>> = Mutex::new(None);
static WALK: Mutex<Option<Walk>> = Mutex::new(None);
static WALKS: AtomicU32 = AtomicU32::new(0);
static EXITS: Mutex<Option<(u32, Exit)>> = Mutex::new(None);

struct Log {
    calls: BTreeMap<&'static str, u32>,
    injected: BTreeMap<&'static str, Injected>,
    /// Calls that were made to fail. What follows from that is no mistake of the caller.
    failed: BTreeSet<&'static str>,
    violations: Vec<String>,
}

/// How a call fails.
struct Injected {
    /// How often it succeeds before.
    after: u32,
    code: hv_return_t,
    /// It fails only once.
    once: bool,
}

impl Log {
    const NONE: Self = Self {
        calls: BTreeMap::new(),
        injected: BTreeMap::new(),
        failed: BTreeSet::new(),
        violations: Vec::new(),
    };
}

/// An exit that no guest has caused.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Its reason.
    pub reason: hv_exit_reason_t,
    /// ESR_EL2, for an exception.
    pub syndrome: u64,
    /// The guest-physical address, for an abort.
    pub address: u64,
}

/// How an abort is reported that the next fitting access causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// An access to a device: without a description of its instruction.
    Hidden,
    /// A store to a device: as cache maintenance by address.
    CacheMaintenance,
}

/// What a walk of the guest's translation table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// A load.
    Load,
    /// An instruction fetch.
    Fetch,
}

/// The time in which one test has the stand-in for itself. When it ends, there must be no virtual machine,
/// no object that was not released, and no violation.
pub struct Session {
    _alone: MutexGuard<'static, ()>,
}

impl Session {
    /// Waits for its turn; nothing is injected, and the host is the usual one.
    pub fn begin() -> Self {
        Self::begin_on(Host::USUAL)
    }

    /// Waits for its turn; nothing is injected.
    pub fn begin_on(host: Host) -> Self {
        let alone = SESSION.lock();
        squib_vmm::hypervisor::hvf::use_stand_in();
        let session = Self { _alone: alone };
        session.clear();
        host::set(host);
        session
    }

    /// From now on the process is on `host`.
    pub fn move_to(&self, host: Host) {
        host::set(host);
    }

    /// Lets `call` fail with `code` from now on, but for the next `after` times.
    pub fn inject(&self, call: &'static str, after: u32, code: hv_error_t) {
        let injected = Injected { after, code: code as hv_return_t, once: false };
        LOG.lock().injected.insert(call, injected);
    }

    /// Lets `call` fail with `code` once, after it has succeeded `after` times.
    pub fn inject_once(&self, call: &'static str, after: u32, code: hv_error_t) {
        let injected = Injected { after, code: code as hv_return_t, once: true };
        LOG.lock().injected.insert(call, injected);
    }

    /// Ends what [`inject`](Self::inject) and [`inject_once`](Self::inject_once) began.
    pub fn heal(&self) {
        LOG.lock().injected.clear();
    }

    /// Lets each `n`th run return at once as if it had been cancelled; zero for none.
    pub fn cancel_every(&self, n: u32) {
        CANCEL_EVERY.store(n, Ordering::SeqCst);
    }

    /// Lets the next access that fits be reported as `report` says.
    pub fn report_next(&self, report: Report) {
        *REPORT.lock() = Some(report);
    }

    /// Lets every write to memory that may only be read be reported as that of a walk of the guest's
    /// translation table, which WnR does not tell of; until this is called with none.
    pub fn report_walks(&self, walk: Option<Walk>) {
        *WALK.lock() = walk;
    }

    /// How often that was done since the session began.
    pub fn walks(&self) -> u32 {
        WALKS.load(Ordering::SeqCst)
    }

    /// Whether what [`report_next`](Self::report_next) said still waits for its access.
    pub fn is_report_due(&self) -> bool {
        REPORT.lock().is_some()
    }

    /// Lets the next `times` runs return at once with `exit`, for which PC may be anywhere.
    pub fn exit_next(&self, times: u32, exit: Exit) {
        *EXITS.lock() = Some((times, exit));
    }

    /// Lets the next `n` calls out of the guest be lost on a vCPU that sleeps there, as when they meet another exit.
    pub fn lose_exits(&self, n: u32) {
        LOSES.store(n, Ordering::SeqCst);
    }

    /// How many of them have not been made yet.
    pub fn exits_to_lose(&self) -> u32 {
        LOSES.load(Ordering::SeqCst)
    }

    /// How often each call was made since the session began.
    pub fn calls(&self) -> BTreeMap<&'static str, u32> {
        LOG.lock().calls.clone()
    }

    /// Whether there is a virtual machine.
    pub fn has_machine(&self) -> bool {
        vm::exists()
    }

    /// What was done against the framework's rules; forgotten with this call.
    pub fn violations(&self) -> Vec<String> {
        std::mem::take(&mut LOG.lock().violations)
    }

    fn clear(&self) {
        *LOG.lock() = Log::NONE;
        CANCEL_EVERY.store(0, Ordering::SeqCst);
        LOSES.store(0, Ordering::SeqCst);
        system::reset();
        time::reset();
        *REPORT.lock() = None;
        *WALK.lock() = None;
        WALKS.store(0, Ordering::SeqCst);
        *EXITS.lock() = None;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut found = self.violations();
        if vm::exists() {
            found.push("the virtual machine was not destroyed".to_owned());
            vm::forget();
        }
        let objects = object::forget();
        if objects > 0 {
            found.push(format!("{objects} objects were not released"));
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
    let Some(injected) = log.injected.get_mut(call) else { return Ok(()) };
    if injected.after > 0 {
        injected.after -= 1;
        return Ok(());
    }
    let code = injected.code;
    if injected.once {
        log.injected.remove(call);
    }
    log.failed.insert(call);
    Err(code)
}

/// Whether `call` was made to fail in this session.
pub(crate) fn has_failed(call: &'static str) -> bool {
    LOG.lock().failed.contains(call)
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

/// Whether this call out of the guest is to be lost.
pub(crate) fn lose_exit() -> bool {
    LOSES.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

/// How this run is to end before it begins, if it is.
pub(crate) fn exit_this_run() -> Option<Exit> {
    let mut exits = EXITS.lock();
    let (left, exit) = exits.as_mut()?;
    let exit = *exit;
    *left -= 1;
    exits.take_if(|(left, _)| *left == 0);
    Some(exit)
}

/// What the write that just aborted is to be reported as, if not as it is.
pub(crate) fn walk() -> Option<Walk> {
    let walk = *WALK.lock();
    if walk.is_some() {
        WALKS.fetch_add(1, Ordering::SeqCst);
    }
    walk
}

/// How this abort is to be reported, if not as it is; `fits` says which reports suit it.
pub(crate) fn report_this(fits: impl FnOnce(Report) -> bool) -> Option<Report> {
    REPORT.lock().take_if(|report| fits(*report))
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
