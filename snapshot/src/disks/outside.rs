//! Disks outside the snapshot: which files of this host a snapshot may have opened.
//!
//! A snapshot comes from others, and the path of a disk in it is theirs: with it a guest could be given any
//! file of the user's, and the digest that would guard it lies in the same snapshot. So such a path counts for
//! nothing, until the user names the file for the disk, or allows the place where it lies.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
};
use squib_devices::virtio::block::BlockError;
use squib_formats::{
    manifest::DiskRecord,
    open::{self, Access, Kind, OpenError},
};

use super::{CheckError, DiskError};

/// A disk outside the snapshot, open.
pub(crate) struct Outside {
    pub(crate) file: File,
    /// Where it lies: as the user has it, or without symbolic links if only its place is allowed.
    pub(crate) path: PathBuf,
}

impl Outside {
    /// Opens the disk of `record` as its machine will: at its place in `named`; or where the record says,
    /// which must then lie at or below one of the paths `allowed`.
    ///
    /// What is compared is the real path, component by component; and what is opened is what was compared,
    /// also if a part of the path becomes a symbolic link meanwhile.
    pub(crate) fn open(
        record: &DiskRecord,
        named: &BTreeMap<String, PathBuf>,
        allowed: &[PathBuf],
    ) -> Result<Self, CheckError> {
        let access = if record.read_only { Access::Read } else { Access::Write };
        let (path, opened) = match named.get(&record.id) {
            Some(path) => (path.clone(), open::open(path, Kind::Disk, access)),
            None => {
                let (place, rest) = resolve(record, allowed)?;
                let opened = open_below(&place, &rest, access);
                let path = if rest.as_os_str().is_empty() { place } else { place.join(rest) };
                (path, opened)
            }
        };
        match opened {
            Ok(file) => Ok(Self { file, path }),
            Err(OpenError::Kind(_)) => Err(BlockError::NotADisk { path }.into()),
            Err(OpenError::Io(source)) => {
                let id = record.id.clone();
                Err(DiskError::Io { id, path, action: "open", source }.into())
            }
        }
    }
}

/// The allowed place in which the disk lies, and the way on from there; both without symbolic links.
fn resolve(record: &DiskRecord, allowed: &[PathBuf]) -> Result<(PathBuf, PathBuf), DiskError> {
    let path = Path::new(&record.path);
    let refused = || DiskError::NotAllowed { id: record.id.clone(), path: path.to_owned() };
    // A relative path says nothing: the working directory of today has nothing to do with it. And without
    // an allowed place the path is not even looked at, which for some file systems is more than looking.
    if !path.is_absolute() || allowed.is_empty() {
        return Err(refused());
    }
    let failed = |source| {
        let (id, path) = (record.id.clone(), path.to_owned());
        DiskError::Io { id, path, action: "open", source }
    };
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        // What is not there is told only of a place that is allowed.
        Err(error) => {
            let plain = path.components().all(|part| !matches!(part, Component::ParentDir));
            let below = plain && allowed.iter().any(|place| path.starts_with(place));
            return Err(if below { failed(error) } else { refused() });
        }
    };
    for place in allowed {
        // A place that is not there allows nothing.
        if let Ok(place) = fs::canonicalize(place)
            && let Ok(rest) = real.strip_prefix(&place)
        {
            let rest = rest.to_owned();
            return Ok((place, rest));
        }
    }
    Err(refused())
}

/// Opens `rest` below `place` without following a symbolic link.
fn open_below(place: &Path, rest: &Path, access: Access) -> Result<File, OpenError> {
    let Some(name) = rest.file_name() else {
        return open::open_at(CWD, place, Kind::Disk, access, OFlags::NOFOLLOW);
    };
    let mut dir = open_dir(CWD, place)?;
    for part in rest.parent().into_iter().flat_map(Path::components) {
        dir = open_dir(&dir, Path::new(part.as_os_str()))?;
    }
    // As with a path, an open of a device that is no disk is not even tried.
    let stat = rustix::fs::statat(&dir, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .map_err(io::Error::from)?;
    match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        kind @ rustix::fs::FileType::CharacterDevice => Err(OpenError::Kind(kind)),
        _ => open::open_at(&dir, name, Kind::Disk, access, OFlags::NOFOLLOW),
    }
}

