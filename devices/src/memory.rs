//! Guest RAM: one contiguous range at [`RAM_BASE`](crate::map::RAM_BASE), shared by vCPUs, devices
//! and whoever captures or restores it.
//!
//! The region type is our own rather than the library's, since every host access goes through
//! [`RamRegion::get_slice`]: the one place where residency and dirty tracking belong.

use std::{io, sync::Arc};

use memmap2::{MmapOptions, MmapRaw};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::map::RAM_BASE;

/// Guest RAM; clones share the same bytes.
#[derive(Clone, Debug)]
pub struct GuestRam {
    region: Arc<RamRegion>,
}

impl GuestRam {
    /// Fresh zeroed RAM of `size` bytes, which must be a multiple of 64 KiB and not zero.
    /// Pages take host memory when they are first written.
    pub fn new(size: u64) -> io::Result<Self> {
        let len = usize::try_from(size).ok().filter(|len| *len > 0 && len % 0x1_0000 == 0);
        let Some(len) = len else {
            let why = format!("a RAM size of {size} bytes is not a positive multiple of 64 KiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        };
        let mapping = MmapRaw::from(MmapOptions::new().len(len).no_reserve_swap().map_anon()?);
        Ok(Self { region: Arc::new(RamRegion { mapping }) })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.region.len()
    }

    /// First guest-physical address.
    pub fn base(&self) -> u64 {
        RAM_BASE
    }

    /// The host address of the first byte. It stays valid while any clone of this `GuestRam` lives;
    /// other threads write through it at any time while the guest runs.
    pub fn host_ptr(&self) -> *mut u8 {
        self.region.mapping.as_mut_ptr()
    }
}

impl GuestRam {
    /// The way to find the parts of RAM that nobody has touched since it was made, if this host can
    /// tell. They are zero, and finding them is cheaper than reading them, which gives each page a
    /// place in the page table.
    pub fn untouched(&self) -> Option<Untouched> {
        sys::Pagemap::open().map(|pagemap| Untouched { pagemap, ram: self.clone() })
    }
}

/// Parts of RAM that nobody has touched: see [`GuestRam::untouched`].
#[derive(Debug)]
pub struct Untouched {
    pagemap: sys::Pagemap,
    ram: GuestRam,
}

impl Untouched {
    /// Whether nobody has touched any of the `len` bytes at `offset` from the start of RAM. False if it
    /// cannot be told. What is written at the same time may be missed.
    pub fn covers(&self, offset: u64, len: u64) -> bool {
        // This holds for private anonymous memory only: a page of a mapped file that is not in the page
        // table still has the file's bytes.
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.ram.size());
        inside && len > 0 && self.pagemap.is_empty(self.ram.host_ptr() as u64 + offset, len)
    }
}

#[cfg(target_os = "linux")]
mod sys {
    use std::{fs::File, os::unix::fs::FileExt};

    /// The page table of this process. The kernel's Documentation/admin-guide/mm/pagemap.rst.
    #[derive(Debug)]
    pub(super) struct Pagemap {
        file: File,
        page: u64,
    }

    /// "page present" and "page swapped": one of them is set for every page that has been touched.
    const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

    impl Pagemap {
        pub(super) fn open() -> Option<Self> {
            // SAFETY: sysconf reads a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            let page = u64::try_from(page).ok().filter(|page| page.is_power_of_two())?;
            Some(Self { file: File::open("/proc/self/pagemap").ok()?, page })
        }

