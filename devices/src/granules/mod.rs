//! Guest memory and disks in granules of one size, each of which is absent, unchanged or changed.
//!
//! A granule is *absent* until its bytes have been brought from an [`Origin`]; *unchanged* (readable) while
//! nobody has written to it since the [`Baseline`]; and *changed* (writable) from the first write on. With
//! these three states and nothing else
//!
//! - a restore can let the guest run at once and bring what it touches ([`Granules::set_origin`]),
//! - a difference finds what was not written to without reading it ([`Frozen::known_digest`]),
//! - a capture reads a moment's bytes while the guest goes on ([`Granules::freeze`]): the first write to an
//!   unchanged granule puts its bytes aside.
//!
//! Whoever touches the bytes asks [`Granules::allow`] first. That is one load of a byte for what is allowed;
//! anything else goes through a lock, under which no I/O is done: a granule that somebody works on is
//! *busy*, and others wait for it. So each is brought once, whoever asks for it and how many.

mod frozen;
mod ranges;
mod table;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    io,
    ops::Range,
    sync::{Arc, atomic::AtomicU8},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use squib_formats::{digest::Digest, image::Content};

pub use frozen::Frozen;
use ranges::RangeSet;
use table::Table;

/// The granule's bytes are there.
pub const READABLE: u8 = 1;
/// The granule may be written to: it may have changed since the baseline.
pub const WRITABLE: u8 = 2;
const BOTH: u8 = READABLE | WRITABLE;

/// Where the bytes of granules lie. Called for one granule by one thread at a time, but for different
/// granules by many.
pub trait Store: Send + Sync + 'static {
    /// Reads what lies at `offset` into all of `into`; or answers [`Content::Zero`] where it is known to be
    /// zeros without reading, and leaves `into` as it is.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content>;

    /// The first bytes in `range` that may be something else than zeros, found without reading any; `None` if
    /// there are none.
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok((!range.is_empty()).then_some(range))
    }

    /// Puts the first bytes of an absent granule, which reads as zeros, to `offset`.
    fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Why an origin cannot give a granule's bytes.
pub type OriginError = Box<dyn std::error::Error + Send + Sync>;

/// Where the bytes of absent granules come from.
pub trait Origin: Send + Sync {
    /// Hands the verified bytes of `granule` to `put`, or does not call it if all are zero.
    fn load(
        &self,
        granule: u64,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), OriginError>;
}

/// What every granule held at an earlier moment, by digest.
pub trait Baseline: Send + Sync {
    /// blake3 of the granule's bytes at that moment, continued with zeros to a whole granule; `None` if it is
    /// not known after all.
    fn digest(&self, granule: u64) -> Option<Digest>;

    /// As [`digest`](Self::digest), with the number of granules from `granule` on that are known to have the
    /// same.
    fn run(&self, granule: u64) -> Option<(Digest, u64)> {
        Some((self.digest(granule)?, 1))
    }
}

/// An absent granule cannot be had. Nobody gets the bytes of any other in its place: see
/// [`Granules::on_failure`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: the {granule_size} bytes at {offset:#x} cannot be loaded: {why}")]
pub struct Unavailable {
    /// What it is a part of.
    pub what: Arc<str>,
    /// Offset of the granule in bytes.
    pub offset: u64,
    /// Size of a granule in bytes.
    pub granule_size: u64,
    /// What the origin said.
    pub why: Arc<str>,
}

/// Told of the first granule that cannot be had.
type OnFailure = Box<dyn Fn(&Unavailable) + Send + Sync>;

/// The granules of one memory or disk.
pub struct Granules<S> {
    store: S,
    what: Arc<str>,
    size: u64,
    shift: u32,
    count: u64,
    access: Table,
    slow: Mutex<Slow>,
    /// Woken when a granule is no longer busy, and when there is room to put bytes aside.
    changed: Condvar,
}

