//! Bytes on their way between the host and the guest's serial port.

mod output;

use std::{collections::VecDeque, sync::Arc};

use parking_lot::{Condvar, Mutex};

pub(super) use self::output::{Output, OutputEnd};

/// Bytes that wait for the guest before a sender is held up.
const MOST_WAITING: usize = 4096;
/// Bytes offered to the port at once: the receive FIFO of a 16550A is 16, ours may be larger.
const OFFER: usize = 64;

/// The way to the guest's console; clones lead to the same port.
#[derive(Clone)]
pub struct ConsoleInput {
    feed: Arc<Feed>,
}

/// The machine has gone away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has gone away")]
pub struct ConsoleClosed;

impl ConsoleInput {
    /// Sends all `bytes`, waiting while the guest is behind (or paused) by more than 4 KiB.
    pub fn send(&self, mut bytes: &[u8]) -> Result<(), ConsoleClosed> {
        while !bytes.is_empty() {
            let mut state = self.feed.state.lock();
            while state.open && state.waiting.len() >= MOST_WAITING {
                self.feed.changed.wait(&mut state);
            }
            let taken = self.feed.put(&mut state, bytes)?;
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// Sends as many of `bytes` as can wait for the guest, at once, and says how many that were.
    pub fn try_send(&self, bytes: &[u8]) -> Result<usize, ConsoleClosed> {
        self.feed.put(&mut self.feed.state.lock(), bytes)
    }

    pub(super) fn new(feed: Arc<Feed>) -> Self {
        Self { feed }
    }

    /// Nothing reaches the port after this until [`release`](Self::release).
    pub(super) fn hold(&self) {
        self.feed.state.lock().held = true;
    }

    pub(super) fn release(&self) {
        self.feed.state.lock().held = false;
        self.feed.changed.notify_all();
    }

    pub(super) fn close(&self) {
        self.feed.state.lock().open = false;
        self.feed.changed.notify_all();
        self.feed.has_room();
    }
}

/// What senders, the pump and the port share.
pub(super) struct Feed {
    state: Mutex<State>,
    changed: Condvar,
    /// Set when the port may have room again. A lock of its own: the port announces room with its own
    /// lock held, and the pump offers bytes with `state` held.
    room: Mutex<bool>,
    room_made: Condvar,
}

struct State {
    waiting: VecDeque<u8>,
    open: bool,
    held: bool,
}

impl Feed {
    /// A feed that holds everything back.
    pub(super) fn new() -> Arc<Self> {
        let state = State { waiting: VecDeque::new(), open: true, held: true };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            room: Mutex::new(false),
            room_made: Condvar::new(),
        })
    }

    /// The guest has taken bytes out of the port. May be called with the port locked.
    pub(super) fn has_room(&self) {
        *self.room.lock() = true;
        self.room_made.notify_all();
    }

    /// Body of the pump's thread: carries bytes to the port, which takes as many as it has room for.
    pub(super) fn pump(&self, offer: impl Fn(&[u8]) -> usize) {
        let mut bytes = Vec::with_capacity(OFFER);
        loop {
            let mut state = self.state.lock();
            while state.open && (state.held || state.waiting.is_empty()) {
                self.changed.wait(&mut state);
            }
            if !state.open {
                return;
            }
            bytes.clear();
            bytes.extend(state.waiting.iter().take(OFFER));
            *self.room.lock() = false;
            // Offered under the lock, so that nothing is under way once `hold` returns.
            let taken = offer(&bytes).min(bytes.len());
            state.waiting.drain(..taken);
            drop(state);
            self.changed.notify_all();
            if taken < bytes.len() {
                let mut room = self.room.lock();
                while !*room {
                    self.room_made.wait(&mut room);
                }
            }
        }
    }

    fn put(&self, state: &mut State, bytes: &[u8]) -> Result<usize, ConsoleClosed> {
        if !state.open {
            return Err(ConsoleClosed);
        }
        let room = MOST_WAITING.saturating_sub(state.waiting.len()).min(bytes.len());
        state.waiting.extend(&bytes[..room]);
        self.changed.notify_all();
        Ok(room)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A port of `size` bytes and a pump for it.
    fn pumped(
        size: usize,
        body: impl FnOnce(&ConsoleInput, &dyn Fn() -> Vec<u8>, &Mutex<Vec<u8>>),
    ) {
        let feed = Feed::new();
        let input = ConsoleInput::new(Arc::clone(&feed));
        let port = Mutex::new(Vec::new());
        thread::scope(|scope| {
            scope.spawn(|| {
                feed.pump(|bytes| {
                    let mut port = port.lock();
                    let room = (size - port.len()).min(bytes.len());
                    port.extend_from_slice(&bytes[..room]);
                    room
                })
            });
            let read = || {
                let taken = std::mem::take(&mut *port.lock());
                feed.has_room();
                taken
            };
            body(&input, &read, &port);
            input.close();
        });
    }

    #[test]
    fn every_byte_arrives_in_order_through_a_small_port() {
        let sent: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        pumped(16, |input, read, _| {
            input.release();
            thread::scope(|scope| {
                scope.spawn(|| input.send(&sent).unwrap());
                let mut got = Vec::new();
                while got.len() < sent.len() {
                    got.extend(read());
                    thread::yield_now();
                }
                assert_eq!(got, sent);
            });
        });
    }

    #[test]
    fn nothing_reaches_a_port_that_is_held() {
        pumped(16, |input, read, port| {
            input.send(b"abc").unwrap();
            thread::yield_now();
            assert!(port.lock().is_empty());
            input.release();
            let mut got = Vec::new();
            while got.len() < 3 {
                got.extend(read());
            }
            input.hold();
            input.send(b"def").unwrap();
            thread::yield_now();
            assert!(port.lock().is_empty());
        });
    }

    #[test]
    fn a_full_queue_takes_what_fits_and_a_closed_one_nothing() {
        let input = ConsoleInput::new(Feed::new());
        assert_eq!(input.try_send(&[0; 5000]), Ok(MOST_WAITING));
        assert_eq!(input.try_send(&[0; 1]), Ok(0));
        input.close();
        assert_eq!(input.try_send(&[0; 1]), Err(ConsoleClosed));
        assert_eq!(input.send(&[0; 1]), Err(ConsoleClosed));
    }
}
