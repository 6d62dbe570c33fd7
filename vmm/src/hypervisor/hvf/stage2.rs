//! Guest memory at stage 2: what a vCPU may touch without leaving the guest.
//!
//! A granule that is absent is not mapped, an unchanged one is mapped without the right to write, a changed
//! one with all rights. Granules gain rights while vCPUs run, without anybody telling; then the guest's next
//! access faults and [`Stage2::grant`] hears of it. They lose rights only by [`Stage2::write_protect`] and
//! [`Stage2::take_away`].

use std::sync::atomic::{AtomicBool, Ordering};

use applevisor::memory::PAGE_SIZE;
use parking_lot::Mutex;
use squib_devices::{
    granules::{READABLE, WRITABLE},
    map::Range,
    memory::GuestRam,
};

use super::{
    error::{Doing, HvfError},
    sys::{self, Rights},
};

/// The mappings of RAM.
pub(super) struct Stage2 {
    ram: GuestRam,
    /// Rights of each granule as the framework knows them.
    mapped: Mutex<Vec<Option<Rights>>>,
    /// What was there before the first run has been mapped.
    begun: AtomicBool,
}

impl Stage2 {
    /// Nothing is mapped yet: until the first run, rights of granules may change in any way.
    pub(super) fn new(ram: &GuestRam) -> Result<Self, HvfError> {
        let (host, size, page) = (ram.host_ptr() as u64, ram.size(), PAGE_SIZE as u64);
        // The host's page and the framework's are the same on a Mac.
        let host_page = rustix::param::page_size() as u64;
        if !host.is_multiple_of(host_page) || !size.is_multiple_of(page) {
            return Err(HvfError::Unaligned { host, size, page });
        }
        let mapped = Mutex::new(vec![None; ram.granules().count() as usize]);
        Ok(Self { ram: ram.clone(), mapped, begun: AtomicBool::new(false) })
    }

    /// Whether RAM lies at guest-physical `address`.
    pub(super) fn is_ram(&self, address: u64) -> bool {
        address.checked_sub(self.ram.base()).is_some_and(|offset| offset < self.ram.size())
    }

    /// Before the first run: maps what is there, in as few calls as possible.
    pub(super) fn begin(&self) -> Result<(), HvfError> {
        if self.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut mapped = self.mapped.lock();
        if self.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        let (access, _) = self.ram.granules().rights();
        let wanted: Vec<_> = access
            .iter()
            .map(|access| match access.load(Ordering::Acquire) {
                access if access & READABLE == 0 => None,
                access if access & WRITABLE == 0 => Some(Rights::ReadExec),
                _ => Some(Rights::All),
            })
            .collect();
        for Run { range, granules, rights } in self.runs(&wanted) {
            if let Some(rights) = rights {
                self.map(range, rights)?;
                // At once: after an error further on, `take_away` must find it.
                mapped[granules].fill(Some(rights));
            }
        }
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Lets vCPUs use `range`, which is one granule.
    pub(super) fn grant(&self, range: Range, write: bool) -> Result<(), HvfError> {
        let granule =
            ((range.base - self.ram.base()) / self.ram.granules().granule_size()) as usize;
        let wanted = if write { Rights::All } else { Rights::ReadExec };
        let mut mapped = self.mapped.lock();
        match mapped[granule] {
            None => self.map(range, wanted)?,
            Some(Rights::ReadExec) if write => protect(range, wanted)?,
            // Another vCPU met the same fault and was here first.
            Some(_) => return Ok(()),
        }
        mapped[granule] = Some(wanted);
        Ok(())
    }

    /// Takes the right to write away from all. EXEC stays, since a guest executes what it has written.
    pub(super) fn write_protect(&self) -> Result<(), HvfError> {
        let mut mapped = self.mapped.lock();
        for Run { range, granules, rights } in self.runs(&mapped) {
            if rights == Some(Rights::All) {
                self.in_parts(range, |range| protect(range, Rights::ReadExec))?;
                // At once: after an error further on, a write here must not be taken for one that is allowed.
                mapped[granules].fill(Some(Rights::ReadExec));
            }
        }
        Ok(())
    }

    /// Takes everything out of the guest's address space: before the host memory goes away, or to make vCPUs
    /// leave the guest that cannot be called. Whatever they touch next faults, and [`grant`](Self::grant)
    /// brings it back.
    pub(super) fn take_away(&self) {
        let mut mapped = self.mapped.lock();
        for Run { range, granules, rights } in self.runs(&mapped) {
            if rights.is_none() {
                continue;
            }
            match self.in_parts(range, unmap) {
                Ok(()) => mapped[granules].fill(None),
                Err(error) => tracing::warn!("guest memory stays mapped: {error}"),
            }
        }
    }

    fn map(&self, range: Range, rights: Rights) -> Result<(), HvfError> {
        let offset = (range.base - self.ram.base()) as usize;
        // SAFETY: the range is inside RAM, which `self.ram` keeps mapped until after `take_away`, and the
        // virtual machine itself until it is destroyed; `GuestRam` hands out no references to its bytes.
        let result = unsafe {
            sys::map(self.ram.host_ptr().wrapping_add(offset), range.base, range.size, rights)
        };
        result.doing(|| format!("mapping {:#x} bytes of RAM at {:#x}", range.size, range.base))
    }

    /// Does `work` on neighbouring granules at once, and if that is refused on each: they may have been mapped
    /// by several calls, and the framework does not say whether one call may then change them all.
    fn in_parts(
        &self,
        range: Range,
        work: impl Fn(Range) -> Result<(), HvfError>,
    ) -> Result<(), HvfError> {
        let size = self.ram.granules().granule_size();
        let whole = work(range);
        if whole.is_ok() || range.size <= size {
            return whole;
        }
        (range.base..range.end())
            .step_by(size as usize)
            .try_for_each(|base| work(Range { base, size: size.min(range.end() - base) }))
    }

    /// Neighbouring granules with equal rights.
    fn runs(&self, rights: &[Option<Rights>]) -> Vec<Run> {
        let size = self.ram.granules().granule_size();
        let mut first = 0;
        let run = |run: &[Option<Rights>]| {
            let granules = first..first + run.len();
            let at = first as u64 * size;
            let end = (granules.end as u64 * size).min(self.ram.size());
            let range = Range { base: self.ram.base() + at, size: end - at };
            first = granules.end;
            Run { range, granules, rights: run[0] }
        };
        rights.chunk_by(|one, next| one == next).map(run).collect()
    }
}

/// Granules that lie side by side.
struct Run {
    /// Guest-physical.
    range: Range,
    granules: std::ops::Range<usize>,
    /// None if they are not mapped.
    rights: Option<Rights>,
}

fn protect(range: Range, rights: Rights) -> Result<(), HvfError> {
    let Range { base, size } = range;
    sys::protect(base, size, rights)
        .doing(|| format!("protecting {size:#x} bytes of RAM at {base:#x}"))
}

fn unmap(range: Range) -> Result<(), HvfError> {
    let Range { base, size } = range;
    sys::unmap(base, size).doing(|| format!("unmapping {size:#x} bytes of RAM at {base:#x}"))
}
