//! Batches of chunks through worker threads and back in order.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{Control, Layout};
use crate::error::FormatError;

/// Batches that are begun and not yet taken, for each worker.
const AHEAD: u64 = 2;

/// Runs `work` for every batch of chunks on worker threads, each with its own value of `new_worker`, and
/// hands the results to `take` on the calling thread in order. `take` answers how many bytes are stored so
/// far. However slow it is, at most [`AHEAD`] batches a worker are begun and not yet taken, so memory stays
/// bounded: 2 MiB of raw bytes a worker, or two chunks if those are larger.
///
/// The error is the one of the lowest-numbered batch that failed, whatever the timing.
pub(super) fn run_in_order<W, T: Send>(
    layout: Layout,
    control: Control<'_>,
    new_worker: impl Fn() -> Result<W, FormatError> + Sync,
    work: impl Fn(&mut W, Range<u64>) -> Result<T, FormatError> + Sync,
    mut take: impl FnMut(Range<u64>, T) -> Result<u64, FormatError>,
) -> Result<(), FormatError> {
    let line = Line::new(layout.batches(), control.threads.get() as u64 * AHEAD);
    std::thread::scope(|scope| {
        for _ in 0..line.batches.min(control.threads.get() as u64) {
            scope.spawn(|| {
                // A panic in `work` must not leave the calling thread waiting for the batch.
                let _closes = CloseOnPanic(&line);
                let mut worker = None;
                while let Some(batch) = line.next() {
                    let mut run = || {
                        control.check()?;
                        let worker = match &mut worker {
                            Some(worker) => worker,
                            none => none.insert(new_worker()?),
                        };
                        work(worker, layout.batch(batch))
                    };
                    line.put(batch, run());
                }
            });
        }
        let mut run = || {
            for batch in 0..line.batches {
                let Some(result) = line.get(batch) else {
                    break;
                };
                let chunks = layout.batch(batch);
                let done = layout.offset(chunks.end).min(layout.size);
                let stored = take(chunks, result?)?;
                control.check()?;
                control.progress.advanced(done, layout.size, stored);
            }
            Ok(())
        };
        let result = run();
        line.close();
        result
    })
}

/// The order of batches between workers and the calling thread.
struct Line<T> {
    batches: u64,
    ahead: u64,
    inner: Mutex<LineInner<T>>,
    changed: Condvar,
}

struct LineInner<T> {
    next: u64,
    taken: u64,
    done: HashMap<u64, Result<T, FormatError>>,
    closed: bool,
}

impl<T> Line<T> {
    fn new(batches: u64, ahead: u64) -> Self {
        let inner = LineInner { next: 0, taken: 0, done: HashMap::new(), closed: false };
        Self { batches, ahead, inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// The next batch to work on; `None` if there is none left.
    fn next(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        while !inner.closed && inner.next < self.batches && inner.next - inner.taken >= self.ahead {
            inner = self.wait(inner);
        }
        if inner.closed || inner.next >= self.batches {
            return None;
        }
        inner.next += 1;
        Some(inner.next - 1)
    }

    fn put(&self, batch: u64, result: Result<T, FormatError>) {
        lock(&self.inner).done.insert(batch, result);
        self.changed.notify_all();
    }

    /// Waits for the result of `batch`; `None` if a worker panicked.
    fn get(&self, batch: u64) -> Option<Result<T, FormatError>> {
        let mut inner = lock(&self.inner);
        loop {
            if let Some(result) = inner.done.remove(&batch) {
                inner.taken = batch + 1;
                self.changed.notify_all();
                return Some(result);
            }
            if inner.closed {
                return None;
            }
            inner = self.wait(inner);
        }
    }

    fn close(&self) {
        lock(&self.inner).closed = true;
        self.changed.notify_all();
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, LineInner<T>>) -> MutexGuard<'a, LineInner<T>> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }
}

struct CloseOnPanic<'a, T>(&'a Line<T>);

impl<T> Drop for CloseOnPanic<'_, T> {
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
        panic::{AssertUnwindSafe, catch_unwind},
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    use super::*;
    use crate::image::{CHUNK_SIZE, MAX_CHUNK_SIZE};

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
            let work = |_: &mut (), chunks: Range<u64>| {
                begun.fetch_add(1, Ordering::SeqCst);
                Ok(chunks.clone())
            };
            let mut taken = 0;
            run_in_order(
                layout,
                control(),
                || Ok(()),
                work,
                |chunks, result: Range<u64>| {
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
            assert_eq!((next, begun.into_inner()), (layout.chunks(), layout.batches()));
        }
    }

    #[test]
    fn the_lowest_batch_that_fails_is_told() {
        let layout = Layout { size: 60 << 20, chunk_size: CHUNK_SIZE };
        let fails = |chunk: u64| FormatError::field("memory", format!("chunk {chunk}"), "fails");
        let work = |_: &mut (), chunks: Range<u64>| match chunks.start {
            start if start >= 320 => Err(fails(start)),
            _ => Ok(()),
        };
        for _ in 0..20 {
            let error = run_in_order(layout, control(), || Ok(()), work, |_, ()| Ok(0));
            assert!(error.unwrap_err().to_string().contains("chunk 320"));
        }
    }

    #[test]
    fn a_panic_in_a_worker_ends_the_run() {
        let layout = Layout { size: 60 << 20, chunk_size: CHUNK_SIZE };
        let work = |_: &mut (), chunks: Range<u64>| match chunks.start {
            320 => panic!("as the test wants it"),
            _ => Ok(()),
        };
        let run = || run_in_order(layout, control(), || Ok(()), work, |_, ()| Ok(0));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    }
}
