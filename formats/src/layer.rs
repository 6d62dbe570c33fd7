//! What [`Staging`](crate::publish::Staging) asks of the operating system, step by step, so that a test can make
//! any step fail.

use std::{
    fmt::Debug,
    fs::{self, File},
    io::{self, Write},
    os::fd::BorrowedFd,
    path::Path,
};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};

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

    /// Removes the directory at `path` and all that is in it.
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}

/// The operating system and nothing else.
#[derive(Debug)]
pub struct Real;

impl Layer for Real {}
