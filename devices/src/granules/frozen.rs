//! A moment of a memory or disk, read while its owner goes on.

use std::{io, ops::Range, sync::Arc};

use parking_lot::MutexGuard;
use squib_formats::{digest::Digest, image::Content};

use super::{Aside, Baseline, Freeze, Granules, RangeSet, Slow, Store, WRITABLE};

/// The bytes of one moment. Each may be read once; with that, whoever writes need not keep it any longer.
///
/// Dropped without [`keep`](Self::keep) it leaves no trace: the next difference still finds everything that
/// has changed since the baseline before it.
pub struct Frozen<S: Store> {
    granules: Arc<Granules<S>>,
    /// That of the bytes that had not changed.
    baseline: Option<Arc<dyn Baseline>>,
}

impl<S: Store> Granules<S> {
    /// Begins to hold the bytes of this moment: granules that are written to from now on are put aside, at
    /// most `limit` bytes of them (or one granule); then writers wait until they have been read. `None` if
    /// another moment is being read.
    ///
    /// Called while nobody writes; and whoever remembers that a granule may be written to must forget it
    /// before anybody writes again.
    pub fn freeze(self: &Arc<Self>, limit: u64) -> Option<Frozen<S>> {
        let mut slow = self.slow.lock();
        if slow.freeze.is_some() {
            return None;
        }
        // What is in it from now on has been written to since the moment.
        let changed_before = std::mem::take(&mut slow.changed);
        for granules in changed_before.ranges() {
            self.access.update(granules, |access| access & !WRITABLE);
        }
        slow.freeze = Some(Freeze {
            changed_before,
            taken: RangeSet::default(),
            parts: Default::default(),
            aside: Default::default(),
            aside_bytes: 0,
            limit,
            throttled: 0,
        });
        Some(Frozen { granules: Arc::clone(self), baseline: slow.baseline.clone() })
    }
}

