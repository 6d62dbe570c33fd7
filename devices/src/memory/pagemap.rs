//! Which pages of this process have been touched.

pub(super) use sys::Pagemap;

#[cfg(target_os = "linux")]
mod sys {
    use std::{
        fs::File,
        ops::Range,
        os::{fd::AsRawFd, unix::fs::FileExt},
    };

    /// The page table of this process. The kernel's Documentation/admin-guide/mm/pagemap.rst.
    #[derive(Debug)]
    pub(in super::super) struct Pagemap {
        file: File,
        page: u64,
    }

    /// "page present" and "page swapped": one of them is set for every page that has been touched.
    const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
    /// Most pages that are looked at for the end of what has been touched, so that to go through memory in
    /// pieces does not look at the same pages over and over.
    const MOST: u64 = 16384;
    /// Entries that are read at once.
    const STEP: u64 = 4096;

    /// `struct pm_scan_arg` of the kernel's include/uapi/linux/fs.h, Linux 6.7 and later.
    #[repr(C)]
    #[derive(Default)]
    struct PmScanArg {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }

    /// `struct page_region`.
    #[repr(C)]
    #[derive(Default)]
    struct PageRegion {
        start: u64,
        end: u64,
        categories: u64,
    }

    /// `_IOWR('f', 16, struct pm_scan_arg)`.
    const PAGEMAP_SCAN: u32 = 3 << 30 | (size_of::<PmScanArg>() as u32) << 16 | 0x66 << 8 | 16;
    /// `PAGE_IS_PRESENT` and `PAGE_IS_SWAPPED`.
    const IS_PRESENT_OR_SWAPPED: u64 = 1 << 3 | 1 << 4;

    impl Pagemap {
        pub(in super::super) fn open() -> Option<Self> {
            // SAFETY: sysconf reads a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            let page = u64::try_from(page).ok().filter(|page| page.is_power_of_two())?;
            Some(Self { file: File::open("/proc/self/pagemap").ok()?, page })
        }

        /// The first pages of the range that are there, `None` if there are none. An error counts as all.
        pub(in super::super) fn touched(&self, addresses: Range<u64>) -> Option<Range<u64>> {
            let Range { start, end } = addresses;
            let pages = start / self.page..end.div_ceil(self.page);
            let found = match self.scan(&pages) {
                Ok(found) => found,
                Err(_) => match self.read(&pages) {
                    Ok(found) => found,
                    Err(_) => return Some(start..end),
                },
            }?;
            Some((found.start * self.page).max(start)..(found.end * self.page).min(end))
        }

        /// Asks the kernel, which passes over what has no page tables.
        fn scan(&self, pages: &Range<u64>) -> std::io::Result<Option<Range<u64>>> {
            let mut region = PageRegion::default();
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start: pages.start * self.page,
                end: pages.end * self.page,
                vec: &raw mut region as u64,
                vec_len: 1,
                max_pages: MOST,
                category_anyof_mask: IS_PRESENT_OR_SWAPPED,
                return_mask: IS_PRESENT_OR_SWAPPED,
                ..PmScanArg::default()
            };
            // SAFETY: the descriptor is open; `arg` is what PAGEMAP_SCAN reads and writes, and its `vec` leads
            // to one region, which lives as long as the call.
            let found =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            match found {
                -1 => Err(std::io::Error::last_os_error()),
                0 => Ok(None),
                _ => Ok(Some(region.start / self.page..region.end / self.page)),
            }
        }

        /// Reads the entry of every page, as older kernels have it.
        pub(super) fn read(&self, pages: &Range<u64>) -> std::io::Result<Option<Range<u64>>> {
            let mut bytes = vec![0; STEP.min(pages.end - pages.start) as usize * 8];
            let (mut next, mut first) = (pages.start, None);
            while next < pages.end {
                let count = STEP.min(pages.end - next);
                let bytes = &mut bytes[..count as usize * 8];
                self.file.read_exact_at(bytes, next * 8)?;
                let (entries, _) = bytes.as_chunks::<8>();
                for (page, entry) in (next..).zip(entries) {
                    let touched = u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
                    match first {
                        None if touched => first = Some(page),
                        Some(first) if !touched || page - first >= MOST => {
                            return Ok(Some(first..page));
                        }
                        _ => {}
                    }
                }
                next += count;
            }
            Ok(first.map(|first| first..pages.end))
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

        pub(in super::super) fn touched(
            &self,
            _: std::ops::Range<u64>,
        ) -> Option<std::ops::Range<u64>> {
            match *self {}
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use memmap2::MmapMut;

    use super::*;

    const PAGES: u64 = 40_000;

    #[test]
    fn the_kernel_and_the_table_of_pages_say_the_same() {
        let mut memory = MmapMut::map_anon(PAGES as usize * 4096).unwrap();
        let base = memory.as_ptr() as u64 / 4096;
        let touched = [3, 4, 5, 100, 511, 512, 9_999, 39_999];
        for page in touched {
            memory[page * 4096 + 7] = 1;
        }
        let map = Pagemap::open().unwrap();
        let mut next = base;
        let mut found = Vec::new();
        while let Some(range) = map.touched(next * 4096..(base + PAGES) * 4096) {
            let pages = range.start / 4096..range.end / 4096;
            assert_eq!(map.read(&(next..base + PAGES)).unwrap(), Some(pages.clone()));
            found.extend(pages.clone().map(|page| page - base));
            next = pages.end;
        }
        assert_eq!(map.read(&(next..base + PAGES)).unwrap(), None);
        for page in touched {
            assert!(found.contains(&(page as u64)), "{page} in {found:?}");
        }
        // A huge page may have come for one.
        assert!(found.len() < 5_000, "{}", found.len());
    }
}