#[derive(Default)]
struct Slow {
    /// Granules that are not readable.
    absent: RangeSet,
    /// Granules that are writable.
    changed: RangeSet,
    /// Granules that somebody loads, copies or reads just now.
    busy: HashSet<u64>,
    origin: Option<Arc<dyn Origin>>,
    baseline: Option<Arc<dyn Baseline>>,
    freeze: Option<Freeze>,
    failed: Option<Unavailable>,
    on_failure: Option<Arc<OnFailure>>,
    /// Granules with bytes, in the order in which somebody needed them.
    record: Option<Vec<u64>>,
    /// Absent granules that an overwrite which failed may have left bytes in.
    scribbled: HashSet<u64>,
}

impl Slow {
    /// Those granules have exactly the rights `access` from now on.
    fn note(&mut self, granules: Range<u64>, access: u8) {
        match access & READABLE {
            0 => self.absent.insert(granules.clone()),
            _ => self.absent.remove(granules.clone()),
        }
        match access & WRITABLE {
            0 => self.changed.remove(granules),
            _ => self.changed.insert(granules),
        }
    }
}

/// A moment that is being read.
struct Freeze {
    /// What had been written to before; the next difference needs it if this capture comes to nothing.
    changed_before: RangeSet,
    /// Granules that have been read in full.
    taken: RangeSet,
    /// Bytes read of granules that have been read in part.
    parts: HashMap<u64, u32>,
    /// What was put aside, since somebody wanted to write.
    aside: HashMap<u64, Aside>,
    aside_bytes: u64,
    limit: u64,
    /// Writers that had to wait for room.
    throttled: u64,
}

impl Freeze {
    /// Whether the granule has not been read in full and is not put aside either.
    fn needs(&self, granule: u64) -> bool {
        !self.taken.contains(granule) && !self.aside.contains_key(&granule)
    }
}

enum Aside {
    Zero,
    Bytes(Box<[u8]>),
}

impl<S: Store> Granules<S> {
    /// Granules of `1 << shift` bytes over `size` bytes in `store`, all with the rights `access`. `what`
    /// stands in errors.
    pub fn new(what: &str, store: S, size: u64, shift: u32, access: u8) -> Self {
        Self::with_table(what, store, size, shift, access, Table::sparse)
    }

    /// As [`new`](Self::new), with a table of [`rights`](Self::rights), one byte a granule from the start.
    pub fn with_rights(what: &str, store: S, size: u64, shift: u32, access: u8) -> Self {
        Self::with_table(what, store, size, shift, access, Table::flat)
    }

    fn with_table(
        what: &str,
        store: S,
        size: u64,
        shift: u32,
        access: u8,
        table: fn(u64, u8) -> Table,
    ) -> Self {
        let count = size.div_ceil(1 << shift);
        let mut slow = Slow::default();
        slow.note(0..count, access);
        let (access, slow, changed) = (table(count, access), Mutex::new(slow), Condvar::new());
        Self { store, what: what.into(), size, shift, count, access, slow, changed }
    }

    /// Size of all in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size of a granule in bytes. The last one may be shorter.
    pub fn granule_size(&self) -> u64 {
        1 << self.shift
    }

    /// Number of granules.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// What is allowed, one byte a granule, [`READABLE`] and [`WRITABLE`]; and the binary logarithm of a
    /// granule's size. For reading only. `None` unless they were made [with it](Self::with_rights).
    pub fn rights(&self) -> Option<(Arc<[AtomicU8]>, u32)> {
        match &self.access {
            Table::Flat(access) => Some((Arc::clone(access), self.shift)),
            Table::Sparse(_) => None,
        }
    }

    /// Where the bytes lie.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Sets where absent granules come from.
    pub fn set_origin(&self, origin: Arc<dyn Origin>) {
        self.slow.lock().origin = Some(origin);
    }

    /// Sets what unchanged and absent granules hold.
    pub fn set_baseline(&self, baseline: Arc<dyn Baseline>) {
        self.slow.lock().baseline = Some(baseline);
    }

    /// Has `hook` called, once, when a granule cannot be had; at once if that is so already. From then on
    /// nothing that is not there yet can be had: whoever runs the guest must stop it.
    pub fn on_failure(&self, hook: impl Fn(&Unavailable) + Send + Sync + 'static) {
        let mut slow = self.slow.lock();
        let failed = slow.failed.clone();
        let hook: Arc<OnFailure> = Arc::new(Box::new(hook));
        slow.on_failure = Some(Arc::clone(&hook));
        drop(slow);
        if let Some(failure) = failed {
            hook(&failure);
        }
    }

