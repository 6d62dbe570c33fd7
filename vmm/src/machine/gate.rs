//! Where vCPU threads meet whoever controls the machine.
//!
//! Threads look at [`Gate::must_park`] before each entry into the guest. At the gate a parked thread
//! carries out requests on its own vCPU, since a vCPU may be touched by its own thread only, until the
//! machine runs again or ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::types::{Crash, Outcome};
use crate::{
    hypervisor::{Kick, Vcpu},
    psci::Psci,
};

/// How long a thread that is called has until it is kicked again: a backend may lose a kick that meets another
/// exit, and a guest that sleeps comes by nothing else.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// Work for a parked vCPU's thread.
type Request = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

/// The meeting point of one machine's threads.
pub(super) struct Gate {
    /// Copy of `state.phase != Run`, read without the lock.
    park: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Threads of vCPUs that are off wait there.
    psci: Arc<Psci>,
}

struct State {
    phase: Phase,
    /// Retired instructions at which the vCPU of a deterministic machine parks.
    limit: Option<u64>,
    /// The last run ended since the guest sleeps for ever.
    idle: bool,
    slots: Vec<Slot>,
    outcome: Option<Outcome>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Park,
    Run,
    Exit,
}

#[derive(Default)]
struct Slot {
    kick: Option<Arc<dyn Kick>>,
    parked: bool,
    gone: bool,
    request: Option<Request>,
}

/// What a thread does after it was parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Runs the guest up to the limit.
    Run { limit: Option<u64> },
    /// Ends.
    Exit,
}

impl Gate {
    /// A closed gate.
    pub(super) fn new(vcpus: u32, psci: Arc<Psci>) -> Self {
        let state = State {
            phase: Phase::Park,
            limit: None,
            idle: false,
            slots: (0..vcpus).map(|_| Slot::default()).collect(),
            outcome: None,
        };
        Self {
            park: AtomicBool::new(true),
            state: Mutex::new(state),
            changed: Condvar::new(),
            psci,
        }
    }

    // For vCPU threads.

    /// True if threads must come to [`park`](Self::park).
    pub(super) fn must_park(&self) -> &AtomicBool {
        &self.park
    }

    /// Makes a vCPU known. Called by its thread.
    pub(super) fn enter(&self, index: u32, kick: Arc<dyn Kick>) {
        self.state.lock().slots[index as usize].kick = Some(kick);
    }

    /// Waits until the machine runs or ends, serving requests on `vcpu`.
    pub(super) fn park(&self, index: u32, vcpu: &mut dyn Vcpu) -> Next {
        let mut state = self.state.lock();
        loop {
            match state.phase {
                Phase::Exit => return Next::Exit,
                Phase::Run => return Next::Run { limit: state.limit },
                Phase::Park => {}
            }
            let slot = &mut state.slots[index as usize];
            if let Some(request) = slot.request.take() {
                MutexGuard::unlocked(&mut state, || request(vcpu));
                continue;
            }
            if !slot.parked {
                slot.parked = true;
                self.changed.notify_all();
            }
            self.changed.wait(&mut state);
        }
    }

    /// Parks the machine since its limit is reached, or since the guest sleeps for ever (`idle`).
    /// Called by a vCPU's thread.
    pub(super) fn stop_here(&self, idle: bool) {
        let mut state = self.state.lock();
        state.idle = idle;
        if state.phase == Phase::Run {
            self.close(&mut state);
        }
    }

