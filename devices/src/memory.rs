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
    fn a_size_that_is_not_a_multiple_of_64_kib_is_refused() {
        assert!(GuestRam::new(0).is_err());
        assert!(GuestRam::new(0x1_0001).is_err());
    }
}