    /// Takes note that the bytes will not be there for much longer: as if one of them could not be had.
    pub fn lose(&self, why: &str) {
        let (what, why) = (Arc::clone(&self.what), why.into());
        let failure = Unavailable { what, offset: 0, granule_size: self.size, why };
        self.tell(&mut self.slow.lock(), &failure);
    }

    /// Waits until the `len` bytes at `offset`, which lie inside, may be read, and with `write` also written.
    #[inline]
    pub fn allow(&self, offset: u64, len: u64, write: bool) -> Result<(), Unavailable> {
        let need = if write { BOTH } else { READABLE };
        for granule in self.covering(offset, len) {
            if self.access.get(granule) & need != need {
                self.resolve(granule, need, None)?;
            }
        }
        Ok(())
    }

    /// Runs `write`, which gives all of the `len` bytes at `offset` new ones, once they may be written to. An
    /// absent granule that lies in the range whole is not brought for that, unless a freeze needs what it
    /// held; if `write` fails, it is absent as before.
    pub fn overwrite<R, E: From<Unavailable>>(
        &self,
        offset: u64,
        len: u64,
        write: impl FnOnce() -> Result<R, E>,
    ) -> Result<R, E> {
        let whole = self.inside(offset, len);
        let mut absent = false;
        for granule in self.covering(offset, len) {
            let access = self.access.get(granule);
            if access & READABLE == 0 && whole.contains(&granule) {
                absent = true;
            } else if access & BOTH != BOTH {
                self.resolve(granule, BOTH, None)?;
            }
        }
        if !absent {
            return write();
        }
        let mut claim = self.claim(whole)?;
        let result = write();
        claim.written = result.is_ok();
        result
    }

    /// Brings `granule` from `origin` if it is absent, without anybody having asked for it.
    pub fn prefetch(&self, granule: u64, origin: &dyn Origin) -> Result<(), Unavailable> {
        match self.is_absent(granule) {
            true => self.resolve(granule, READABLE, Some(origin)),
            false => Ok(()),
        }
    }

    /// Whether the granule's bytes are still where they come from.
    pub fn is_absent(&self, granule: u64) -> bool {
        self.access.get(granule) & READABLE == 0
    }

    /// Whether the granule may have been written to since the baseline.
    pub fn is_changed(&self, granule: u64) -> bool {
        self.access.get(granule) & WRITABLE != 0
    }

    /// Begins to write down which granules are brought because somebody needed them.
    pub fn start_recording(&self) {
        self.slow.lock().record.get_or_insert_default();
    }

    /// What was written down so far: granules that are not all zeros, in the order of their first use.
    pub fn recorded(&self) -> Vec<u64> {
        self.slow.lock().record.clone().unwrap_or_default()
    }

    /// The first granule from `granule` on whose bytes are still where they come from.
    pub fn next_absent(&self, granule: u64) -> Option<u64> {
        let next = match self.slow.lock().absent.run(granule) {
            (true, _) => granule,
            (false, next) => next,
        };
        (next < self.count).then_some(next)
    }

    /// Gives all granules the rights `access`, which a restore does that has just put all bytes in place.
    /// Called before anything runs.
    pub fn set_all(&self, access: u8) {
        self.set(0..self.count, access);
    }

    /// As [`set_all`](Self::set_all), for those granules only: absent ones that are all zeros, as the store has
    /// them from the start, need not be brought.
    pub fn set(&self, granules: Range<u64>, access: u8) {
        let granules = granules.start.min(self.count)..granules.end.min(self.count);
        let mut slow = self.slow.lock();
        slow.note(granules.clone(), access);
        self.access.update(granules, |_| access);
    }

    fn covering(&self, offset: u64, len: u64) -> Range<u64> {
        let first = offset >> self.shift;
        match len {
            0 => first..first,
            _ => first..((offset + len - 1) >> self.shift) + 1,
        }
    }