        /// Whether no page of the range is there. An error counts as no.
        pub(super) fn is_empty(&self, address: u64, len: u64) -> bool {
            let mut next = address / self.page;
            let end = (address + len).div_ceil(self.page);
            let mut entries = [0; 64 * 8];
            while next < end {
                let count = (end - next).min(64);
                let entries = &mut entries[..count as usize * 8];
                if self.file.read_exact_at(entries, next * 8).is_err() {
                    return false;
                }
                let (entries, _) = entries.as_chunks::<8>();
                if entries.iter().any(|e| u64::from_ne_bytes(*e) & PRESENT_OR_SWAPPED != 0) {
                    return false;
                }
                next += count;
            }
            true
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod sys {
    /// No such thing here.
    #[derive(Debug)]
    pub(super) enum Pagemap {}

    impl Pagemap {
        pub(super) fn open() -> Option<Self> {
            None
        }

        pub(super) fn is_empty(&self, _: u64, _: u64) -> bool {
            match *self {}
        }
    }
}

/// The one region of [`GuestRam`].
#[derive(Debug)]
pub struct RamRegion {
    mapping: MmapRaw,
}

impl GuestMemoryRegion for RamRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len() as GuestUsize
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(RAM_BASE)
    }

    fn bitmap(&self) {}

    fn get_host_address(
        &self,
        addr: MemoryRegionAddress,
    ) -> vm_memory::guest_memory::Result<*mut u8> {
        let slice = self.get_slice(addr, 1)?;
        Ok(slice.ptr_guard_mut().as_ptr())
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> vm_memory::guest_memory::Result<VolatileSlice<'_, ()>> {
        let start = usize::try_from(offset.0)
            .ok()
            .filter(|start| start.checked_add(count).is_some_and(|end| end <= self.mapping.len()))
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        // SAFETY: start + count lies inside the mapping, which lives as long as `self`; accesses
        // through a VolatileSlice are volatile or atomic, as memory shared with a guest demands.
        Ok(unsafe { VolatileSlice::new(self.mapping.as_mut_ptr().add(start), count) })
    }
}

impl GuestMemoryRegionBytes for RamRegion {}

impl GuestMemoryBackend for GuestRam {
    type R = RamRegion;

    fn iter(&self) -> impl Iterator<Item = &RamRegion> {
        std::iter::once(&*self.region)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn bytes_written_are_read_back_through_a_clone() {
        let ram = GuestRam::new(0x1_0000).unwrap();
        ram.write_slice(b"squib", GuestAddress(RAM_BASE + 0xfffb)).unwrap();
        let mut back = [0; 5];
        ram.clone().read_slice(&mut back, GuestAddress(RAM_BASE + 0xfffb)).unwrap();
        assert_eq!(&back, b"squib");
    }

    #[test]
    fn access_past_the_end_is_an_error() {
        let ram = GuestRam::new(0x1_0000).unwrap();
        assert!(ram.write_slice(&[0; 2], GuestAddress(RAM_BASE + 0xffff)).is_err());
        assert!(ram.read_obj::<u8>(GuestAddress(RAM_BASE - 1)).is_err());
        assert!(ram.read_obj::<u8>(GuestAddress(u64::MAX)).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_was_written_or_read_is_not_untouched() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let untouched = ram.untouched().expect("a process can read its own pagemap");
        assert!(untouched.covers(0, 64 << 20));
        // Far from each other: a huge page may come for one byte.
        ram.write_obj(1u8, GuestAddress(RAM_BASE + (8 << 20) + 4095)).unwrap();
        let _: u8 = ram.read_obj(GuestAddress(RAM_BASE + (24 << 20))).unwrap();
        for touched in [8 << 20, 24 << 20] {
            assert!(!untouched.covers(touched, 4096));
            assert!(!untouched.covers(touched - 0x1_0000, 0x2_0000));
        }
        assert!(untouched.covers(16 << 20, 0x1_0000));
        assert!(!untouched.covers((64 << 20) - 1, 2), "beyond the end");
        assert!(!untouched.covers(u64::MAX, 2));
    }

    #[test]
    fn a_size_that_is_not_a_multiple_of_64_kib_is_refused() {
        assert!(GuestRam::new(0).is_err());
        assert!(GuestRam::new(0x1_0001).is_err());
    }
}
