//! Waiting until something is on the storage itself, and asking it for holes, where the systems differ.

use std::{
    fs::File,
    io,
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
}
