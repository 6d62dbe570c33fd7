//! The mapping that RAM lies in.

use std::{io, ops::Range, sync::OnceLock};

use memmap2::{MmapOptions, MmapRaw};
use squib_formats::image::Content;
use vm_memory::VolatileSlice;

use super::{guard::Guard, pagemap::Pagemap};
use crate::granules::Store;

/// Host memory for RAM.
#[derive(Debug)]
pub struct RamStore {
    mapping: MmapRaw,
    /// Keeps the file that is mapped as it is. Behind the mapping: dropped after it.
    guard: Option<Guard>,
    /// It is private anonymous memory: what nobody has touched is zero.
    anonymous: bool,
    /// Opened when it is first needed, if this host has it.
    pagemap: OnceLock<Option<Pagemap>>,
}

impl RamStore {
    pub(super) fn anonymous(size: u64) -> io::Result<Self> {
        let mapping = options(size)?.map_anon()?;
        let (mapping, pagemap) = (mapping.into(), OnceLock::new());
        Ok(Self { mapping, guard: None, anonymous: true, pagemap })
    }

    pub(super) fn private(guard: Guard, size: u64) -> io::Result<Self> {
        let found = guard.file().metadata()?.len();
        if found != size {
            // Touching a page behind the end of the file would be a SIGBUS.
            let why = format!("the file has {found} bytes, RAM has {size}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        // SAFETY: the guard keeps the file from being written to or cut off until the mapping is gone, or for
        // the system's lease-break-time after it has told that somebody wants to; all accesses are volatile, as
        // memory shared with a guest demands.
        let mapping = unsafe { options(size)?.map_copy(guard.file())? };
        let (mapping, pagemap) = (mapping.into(), OnceLock::new());
        Ok(Self { mapping, guard: Some(guard), anonymous: false, pagemap })
    }

    /// What keeps the mapped file as it is, if one is mapped.
    pub(super) fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    pub(super) fn size(&self) -> u64 {
        self.mapping.len() as u64
    }

    pub(super) fn host_ptr(&self) -> *mut u8 {
        self.mapping.as_mut_ptr()
    }

    /// The `count` bytes at `offset`, if all are inside. Whether they may be touched is another question.
    pub(super) fn slice(&self, offset: u64, count: usize) -> Option<VolatileSlice<'_, ()>> {
        let start = usize::try_from(offset).ok()?;
        start.checked_add(count).filter(|end| *end <= self.mapping.len())?;
        // SAFETY: start + count lies inside the mapping, which lives as long as `self`; accesses
        // through a VolatileSlice are volatile or atomic, as memory shared with a guest demands.
        Some(unsafe { VolatileSlice::new(self.mapping.as_mut_ptr().add(start), count) })
    }

    /// Whether nobody has touched any of the `len` bytes at `offset`, which are zero then; and finding that
    /// out is cheaper than reading them, which gives each page a place in the page table. False if it cannot
    /// be told.
    pub(super) fn is_untouched(&self, offset: u64, len: u64) -> bool {
        // A page of a mapped file that is not in the page table still has the file's bytes.
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size());
        let pagemap = || self.pagemap.get_or_init(Pagemap::open).as_ref();
        self.anonymous
            && inside
            && len > 0
            && pagemap().is_some_and(|map| {
                let start = self.host_ptr() as u64 + offset;
                map.touched(start..start + len).is_none()
            })
    }
}

impl Store for RamStore {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        if self.is_untouched(offset, into.len() as u64) {
            return Ok(Content::Zero);
        }
        let slice = self.slice(offset, into.len()).ok_or(io::ErrorKind::InvalidInput)?;
        slice.copy_to(into);
        Ok(Content::Data)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let inside = range.start < range.end && range.end <= self.size();
        // A page of a mapped file that is not in the page table still has the file's bytes.
        let map = Some(()).filter(|()| self.anonymous && inside);
        let map = map.and_then(|()| self.pagemap.get_or_init(Pagemap::open).as_ref());
        let Some(map) = map else { return Ok((!range.is_empty()).then_some(range)) };
        let base = self.host_ptr() as u64;
        let found = map.touched(base + range.start..base + range.end);
        Ok(found.map(|found| found.start - base..found.end - base))
    }

    fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let slice = self.slice(offset, bytes.len()).ok_or(io::ErrorKind::InvalidInput)?;
        self.populate(offset, bytes.len());
        slice.copy_from(bytes);
        Ok(())
    }
}

impl RamStore {
    /// Gives the range its pages in one call rather than in a fault a page. It is only a help: a range that does
    /// not begin at a page is refused, and gets its pages as it is written.
    fn populate(&self, offset: u64, len: usize) {
        #[cfg(target_os = "linux")]
        if len >= 16384 {
            // SAFETY: the range is inside the mapping, as the caller has checked.
            unsafe {
                let start = self.mapping.as_mut_ptr().add(offset as usize);
                libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }
}

/// For a mapping of `size` bytes.
fn options(size: u64) -> io::Result<MmapOptions> {
    let len = usize::try_from(size).ok().filter(|len| *len > 0 && len % 0x1_0000 == 0);
    let Some(len) = len else {
        let why = format!("a RAM size of {size} bytes is not a positive multiple of 64 KiB");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    };
    let mut options = MmapOptions::new();
    options.len(len).no_reserve_swap();
    Ok(options)
}
