//! Guest RAM: one contiguous range at [`RAM_BASE`](crate::map::RAM_BASE), shared by vCPUs, devices
//! and whoever captures or restores it.
//!
//! The region type is our own rather than the library's, since every host access goes through
//! [`RamRegion::get_slice`]: the one place where it waits for bytes that are not there yet, and where what
//! is written is marked. Which those are, [`Granules`] know.

mod guard;
mod pagemap;
mod store;

use std::{
    fs::File,
    io,
    sync::{Arc, atomic::AtomicU8},
};

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use self::guard::Guard;
pub use self::store::RamStore;
use crate::{
    granules::{Granules, READABLE, WRITABLE},
    map::RAM_BASE,
};

/// Binary logarithm of the size of a granule of RAM that is not restored: 64 KiB.
pub const GRANULE_SHIFT: u32 = 16;

/// Guest RAM; clones share the same bytes.
#[derive(Clone, Debug)]
pub struct GuestRam {
    region: Arc<RamRegion>,
}

impl GuestRam {
    /// Fresh zeroed RAM of `size` bytes, which must be a multiple of 64 KiB and not zero.
    /// Pages take host memory when they are first written.
    pub fn new(size: u64) -> io::Result<Self> {
        Self::over(RamStore::anonymous(size)?, GRANULE_SHIFT, READABLE | WRITABLE)
    }

    /// RAM of `size` bytes in granules of `1 << shift`, from 16 KiB on, none of which is there: the caller
    /// [says](Granules::set_origin) where they come from, or fills them in and [says so](Granules::set_all).
    pub fn absent(size: u64, shift: u32) -> io::Result<Self> {
        Self::over(RamStore::anonymous(size)?, shift, 0)
    }

    /// RAM that begins as the bytes of `file`, which is open for reading only, and shares their pages until it
    /// writes to them. All of it is there and unchanged.
    ///
    /// Nobody can change the file until the RAM is gone: who tries waits, and the granules
    /// [fail](Granules::on_failure). From then on `is_right` has to find the file as it should be.
    ///
    /// # Errors
    /// [`Unguarded`](FromFileError::Unguarded) where the system cannot give that promise.
    pub fn from_file(
        file: File,
        size: u64,
        shift: u32,
        is_right: impl FnOnce(&File) -> bool,
    ) -> Result<Self, FromFileError> {
        let guard = Guard::take(file).map_err(FromFileError::Unguarded)?;
        if !is_right(guard.file()) {
            return Err(FromFileError::Changed);
        }
        let ram = Self::over(RamStore::private(guard, size)?, shift, READABLE)?;
        let granules = Arc::downgrade(ram.granules());
        let lose = move || {
            if let Some(granules) = granules.upgrade() {
                granules.lose("another program wants to change the file that they are mapped from");
            }
        };
        if let Some(guard) = ram.granules().store().guard() {
            guard.on_break(Box::new(lose));
        }
        Ok(ram)
    }

    fn over(store: RamStore, shift: u32, access: u8) -> io::Result<Self> {
        if !(14..=22).contains(&shift) {
            let why = format!("granules of 2^{shift} bytes are not from 16 KiB to 4 MiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let size = store.size();
        let granules = Granules::with_rights("guest memory", store, size, shift, access);
        Ok(Self { region: Arc::new(RamRegion { granules: Arc::new(granules) }) })
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
    /// other threads write through it at any time while the guest runs. What may be touched,
    /// [`granules`](Self::granules) say.
    pub fn host_ptr(&self) -> *mut u8 {
        self.region.granules.store().host_ptr()
    }

    /// What may be read and written, one byte a granule, and the binary logarithm of a granule's size: see
    /// [`Granules::rights`].
    pub fn rights(&self) -> (Arc<[AtomicU8]>, u32) {
        // RAM has them from the start.
        self.granules().rights().unwrap_or_default()
    }

    /// What is there and what has changed.
    pub fn granules(&self) -> &Arc<Granules<RamStore>> {
        &self.region.granules
    }
}

/// Why there is no RAM over a file.
#[derive(Debug, thiserror::Error)]
pub enum FromFileError {
    /// Nothing would keep others from changing the file: it is on a file system without leases, say, or open
    /// for writing.
    #[error("it cannot be kept from changing: {0}")]
    Unguarded(#[source] io::Error),
    /// It is not as it should be.
    #[error("it was changed meanwhile")]
    Changed,
    /// It cannot be mapped.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The one region of [`GuestRam`].
#[derive(Debug)]
pub struct RamRegion {
    granules: Arc<Granules<RamStore>>,
}

impl GuestMemoryRegion for RamRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.granules.size()
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

    /// The bytes, once they are there. They count as written, since nobody can tell whether they will be.
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> vm_memory::guest_memory::Result<VolatileSlice<'_, ()>> {
        let slice = self.granules.store().slice(offset.0, count);
        let slice = slice.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let allowed = self.granules.allow(offset.0, count as u64, true);
        allowed.map_err(|error| GuestMemoryError::IOError(io::Error::other(error)))?;
        Ok(slice)
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
        let untouched = ram.granules().store();
        assert!(untouched.is_untouched(0, 64 << 20));
        // Far from each other: a huge page may come for one byte.
        ram.write_obj(1u8, GuestAddress(RAM_BASE + (8 << 20) + 4095)).unwrap();
        let _: u8 = ram.read_obj(GuestAddress(RAM_BASE + (24 << 20))).unwrap();
        for touched in [8 << 20, 24 << 20] {
            assert!(!untouched.is_untouched(touched, 4096));
            assert!(!untouched.is_untouched(touched - 0x1_0000, 0x2_0000));
        }
        assert!(untouched.is_untouched(16 << 20, 0x1_0000));
        assert!(!untouched.is_untouched((64 << 20) - 1, 2), "beyond the end");
        assert!(!untouched.is_untouched(u64::MAX, 2));
    }

    #[test]
    fn a_size_that_is_not_a_multiple_of_64_kib_is_refused() {
        assert!(GuestRam::new(0).is_err());
        assert!(GuestRam::new(0x1_0001).is_err());
    }
}