    /// The granules that lie in the range with all their bytes.
    fn inside(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset + len;
        let behind = if end == self.size { self.count() } else { end >> self.shift };
        let first = offset.div_ceil(1 << self.shift);
        first..behind.max(first)
    }

    /// Where the granule lies, and how long it is.
    fn place(&self, granule: u64) -> (u64, usize) {
        let offset = granule << self.shift;
        (offset, (self.size - offset).min(1 << self.shift) as usize)
    }

    /// `other` is where an absent granule comes from that nobody has asked for.
    #[cold]
    fn resolve(
        &self,
        granule: u64,
        need: u8,
        other: Option<&dyn Origin>,
    ) -> Result<(), Unavailable> {
        let mut slow = self.slow.lock();
        while self.access.get(granule) & need != need {
            self.advance(&mut slow, granule, other)?;
        }
        Ok(())
    }

    /// One step of a granule that is not all that is wanted: a wait, to be there, or to be writable.
    fn advance(
        &self,
        slow: &mut MutexGuard<'_, Slow>,
        granule: u64,
        other: Option<&dyn Origin>,
    ) -> Result<(), Unavailable> {
        if slow.busy.contains(&granule) {
            self.changed.wait(slow);
        } else if self.is_absent(granule) {
            self.bring(slow, granule, other)?;
        } else if self.put_aside(slow, granule)? {
            self.grant(slow, granule, WRITABLE);
        }
        Ok(())
    }

    /// Makes all of `whole`, which are about to be overwritten, writable or busy.
    ///
    /// Nobody who keeps a granule busy waits for another, but for those who do this, in ascending order.
    /// Whoever waits here for room to put bytes aside has made none busy that a reader needs.
    #[cold]
    fn claim(&self, whole: Range<u64>) -> Result<Claim<'_, S>, Unavailable> {
        // Before the lock, so that on an error it is dropped after it.
        let mut claim = Claim { granules: self, claimed: Vec::new(), written: false };
        let mut slow = self.slow.lock();
        for granule in whole {
            while self.access.get(granule) & BOTH != BOTH {
                if let Some(failed) = &slow.failed {
                    return Err(failed.clone());
                }
                let frozen = slow.freeze.as_ref().is_some_and(|freeze| freeze.needs(granule));
                if self.is_absent(granule) && !frozen && slow.busy.insert(granule) {
                    claim.claimed.push(granule);
                    break;
                }
                self.advance(&mut slow, granule, None)?;
            }
        }
        drop(slow);
        Ok(claim)
    }

    /// Brings an absent granule that is not busy.
    fn bring(
        &self,
        slow: &mut MutexGuard<'_, Slow>,
        granule: u64,
        other: Option<&dyn Origin>,
    ) -> Result<(), Unavailable> {
        if let Some(failed) = &slow.failed {
            return Err(failed.clone());
        }
        let usual = slow.origin.clone();
        let scribbled = slow.scribbled.contains(&granule);
        let (offset, len) = self.place(granule);
        let mut has_bytes = false;
        let loaded = self.busy(slow, granule, || {
            let origin = other.or(usual.as_deref()).ok_or("nothing is known of them")?;
            origin.load(granule, &mut |bytes| {
                has_bytes = true;
                self.store.fill(offset, bytes)
            })?;
            if scribbled && !has_bytes {
                self.store.fill(offset, &vec![0; len])?;
            }
            Ok::<(), OriginError>(())
        });
        if let Err(why) = loaded {
            return Err(self.fail(slow, offset, &why.to_string()));
        }
        if other.is_none()
            && has_bytes
            && let Some(record) = &mut slow.record
        {
            record.push(granule);
        }
        slow.scribbled.remove(&granule);
        self.grant(slow, granule, READABLE);
        Ok(())
    }

    /// Before the first write to a granule that is there and not busy: keeps its bytes if a freeze still
    /// needs them. False if the state has changed meanwhile and is to be looked at again.
    fn put_aside(
        &self,
        slow: &mut MutexGuard<'_, Slow>,
        granule: u64,
    ) -> Result<bool, Unavailable> {
        let (offset, len) = self.place(granule);
        let Some(freeze) = &mut slow.freeze else { return Ok(true) };
        if !freeze.needs(granule) {
            return Ok(true);
        }
        if freeze.aside_bytes > 0 && freeze.aside_bytes + len as u64 > freeze.limit {
            freeze.throttled += 1;
            self.changed.wait(slow);
            return Ok(false);
        }
        freeze.aside_bytes += len as u64;
        let copy = self.busy(slow, granule, || {
            let mut bytes = vec![0; len].into_boxed_slice();
            self.store.read(offset, &mut bytes).map(|content| match content {
                Content::Zero => Aside::Zero,
                Content::Data => Aside::Bytes(bytes),
            })
        });
        let copy = copy.map_err(|error| self.fail(slow, offset, &error.to_string()))?;
        // The freeze may have ended meanwhile; then nobody needs the bytes.
        if let Some(freeze) = &mut slow.freeze {
            if matches!(copy, Aside::Zero) {
                freeze.aside_bytes -= len as u64;
            }
            freeze.aside.insert(granule, copy);
        }
        Ok(true)
    }

    /// Runs `work` without the lock, while nobody else works on `granule`.
    fn busy<R>(
        &self,
        slow: &mut MutexGuard<'_, Slow>,
        granule: u64,
        work: impl FnOnce() -> R,
    ) -> R {
        slow.busy.insert(granule);
        // Dropped also when `work` panics: others must not wait for ever.
        let guard = Busy { granules: self, slow, granule };
        MutexGuard::unlocked(guard.slow, work)
    }

    fn fail(&self, slow: &mut MutexGuard<'_, Slow>, offset: u64, why: &str) -> Unavailable {
        let failure = Unavailable {
            what: Arc::clone(&self.what),
            offset,
            granule_size: 1 << self.shift,
            why: why.into(),
        };
        self.tell(slow, &failure);
        failure
    }

    /// Tells of the first failure.
    fn tell(&self, slow: &mut MutexGuard<'_, Slow>, failure: &Unavailable) {
        if slow.failed.is_none() {
            slow.failed = Some(failure.clone());
            if let Some(hook) = slow.on_failure.clone() {
                MutexGuard::unlocked(slow, || hook(failure));
            }
        }
    }
}

