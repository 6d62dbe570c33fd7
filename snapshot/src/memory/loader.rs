//! The thread that brings what nobody has asked for yet.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use squib_devices::granules::{Granules, Store};
use squib_formats::{
    error::FormatError,
    image::{ImageReader, Record},
};

use super::origin::Sweep;

/// Chunks that are looked at for one read ahead.
const AHEAD: usize = 64;

/// Brings absent granules one after the other while it lives.
pub(crate) struct Loader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Brings the granules of `granules` from `image`: those of `first` in that order, and then all others. If
    /// one cannot be had, the granules tell whoever runs the guest, and it ends.
    pub(crate) fn start<S: Store>(
        granules: &Arc<Granules<S>>,
        image: &ImageReader,
        first: &[u32],
    ) -> Result<Self, FormatError> {
        let sweep = Sweep::new(image)?;
        let count = image.index().chunks();
        let first = first.iter().map(|chunk| u64::from(*chunk)).filter(|chunk| *chunk < count);
        let data = image.index().runs().filter(|(_, record)| **record != Record::Zero);
        let order: Vec<u64> = first.chain(data.flat_map(|(chunks, _)| chunks)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (granules, stopped) = (Arc::clone(granules), Arc::clone(&stop));
        let load = move || {
            for (at, chunk) in order.iter().enumerate() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if granules.is_absent(*chunk) {
                    sweep.read_ahead(&order[at..(at + AHEAD).min(order.len())]);
                    if granules.prefetch(*chunk, &sweep).is_err() {
                        return;
                    }
                }
            }
            // Of what is all zeros nothing is to be brought. Then nothing depends on the snapshot any more.
            let mut next = 0;
            while let Some(chunk) = granules.next_absent(next) {
                if stopped.load(Ordering::Relaxed) || granules.prefetch(chunk, &sweep).is_err() {
                    return;
                }
                next = chunk + 1;
            }
        };
        let thread = thread::Builder::new().name("loader".into()).spawn(load);
        let thread = thread.map_err(|e| FormatError::io(&image.record().name, "load", e))?;
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
