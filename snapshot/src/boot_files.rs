//! What a guest boots again from after a reset: the kernel and the initrd that it was booted from, known by
//! their digests.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use squib_formats::{
    boot_files::{digest_boot_file, write_boot_file},
    digest::Digest,
    error::FormatError,
    manifest::{INITRD_FILE, KERNEL_FILE},
    open::{self, Access, Kind},
    publish::Staging,
    snapshot_dir::Snapshot,
};
use squib_vmm::config::{MachineConfig, OnReset};

/// Files that the user names, in place of those of the snapshot.
#[derive(Clone, Debug, Default)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
}

/// Why what the guest was booted from cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BootFileError {
    /// The snapshot does not say which file it was, and its path alone proves nothing.
    #[error(
        "the {what} that the guest was booted from is not known: the snapshot holds no digest of it"
    )]
    Unknown {
        /// "kernel" or "initrd".
        what: &'static str,
    },
    /// The file cannot be opened.
    #[error("{what} {}: {source}", path.display())]
    Open {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The user names a file that the guest was not booted from.
    #[error("{what} {}: blake3 is {found}, the guest was booted from a file with {expected}", path.display())]
    Another {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The digest in the snapshot.
        expected: Digest,
        /// The file's.
        found: Digest,
    },
    /// The user names an initrd, and the guest was booted without one.
    #[error("initrd {}: the guest was booted without one", path.display())]
    NoInitrd {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be copied into the snapshot, or is another one by now.
    #[error("{what} {}: {source}", path.display())]
    Copy {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        source: Box<FormatError>,
    },
}

/// The names of the two in messages and in the snapshot.
const KERNEL: (&str, &str) = ("kernel", KERNEL_FILE);
const INITRD: (&str, &str) = ("initrd", INITRD_FILE);

/// Puts what the machine of `config` was booted from into the snapshot.
pub(crate) fn store(staging: &mut Staging, config: &MachineConfig) -> Result<(), BootFileError> {
    let kernel = (KERNEL, Some(&config.kernel), config.kernel_digest);
    let initrd = (INITRD, config.initrd.as_ref(), config.initrd_digest);
    for ((what, name), path, digest) in [kernel, initrd] {
        let Some(path) = path else { continue };
        let digest = digest.ok_or(BootFileError::Unknown { what })?;
        let mut file = open(what, path)?;
        write_boot_file(staging, name, &mut file, digest, config.memory).map_err(|source| {
            BootFileError::Copy { what, path: path.clone(), source: Box::new(source) }
        })?;
    }
    Ok(())
}

/// Refuses files that the user names and that a reset could not boot: nothing else would say so until then.
pub(crate) fn check_named(named: &BootFiles, config: &MachineConfig) -> Result<(), BootFileError> {
    let BootFiles { kernel, initrd } = named;
    if let (Some(path), None) = (initrd, &config.initrd) {
        return Err(BootFileError::NoInitrd { path: path.clone() });
    }
    let kernel = (KERNEL.0, kernel, config.kernel_digest);
    for (what, path, digest) in [kernel, (INITRD.0, initrd, config.initrd_digest)] {
        let Some(path) = path else { continue };
        let mut file = open(what, path)?;
        // An older snapshot does not know which file it was: then the user's word counts.
        let Some(expected) = digest else { continue };
        let found = digest_boot_file(&mut file).map_err(|source| BootFileError::Open {
            what,
            path: path.clone(),
            source,
        })?;
        if found != expected {
            return Err(BootFileError::Another { what, path: path.clone(), expected, found });
        }
    }
    Ok(())
}

/// Says in `config` where the restored machine boots again from: what the user named, else what is in the
/// snapshot, else where it was. Returns why it cannot, as far as that shows without reading the files; a boot
/// checks their digests.
pub(crate) fn place(
    snapshot: &Snapshot,
    named: &BootFiles,
    config: &mut MachineConfig,
) -> Result<(), BootFileError> {
    let found =
        find(KERNEL, snapshot, named.kernel.as_deref(), &config.kernel, config.kernel_digest);
    let (kernel, mut usable) = found;
    config.kernel = kernel;
    if let Some(path) = config.initrd.take() {
        let named = named.initrd.as_deref();
        let (initrd, found) = find(INITRD, snapshot, named, &path, config.initrd_digest);
        config.initrd = Some(initrd);
        usable = usable.and(found);
    }
    match config.on_reset {
        OnReset::Restart => usable.and_then(|()| {
            let initrd = config.initrd.as_deref().map(|path| open(INITRD.0, path));
            open(KERNEL.0, &config.kernel).and(initrd.transpose()).map(drop)
        }),
        // Paths out of a snapshot are not even looked at where no reset will boot anything.
        OnReset::Exit => usable,
    }
}

fn find(
    (what, name): (&'static str, &'static str),
    snapshot: &Snapshot,
    named: Option<&Path>,
    hint: &Path,
    digest: Option<Digest>,
) -> (PathBuf, Result<(), BootFileError>) {
    let path = match named {
        Some(named) => named.to_owned(),
        None if snapshot.manifest().file(name).is_ok() => snapshot.path().join(name),
        None => hint.to_owned(),
    };
    // A path out of a snapshot is a hint. Without a digest nothing proves that it is the right file, and the
    // guest must not be able to have another one booted.
    let usable = match (named, digest) {
        (None, None) => Err(BootFileError::Unknown { what }),
        _ => Ok(()),
    };
    (path, usable)
}

fn open(what: &'static str, path: &Path) -> Result<File, BootFileError> {
    open::open(path, Kind::File, Access::Read).map_err(|error| BootFileError::Open {
        what,
        path: path.to_owned(),
        source: error.into(),
    })
}
