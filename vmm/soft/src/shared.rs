//! What the vCPUs of one machine share: RAM, the counter, and each other.

use std::{
    any::Any,
    sync::{
        Arc, Mutex, MutexGuard, RwLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
};

use crate::{Counter, Signals, signals::MAINTENANCE};

/// What vCPUs may do with RAM now, one byte a granule of `1 << shift` bytes: [`READABLE`] and
/// [`WRITABLE`]. Bits may be set at any time; they are taken away only while no vCPU runs, and each
/// [`Shared::forget_translations`] before it runs again.
#[derive(Clone)]
pub struct Granules {
    /// One byte a granule.
    pub access: Arc<[AtomicU8]>,
    /// Binary logarithm of a granule's size in bytes, at least that of a 4 KiB page.
    pub shift: u32,
}

/// The granule's bytes are there.
pub const READABLE: u8 = 1;
/// The granule may be written to.
pub const WRITABLE: u8 = 2;

/// The guest's RAM as the vCPUs see it.
pub struct Ram {
    host: *mut u8,
    len: u64,
    base: u64,
    granules: Granules,
    _keep: Arc<dyn Any + Send + Sync>,
}

/// Where guest-physical bytes are.
pub(crate) enum Place {
    /// At this host address.
    Ram(*mut u8),
    /// In RAM, and the access is not allowed now: [`Exit::Memory`](crate::Exit::Memory).
    Withheld,
    /// Not in RAM.
    Elsewhere,
}

// SAFETY: the pointer is only used for accesses that are volatile or atomic, which the memory's
// other users expect from a guest; `_keep` keeps it mapped.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// RAM of `len` bytes at guest-physical `base`, backed by `host`, all of it there at all times.
    ///
    /// # Safety
    ///
    /// `host` must be valid for reads and writes of `len` bytes for as long as `keep` lives, aligned
    /// to 4 KiB, and no Rust reference to those bytes may exist meanwhile.
    pub unsafe fn new(
        host: *mut u8,
        len: u64,
        base: u64,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let all = Granules { access: Arc::new([AtomicU8::new(READABLE | WRITABLE)]), shift: 63 };
        Self { host, len, base, granules: all, _keep: keep }
    }

    /// With the rights that `granules` gives, which covers all of RAM.
    #[must_use]
    pub fn with_granules(mut self, granules: Granules) -> Self {
        assert!(granules.shift >= 12, "a granule is at least a page");
        assert!((granules.access.len() as u64) << granules.shift >= self.len, "all of RAM");
        self.granules = granules;
        self
    }

    /// Where the `size` bytes at guest-physical `pa` are, which lie on one page.
    #[inline]
    pub(crate) fn place(&self, pa: u64, size: u64, write: bool) -> Place {
        let Some(offset) = pa.checked_sub(self.base) else { return Place::Elsewhere };
        if offset >= self.len || size > self.len - offset {
            return Place::Elsewhere;
        }
        let Granules { access, shift } = &self.granules;
        let need = if write { READABLE | WRITABLE } else { READABLE };
        // Acquire: the bytes were put there before the bit was set.
        if access[(offset >> shift) as usize].load(Ordering::Acquire) & need != need {
            return Place::Withheld;
        }
        // SAFETY: offset is inside the memory that `new` was promised.
        Place::Ram(unsafe { self.host.add(offset as usize) })
    }

    /// Whether `pa` is in RAM.
    pub(crate) fn contains(&self, pa: u64) -> bool {
        pa.checked_sub(self.base).is_some_and(|offset| offset < self.len)
    }

    /// Number of the 4 KiB page at `pa`, which is in RAM.
    pub(crate) fn page_index(&self, pa: u64) -> usize {
        ((pa - self.base) >> 12) as usize
    }

    pub(crate) fn pages(&self) -> usize {
        (self.len >> 12) as usize
    }
}

/// One machine, as far as its vCPUs are concerned.
pub struct Shared {
    pub(crate) ram: Ram,
    pub(crate) counter: Arc<Counter>,
    /// One byte a page: not zero if some vCPU may hold code decoded from it.
    pub(crate) has_code: Box<[AtomicU8]>,
    pub(crate) peers: RwLock<Vec<Arc<Peer>>>,
}

impl Shared {
    /// A machine with `ram` and `counter`, and no vCPU yet.
    pub fn new(ram: Ram, counter: Arc<Counter>) -> Arc<Self> {
        let has_code = zeros(ram.pages());
        Arc::new(Self { ram, counter, has_code, peers: RwLock::default() })
    }

    /// Makes every vCPU look at [`Granules`] again before it uses a page. Called while none runs.
    pub fn forget_translations(&self) {
        for peer in self.peers() {
            peer.ask(Maintenance::AllTranslations);
        }
    }

    pub(crate) fn peers(&self) -> Vec<Arc<Peer>> {
        self.peers.read().unwrap_or_else(|poison| poison.into_inner()).clone()
    }
}

/// Zeros that take memory only where they are written to: a machine with much RAM begins as fast as one with
/// little.
fn zeros(count: usize) -> Box<[AtomicU8]> {
    let bytes = Box::into_raw(vec![0u8; count].into_boxed_slice());
    // SAFETY: AtomicU8 has the size, the alignment and the bit validity of u8, and this is the only owner.
    unsafe { Box::from_raw(bytes as *mut [AtomicU8]) }
}

/// Maintenance that one vCPU asks of another.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Maintenance {
    /// Forget all translations.
    AllTranslations,
    /// Forget the translations of this 4 KiB page, any ASID.
    Page(u64),
    /// Forget the translations of this ASID.
    Asid(u16),
    /// Forget the code decoded from this 4 KiB page of RAM (its number).
    Code(usize),
    /// Forget all decoded code.
    AllCode,
}

/// One vCPU as the others see it.
#[derive(Default)]
pub(crate) struct Peer {
    pub(crate) signals: Arc<Signals>,
    /// Set while the vCPU may use its translations and decoded code.
    pub(crate) in_guest: AtomicBool,
    requests: Mutex<Vec<Maintenance>>,
    asked: AtomicU64,
    done: AtomicU64,
}

/// More requests than this are answered by forgetting everything.
const MAX_REQUESTS: usize = 64;

impl Peer {
    /// Asks for `what`; the answer is there when [`settled`](Self::settled) says so.
    pub(crate) fn ask(&self, what: Maintenance) {
        {
            let mut requests = self.lock();
            if requests.len() >= MAX_REQUESTS {
                requests.clear();
                requests.push(Maintenance::AllTranslations);
                requests.push(Maintenance::AllCode);
            } else {
                requests.push(what);
            }
            self.asked.fetch_add(1, Ordering::SeqCst);
        }
        self.signals.raise(MAINTENANCE);
    }

    /// True if everything that was asked so far is done, or will be before the vCPU uses anything.
    pub(crate) fn settled(&self) -> bool {
        !self.in_guest.load(Ordering::SeqCst)
            || self.done.load(Ordering::SeqCst) >= self.asked.load(Ordering::SeqCst)
    }

    /// True if requests wait.
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst) != self.done.load(Ordering::SeqCst)
    }

    /// Takes the requests; the caller carries them out and then calls [`finish`](Self::finish).
    pub(crate) fn begin(&self) -> (Vec<Maintenance>, u64) {
        let mut requests = self.lock();
        (std::mem::take(&mut *requests), self.asked.load(Ordering::SeqCst))
    }

    /// Says that everything up to `ticket` is done.
    pub(crate) fn finish(&self, ticket: u64) {
        self.done.store(ticket, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Maintenance>> {
        self.requests.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}
