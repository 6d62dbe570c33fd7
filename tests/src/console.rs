//! The host's end of a guest's console.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Keeps everything that a guest prints; clones share it.
#[derive(Clone, Default)]
pub struct Capture {
    bytes: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl Capture {
    /// Everything so far.
    pub fn taken(&self) -> Vec<u8> {
        self.bytes.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Everything so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.taken()).into_owned()
    }

    /// Waits until `found` finds something in what was printed, at most for `timeout`.
    pub fn wait_for<T>(&self, timeout: Duration, found: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (bytes, printed) = &*self.bytes;
        let bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut result = None;
        let waited = printed.wait_timeout_while(bytes, timeout, |bytes| {
            result = found(&String::from_utf8_lossy(bytes));
            result.is_none()
        });
        drop(waited);
        result
    }
}

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        self.bytes.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
