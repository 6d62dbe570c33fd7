//! Disks as images of the snapshot, back into files, or checked where they are.
//!
//! All of this reads and fills the granules through which the guest uses the disk, so that the guest can go on
//! while a disk is captured, and begin before one is restored.

mod capture;
mod digest;
mod outside;
mod restore;
mod room;

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use squib_devices::virtio::block::{BlockError, FileDisk};
use squib_formats::{
    digest::Digest,
    open::{self, Access, Kind, OpenError},
};

pub(crate) use capture::{Disk, FrozenDisk};
pub(crate) use outside::Outside;
pub(crate) use restore::{CheckError, Disks, check, digest_kind};
pub use restore::{DiskLoad, FinishError, finish_disks};
pub(crate) use room::{can_make, data_bytes, free};

/// What a restore does with a disk that lies outside the snapshot and has changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ChangedDisks {
    /// It refuses: the guest's file system would be damaged.
    #[default]
    Refuse,
    /// It goes on.
    Accept,
}

/// Why a disk cannot be captured or used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened or read.
    #[error("disk `{id}`: {}: cannot {action}: {source}", path.display())]
    Io {
        /// The disk's id.
        id: String,
        /// Where it should be.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// It has another size than it had.
    #[error("disk `{id}`: {} has {found} bytes, it had {expected} in the snapshot", path.display())]
    Size {
        /// The disk's id.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// Its size in the snapshot, in bytes.
        expected: u64,
        /// Its size now, in bytes.
        found: u64,
    },
    /// Its bytes are not what they were.
    #[error(
        "disk `{id}`: {} has changed since the snapshot: digest {found}, expected {expected}",
        path.display()
    )]
    Changed {
        /// The disk's id.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// Image digest in the snapshot.
        expected: Digest,
        /// Image digest now.
        found: Digest,
    },
    /// Its path cannot be written into the manifest.
    #[error("disk `{id}`: the path {} is not UTF-8 and cannot be recorded", path.display())]
    Path {
        /// The disk's id.
        id: String,
        /// Where it is.
        path: PathBuf,
    },
    /// It is not a disk, or in use.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// It would not fit where it is to be made.
    #[error("disk `{id}`: no room for {}: {needed} bytes needed, {free} free", path.display())]
    NoRoom {
        /// The disk's id.
        id: String,
        /// Where it would be.
        path: PathBuf,
        /// Bytes that it and the disks before it need.
        needed: u64,
        /// Bytes that can be written there.
        free: u64,
    },
    /// It lies outside the snapshot, at a place that the user has not allowed.
    #[error(
        "disk `{id}`: the snapshot asks for {}, a file of this host that nothing allows it to use",
        path.display()
    )]
    NotAllowed {
        /// The disk's id.
        id: String,
        /// The path in the snapshot.
        path: PathBuf,
    },
    /// It is being captured already.
    #[error("disk `{id}`: another snapshot of it is being written")]
    Frozen {
        /// The disk's id.
        id: String,
    },
}

/// Opens and locks the disk that lies at `path`.
pub(crate) fn open(id: &str, path: &Path, read_only: bool) -> Result<FileDisk, DiskError> {
    let access = if read_only { Access::Read } else { Access::Write };
    match open::open(path, Kind::Disk, access) {
        Ok(file) => Ok(FileDisk::from_file(file, path, read_only)?),
        Err(OpenError::Kind(_)) => Err(BlockError::NotADisk { path: path.to_owned() }.into()),
        Err(OpenError::Io(source)) => {
            let (id, path) = (id.to_owned(), path.to_owned());
            Err(DiskError::Io { id, path, action: "open", source })
        }
    }
}

/// Locks the open disk `file`, which must have `expected` bytes. `path` names it in errors.
fn lock(
    id: &str,
    file: File,
    path: &Path,
    read_only: bool,
    expected: u64,
) -> Result<FileDisk, DiskError> {
    // A block device's size is where its end is; its metadata say 0.
    let found = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(|source| {
        let (id, path) = (id.to_owned(), path.to_owned());
        DiskError::Io { id, path, action: "read", source }
    })?;
    if found != expected {
        let (id, path) = (id.to_owned(), path.to_owned());
        return Err(DiskError::Size { id, path, expected, found });
    }
    Ok(FileDisk::from_file(file, path, read_only)?)
}

/// Makes a private file of `size` bytes at `path`, nothing but one hole, open and locked.
fn create(id: &str, path: &Path, size: u64) -> Result<FileDisk, DiskError> {
    let failed = |action| {
        let (id, path) = (id.to_owned(), path.to_owned());
        move |source| DiskError::Io { id, path, action, source }
    };
    let new = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = new.map_err(failed("create"))?;
    let made = file.set_len(size).map_err(failed("set the size"));
    match made.and_then(|()| Ok(FileDisk::from_file(file, path, false)?)) {
        Ok(disk) => Ok(disk),
        Err(error) => {
            remove(path);
            Err(error)
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!("{}: cannot remove: {error}", path.display());
    }
}
