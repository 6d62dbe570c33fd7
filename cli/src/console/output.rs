//! Console output: a thread of its own writes it, so that a slow reader holds up neither the vCPU
//! that happened to write a byte nor a pause.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Bytes that may wait. A reader that stands still for longer stops the guest at its next byte, as a
/// real line without flow control would not: nothing is lost.
const CAPACITY: usize = 1 << 20;

/// The writing end; clones write to the same place.
#[derive(Clone)]
pub(crate) struct Output {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The thread holds bytes that it has not written out yet.
    writing: bool,
    /// Nobody reads any more: what comes is dropped.
    closed: bool,
    /// The VM is ending: nobody may wait for the reader any more.
    released: bool,
    done: bool,
}

/// Ends the thread once everything is written.
pub(crate) struct Drain {
    output: Output,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    /// Starts the thread that writes to `sink`.
    pub(crate) fn new(mut sink: impl Write + Send + 'static) -> io::Result<(Self, Drain)> {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        let output = Self { shared: shared.clone() };
        let thread = thread::Builder::new().name("console-out".into()).spawn(move || {
            loop {
                let mut queue = lock(&shared);
                queue.writing = false;
                shared.changed.notify_all();
                while queue.bytes.is_empty() && !queue.done {
                    queue = wait(&shared, queue);
                }
                if queue.bytes.is_empty() {
                    return;
                }
                let bytes: Vec<u8> = queue.bytes.drain(..).collect();
                queue.writing = true;
                shared.changed.notify_all();
                drop(queue);
                if let Err(e) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                    super::message(&format!(
                        "squib: the console output is closed ({e}); the VM runs on\n"
                    ));
                    let mut queue = lock(&shared);
                    queue.closed = true;
                    queue.bytes.clear();
                }
            }
        })?;
        Ok((output.clone(), Drain { output, thread: Some(thread) }))
    }

    /// From now on a write does not wait for the reader: the VM is ending, and has to come to rest.
    pub(crate) fn release(&self) {
        lock(&self.shared).released = true;
        self.shared.changed.notify_all();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = lock(&self.shared);
        while queue.bytes.len() >= CAPACITY && !queue.closed && !queue.released {
            queue = wait(&self.shared, queue);
        }
        if !queue.closed && !queue.done {
            queue.bytes.extend(bytes);
            self.shared.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        // A reader that has stopped reading must not keep a VM that has ended.
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut queue = lock(&self.output.shared);
        queue.done = true;
        queue.released = true;
        self.output.shared.changed.notify_all();
        while (!queue.bytes.is_empty() || queue.writing) && !queue.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self
                .output
                .shared
                .changed
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(queue);
        if let Some(thread) = self.thread.take() {
            // It panicked only if the sink did, which has been reported.
            let _ = thread.join();
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a>(shared: &Shared, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
    shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Collect(Arc<Mutex<Vec<u8>>>);

    impl Write for Collect {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_is_written_in_order_before_the_drain_ends() {
        let sunk = Arc::new(Mutex::new(Vec::new()));
        let (mut output, drain) = Output::new(Collect(sunk.clone())).unwrap();
        let mut all = Vec::new();
        for n in 0..10_000 {
            let line = format!("line {n}\n");
            output.write_all(line.as_bytes()).unwrap();
            all.extend_from_slice(line.as_bytes());
        }
        drop(drain);
        assert_eq!(*sunk.lock().unwrap(), all);
    }

    #[test]
    fn a_writer_goes_on_when_nobody_reads_any_more() {
        struct Closed(mpsc::Sender<()>);
        impl Write for Closed {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                let _ = self.0.send(());
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, tried) = mpsc::channel();
        let (mut output, _drain) = Output::new(Closed(sender)).unwrap();
        output.write_all(b"x").unwrap();
        tried.recv().unwrap();
        for _ in 0..64 {
            output.write_all(&[0; CAPACITY / 16]).unwrap();
        }
    }
}
