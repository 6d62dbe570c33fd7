//! Batches of chunks through worker threads and back in order.

use std::{
    collections::HashMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{
    Control, Layout,
    plan::{Batch, Plan},
};
use crate::error::FormatError;

/// Batches that are begun and not yet taken, for each worker.
const AHEAD: u64 = 2;

/// Runs `work` for every batch of `plan` on worker threads, each with its own value of `new_worker`, and
/// hands the results to `take` on the calling thread in order. `take` answers how many bytes are stored so
/// far. However slow it is, at most [`AHEAD`] batches a worker are begun and not yet taken, so memory stays
/// bounded: 2 MiB of raw bytes a worker, or two chunks if those are larger.
///
/// The error is the one of the lowest-numbered batch that failed, whatever the timing.
pub(super) fn run_in_order<W, T: Send>(
    layout: Layout,
    plan: Plan<'_>,
    control: Control<'_>,
    new_worker: impl Fn() -> Result<W, FormatError> + Sync,
    work: impl Fn(&mut W, &Batch) -> Result<T, FormatError> + Sync,
    mut take: impl FnMut(&Batch, T) -> Result<u64, FormatError>,
) -> Result<(), FormatError> {
    let line = Line::new(plan, control.workers() * AHEAD);
    let most = layout.chunks().div_ceil(layout.batch_len());
    if most == 0 {
        return Ok(());
    }
    // Does one batch; false if there is none left.
    let step = |worker: &mut Option<W>| {
        let Some((number, batch)) = line.next() else { return false };
        let run = |batch: Batch| {
            control.check()?;
            let worker = match worker {
                Some(worker) => worker,
                none => none.insert(new_worker()?),
            };
            let done = work(worker, &batch)?;
            Ok((batch, done))
        };
        line.put(number, batch.and_then(run));
        true
    };
    std::thread::scope(|scope| {
        // However this thread leaves, by an error or a panic of `take`, no worker waits for it.
        let _closes = Closes(&line);
        let mut started = 0;
        while started < most.min(control.workers()) {
            let body = || {
                // A panic in `work` must not leave the calling thread waiting for the batch.
                let _closes = CloseOnPanic(&line);
                let mut worker = None;
                while step(&mut worker) {}
            };
            if std::thread::Builder::new().spawn_scoped(scope, body).is_err() {
                // The system has no thread left: those that there are do it, or this one alone.
                break;
            }
            started += 1;
        }
        let mut own = None;
        for number in 0.. {
            if started == 0 {
                step(&mut own);
            }
            let Some(result) = line.get(number) else {
                break;
            };
            let (batch, done) = result?;
            let stored = take(&batch, done)?;
            control.check()?;
            let done = layout.offset(batch.span.end).min(layout.size);
            control.progress.advanced(done, layout.size, stored);
        }
        Ok(())
    })
}

/// The order of batches between workers and the calling thread.
struct Line<'a, T> {
    plan: Mutex<Plan<'a>>,
    ahead: u64,
    inner: Mutex<LineInner<T>>,
    changed: Condvar,
}

struct LineInner<T> {
    next: u64,
    taken: u64,
    done: HashMap<u64, Result<(Batch, T), FormatError>>,
    /// No further batch is begun.
    ended: bool,
    /// Nobody waits for a result any more.
    closed: bool,
}

impl<'a, T> Line<'a, T> {
    fn new(plan: Plan<'a>, ahead: u64) -> Self {
        let done = HashMap::new();
        let inner = LineInner { next: 0, taken: 0, done, ended: false, closed: false };
        Self { plan: Mutex::new(plan), ahead, inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// The next batch to work on and its number, or why it cannot be told; `None` if there is none left.
    fn next(&self) -> Option<(u64, Result<Batch, FormatError>)> {
        // Held all the time, so that numbers are in the order of the batches. Without the other lock: to find
        // the next batch may take a call to the file system.
        let mut plan = lock(&self.plan);
        let mut inner = lock(&self.inner);
        while !inner.closed && !inner.ended && inner.next - inner.taken >= self.ahead {
            inner = self.wait(inner);
        }
        if inner.closed || inner.ended {
            return None;
        }
        drop(inner);
        let batch = plan.next().transpose();
        let mut inner = lock(&self.inner);
        inner.ended = !matches!(batch, Some(Ok(_)));
        let Some(batch) = batch else {
            self.changed.notify_all();
            return None;
        };
        inner.next += 1;
        Some((inner.next - 1, batch))
    }

    fn put(&self, number: u64, result: Result<(Batch, T), FormatError>) {
        lock(&self.inner).done.insert(number, result);
        self.changed.notify_all();
    }

    /// Waits for the result of the batch of that number; `None` if there is none, or a worker panicked.
    fn get(&self, number: u64) -> Option<Result<(Batch, T), FormatError>> {
        let mut inner = lock(&self.inner);
        loop {
            if let Some(result) = inner.done.remove(&number) {
                inner.taken = number + 1;
                self.changed.notify_all();
                return Some(result);
            }
            if inner.closed || inner.ended && number >= inner.next {
                return None;
            }
            inner = self.wait(inner);
        }
    }

    fn close(&self) {
        lock(&self.inner).closed = true;
        self.changed.notify_all();
    }

    fn wait<'b>(&self, inner: MutexGuard<'b, LineInner<T>>) -> MutexGuard<'b, LineInner<T>> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }
}

struct Closes<'a, 'b, T>(&'a Line<'b, T>);

impl<T> Drop for Closes<'_, '_, T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct CloseOnPanic<'a, 'b, T>(&'a Line<'b, T>);

impl<T> Drop for CloseOnPanic<'_, '_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}

