//! Whether there is room for disks that are to be made.

use std::{fs, io, path::Path};

use rustix::fs::Access;
#[cfg(target_os = "linux")]
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use squib_formats::image::{Index, zero_digest};

use super::DiskError;

/// Bytes of an image's chunks that are not zero: what a file made of it takes.
pub(crate) fn data_bytes(index: &Index) -> u64 {
    let zero = zero_digest(index.chunk_size());
    let data = index.digest_runs().filter(|(_, digest)| *digest != zero);
    data.map(|(chunks, _)| index.bytes(&chunks)).sum()
}

/// Bytes that this user can still write below `dir`.
pub(crate) fn free(dir: &Path) -> io::Result<u64> {
    if !fs::metadata(dir)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether a file of `size` bytes, all of it one hole, can be made in `dir`: this user may write there, and the
/// file system has files of that size. Nothing is seen of it.
pub(crate) fn can_make(dir: &Path, size: u64) -> io::Result<()> {
    rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK)?;
    #[cfg(target_os = "linux")]
    {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => rustix::fs::ftruncate(&file, size)?,
            // Not every file system has files without a name.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = size;
    Ok(())
}

/// Whether `needed` bytes go into the directory of `path`, which the disk `id` is to become, with `promised`
/// bytes still to come for other disks. A guest that runs already could only be ended for want of room.
pub(super) fn check(id: &str, path: &Path, needed: u64, promised: u64) -> Result<(), DiskError> {
    // If that cannot be told, writing tells.
    let Some(Ok(free)) = path.parent().map(free) else { return Ok(()) };
    match free.checked_sub(promised).is_some_and(|left| left >= needed) {
        true => Ok(()),
        false => {
            let (id, path) = (id.to_owned(), path.to_owned());
            Err(DiskError::NoRoom { id, path, needed: needed.saturating_add(promised), free })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_is_free_is_refused_and_what_others_will_take_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.img");
        let all = free(dir.path()).unwrap();
        check("root", &path, 0, 0).unwrap();
        // Others may write to this file system at the same time, but not so much.
        let error = check("root", &path, all / 2, all).unwrap_err().to_string();
        assert!(
            error.starts_with("disk `root`: no room for ") && error.contains(" free"),
            "{error}"
        );
        check("root", &path, u64::MAX, 0).unwrap_err();
        check("root", &path, u64::MAX, u64::MAX).unwrap_err();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_file_that_the_file_system_cannot_have_is_told_and_none_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        can_make(dir.path(), 1 << 30).unwrap();
        can_make(dir.path(), i64::MAX as u64).unwrap_err();
        can_make(&dir.path().join("not"), 0).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
