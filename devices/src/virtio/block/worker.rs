//! Where a device's requests are carried out: on a thread of their own, or inside the doorbell.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// The part of a device that carries out requests.
pub(super) trait Engine: Send + 'static {
    /// The doorbell was rung: there may be requests.
    fn ring(&mut self);

    /// The doorbell was rung, and not all that was offered then has been looked at.
    fn has_work(&self) -> bool;

    /// Carries out requests until there are none, or until `halt` is set; whole ones only.
    fn run(&mut self, halt: &AtomicBool) -> Rest;

    /// The machine goes on after a pause or a restore.
    fn resumed(&mut self);
}

/// Why an engine came to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// There is nothing more to do.
    Idle,
    /// It was told to stop.
    Halted,
    /// The rate limiter lets nothing pass before this time is over.
    Throttled(Duration),
}

/// An engine where it works.
pub(super) enum Runner<E: Engine> {
    /// Requests complete inside [`ring`](Self::ring), on the caller's thread.
    Inline(Mutex<E>),
    /// Requests complete on a worker thread.
    Worker(Worker<E>),
}

/// The worker did not bring the engine home in time, or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotHome {
    Deadline,
    WorkerGone,
}

impl<E: Engine> Runner<E> {
    pub(super) fn ring(&self) {
        match self {
            Self::Inline(engine) => {
                let mut engine = engine.lock();
                engine.ring();
                engine.run(&AtomicBool::new(false));
            }
            Self::Worker(worker) => worker.ring(),
        }
    }

    /// Calls `f` with the engine while it is between requests.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut E) -> R) -> Result<R, NotHome> {
        match self {
            Self::Inline(engine) => Ok(f(&mut engine.lock())),
            Self::Worker(worker) => {
                let mut control = worker.halt(None)?;
                let result = control.engine.as_mut().map(f).ok_or(NotHome::WorkerGone);
                worker.release(control);
                result
            }
        }
    }

    /// Lets the engine come to rest and stay there until [`resume`](Self::resume). Without a deadline
    /// it waits as long as a request takes.
    pub(super) fn pause(&self, deadline: Option<Instant>) -> Result<(), NotHome> {
        let Self::Worker(worker) = self else { return Ok(()) };
        let mut control = worker.halt(deadline)?;
        control.paused = true;
        worker.release(control);
        Ok(())
    }

    /// Goes on with what was offered in the meantime. Inline, that is only what a saved state says
    /// was notified: everything else is either done, or waits for a doorbell that the guest has not
    /// rung yet, and answering early would be seen.
    pub(super) fn resume(&self) {
        match self {
            Self::Inline(engine) => {
                let mut engine = engine.lock();
                engine.resumed();
                if engine.has_work() {
                    engine.run(&AtomicBool::new(false));
                }
            }
            Self::Worker(worker) => {
                let mut control = worker.shared.control.lock();
                // An engine that is at work was not paused. It is not waited for, so that a request
                // that hangs does not keep the machine from going on after a pause that failed.
                if let Some(engine) = &mut control.engine {
                    engine.resumed();
                }
                control.paused = false;
                control.retry_at = None;
                control.rung = true;
                worker.shared.wake.notify_one();
            }
        }
    }
}

/// A thread that owns the engine while it works, and puts it back between requests whenever it is
/// asked to: so no lock is held across I/O.
pub(super) struct Worker<E: Engine> {
    shared: Arc<Shared<E>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared<E> {
    control: Mutex<Control<E>>,
    /// For the worker: there is something to do.
    wake: Condvar,
    /// For whoever waits for the engine: it is home, or the worker has ended.
    home: Condvar,
    /// Tells the running engine to come home.
    halt: AtomicBool,
}

struct Control<E> {
    /// `None` while the worker works.
    engine: Option<E>,
    rung: bool,
    paused: bool,
    /// Somebody waits for the engine; the worker leaves it where it is.
    wanted: bool,
    quit: bool,
    gone: bool,
    /// The rate limiter lets nothing pass before.
    retry_at: Option<Instant>,
}

impl<E: Engine> Worker<E> {
    pub(super) fn spawn(name: String, engine: E) -> io::Result<Self> {
        let control = Control {
            engine: Some(engine),
            rung: false,
            paused: false,
            wanted: false,
            quit: false,
            gone: false,
            retry_at: None,
        };
        let shared = Arc::new(Shared {
            control: Mutex::new(control),
            wake: Condvar::new(),
            home: Condvar::new(),
            halt: AtomicBool::new(false),
        });
        let worker = shared.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let gone = Gone(&worker);
            worker.work();
            drop(gone);
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn ring(&self) {
        self.shared.control.lock().rung = true;
        self.shared.wake.notify_one();
    }

    /// Waits until the engine is home, and keeps it there until [`release`](Self::release).
    fn halt(&self, deadline: Option<Instant>) -> Result<MutexGuard<'_, Control<E>>, NotHome> {
        let Shared { control, home, halt, .. } = &*self.shared;
        let mut control = control.lock();
        control.wanted = true;
        halt.store(true, Ordering::Relaxed);
        while control.engine.is_none() && !control.gone {
            match deadline {
                None => home.wait(&mut control),
                Some(deadline) => {
                    let late = home.wait_until(&mut control, deadline).timed_out();
                    if late && control.engine.is_none() && !control.gone {
                        self.release(control);
                        return Err(NotHome::Deadline);
                    }
                }
            }
        }
        if control.gone {
            return Err(NotHome::WorkerGone);
        }
        // The doorbell belongs to the engine's state.
        if std::mem::take(&mut control.rung)
            && let Some(engine) = &mut control.engine
        {
            engine.ring();
        }
        Ok(control)
    }

    fn release(&self, mut control: MutexGuard<'_, Control<E>>) {
        control.wanted = false;
        self.shared.halt.store(false, Ordering::Relaxed);
        self.shared.wake.notify_one();
    }
}

impl<E: Engine> Drop for Worker<E> {
    fn drop(&mut self) {
        self.shared.control.lock().quit = true;
        self.shared.halt.store(true, Ordering::Relaxed);
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

impl<E: Engine> Shared<E> {
    fn work(&self) {
        let mut control = self.control.lock();
        while !control.quit {
            let Some(mut engine) = self.next_work(&mut control) else { continue };
            if std::mem::take(&mut control.rung) {
                engine.ring();
            }
            control.retry_at = None;
            let rest = MutexGuard::unlocked(&mut control, || engine.run(&self.halt));
            if let Rest::Throttled(wait) = rest {
                // A wait beyond the clock's range is as good as for ever.
                control.retry_at =
                    Instant::now().checked_add(wait.min(Duration::from_secs(1 << 30)));
            }
            control.engine = Some(engine);
            self.home.notify_all();
        }
    }

    /// The engine, if it may work and has something to do; else `None` after a wait.
    fn next_work(&self, control: &mut MutexGuard<'_, Control<E>>) -> Option<E> {
        let held = control.paused || control.wanted;
        let work = control.rung || control.engine.as_ref().is_some_and(E::has_work);
        if held || !work {
            self.wake.wait(control);
            return None;
        }
        if let Some(at) = control.retry_at
            && Instant::now() < at
        {
            self.wake.wait_until(control, at);
            return None;
        }
        control.engine.take()
    }
}

/// Tells everybody that the worker has ended, also when it panicked.
struct Gone<'a, E>(&'a Shared<E>);

impl<E> Drop for Gone<'_, E> {
    fn drop(&mut self) {
        self.0.control.lock().gone = true;
        self.0.home.notify_all();
    }
}
