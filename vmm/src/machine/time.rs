//! Keeps the guest's counter together with the host's time, in a way that no guest takes for a
//! hang.
//!
//! Time passes while the guest does not run: between a snapshot and its restore, while the process
//! is stopped (SIGSTOP, a frozen control group, a host without CPU time), while the host is
//! suspended. A guest whose counter jumps over such a time reports stalls and lockups of itself;
//! Linux on arm64 looks at no stolen time. So the counter runs on a lease that this file's thread
//! renews, and a time away of at most [`MOST`] reaches it in steps. A longer one is the wall
//! clock's alone, which the guest reads from its RTC.
//!
//! With [`ClockPolicy::Freeze`] the counter makes up for nothing. A deterministic machine has a
//! time of its own, and none of this.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use squib_devices::clock::Clock;

use super::{Control, alarm::AlarmClock, types::ClockPolicy, vcpu::Board};
use crate::{config::MachineConfig, hypervisor::SystemCounter};

/// The longest time away that the counter makes up for, all steps together. Linux reports a stall
/// of RCU after 21 seconds and a soft lockup after 20 (`rcu_cpu_stall_timeout`, twice
/// `watchdog_thresh`), reckoned from a moment that may lie before the steps: with the lease they
/// are a quarter of that.
pub(super) const MOST: Duration = Duration::from_secs(3);
/// Each step. Linux takes it for time that its running task has used up, which then waits for the
/// others.
const STEP: Duration = Duration::from_millis(100);
/// How long the guest runs between two steps.
const BETWEEN_STEPS: Duration = Duration::from_millis(50);
/// A guest that has not taken its timer's interrupt so often when a step was due gets no more.
const MOST_REFUSALS: u32 = 40;
/// How long a step waits for the vCPUs.
const STEP_PATIENCE: Duration = Duration::from_millis(250);
/// How far the counter comes by itself when the process is stopped.
const LEASE: Duration = Duration::from_secs(2);
/// How often the lease is renewed.
const LOOK: Duration = Duration::from_secs(1);
/// A time away that is worth a step.
const NOTICED: Duration = Duration::from_millis(500);
/// Less is not added up: two clocks of a host may differ by so much between two looks, and be one
/// again.
const BLUR: Duration = Duration::from_millis(20);
/// How often both clocks are read for two readings of one moment.
const READINGS: u32 = 5;

/// The keeper of a machine's time.
pub(super) struct TimeKeeper {
    board: Arc<Board>,
    counter: Arc<dyn SystemCounter>,
    clock: Arc<dyn Clock>,
    alarm: Arc<AlarmClock>,
    vcpus: u32,
    deterministic: bool,
    /// The machine's run state, which must not change beside a look or a step.
    control: Arc<Mutex<Control>>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    open: bool,
    running: bool,
    policy: ClockPolicy,
    /// Time away that is not worth a step yet.
    missed: Duration,
    debt: Debt,
    seen: Seen,
}

/// By how much the counter is still to be moved.
#[derive(Default)]
struct Debt {
    owed: Duration,
    /// What was granted, less the time that the guest has run since: a process that is stopped
    /// again and again does not move its guest's counter by [`MOST`] each time.
    granted: Duration,
    /// Steps that could not be made since the last one.
    refusals: u32,
}

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Seen {
    continuous_ns: u64,
    ticks: u64,
}

impl TimeKeeper {
    /// The keeper of a machine of `config` at rest.
    pub(super) fn new(
        config: &MachineConfig,
        board: Arc<Board>,
        counter: Arc<dyn SystemCounter>,
        clock: Arc<dyn Clock>,
        alarm: Arc<AlarmClock>,
        control: Arc<Mutex<Control>>,
    ) -> Arc<Self> {
        let (vcpus, deterministic) = (config.vcpus, config.deterministic.is_some());
        let seen = Seen { continuous_ns: 0, ticks: 0 };
        let state = State {
            open: true,
            running: false,
            policy: ClockPolicy::Freeze,
            missed: Duration::ZERO,
            debt: Debt::default(),
            seen,
        };
        let state = Mutex::new(state);
        let changed = Condvar::new();
        let keeper =
            Self { board, counter, clock, alarm, vcpus, deterministic, control, state, changed };
        if !deterministic {
            keeper.counter.lease(keeper.ticks(LEASE));
        }
        Arc::new(keeper)
    }

    /// What a time away does to the counter from now on.
    pub(super) fn set_policy(&self, policy: ClockPolicy) {
        self.state.lock().policy = policy;
    }

    /// The machine was away before its first instruction. Returns by how much the counter will be
    /// moved for that: all of it, or nothing.
    pub(super) fn make_up(&self, away: Duration) -> Duration {
        if self.state.lock().debt.grant(away) { away } else { Duration::ZERO }
    }

    /// The ticks in [`MOST`].
    pub(super) fn most_ticks(&self) -> u64 {
        self.ticks(MOST)
    }

