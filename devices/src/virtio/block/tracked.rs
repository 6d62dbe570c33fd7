//! A disk of which is known what is there and what has changed.

use std::{io, sync::Arc};

use vm_memory::VolatileSlice;

use super::disk::{Disk, FileDisk};
use crate::granules::{Granules, READABLE, WRITABLE};

/// Binary logarithm of the size of a granule of a disk that is not restored: 64 KiB.
pub const GRANULE_SHIFT: u32 = 16;

/// The granules of a disk.
pub type DiskGranules = Granules<FileDisk>;

/// A disk that asks its granules before every access. For what they allow that is a load of a byte each.
#[derive(Clone, Debug)]
pub struct TrackedDisk {
    granules: Arc<DiskGranules>,
}

impl TrackedDisk {
    /// The disk in `granules`.
    pub fn new(granules: Arc<DiskGranules>) -> Self {
        Self { granules }
    }

    /// The granules of the disk `id`, all of which are there, and may have changed unless it is `read_only`.
    pub fn granules_of(id: &str, disk: FileDisk, read_only: bool) -> DiskGranules {
        let access = if read_only { READABLE } else { READABLE | WRITABLE };
        Self::granules(id, disk, GRANULE_SHIFT, access)
    }

    /// The granules of the disk `id`, of `1 << shift` bytes, none of which is there: the file is one hole. The
    /// caller [says](Granules::set_origin) where they come from, or fills them in and
    /// [says so](Granules::set_all).
    pub fn absent(id: &str, disk: FileDisk, shift: u32) -> DiskGranules {
        Self::granules(id, disk, shift, 0)
    }

    fn granules(id: &str, disk: FileDisk, shift: u32, access: u8) -> DiskGranules {
        let size = disk.size();
        Granules::new(&format!("disk `{id}`"), disk, size, shift, access)
    }

    fn disk(&self) -> &FileDisk {
        self.granules.store()
    }
}

impl Disk for TrackedDisk {
    fn size(&self) -> u64 {
        self.granules.size()
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.granules.allow(offset, total(into), false)?;
        self.disk().read_at(offset, into)
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.granules.overwrite(offset, total(from), || self.disk().write_at(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        self.disk().flush()
    }

    /// What was not there reads as zeros afterwards, even if the file system takes no hint.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.granules.overwrite(offset, len, || self.disk().discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.granules.overwrite(offset, len, || self.disk().write_zeroes(offset, len, may_unmap))
    }
}

fn total(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}