    /// Ends the machine. The first outcome counts.
    pub(super) fn end(&self, outcome: Outcome) {
        let mut state = self.state.lock();
        state.outcome.get_or_insert(outcome);
        if state.phase == Phase::Run {
            self.close(&mut state);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Says that the thread of vCPU `index` is about to end, early because of a panic if `crash` is set.
    pub(super) fn leave(&self, index: u32, crash: Option<Crash>) {
        self.state.lock().slots[index as usize].gone = true;
        match crash {
            Some(crash) => self.end(Outcome::Crashed(crash)),
            None => drop(self.changed.notify_all()),
        }
    }

    // For whoever controls the machine.

    /// Lets the threads run, up to `limit`.
    pub(super) fn open(&self, limit: Option<u64>) -> Result<(), Outcome> {
        let mut state = self.state.lock();
        if let Some(outcome) = &state.outcome {
            return Err(outcome.clone());
        }
        self.open_locked(&mut state, limit);
        Ok(())
    }

    /// Calls all threads to the gate and waits for them. If some do not come until `deadline`, all run
    /// on, and their numbers are the error.
    pub(super) fn close_until(&self, deadline: Instant) -> Result<(), Vec<u32>> {
        let mut state = self.state.lock();
        let limit = state.limit;
        if state.phase == Phase::Run {
            self.close(&mut state);
        }
        while !state.all_parked() {
            let again = deadline.min(Instant::now() + KICK_AGAIN);
            if self.changed.wait_until(&mut state, again).timed_out() && !state.all_parked() {
                if Instant::now() < deadline {
                    kick(&state, |slot| !slot.at_rest());
                    continue;
                }
                let late = (0..).zip(&state.slots).filter(|(_, slot)| !slot.at_rest());
                let late = late.map(|(index, _)| index).collect();
                if state.outcome.is_none() {
                    self.open_locked(&mut state, limit);
                }
                return Err(late);
            }
        }
        Ok(())
    }

    /// Waits until all threads are parked of their own accord; true if the guest is idle.
    pub(super) fn wait_parked(&self) -> bool {
        let mut state = self.state.lock();
        while state.phase == Phase::Run || !state.all_parked() {
            self.changed.wait(&mut state);
        }
        state.idle
    }

    /// Carries out `work` on the parked vCPU `index`, on its thread; none if that has ended or does not
    /// rest at the gate.
    pub(super) fn on_vcpu<R: Send + 'static>(
        &self,
        index: u32,
        work: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Option<R> {
        let (send, answer) = mpsc::sync_channel(1);
        let mut state = self.state.lock();
        let phase = state.phase;
        let slot = &mut state.slots[index as usize];
        if slot.gone || phase != Phase::Park {
            return None;
        }
        slot.request = Some(Box::new(move |vcpu: &mut dyn Vcpu| {
            // The receiver waits below; if it is gone nobody wants the answer.
            let _ = send.send(work(vcpu));
        }));
        drop(state);
        self.changed.notify_all();
        // A thread that ends drops the request, and with it the sender.
        answer.recv().ok()
    }

    /// How the machine ended.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.state.lock().outcome.clone()
    }

    /// Waits for the end, at most until `deadline`.
    pub(super) fn wait_outcome(&self, deadline: Option<Instant>) -> Option<Outcome> {
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return Some(outcome.clone());
            }
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) => {
                    if self.changed.wait_until(&mut state, deadline).timed_out() {
                        return state.outcome.clone();
                    }
                }
            }
        }
    }

    /// Makes all threads end, and waits at most for `patience`. Answers those that are in the guest still:
    /// the backend cannot get them out.
    pub(super) fn dismiss(&self, patience: Duration) -> Vec<u32> {
        let until = Instant::now() + patience;
        let mut state = self.state.lock();
        self.close(&mut state);
        state.phase = Phase::Exit;
        for slot in &mut state.slots {
            slot.request = None;
        }
        self.changed.notify_all();
        loop {
            let here =
                (0..).zip(&state.slots).filter(|(_, slot)| slot.kick.is_some() && !slot.gone);
            let here: Vec<u32> = here.map(|(index, _)| index).collect();
            if here.is_empty() || Instant::now() >= until {
                return here;
            }
            let again = until.min(Instant::now() + KICK_AGAIN);
            if self.changed.wait_until(&mut state, again).timed_out() {
                kick(&state, |slot| !slot.gone);
            }
        }
    }

    fn open_locked(&self, state: &mut State, limit: Option<u64>) {
        state.phase = Phase::Run;
        state.limit = limit;
        state.idle = false;
        for slot in &mut state.slots {
            slot.parked = false;
        }
        self.park.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// Calls the threads to the gate.
    fn close(&self, state: &mut State) {
        state.phase = Phase::Park;
        self.park.store(true, Ordering::Release);
        kick(state, |_| true);
        self.psci.interrupt();
        self.changed.notify_all();
    }
}

fn kick(state: &State, which: impl Fn(&Slot) -> bool) {
    let slots = state.slots.iter().filter(|slot| which(slot));
    slots.filter_map(|slot| slot.kick.as_ref()).for_each(|kick| kick.kick());
}

impl State {
    fn all_parked(&self) -> bool {
        self.slots.iter().all(Slot::at_rest)
    }
}

impl Slot {
    fn at_rest(&self) -> bool {
        self.parked || self.gone
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use squib_devices::map::Range;

    use super::*;

    #[derive(Default)]
    struct Kicks(AtomicU32);

    impl Kick for Kicks {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_thread_that_does_not_come_is_kicked_again_and_then_left_alone() {
        let psci = Psci::new(2, Range { base: 0, size: 0x1000 });
        let gate = Gate::new(2, Arc::new(psci));
        let kicks = [Arc::new(Kicks::default()), Arc::new(Kicks::default())];
        for (index, kicks) in (0..).zip(&kicks) {
            gate.enter(index, Arc::clone(kicks) as Arc<dyn Kick>);
        }
        gate.open(None).unwrap();
        assert_eq!(gate.close_until(Instant::now() + KICK_AGAIN * 3 / 2), Err(vec![0, 1]));
        for kicks in &kicks {
            assert!(kicks.0.load(Ordering::SeqCst) >= 2);
        }
        gate.leave(0, None);
        assert_eq!(gate.dismiss(KICK_AGAIN * 3 / 2), [1]);
        assert!(kicks[1].0.load(Ordering::SeqCst) >= 2);
        std::thread::scope(|scope| {
            scope.spawn(|| gate.leave(1, None));
            assert!(gate.dismiss(Duration::from_secs(100)).is_empty());
        });
    }
}
