//! Which pages of this process have been touched.

pub(super) use sys::Pagemap;

#[cfg(target_os = "linux")]
mod sys {
    use std::{fs::File, os::unix::fs::FileExt};

    /// The page table of this process. The kernel's Documentation/admin-guide/mm/pagemap.rst.
    #[derive(Debug)]
    pub(in super::super) struct Pagemap {
        file: File,
        page: u64,
    }

    /// "page present" and "page swapped": one of them is set for every page that has been touched.
    const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

    impl Pagemap {
        pub(in super::super) fn open() -> Option<Self> {
            // SAFETY: sysconf reads a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            let page = u64::try_from(page).ok().filter(|page| page.is_power_of_two())?;
            Some(Self { file: File::open("/proc/self/pagemap").ok()?, page })
        }

        /// Whether no page of the range is there. An error counts as no.
        pub(in super::super) fn is_empty(&self, address: u64, len: u64) -> bool {
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
    pub(in super::super) enum Pagemap {}

    impl Pagemap {
        pub(in super::super) fn open() -> Option<Self> {
            None
        }

        pub(in super::super) fn is_empty(&self, _: u64, _: u64) -> bool {
            match *self {}
        }
    }
}