impl<S> Granules<S> {
    /// Gives `granule` rights that it did not have.
    fn grant(&self, slow: &mut Slow, granule: u64, access: u8) {
        let granules = granule..granule + 1;
        if access & READABLE != 0 {
            slow.absent.remove(granules.clone());
        }
        if access & WRITABLE != 0 {
            slow.changed.insert(granules.clone());
        }
        self.access.update(granules, |before| before | access);
    }
}

/// A granule that is being worked on.
struct Busy<'a, 'b, S> {
    granules: &'a Granules<S>,
    slow: &'a mut MutexGuard<'b, Slow>,
    granule: u64,
}

impl<S> Drop for Busy<'_, '_, S> {
    fn drop(&mut self) {
        self.slow.busy.remove(&self.granule);
        self.granules.changed.notify_all();
    }
}

/// Absent granules that are being overwritten, which keeps them busy.
struct Claim<'a, S> {
    granules: &'a Granules<S>,
    claimed: Vec<u64>,
    /// They have their new bytes.
    written: bool,
}

impl<S> Drop for Claim<'_, S> {
    fn drop(&mut self) {
        let mut slow = self.granules.slow.lock();
        for granule in &self.claimed {
            slow.busy.remove(granule);
            if self.written {
                slow.scribbled.remove(granule);
                self.granules.grant(&mut slow, *granule, BOTH);
            } else {
                slow.scribbled.insert(*granule);
            }
        }
        drop(slow);
        self.granules.changed.notify_all();
    }
}

impl From<Unavailable> for io::Error {
    fn from(error: Unavailable) -> Self {
        Self::other(error)
    }
}

impl<S> std::fmt::Debug for Granules<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Granules")
            .field("what", &self.what)
            .field("size", &self.size)
            .field("granule_size", &(1u64 << self.shift))
            .finish_non_exhaustive()
    }
}
