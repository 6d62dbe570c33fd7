//! What lies behind a block device: positioned I/O straight between a file and guest memory.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use rustix::fs::FlockOperation;
use squib_formats::{
    image::Content,
    open::{self, Access, Kind, OpenError},
    storage,
};
use vm_memory::VolatileSlice;

use super::{BlockError, SECTOR_SIZE};
use crate::granules::Store;

/// A backing store. Offsets and lengths are in bytes, and inside [`size`](Self::size).
pub trait Disk: Send {
    /// Size in bytes, a multiple of 512, fixed.
    fn size(&self) -> u64;

    /// Fills all of `into` with what lies at `offset`.
    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes all of `from` to `offset`.
    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Returns once everything that was written is on stable storage.
    fn flush(&self) -> io::Result<()>;

    /// A hint that the contents are not needed any more.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the bytes read as zero; `may_unmap` allows a hole.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
}

/// A raw image file, or a block device of the host, locked against other users.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
}

/// Most pieces handed to one system call; IOV_MAX is at least 1024 where this runs.
pub(super) const MAX_BATCH: usize = 64;

impl FileDisk {
    /// Opens and locks `path`: exclusively for writing, shared for reading only.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let access = if read_only { Access::Read } else { Access::Write };
        let file = open::open(path, Kind::Disk, access).map_err(|error| match error {
            OpenError::Kind(_) => BlockError::NotADisk { path: path.into() },
            OpenError::Io(source) => BlockError::Open { path: path.into(), source },
        })?;
        Self::from_file(file, path, read_only)
    }

    /// Locks `file`, which the caller has opened; `path` names it in errors.
    pub fn from_file(mut file: File, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&file, lock) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(BlockError::InUse { path: path.into() });
            }
            Err(error) => {
                return Err(BlockError::Lock { path: path.into(), source: error.into() });
            }
        }
        // A block device has no length of its own in its metadata.
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|source| BlockError::Open { path: path.into(), source })?;
        check_size(size, path)?;
        Ok(Self { file, size })
    }

    /// The file that was opened and locked.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes zeros, where the file system knows no better way.
    fn plain_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROES: [u8; 0x1_0000] = [0; 0x1_0000];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }
}

/// Whether a disk can be of `size` bytes: whole sectors, at least one. `path` names it in the error.
fn check_size(size: u64, path: &Path) -> Result<(), BlockError> {
    match size > 0 && size.is_multiple_of(SECTOR_SIZE) {
        true => Ok(()),
        false => Err(BlockError::Size { path: path.into(), size }),
    }
}

/// A disk of which only the size is known: what a saved state fits to can be told, and no byte can be had.
#[derive(Clone, Copy, Debug)]
pub struct SizeOnly(u64);

impl SizeOnly {
    /// A disk of `size` bytes, which is held to the same rules as a file; `path` names it in errors.
    pub fn new(size: u64, path: &Path) -> Result<Self, BlockError> {
        check_size(size, path).map(|()| Self(size))
    }

    fn no_bytes() -> io::Error {
        io::Error::new(io::ErrorKind::Unsupported, "only the size of this disk is known")
    }
}

impl Disk for SizeOnly {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Err(Self::no_bytes())
    }

    fn write_at(&self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Err(Self::no_bytes())
    }

    fn flush(&self) -> io::Result<()> {
        Err(Self::no_bytes())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(Self::no_bytes())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(Self::no_bytes())
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(into, offset, |iov, offset| {
            // SAFETY: every entry of `iov` is a part of a VolatileSlice of `into`, whose memory
            // stays mapped and writable while the slice lives; no reference to it is made, so the
            // guest may touch it at the same time.
            unsafe {
                libc::preadv(self.file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, offset)
            }
        })
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(from, offset, |iov, offset| {
            // SAFETY: as in `read_at`; the memory is only read.
            unsafe {
                libc::pwritev(self.file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, offset)
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        storage::sync_data(&self.file)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match sys::punch_hole(&self.file, offset, len) {
            // The hint cannot be followed here.
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let quick = if may_unmap {
            sys::punch_hole(&self.file, offset, len)
        } else {
            sys::zero_range(&self.file, offset, len)
        };
        match quick {
            Err(error) if unsupported(&error) => self.plain_zeroes(offset, len),
            result => result,
        }
    }
}

/// The same bytes for those who do not move them to or from guest memory. Holes are found and not read.
impl Store for FileDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        if storage::is_hole(&self.file, offset, into.len() as u64) {
            return Ok(Content::Zero);
        }
        self.file.read_exact_at(into, offset)?;
        Ok(Content::Data)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(storage::next_data(&self.file, range.start, range.end))
    }

    fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }
}

/// Calls `call` until all of `slices` is moved to or from `offset`.
fn transfer(
    slices: &[VolatileSlice<'_>],
    mut offset: u64,
    call: impl Fn(&[libc::iovec], libc::off_t) -> libc::ssize_t,
) -> io::Result<()> {
    for batch in slices.chunks(MAX_BATCH) {
        let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_BATCH];
        for (entry, slice) in iov.iter_mut().zip(batch) {
            entry.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            entry.iov_len = slice.len();
        }
        let iov = &mut iov[..batch.len()];
        // Up to here everything is done, or empty.
        let mut first = 0;
        while let Some(entry) = iov.get(first) {
            if entry.iov_len == 0 {
                first += 1;
                continue;
            }
            let at = libc::off_t::try_from(offset)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let moved = match call(&iov[first..], at) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                moved if moved > 0 => moved as usize,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
            };
            offset += moved as u64;
            let mut left = moved;
            for entry in &mut iov[first..] {
                let part = left.min(entry.iov_len);
                entry.iov_base = entry.iov_base.wrapping_byte_add(part);
                entry.iov_len -= part;
                left -= part;
            }
        }
    }
    Ok(())
}

fn unsupported(error: &io::Error) -> bool {
    // EINVAL: F_PUNCHHOLE of a file system that wants another alignment.
    matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput)
}

#[cfg(target_os = "linux")]
mod sys {
    use std::{fs::File, io};

    use rustix::fs::{FallocateFlags, fallocate};

    pub(super) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(file, flags, offset, len)?)
    }

    pub(super) fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(file, flags, offset, len)?)
    }
}

#[cfg(target_os = "macos")]
mod sys {
    use std::{fs::File, io, os::fd::AsRawFd};

    /// F_PUNCHHOLE wants both ends aligned to a block, at most this large.
    const BLOCK: u64 = 4096;

    pub(super) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
        if !offset.is_multiple_of(BLOCK) || !len.is_multiple_of(BLOCK) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let hole = libc::fpunchhole_t {
            fp_flags: 0,
            reserved: 0,
            fp_offset: offset as libc::off_t,
            fp_length: len as libc::off_t,
        };
        // SAFETY: the descriptor is open, and `hole` is what F_PUNCHHOLE reads.
        match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PUNCHHOLE, &raw const hole) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    pub(super) fn zero_range(_: &File, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
