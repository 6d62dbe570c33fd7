//! Opening the files that a user or a snapshot names: what is no file of the kind that is expected is
//! refused, and no open waits, as one of a FIFO does for the other end.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::fs::{CWD, FileType, Mode, OFlags};

/// What may be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular files.
    File,
    /// Regular files and block devices.
    Disk,
}

/// How it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading.
    Read,
    /// For reading and writing.
    Write,
}

/// Why it was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is another kind of file.
    #[error("{}, not a regular file", name(*.0))]
    Kind(FileType),
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Io(error) => error,
            OpenError::Kind(FileType::Directory) => io::ErrorKind::IsADirectory.into(),
            kind @ OpenError::Kind(_) => Self::new(io::ErrorKind::InvalidInput, kind.to_string()),
        }
    }
}

/// Opens the file at `path`. Symbolic links are followed.
///
/// # Errors
/// It cannot be opened, or is not of the kind. Then it was not opened at all, unless it was exchanged
/// meanwhile: to open a device can have an effect.
pub fn open(path: &Path, kind: Kind, access: Access) -> Result<File, OpenError> {
    let stat = rustix::fs::stat(path).map_err(io::Error::from)?;
    check(FileType::from_raw_mode(stat.st_mode), kind)?;
    open_at(CWD, path, kind, access, OFlags::empty())
}

/// Opens the file called `name` in `dir`, with `flags` besides. What is not of the kind is closed again.
///
/// # Errors
/// It cannot be opened, or is not of the kind.
pub fn open_at(
    dir: impl AsFd,
    name: impl rustix::path::Arg,
    kind: Kind,
    access: Access,
    flags: OFlags,
) -> Result<File, OpenError> {
    let access = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    };
    // What regular files do does not depend on NONBLOCK.
    let flags = flags | access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(io::Error::from)?;
    checked(file, kind)
}

fn checked(file: OwnedFd, kind: Kind) -> Result<File, OpenError> {
    let stat = rustix::fs::fstat(&file).map_err(io::Error::from)?;
    check(FileType::from_raw_mode(stat.st_mode), kind)?;
    Ok(File::from(file))
}

fn check(found: FileType, kind: Kind) -> Result<(), OpenError> {
    match (found, kind) {
        (FileType::RegularFile, _) | (FileType::BlockDevice, Kind::Disk) => Ok(()),
        _ => Err(OpenError::Kind(found)),
    }
}

fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        _ => "of a kind that is not known",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        assert!(std::process::Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
        let _socket = UnixListener::bind(path("socket")).unwrap();
        std::fs::write(path("file"), "x").unwrap();
        std::os::unix::fs::symlink("fifo", path("link")).unwrap();
        for access in [Access::Read, Access::Write] {
            for name in ["fifo", "socket", "link", "."] {
                let found = open(&path(name), Kind::Disk, access);
                assert!(matches!(found, Err(OpenError::Kind(_))), "{name}: {found:?}");
            }
            // As if it had been exchanged after it was looked at.
            open_at(CWD, path("fifo"), Kind::Disk, access, OFlags::empty()).unwrap_err();
            open(&path("file"), Kind::File, access).unwrap();
        }
        let found = open(Path::new("/dev/null"), Kind::Disk, Access::Read).unwrap_err();
        assert_eq!(io::Error::from(found).to_string(), "a character device, not a regular file");
    }
}