/// Locks; nothing under these locks can be left half done by a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        num::NonZeroUsize,
        ops::Range,
        panic::{AssertUnwindSafe, catch_unwind},
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    use super::*;
    use crate::image::{CHUNK_SIZE, MAX_CHUNK_SIZE, MAX_THREADS};

    const THREADS: u64 = 3;

    fn control() -> Control<'static> {
        Control { threads: NonZeroUsize::new(THREADS as usize).unwrap(), ..Control::default() }
    }

    #[test]
    fn workers_do_not_run_away_from_a_slow_taker() {
        for chunk_size in [CHUNK_SIZE, MAX_CHUNK_SIZE] {
            let layout = Layout { size: 100 * u64::from(chunk_size) * 16 + 1, chunk_size };
            let begun = AtomicU64::new(0);
            let mut next = 0;
            let work = |_: &mut (), batch: &Batch| {
                begun.fetch_add(1, Ordering::SeqCst);
                Ok(batch.span.clone())
            };
            let mut taken = 0;
            run_in_order(
                layout,
                Plan::all(layout),
                control(),
                || Ok(()),
                work,
                |batch, result: Range<u64>| {
                    let chunks = batch.span.clone();
                    // Time for the workers to run away in, if they can.
                    std::thread::sleep(Duration::from_millis(1));
                    // The batch in hand counts as taken: its place in the line is free again.
                    taken += 1;
                    let ahead = begun.load(Ordering::SeqCst) - taken;
                    assert!(ahead <= AHEAD * THREADS, "{ahead} batches");
                    assert_eq!((chunks.start, &chunks), (next, &result));
                    assert!((chunks.end - chunks.start) * u64::from(chunk_size) <= 4 << 20);
                    next = chunks.end;
                    Ok(0)
                },
            )
            .unwrap();
            assert_eq!((next, begun.into_inner()), (layout.chunks(), taken));
        }
    }

    #[test]
    fn the_lowest_batch_that_fails_is_told() {
        let layout = Layout { size: 60 << 20, chunk_size: CHUNK_SIZE };
        let fails = |chunk: u64| FormatError::field("memory", format!("chunk {chunk}"), "fails");
        let work = |_: &mut (), batch: &Batch| match batch.span.start {
            start if start >= 320 => Err(fails(start)),
            _ => Ok(()),
        };
        for _ in 0..20 {
            let plan = Plan::all(layout);
            let error = run_in_order(layout, plan, control(), || Ok(()), work, |_, ()| Ok(0));
            assert!(error.unwrap_err().to_string().contains("chunk 320"));
        }
    }

    #[test]
    fn a_panic_in_a_worker_ends_the_run() {
        let layout = Layout { size: 60 << 20, chunk_size: CHUNK_SIZE };
        let work = |_: &mut (), batch: &Batch| match batch.span.start {
            320 => panic!("as the test wants it"),
            _ => Ok(()),
        };
        let plan = || Plan::all(layout);
        let run = || run_in_order(layout, plan(), control(), || Ok(()), work, |_, ()| Ok(0));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    }

    #[test]
    fn a_panic_of_the_taker_ends_the_run() {
        let layout = Layout { size: 60 << 20, chunk_size: CHUNK_SIZE };
        let take = |batch: &Batch, ()| match batch.span.start {
            320 => panic!("as the test wants it"),
            _ => Ok(0),
        };
        let work = |_: &mut (), _: &Batch| Ok(());
        let run = || run_in_order(layout, Plan::all(layout), control(), || Ok(()), work, take);
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    }

    #[test]
    fn any_number_of_threads_comes_to_an_end() {
        let layout = Layout { size: 60 << 20, chunk_size: CHUNK_SIZE };
        for threads in [1, MAX_THREADS + 1, 1 << (usize::BITS - 1), usize::MAX] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let control = Control { threads, ..Control::default() };
            let mut taken = 0;
            let take = |batch: &Batch, ()| {
                taken += batch.span.end - batch.span.start;
                Ok(0)
            };
            let work = |_: &mut (), _: &Batch| Ok(());
            run_in_order(layout, Plan::all(layout), control, || Ok(()), work, take).unwrap();
            assert_eq!(taken, layout.chunks());
        }
    }
}
