//! What the guest wrote, on its way to the host.
//!
//! The port gives byte by byte, and each write to the host costs a system call and a reader that wakes up.
//! So the first byte after a rest goes out at once, and what comes within [`GATHER`] of a write goes out
//! together; the guest wakes the writer's thread for the first byte and for a full piece only.

use std::{
    io::{self, ErrorKind, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::machine::types::Timings;

/// Bytes that wait for the host before the guest is held up.
const MOST_UNWRITTEN: usize = 64 << 10;
/// Bytes offered to the sink at once: a piece, after which progress can be seen. A page of a pipe on Linux.
const PIECE: usize = 4096;
/// The least time from one write to the next while less than a piece waits. A line takes a guest less, so a
/// reader waits no longer than this for its end.
const GATHER: Duration = Duration::from_millis(2);

/// What the guest wrote, on its way to the host. The guest is held up while the host is behind.
pub(in crate::machine) struct Output {
    state: Mutex<State>,
    /// For the writer: there is something to do.
    filled: Condvar,
    /// For all others: the sink has taken something, or the guest is not held up any more.
    taken: Condvar,
    timings: Arc<Timings>,
    gather: Duration,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// The writer has not yet come back from the sink, its flush included.
    writing: bool,
    /// Bytes in the writer's hands that the sink has not taken.
    in_hand: usize,
    /// The writer waits for the first byte.
    idle: bool,
    /// How many wait for everything to be written: nothing is gathered.
    drains: u32,
    closed: bool,
    /// The guest is not held up, since it is wanted at the gate.
    hurry: bool,
    /// The sink has taken nothing for too long: what is left is lost, and has been counted.
    given_up: bool,
}

impl State {
    fn unwritten(&self) -> usize {
        self.waiting.len() + self.in_hand
    }

    fn is_done(&self) -> bool {
        self.waiting.is_empty() && !self.writing
    }

    /// Whether the writer may wait for more.
    fn gathers(&self) -> bool {
        self.drains == 0 && !self.closed && !self.hurry && self.waiting.len() < PIECE
    }
}

impl Output {
    pub(in crate::machine) fn new(timings: Arc<Timings>) -> Arc<Self> {
        Self::gathering(timings, GATHER)
    }

    /// One with `gather` in the place of [`GATHER`].
    fn gathering(timings: Arc<Timings>, gather: Duration) -> Arc<Self> {
        let (filled, taken) = (Condvar::new(), Condvar::new());
        Arc::new(Self { state: Mutex::default(), filled, taken, timings, gather })
    }

    /// Body of the writer's thread.
    pub(in crate::machine) fn write_to(&self, mut sink: Box<dyn Write + Send>) {
        let mut bytes = Vec::new();
        let mut rested = Instant::now();
        loop {
            let mut state = self.state.lock();
            while !state.closed && state.waiting.is_empty() {
                state.idle = true;
                self.filled.wait(&mut state);
            }
            state.idle = false;
            while state.gathers() && !self.filled.wait_until(&mut state, rested).timed_out() {}
            if state.waiting.is_empty() {
                return;
            }
            bytes.clear();
            std::mem::swap(&mut bytes, &mut state.waiting);
            (state.writing, state.in_hand) = (true, bytes.len());
            drop(state);
            self.taken.notify_all();
            self.pour(&bytes, &mut *sink);
            self.state.lock().writing = false;
            self.taken.notify_all();
            rested = Instant::now() + self.gather;
        }
    }

    /// While set, the guest is not held up by a slow host.
    pub(in crate::machine) fn hurry(&self, hurry: bool) {
        self.state.lock().hurry = hurry;
        self.taken.notify_all();
        self.filled.notify_one();
    }

    /// Waits until everything has been written; false if that took longer than `timeout`.
    pub(in crate::machine) fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        self.wait_written(|_| deadline).is_ok()
    }

    /// Waits until everything has been written. Gives up when the sink takes nothing for `stall`, or once
    /// `most` is over, and returns how many bytes are lost with that: each is counted in one call.
    pub(in crate::machine) fn finish(&self, stall: Duration, most: Duration) -> usize {
        let now = Instant::now();
        let end = now.checked_add(most);
        let (mut before, mut since) = (usize::MAX, now);
        let lost = self.wait_written(|unwritten| {
            if unwritten < before {
                (before, since) = (unwritten, Instant::now());
            }
            match (since.checked_add(stall), end) {
                (Some(stalled), Some(end)) => Some(stalled.min(end)),
                (stalled, end) => stalled.or(end),
            }
        });
        let Err(lost) = lost else { return 0 };
        let mut state = self.state.lock();
        let counted = std::mem::replace(&mut state.given_up, true);
        state.waiting.clear();
        drop(state);
        self.taken.notify_all();
        if counted { 0 } else { lost }
    }

    /// Whether the writer has nothing to do: its thread ends if this is closed.
    pub(in crate::machine) fn is_done(&self) -> bool {
        self.state.lock().is_done()
    }

    /// Ends the writer once it has written everything.
    pub(in crate::machine) fn close(&self) {
        self.state.lock().closed = true;
        self.filled.notify_one();
        self.taken.notify_all();
    }

    /// Waits until everything has been written, or until the deadline, which may move as the number of unwritten
    /// bytes falls; that number is the error. Nothing is waited for after it was given up.
    fn wait_written(
        &self,
        mut deadline: impl FnMut(usize) -> Option<Instant>,
    ) -> Result<(), usize> {
        let mut state = self.state.lock();
        state.drains += 1;
        self.filled.notify_one();
        while !state.is_done() && !state.given_up {
            match deadline(state.unwritten()) {
                Some(deadline) if Instant::now() >= deadline => break,
                Some(deadline) => drop(self.taken.wait_until(&mut state, deadline)),
                None => self.taken.wait(&mut state),
            }
        }
        state.drains -= 1;
        if state.is_done() { Ok(()) } else { Err(state.unwritten()) }
    }

    /// Writes `bytes` to the sink, piece by piece.
    fn pour(&self, bytes: &[u8], sink: &mut dyn Write) {
        let mut rest = bytes;
        while !rest.is_empty() {
            match sink.write(&rest[..rest.len().min(PIECE)]) {
                Ok(count @ 1..) => rest = &rest[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => {
                    let why = other.err().unwrap_or_else(|| ErrorKind::WriteZero.into());
                    tracing::warn!("{} bytes of console output are lost: {why}", rest.len());
                    rest = &[];
                }
            }
            self.state.lock().in_hand = rest.len();
            self.taken.notify_all();
        }
        if let Err(error) = sink.flush() {
            tracing::warn!("console output may be lost: {error}");
        }
    }
}

/// The serial port's end of an [`Output`].
pub(in crate::machine) struct OutputEnd(pub(in crate::machine) Arc<Output>);

impl OutputEnd {
    fn wait_for_room(&self) -> MutexGuard<'_, State> {
        let Output { state, taken, .. } = &*self.0;
        let mut state = state.lock();
        while !state.closed
            && !state.hurry
            && !state.given_up
            && state.waiting.len() >= MOST_UNWRITTEN
        {
            taken.wait(&mut state);
        }
        state
    }
}

impl Write for OutputEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.timings.mark_first_console_byte();
        let mut state = self.wait_for_room();
        if state.given_up {
            return Ok(bytes.len());
        }
        let before = state.waiting.len();
        state.waiting.extend_from_slice(bytes);
        let piece = before < PIECE && state.waiting.len() >= PIECE;
        if std::mem::take(&mut state.idle) || piece {
            drop(state);
            self.0.filled.notify_one();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const AMPLE: Duration = Duration::from_secs(60);

    /// A sink that notes each write, and takes nothing while its lock is held.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Sink {
        fn bytes(&self) -> Vec<u8> {
            self.0.lock().concat()
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Runs `body` with a writer to `sink`.
    fn written(
        gather: Duration,
        sink: impl Write + Send + 'static,
        body: impl FnOnce(Arc<Output>),
    ) {
        let output = Output::gathering(Arc::default(), gather);
        thread::scope(|scope| {
            let writer = Arc::clone(&output);
            scope.spawn(move || writer.write_to(Box::new(sink)));
            body(Arc::clone(&output));
            output.close();
        });
    }

    fn byte(n: usize) -> u8 {
        n as u8
    }

    #[test]
    fn what_comes_after_a_write_goes_out_in_pieces_and_not_byte_by_byte() {
        const BURST: usize = 5 * PIECE / 2;
        let sink = Sink::default();
        written(HOUR, sink.clone(), |output| {
            let mut end = OutputEnd(Arc::clone(&output));
            end.write_all(&[byte(0)]).unwrap();
            while sink.bytes().is_empty() {
                thread::yield_now();
            }
            (1..BURST).for_each(|n| end.write_all(&[byte(n)]).unwrap());
            assert!(output.drain(AMPLE), "nobody waits for an hour at the end");
        });
        let writes = sink.0.lock().len();
        // The first byte; full pieces, each perhaps in two if the guest wrote on meanwhile; the rest.
        assert!(writes <= 1 + 2 * BURST.div_ceil(PIECE) + 1, "{writes} writes");
        assert!(sink.bytes().into_iter().eq((0..BURST).map(byte)));
    }

    #[test]
    fn the_first_byte_after_a_rest_waits_for_nothing() {
        let (send, taken) = mpsc::channel();
        struct Tell(mpsc::Sender<u8>);
        impl Write for Tell {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                bytes.iter().for_each(|byte| self.0.send(*byte).unwrap());
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        written(Duration::ZERO, Tell(send), |output| {
            let mut end = OutputEnd(output);
            for n in 0..100 {
                end.write_all(&[n]).unwrap();
                assert_eq!(taken.recv_timeout(AMPLE), Ok(n));
            }
        });
    }

    #[test]
    fn output_waits_for_a_slow_host_unless_the_guest_is_in_a_hurry() {
        let sink = Sink::default();
        let count = 3 * MOST_UNWRITTEN;
        written(GATHER, sink.clone(), |output| {
            let stuck = sink.0.lock();
            let mut end = OutputEnd(Arc::clone(&output));
            let guest = thread::spawn(move || {
                (0..count).for_each(|n| end.write_all(&[byte(n)]).unwrap());
            });
            assert!(!output.drain(Duration::ZERO) || !guest.is_finished());
            output.hurry(true);
            guest.join().unwrap();
            assert!(!output.drain(Duration::ZERO));
            drop(stuck);
            assert!(output.drain(AMPLE));
        });
        assert!(sink.bytes().into_iter().eq((0..count).map(byte)));
    }

    #[test]
    fn a_host_that_takes_nothing_is_given_up_and_what_it_did_not_take_is_counted_once() {
        let sink = Sink::default();
        written(GATHER, sink.clone(), |output| {
            let stuck = sink.0.lock();
            let mut end = OutputEnd(Arc::clone(&output));
            end.write_all(&[1; 1000]).unwrap();
            assert_eq!(output.finish(Duration::ZERO, HOUR), 1000);
            assert_eq!(output.finish(HOUR, HOUR), 0, "it is not waited for again");
            end.write_all(&[2; 2 * MOST_UNWRITTEN]).unwrap();
            end.write_all(&[2; 2 * MOST_UNWRITTEN]).unwrap();
            drop(stuck);
        });
    }

    #[test]
    fn a_slow_host_gets_everything_as_long_as_it_takes_something() {
        /// Takes one byte for each permission.
        struct Slow(mpsc::Receiver<()>, Sink);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                // Without a giver it takes what comes.
                let _ = self.0.recv();
                self.1.write(&bytes[..1])
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (give, permission) = mpsc::channel();
        let sink = Sink::default();
        written(GATHER, Slow(permission, sink.clone()), |output| {
            OutputEnd(Arc::clone(&output)).write_all(&[7; 500]).unwrap();
            let finish = thread::spawn(move || output.finish(AMPLE, HOUR));
            for _ in 0..499 {
                give.send(()).unwrap();
            }
            while sink.bytes().len() < 499 {
                thread::yield_now();
            }
            assert!(!finish.is_finished());
            drop(give);
            assert_eq!(finish.join().unwrap(), 0);
        });
        assert_eq!(sink.bytes(), [7; 500]);
    }
}
