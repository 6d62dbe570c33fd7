//! What [`Staging`](crate::publish::Staging) asks of the operating system, step by step, so that a test can make
//! any step fail.

use std::{
    fmt::Debug,
    fs::{self, File},
    io::{self, Write},
    os::fd::BorrowedFd,
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags},
    io::Errno,
};

use crate::storage;

/// The steps of writing a snapshot. What is not overridden is done.
pub trait Layer: Debug + Send + Sync {
    /// Makes the directory `path`, mode 0700.
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::mkdir(path, Mode::RWXU)?)
    }

    /// Makes the file `name` in `dir`, mode 0600, where nothing may be.
    fn create(&self, dir: BorrowedFd<'_>, name: &str) -> io::Result<File> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Makes the file `name` in `dir`, mode 0600, where nothing may be, with the bytes that `file` has now, by
    /// letting the two share what lies on the storage. Answers it open for reading. After an error there is no
    /// file.
    fn clone_file(&self, dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<File> {
        sys::clone_file(dir, name, file)
    }

    /// Appends the first of `bytes` to the file called `name`, and answers how many.
    fn write(&self, _name: &str, mut file: &File, bytes: &[u8]) -> io::Result<usize> {
        file.write(bytes)
    }

    /// Waits until the file called `name` is on the storage.
    fn sync(&self, _name: &str, file: &File) -> io::Result<()> {
        storage::sync(file)
    }

    /// Waits until the directory at `path` is on the storage.
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        storage::sync(File::open(path)?)
    }

    /// Renames a directory.
    fn rename(&self, from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
        match flags.is_empty() {
            true => fs::rename(from, to),
            false => Ok(rustix::fs::renameat_with(CWD, from, CWD, to, flags)?),
        }
    }

    /// Removes the file `name` in `dir`.
    fn unlink(&self, dir: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?)
    }

    /// Removes the files `names` of a snapshot that was replaced, and its directory `path` if nothing else is
    /// in it; false if there is.
    fn remove_old(&self, path: &Path, names: &[String]) -> io::Result<bool> {
        remove_files(path, names.iter().map(String::as_str))
    }

    /// Removes the directory at `path` and all that is in it.
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}

/// Removes the regular files called `names` in the directory at `path`, and then the directory. False if
/// something else is in it: that stays, and so does the directory.
pub fn remove_files<'a>(path: &Path, names: impl IntoIterator<Item = &'a str>) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    for name in names {
        match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                rustix::fs::unlinkat(&dir, name, AtFlags::empty())?;
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match rustix::fs::rmdir(path) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        removed => Ok(removed.map(|()| true)?),
    }
}

/// The operating system and nothing else.
#[derive(Debug)]
pub struct Real;

impl Layer for Real {}

#[cfg(target_os = "linux")]
mod sys {
    use super::*;

    pub(super) fn clone_file(dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<File> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let clone = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?;
        if let Err(error) = rustix::fs::ioctl_ficlone(&clone, file) {
            // Empty; the writer that gives up removes it with all the rest.
            let _ = rustix::fs::unlinkat(dir, name, AtFlags::empty());
            return Err(error.into());
        }
        Ok(File::from(clone))
    }
}

#[cfg(target_os = "macos")]
mod sys {
    use rustix::fs::CloneFlags;

    use super::*;

    pub(super) fn clone_file(dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<File> {
        rustix::fs::fclonefileat(file, dir, name, CloneFlags::NOOWNERCOPY)?;
        // The clone has the mode of the file, with which it might not be opened.
        let open = || {
            rustix::fs::chmodat(dir, name, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(dir, name, flags, Mode::empty())
        };
        let clone = open().inspect_err(|_| {
            // The writer that gives up removes it with all the rest.
            let _ = rustix::fs::unlinkat(dir, name, AtFlags::empty());
        });
        Ok(File::from(clone?))
    }
}