    /// Body of the thread. Ends with [`close`](Self::close), and at once in a deterministic
    /// machine.
    pub(super) fn watch(&self) {
        let mut state = self.state.lock();
        while state.open && !self.deterministic {
            if !state.running {
                self.changed.wait(&mut state);
                continue;
            }
            let pause = if state.debt.owed.is_zero() { LOOK } else { BETWEEN_STEPS };
            if self.changed.wait_for(&mut state, pause).timed_out() {
                MutexGuard::unlocked(&mut state, || self.turn());
            }
        }
    }

    /// Ends [`watch`](Self::watch).
    pub(super) fn close(&self) {
        self.state.lock().open = false;
        self.changed.notify_all();
    }

    /// The counter has been started, with the run state locked.
    pub(super) fn started(&self) {
        if self.deterministic {
            return;
        }
        let mut state = self.state.lock();
        state.running = true;
        self.renew(&mut state);
        self.changed.notify_all();
    }

    /// The counter is about to be stopped, with the run state locked.
    pub(super) fn stopping(&self) {
        self.state.lock().running = false;
        self.changed.notify_all();
    }

    /// Renews the lease, looks whether time was missed, and makes a step if one is due.
    fn turn(&self) {
        // Whoever changes the run state now has the clocks to themselves; the next turn looks
        // again.
        let Some(control) = self.control.try_lock() else { return };
        let mut state = self.state.lock();
        if control.paused || !state.running {
            return;
        }
        let before = state.seen;
        self.renew(&mut state);
        let passed =
            Duration::from_nanos(state.seen.continuous_ns.saturating_sub(before.continuous_ns));
        let ran = self.duration(state.seen.ticks.saturating_sub(before.ticks));
        state.debt.granted = state.debt.granted.saturating_sub(ran);
        let missed = passed.saturating_sub(ran);
        if missed >= BLUR {
            state.missed += missed;
        }
        self.make_up_missed(&mut state);
        if !state.debt.owed.is_zero() && !self.step(&mut state) {
            state.debt.refuse();
        }
    }

    fn make_up_missed(&self, state: &mut State) {
        if state.missed < NOTICED {
            return;
        }
        let missed = std::mem::take(&mut state.missed);
        tracing::info!("the machine stood still for {missed:.1?}");
        self.alarm.look_again();
        if state.policy == ClockPolicy::Advance {
            state.debt.grant(missed);
        }
    }

    /// Moves the counter while all vCPUs are at the gate. False if one did not come, or has not
    /// taken its tick of the step before.
    fn step(&self, state: &mut State) -> bool {
        let gate = &self.board.gate;
        if gate.close_until(Instant::now() + STEP_PATIENCE).is_err() {
            // They run on.
            return false;
        }
        self.counter.stop();
        let taken = (0..self.vcpus)
            .filter(|n| !self.board.psci.is_off(*n))
            .all(|vcpu| matches!(gate.on_vcpu(vcpu, |vcpu| vcpu.timer_due()), Some(Ok(false))));
        if taken {
            let step = self.ticks(state.debt.take(STEP));
            self.counter.set(self.counter.now().saturating_add(step));
        }
        self.counter.start();
        self.renew(state);
        // An outcome keeps the vCPUs parked.
        let _ = gate.open(None);
        taken
    }

    fn renew(&self, state: &mut State) {
        self.counter.lease(self.ticks(LEASE));
        for _ in 0..READINGS {
            let before = self.clock.continuous_ns();
            let ticks = self.counter.now();
            let continuous_ns = self.clock.continuous_ns();
            state.seen = Seen { continuous_ns, ticks };
            // A thread that was put aside between the two would find a time away in the next look.
            if Duration::from_nanos(continuous_ns.saturating_sub(before)) < BLUR / 2 {
                break;
            }
        }
    }

    fn ticks(&self, time: Duration) -> u64 {
        let ticks = time.as_nanos() * u128::from(self.counter.frequency()) / NANOS;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    fn duration(&self, ticks: u64) -> Duration {
        let nanos = u128::from(ticks) * NANOS / u128::from(self.counter.frequency().max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

const NANOS: u128 = 1_000_000_000;

impl Debt {
    /// Takes `away` on, unless that is too much. A part would be of no use: the wall clock has to
    /// be set anyway.
    fn grant(&mut self, away: Duration) -> bool {
        let all = away <= MOST.saturating_sub(self.granted);
        if all {
            self.owed += away;
            self.granted += away;
        }
        all
    }

    /// Takes a part of what is owed, at most `most`.
    fn take(&mut self, most: Duration) -> Duration {
        let part = self.owed.min(most);
        self.owed -= part;
        self.refusals = 0;
        part
    }

    /// A step could not be made. The last of many forgives what is owed.
    fn refuse(&mut self) {
        self.refusals += 1;
        if self.refusals >= MOST_REFUSALS {
            *self = Self { granted: self.granted, ..Self::default() };
        }
    }
}
