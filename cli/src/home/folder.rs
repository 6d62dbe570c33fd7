//! Folders in which secrets of guests lie: the user's own, and closed to others. A folder that is there already is
//! never changed: that it is open may be what its user wants of it.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

/// What other users may do in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Others {
    /// List and read, which is harmless since what is in it has modes of its own.
    MayRead,
    /// Nothing.
    MayNothing,
}

/// Why a folder is not used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It is another user's.
    #[error("{} belongs to user {owner}, not to you (user {user})", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The user of this process.
        user: u32,
    },
    /// Others can do in it what they must not.
    #[error(
        "{} is open to others (mode {mode:04o}), who could {harm}: close it with `chmod {change} {}`",
        path.display(), path.display()
    )]
    Shared {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// What they could do.
        harm: &'static str,
        /// What takes it from them.
        change: &'static str,
    },
    /// Something else lies in its place.
    #[error("{} is not a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be made or looked at.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes `dir`, and what is missing above it, with mode 0700; or checks the one that is there, or to which a
/// link there leads.
pub(crate) fn make(dir: &Path, others: Others) -> Result<(), FolderError> {
    if check(dir, others)? {
        return Ok(());
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| FolderError::Io { path: dir.to_owned(), source })?;
    // Another process, or another user, may have been faster.
    check(dir, others).map(drop)
}

/// Checks `dir`; false if there is none.
pub(crate) fn check(dir: &Path, others: Others) -> Result<bool, FolderError> {
    let path = dir.to_owned();
    let meta = match fs::metadata(dir) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(FolderError::Io { path, source }),
    };
    if !meta.is_dir() {
        return Err(FolderError::NotADirectory { path });
    }
    let (owner, user) = (meta.uid(), rustix::process::geteuid().as_raw());
    if owner != user {
        return Err(FolderError::Foreign { path, owner, user });
    }
    let (closed, harm, change) = match others {
        Others::MayRead => (0o022, "put files into it", "go-w"),
        Others::MayNothing => (0o077, "get at what guests have", "700"),
    };
    let mode = meta.mode() & 0o7777;
    match mode & closed {
        0 => Ok(true),
        _ => Err(FolderError::Shared { path, mode, harm, change }),
    }
}

/// The nearest folder above `dir`, or `dir` itself, that is there.
pub(crate) fn nearest(dir: &Path) -> &Path {
    let mut above = dir.ancestors().filter(|path| !path.as_os_str().is_empty());
    above.find(|path| path.exists()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_closed_with_what_is_missing_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        assert!(!check(&inner, Others::MayNothing).unwrap());
        assert_eq!(nearest(&inner), dir.path());
        make(&inner, Others::MayNothing).unwrap();
        for path in [&inner, inner.parent().unwrap()] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o700);
        }
        assert_eq!(nearest(&inner), inner);
    }

    #[test]
    fn a_file_or_a_link_to_nothing_is_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = make(&file, Others::MayRead).unwrap_err();
        assert!(matches!(error, FolderError::NotADirectory { .. }), "{error}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nothing", &link).unwrap();
        assert!(matches!(make(&link, Others::MayRead), Err(FolderError::Io { .. })));
    }

    #[test]
    fn a_folder_of_another_user_is_refused() {
        // The root of the file system belongs to the superuser, who can give a folder away.
        let dir = tempfile::tempdir().unwrap();
        let foreign = if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(dir.path(), Some(1), None).unwrap();
            dir.path()
        } else {
            Path::new("/")
        };
        let error = make(foreign, Others::MayRead).unwrap_err();
        assert!(matches!(error, FolderError::Foreign { .. }), "{error}");
    }
}
