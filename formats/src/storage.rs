//! Waiting until something is on the storage itself, and asking it for holes, where the systems differ.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::SeekFrom,
    io::{Errno, retry_on_intr},
};

/// Waits until a file or directory is on the storage, not only in a cache that a loss of power empties.
pub fn sync(file: impl AsFd) -> io::Result<()> {
    sync_fd(file.as_fd())
}

/// As [`sync`], for a file of which only the bytes and the size matter.
pub fn sync_data(file: &File) -> io::Result<()> {
    match cfg!(target_os = "macos") {
        true => sync(file),
        false => file.sync_data(),
    }
}

#[cfg(target_os = "macos")]
fn sync_fd(file: BorrowedFd<'_>) -> io::Result<()> {
    // `fsync` there ends when the bytes are in the drive, whose own cache may still lose them.
    match retry_on_intr(|| rustix::fs::fcntl_fullfsync(file)) {
        // File systems of other machines and of other makers do not have it. Any other error is the file's:
        // a second call may not tell it again.
        Err(Errno::NOTSUP | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL) => {
            Ok(retry_on_intr(|| rustix::fs::fsync(file))?)
        }
        synced => Ok(synced?),
    }
}

#[cfg(not(target_os = "macos"))]
fn sync_fd(file: BorrowedFd<'_>) -> io::Result<()> {
    Ok(retry_on_intr(|| rustix::fs::fsync(file))?)
}

/// Begins to write the dirty pages of the range, without waiting. It is no more than advice: what goes wrong is
/// told by the sync.
pub fn start_writeback(file: &File, offset: u64, len: u64) {
    #[cfg(target_os = "linux")]
    if let Some(len) = std::num::NonZeroU64::new(len) {
        // Pages that are dirty stay cached until they are written.
        let _ = rustix::fs::fadvise(file, offset, Some(len), rustix::fs::Advice::DontNeed);
    }
    // Elsewhere nothing of the kind begins writing.
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, len);
}

/// Whether the file system says that there is nothing but a hole in the range. Moves the file's offset.
pub fn is_hole(file: &File, offset: u64, len: u64) -> bool {
    // APFS has answered "hole" for bytes that were written and not yet flushed; other programs lost data by
    // believing it. Reading always tells the truth.
    if cfg!(target_os = "macos") {
        return false;
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data >= offset.saturating_add(len),
        Err(Errno::NXIO) => true,
        // The file system does not know; reading tells.
        Err(_) => false,
    }
}

/// The first bytes at or behind `offset` of the `size` bytes of `file` that do not lie in a hole; `None` if
/// there are none. Where the file system does not know of holes, or cannot be believed, that is everything.
/// Moves the file's offset.
pub fn next_data(file: &File, offset: u64, size: u64) -> Option<Range<u64>> {
    if offset >= size {
        return None;
    }
    // As in `is_hole`.
    if cfg!(target_os = "macos") {
        return Some(offset..size);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) if start >= size => return None,
        Ok(start) => start.max(offset),
        Err(Errno::NXIO) => return None,
        Err(_) => return Some(offset..size),
    };
    // Less than a byte of data there cannot be.
    let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(size);
    Some(start..end.clamp(start + 1, size))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn files_and_directories_can_be_synced() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("a")).unwrap();
        file.write_all_at(b"bytes", 0).unwrap();
        sync(&file).unwrap();
        sync_data(&file).unwrap();
        sync(File::open(dir.path()).unwrap()).unwrap();
    }

    #[test]
    fn what_cannot_be_synced_is_an_error() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(sync(&reader).is_err());
    }

    #[test]
    fn bytes_that_were_just_written_are_never_in_a_hole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1], 0x8_0001).unwrap();
        assert!(!is_hole(&file, 0x8_0000, 0x1_0000));
        assert!(!is_hole(&file, 0, 1 << 20));
    }
    #[test]
    fn data_is_found_between_holes_at_any_offset() {
        let file = tempfile::tempfile().unwrap();
        let size = (1 << 40) + 5;
        file.set_len(size).unwrap();
        let places = [(3u64 << 20) + 1, 5 << 30, (700 << 30) + 4095, size - 1];
        for place in places {
            file.write_all_at(&[1], place).unwrap();
        }
        let found: Vec<_> = std::iter::successors(next_data(&file, 0, size), |last| {
            next_data(&file, last.end, size)
        })
        .collect();
        for place in places {
            assert!(found.iter().any(|range| range.contains(&place)), "{place} in {found:?}");
        }
        for pair in found.windows(2) {
            assert!(pair[0].end < pair[1].start, "{found:?}");
        }
        assert!(found.iter().all(|range| range.start < range.end && range.end <= size));
        assert_eq!(next_data(&file, size, size), None);
        // In the middle of data it begins there.
        assert_eq!(next_data(&file, places[0], size).unwrap().start, places[0]);
    }

    #[test]
    fn what_knows_no_holes_is_all_data() {
        let pipe = io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(pipe.0));
        assert_eq!(next_data(&file, 3, 10), Some(3..10));
        assert_eq!(next_data(&file, 10, 10), None);
    }

    #[test]
    fn a_file_that_ends_in_a_hole_has_nothing_there() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.set_len(1 << 30).unwrap();
        if cfg!(target_os = "linux") {
            let data = next_data(&file, 0, 1 << 30).unwrap();
            assert!(data.start == 0 && data.end < 1 << 20, "{data:?}");
            assert_eq!(next_data(&file, data.end, 1 << 30), None);
        }
    }
}
