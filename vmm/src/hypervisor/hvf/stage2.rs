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
        let (access, _) = self.ram.rights();
        let mut wanted: Vec<_> = access
            .iter()
            .map(|access| match access.load(Ordering::Acquire) {
                access if access & READABLE == 0 => None,
                access if access & WRITABLE == 0 => Some(Rights::ReadExec),
                _ => Some(Rights::All),
            })
            .collect();
        // What a try that failed further on has mapped is there already.
        for (wanted, mapped) in wanted.iter_mut().zip(&*mapped) {
            *wanted = wanted.filter(|_| mapped.is_none());
        }
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
            // Another vCPU met the same fault and was here first. If it is not so, this says why.
            Some(rights) => return protect(range, rights),
        }
        mapped[granule] = Some(wanted);
        Ok(())
    }

    /// Takes the right to write away from all. EXEC stays, since a guest executes what it has written.
    pub(super) fn write_protect(&self) -> Result<(), HvfError> {
        let mut mapped = self.mapped.lock();
        for run in self.runs(&mapped) {
            if run.rights == Some(Rights::All) {
                let now = Some(Rights::ReadExec);
                self.change(&mut mapped, &run, now, |range| protect(range, Rights::ReadExec))?;
            }
        }
        Ok(())
    }

    /// Takes everything out of the guest's address space: before the host memory goes away, or to make vCPUs
    /// leave the guest that cannot be called. Whatever they touch next faults, and [`grant`](Self::grant)
    /// brings it back; one that sleeps touches nothing.
    pub(super) fn take_away(&self) {
        let mut mapped = self.mapped.lock();
        for run in self.runs(&mapped) {
            if run.rights.is_some()
                && let Err(error) = self.change(&mut mapped, &run, None, unmap)
            {
                tracing::warn!("guest memory stays mapped: {error}");
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

    /// Does `work` on all of `run` at once, and if that is refused on each granule: they may have been mapped by
    /// several calls, and the framework does not say whether one call may then change them all. What was done
    /// is noted as it is done: after an error further on, an access must not be taken for one that is allowed.
    fn change(
        &self,
        mapped: &mut [Option<Rights>],
        run: &Run,
        now: Option<Rights>,
        work: impl Fn(Range) -> Result<(), HvfError>,
    ) -> Result<(), HvfError> {
        let Run { range, ref granules, rights: _ } = *run;
        match work(range) {
            Ok(()) => mapped[granules.clone()].fill(now),
            Err(error) if granules.len() == 1 => return Err(error),
            Err(_) => {
                let size = self.ram.granules().granule_size();
                let bases = (range.base..range.end()).step_by(size as usize);
                let mut failed = None;
                for (granule, base) in granules.clone().zip(bases) {
                    match work(Range { base, size: size.min(range.end() - base) }) {
                        Ok(()) => mapped[granule] = now,
                        Err(error) => failed = failed.or(Some(error)),
                    }
                }
                return failed.map_or(Ok(()), Err);
            }
        }
        Ok(())
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