impl<S: Store> Frozen<S> {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.granules.size
    }

    /// Size of a granule in bytes.
    pub fn granule_size(&self) -> u64 {
        self.granules.granule_size()
    }

    /// Reads the bytes at `offset` as they were into all of `into`; or answers [`Content::Zero`] where they
    /// were zeros without being read, and leaves `into` as it is.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        let granule_size = self.granule_size();
        let start = offset % granule_size;
        if start + into.len() as u64 <= granule_size {
            return self.read_part(offset, into);
        }
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let part = (granule_size - at % granule_size).min((into.len() - done) as u64) as usize;
            let place = &mut into[done..done + part];
            if self.read_part(at, place)? == Content::Zero {
                place.fill(0);
            }
            done += part;
        }
        Ok(Content::Data)
    }

    /// The first bytes at or behind `offset` that may have been something else than zeros, found without reading
    /// any; `None` if there are none up to the end. `zero` is the digest of a granule of zeros.
    pub fn data(&self, offset: u64, zero: Digest) -> io::Result<Option<Range<u64>>> {
        let mut at = offset;
        while at < self.granules.size {
            match self.extent(at, zero)? {
                (end, true) => return Ok(Some(at..end)),
                (end, false) => at = end,
            }
        }
        Ok(None)
    }

    /// The end of bytes from `at` on that were all zeros, or that may have been something else, and which of the
    /// two.
    fn extent(&self, at: u64, zero: Digest) -> io::Result<(u64, bool)> {
        let granules = &*self.granules;
        let granule = at >> granules.shift;
        let start_of = |granule: u64| match granule < granules.count {
            true => granule << granules.shift,
            false => granules.size,
        };
        let over = || io::Error::other("the moment is over");
        // What had not changed is what the baseline says, whatever has been written to it since the moment.
        let slow = granules.slow.lock();
        let (changed, mut end) = slow.freeze.as_ref().ok_or_else(over)?.changed_before.run(granule);
        drop(slow);
        let known = self.baseline.as_ref().filter(|_| !changed);
        if let Some((digest, count)) = known.and_then(|baseline| baseline.run(granule)) {
            end = end.min(granule.saturating_add(count));
            return Ok((start_of(end), digest != zero));
        }
        // Of all others the store knows, which is asked first: what has been written to since the moment, or
        // comes from elsewhere, is looked at afterwards, when nothing more can have been when it was asked.
        let found = granules.store.data(at..start_of(end))?;
        let slow = granules.slow.lock();
        let (absent, until) = slow.absent.run(granule);
        let (written, other) = slow.changed.run(granule);
        let end = start_of(end.min(until).min(other));
        Ok(match found {
            _ if absent || written => (end, true),
            None => (end, false),
            Some(data) if data.start > at => (data.start.min(end), false),
            Some(data) => (data.end.clamp(at + 1, end), true),
        })
    }

    /// blake3 of the granule at `offset`, `len` bytes long, if nobody had written to it since the baseline
    /// and that knows it.
    pub fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
        let granule = self.whole(offset, len)?;
        let slow = self.granules.slow.lock();
        if slow.freeze.as_ref()?.changed_before.contains(granule) {
            return None;
        }
        drop(slow);
        self.baseline.as_ref()?.digest(granule)
    }

    /// Says that the granule at `offset`, `len` bytes long, will not be read.
    pub fn skip(&self, offset: u64, len: usize) {
        if let Some(granule) = self.whole(offset, len) {
            self.take(&mut self.granules.slow.lock(), granule, len);
        }
    }

    /// Says that nothing more will be read.
    pub fn skip_all(&self) {
        if let Some(freeze) = &mut self.granules.slow.lock().freeze {
            freeze.taken.insert(0..self.granules.count);
            freeze.aside.clear();
            freeze.aside_bytes = 0;
        }
        self.granules.changed.notify_all();
    }

    /// Granules that had been written to since the baseline, or of which that is not known.
    pub fn changed(&self) -> u64 {
        let slow = self.granules.slow.lock();
        slow.freeze.as_ref().map_or(0, |freeze| freeze.changed_before.len())
    }

    /// How often a writer had to wait for room.
    pub fn throttled(&self) -> u64 {
        self.granules.slow.lock().freeze.as_ref().map_or(0, |freeze| freeze.throttled)
    }

    /// The bytes have been stored: from now on unchanged means unchanged since this moment, whose digests
    /// are `baseline`.
    pub fn keep(self, baseline: Arc<dyn Baseline>) {
        let mut slow = self.granules.slow.lock();
        slow.freeze = None;
        slow.baseline = Some(baseline);
        drop(slow);
        self.granules.changed.notify_all();
    }

    /// The granule at `offset`, if the range is all of it.
    fn whole(&self, offset: u64, len: usize) -> Option<u64> {
        let granule = offset >> self.granules.shift;
        let inside = granule < self.granules.count();
        (inside && self.granules.place(granule) == (offset, len)).then_some(granule)
    }

    /// Reads a part of one granule.
    fn read_part(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        let granules = &*self.granules;
        let granule = offset >> granules.shift;
        let mut slow = granules.slow.lock();
        loop {
            if slow.busy.contains(&granule) {
                granules.changed.wait(&mut slow);
                continue;
            }
            if granules.is_absent(granule) {
                granules.bring(&mut slow, granule, None)?;
                continue;
            }
            let Some(freeze) = &slow.freeze else {
                return Err(io::Error::other("the moment is over"));
            };
            let start = (offset - granules.place(granule).0) as usize;
            let content = match freeze.aside.get(&granule) {
                Some(Aside::Zero) => Content::Zero,
                Some(Aside::Bytes(bytes)) => {
                    into.copy_from_slice(&bytes[start..start + into.len()]);
                    Content::Data
                }
                None if granules.is_changed(granule) => {
                    return Err(io::Error::other(format!("{offset:#x} has been read before")));
                }
                None => granules.busy(&mut slow, granule, || granules.store.read(offset, into))?,
            };
            self.take(&mut slow, granule, into.len());
            return Ok(content);
        }
    }

    /// Counts `len` bytes of the granule as read. If that is all of it, nobody needs to keep it any more.
    fn take(&self, slow: &mut MutexGuard<'_, Slow>, granule: u64, len: usize) {
        let granule_len = self.granules.place(granule).1;
        let Some(freeze) = &mut slow.freeze else { return };
        if freeze.taken.contains(granule) {
            return;
        }
        let taken = freeze.parts.entry(granule).or_default();
        *taken = taken.saturating_add(len as u32);
        if *taken as usize >= granule_len {
            freeze.parts.remove(&granule);
            freeze.taken.insert(granule..granule + 1);
            if let Some(Aside::Bytes(_)) = freeze.aside.remove(&granule) {
                freeze.aside_bytes -= granule_len as u64;
            }
            // A writer may wait for room, or for this granule.
            self.granules.changed.notify_all();
        }
    }
}

impl<S: Store> Drop for Frozen<S> {
    fn drop(&mut self) {
        let mut slow = self.granules.slow.lock();
        // After `keep` there is none.
        let Some(freeze) = slow.freeze.take() else { return };
        for granules in freeze.changed_before.ranges() {
            self.granules.access.update(granules.clone(), |access| access | WRITABLE);
            slow.changed.insert(granules);
        }
        drop(slow);
        self.granules.changed.notify_all();
    }
}