fn open_dir(dir: impl std::os::fd::AsFd, path: &Path) -> io::Result<OwnedFd> {
    // On Linux a directory that may be passed but not read will do.
    #[cfg(target_os = "linux")]
    let flags = OFlags::PATH;
    #[cfg(not(target_os = "linux"))]
    let flags = OFlags::RDONLY;
    let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, path, flags, Mode::empty()) {
        // A link where there was none when the path was resolved.
        Err(Errno::LOOP) => Err(io::ErrorKind::NotADirectory.into()),
        dir => Ok(dir?),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use squib_formats::{digest::Digest, manifest::DiskStorage};

    use super::*;

    struct Place {
        _dir: tempfile::TempDir,
        root: PathBuf,
    }

    impl Place {
        /// `allowed/a/disk`, `allowed-not/disk`, `secret`, and links from one to the other.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root = fs::canonicalize(dir.path()).unwrap();
            for place in ["allowed/a", "allowed-not"] {
                fs::create_dir_all(root.join(place)).unwrap();
                fs::write(root.join(place).join("disk"), place).unwrap();
            }
            fs::write(root.join("secret"), "secret").unwrap();
            symlink(root.join("secret"), root.join("allowed/file-out")).unwrap();
            symlink("../allowed-not", root.join("allowed/dir-out")).unwrap();
            symlink(root.join("allowed/a/disk"), root.join("file-in")).unwrap();
            symlink("allowed", root.join("alias")).unwrap();
            assert!(
                std::process::Command::new("mkfifo")
                    .arg(root.join("allowed/fifo"))
                    .status()
                    .unwrap()
                    .success()
            );
            Self { _dir: dir, root }
        }

        fn open(&self, path: &Path, allowed: &[&str]) -> Result<Outside, CheckError> {
            let record = DiskRecord {
                id: "vda".into(),
                path: path.to_str().unwrap().into(),
                size: 4,
                read_only: false,
                storage: DiskStorage::Reference(squib_formats::image::Scheme::Runs),
                digest: Digest([0; 32]),
            };
            let allowed: Vec<_> = allowed.iter().map(|place| self.root.join(place)).collect();
            Outside::open(&record, &BTreeMap::new(), &allowed)
        }

        fn refused(&self, path: &str, allowed: &[&str]) -> bool {
            let found = self.open(&self.root.join(path), allowed);
            matches!(found, Err(CheckError::Disk(DiskError::NotAllowed { .. })))
        }
    }

    #[test]
    fn only_what_really_lies_at_or_below_an_allowed_place_is_opened() {
        let place = Place::new();
        for (path, allowed) in [
            ("allowed/a/disk", "allowed"),
            ("allowed/a/disk", "allowed/a/"),
            ("allowed/a/disk", "allowed/a/disk"),
            ("allowed/a/disk", "alias"),
            ("alias/a/disk", "allowed"),
            ("file-in", "allowed"),
            ("allowed-not/../allowed/a/disk", "allowed"),
        ] {
            let found = place.open(&place.root.join(path), &[allowed]).map_err(|e| e.to_string());
            assert_eq!(found.unwrap().path, place.root.join("allowed/a/disk"), "{path}, {allowed}");
        }
        for (path, allowed) in [
            ("allowed/a/disk", "nowhere"),
            ("allowed/a/disk", "allowed/a/disk/"),
            ("secret", "allowed"),
            ("allowed-not/disk", "allowed"),
            ("allowed/../secret", "allowed"),
            ("allowed/a/../../secret", "allowed"),
            ("allowed/file-out", "allowed"),
            ("allowed/dir-out/disk", "allowed"),
            ("allowed/a/disk", "allowed/a/d"),
            ("missing", "allowed"),
            ("allowed/../missing", "allowed"),
        ] {
            let refused = place.refused(path, &[allowed]);
            // A slash behind a file is an error of the system's, and then the place allows nothing.
            assert!(refused, "{path}, {allowed}");
        }
        assert!(place.refused("allowed/a/disk", &[]));
    }

    #[test]
    fn a_relative_path_is_refused_whatever_is_allowed() {
        let place = Place::new();
        for path in ["disk", "./disk", "../secret", "", "proc/self/mem"] {
            let found = place.open(Path::new(path), &["", "/"]);
            assert!(matches!(found, Err(CheckError::Disk(DiskError::NotAllowed { .. }))), "{path}");
        }
    }

    #[test]
    fn what_is_missing_or_no_disk_below_an_allowed_place_is_told() {
        let place = Place::new();
        let found = place.open(&place.root.join("allowed/missing"), &["allowed"]);
        assert!(matches!(found, Err(CheckError::Disk(DiskError::Io { .. }))));
        for path in ["allowed/fifo", "allowed/a"] {
            let found = place.open(&place.root.join(path), &["allowed"]);
            let told = match found {
                Err(CheckError::Block(BlockError::NotADisk { .. })) => true,
                // Directories cannot be opened for writing.
                Err(CheckError::Disk(DiskError::Io { .. })) => path == "allowed/a",
                _ => false,
            };
            assert!(told, "{path}");
        }
        assert!(place.open(Path::new("/dev/null"), &["/dev"]).is_err());
    }

    #[test]
    fn a_part_that_becomes_a_link_after_the_check_is_not_followed() {
        let place = Place::new();
        let allowed = place.root.join("allowed");
        for rest in ["file-out", "dir-out/disk"] {
            let opened = open_below(&allowed, Path::new(rest), Access::Read);
            assert!(matches!(opened, Err(OpenError::Io(_))), "{rest}: {opened:?}");
        }
        open_below(&allowed, Path::new("a/disk"), Access::Read).unwrap();
        // The place itself, too.
        open_below(&place.root.join("file-in"), Path::new(""), Access::Read).unwrap_err();
    }
}
