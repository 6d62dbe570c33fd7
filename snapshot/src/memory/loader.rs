//! The thread that brings what nobody has asked for yet.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use squib_devices::granules::{Granules, Store};

/// Brings absent granules one after the other while it lives.
pub(crate) struct Loader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Brings the granules of `first` in that order, and then all others. If one cannot be had, the granules
    /// tell whoever runs the guest, and it ends.
    pub(crate) fn start<S: Store>(
        granules: &Arc<Granules<S>>,
        first: Vec<u64>,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (granules, stopped) = (Arc::clone(granules), Arc::clone(&stop));
        let thread = thread::Builder::new().name("loader".into()).spawn(move || {
            let count = granules.count();
            for granule in first.into_iter().filter(|granule| *granule < count).chain(0..count) {
                if stopped.load(Ordering::Relaxed) || granules.prefetch(granule).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the runtime; what it left undone is brought on first touch.
            let _ = thread.join();
        }
    }
}
