//! What the vCPUs of one machine share: RAM, the counter, and each other.

use std::{
    any::Any,
    sync::{
        Arc, Mutex, MutexGuard, RwLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
};

use crate::{Counter, Signals, signals::MAINTENANCE};

/// The guest's RAM as the vCPUs see it.
pub struct Ram {
    host: *mut u8,
    len: u64,
    base: u64,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is only used for accesses that are volatile or atomic, which the memory's
// other users expect from a guest; `_keep` keeps it mapped.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// RAM of `len` bytes at guest-physical `base`, backed by `host`.
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
        Self { host, len, base, _keep: keep }
    }

    /// The host address of `size` bytes at guest-physical `pa`, if all of them are RAM.
    #[inline]
    pub(crate) fn host(&self, pa: u64, size: u64) -> Option<*mut u8> {
        let offset = pa.checked_sub(self.base)?;
        if offset < self.len && size <= self.len - offset {
            // SAFETY: offset is inside the memory that `new` was promised.
            Some(unsafe { self.host.add(offset as usize) })
        } else {
            None
        }
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
        let has_code = (0..ram.pages()).map(|_| AtomicU8::new(0)).collect();
        Arc::new(Self { ram, counter, has_code, peers: RwLock::default() })
    }

    pub(crate) fn peers(&self) -> Vec<Arc<Peer>> {
        self.peers.read().unwrap_or_else(|poison| poison.into_inner()).clone()
    }
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
