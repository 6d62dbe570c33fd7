//! Removing a snapshot, unless others build on it.
//!
//! A parent does not know its children. They are looked for beside it and in the places that the caller
//! names; one that lies elsewhere is not found.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags},
    io::Errno,
};
use serde::Serialize;
use squib_formats::{
    digest::Digest, error::FormatError, layer::remove_files, snapshot_dir::Snapshot, storage,
};

/// A snapshot that needs another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dependent {
    /// Where it lies.
    pub path: PathBuf,
    /// Its id.
    pub id: Digest,
    /// Its parent's id.
    pub parent: Digest,
    /// Snapshots from it to the one that it needs: 1 for a difference to that one.
    pub distance: usize,
}

/// What was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// The snapshot's id; `None` if this build could not read its manifest.
    pub id: Option<Digest>,
    /// Bytes of its files.
    pub bytes: u64,
    /// Files that did not belong to it and are gone with it.
    pub unlisted: Vec<String>,
    /// Snapshots that needed it and cannot be restored any more, unless there is a copy of it.
    pub dependents: Vec<Dependent>,
}

/// Why a snapshot was not removed. Nothing has changed, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// There is no snapshot.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Others build on it.
    #[error("{}: {}", .path.display(), needed(.dependents))]
    Needed {
        /// The snapshot.
        path: PathBuf,
        /// Those that need it, the closest first.
        dependents: Vec<Dependent>,
    },
    /// A difference to it is being written just now.
    #[error("{}: a difference to it is being written; try again when that is done", .path.display())]
    InUse {
        /// The snapshot.
        path: PathBuf,
    },
    /// The directory has files that do not belong to the snapshot.
    #[error(
        "{}: {} in it that do not belong to the snapshot: {}",
        .path.display(), .names.len(), .names.join(", ")
    )]
    Unlisted {
        /// The snapshot.
        path: PathBuf,
        /// The files' names.
        names: Vec<String>,
    },
    /// It is a snapshot, but what is in it and what builds on it cannot be told.
    #[error("{}: what is in it cannot be told: {why}", .path.display())]
    Unreadable {
        /// The snapshot.
        path: PathBuf,
        /// What is wrong with its manifest.
        why: Box<FormatError>,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The snapshot is gone from its place, but some of its files are still there.
    #[error("{}: removed but for {}: {source}", .path.display(), .rest.display())]
    Rest {
        /// The snapshot.
        path: PathBuf,
        /// What is left of it.
        rest: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// The snapshots that build on the one at `path`, directly or through others, the closest first. They are
/// looked for beside it and in `places`, each of which is a snapshot or a directory of snapshots.
pub fn dependents(path: &Path, places: &[PathBuf]) -> Result<Vec<Dependent>, FormatError> {
    let snapshot = Snapshot::open(path)?;
    let own = canonical(path)?;
    let mut found = Found::default();
    if let Some(beside) = own.parent() {
        found.list(beside);
    }
    places.iter().for_each(|place| found.place(place));
    found.differences.remove(&own);
    Ok(found.building_on(snapshot.id()))
}

/// Removes the snapshot at `path`, once [`dependents`] has found none. `force` removes it although others need
/// it, although the directory has other files in it, and although its manifest cannot be read; never what is
/// no snapshot.
///
/// The directory leaves its place in one step, so that nobody sees half a snapshot; what a killed removal
/// leaves has a hidden name, which the next writer of a snapshot of that name removes.
pub fn remove(path: &Path, places: &[PathBuf], force: bool) -> Result<Removed, RemoveError> {
    let is_link = fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    if is_link {
        let why = "it is a symbolic link; name the directory itself".to_owned();
        return Err(FormatError::NotASnapshot { path: path.to_owned(), why }.into());
    }
    // What has no header of any version is not removed, whatever the caller says.
    Snapshot::peek(path)?;
    let path = &canonical(path)?;
    // Before the dependents are looked for: one that was finished since then has let go of it by now.
    let alone = hold(path, FlockOperation::NonBlockingLockExclusive);
    if !force && matches!(alone, Err(Errno::WOULDBLOCK)) {
        return Err(RemoveError::InUse { path: path.clone() });
    }
    let mut own = Vec::new();
    let (id, unlisted, dependents) = match Snapshot::open(path) {
        Ok(snapshot) => {
            own.extend(snapshot.own_names().map(str::to_owned));
            (Some(snapshot.id()), snapshot.unlisted()?, dependents(path, places)?)
        }
        Err(_) if force => (None, Vec::new(), Vec::new()),
        Err(error) => {
            let why = Box::new(error);
            return Err(RemoveError::Unreadable { path: path.clone(), why });
        }
    };
    if !force && !dependents.is_empty() {
        return Err(RemoveError::Needed { path: path.clone(), dependents });
    }
    if !force && !unlisted.is_empty() {
        return Err(RemoveError::Unlisted { path: path.clone(), names: unlisted });
    }
    let bytes = bytes_in(path);
    take_away(path, if force { None } else { Some(&own) })?;
    drop(alone);
    Ok(Removed { id, bytes, unlisted, dependents })
}

/// Keeps the snapshot at `path` from being removed, as long as the answer lives, while one that builds on it is
/// written. A file system that cannot lock does without.
pub(crate) fn keep(path: &Path) -> Option<OwnedFd> {
    hold(path, FlockOperation::NonBlockingLockShared).ok()
}

fn hold(path: &Path, how: FlockOperation) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::fs::flock(&dir, how)?;
    Ok(dir)
}

/// What a refusal says of the snapshots that are in the way.
pub fn needed(dependents: &[Dependent]) -> String {
    let one = |dependent: &Dependent| {
        let through = if dependent.distance > 1 { " (through others)" } else { "" };
        format!("{}{through}", dependent.path.display())
    };
    let names: Vec<String> = dependents.iter().map(one).collect();
    format!("other snapshots build on it: {}", names.join(", "))
}

/// Differences met, by their real path: their id and their parent's.
#[derive(Default)]
struct Found {
    differences: HashMap<PathBuf, (Digest, Digest)>,
}

impl Found {
    fn place(&mut self, place: &Path) {
        if !self.look(place) {
            self.list(place);
        }
    }

    /// Takes note of the snapshot at `path`; false if there is none that this build can read.
    fn look(&mut self, path: &Path) -> bool {
        let Ok(path) = fs::canonicalize(path) else { return false };
        let Ok(snapshot) = Snapshot::open(&path) else { return false };
        if let Some(parent) = snapshot.manifest().parent {
            self.differences.insert(path, (snapshot.id(), parent));
        }
        true
    }

    /// Takes note of the snapshots in the directory `dir`.
    fn list(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            // What is being written, or was left by a writer that was killed, is no snapshot.
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.look(&entry.path());
            }
        }
    }

    fn building_on(&self, id: Digest) -> Vec<Dependent> {
        let mut all = Vec::new();
        let mut reached = HashSet::from([id]);
        let mut last = vec![id];
        let mut distance = 0;
        while !last.is_empty() {
            distance += 1;
            let mut next: Vec<Dependent> = self
                .differences
                .iter()
                .filter(|(_, (_, parent))| last.contains(parent))
                .map(|(path, (id, parent))| Dependent {
                    path: path.clone(),
                    id: *id,
                    parent: *parent,
                    distance,
                })
                .collect();
            next.sort_by(|a, b| a.path.cmp(&b.path));
            last = next.iter().map(|d| d.id).filter(|id| reached.insert(*id)).collect();
            all.extend(next);
        }
        all
    }
}

/// Renames the snapshot away, makes that durable, and deletes it: the files `own` and nothing else, or all. What
/// is not deleted gets its place back.
fn take_away(path: &Path, own: Option<&[String]>) -> Result<(), RemoveError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let io = |action| {
        let path = path.to_owned();
        move |source| RemoveError::Io { path, action, source }
    };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io("remove")(io::ErrorKind::InvalidInput.into()));
    };
    // The name of a writer's staging directory, which later writers remove when nobody holds it.
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    hidden.push(format!(".partial-{}-removed-{count}", std::process::id()));
    let rest = parent.join(hidden);
    fs::rename(path, &rest).map_err(io("rename"))?;
    File::open(parent).and_then(storage::sync).map_err(io("sync the place of"))?;
    let removed = match own {
        None => fs::remove_dir_all(&rest),
        Some(own) => match remove_files(&rest, own.iter().map(String::as_str)) {
            Ok(true) => Ok(()),
            // Something has come into it since it was looked at.
            Ok(false) => {
                let back = rustix::fs::renameat_with(CWD, &rest, CWD, path, RenameFlags::NOREPLACE);
                let rest = if back.is_ok() { path.to_owned() } else { rest };
                let source = io::ErrorKind::DirectoryNotEmpty.into();
                return Err(RemoveError::Rest { path: path.to_owned(), rest, source });
            }
            Err(error) => Err(error),
        },
    };
    match removed {
        // Somebody else has swept it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(RemoveError::Rest { path: path.to_owned(), rest, source }),
        Ok(()) => Ok(()),
    }
}

fn bytes_in(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|found| found.size()).sum()
}

fn canonical(path: &Path) -> Result<PathBuf, FormatError> {
    fs::canonicalize(path)
        .map_err(|error| FormatError::io(path.display().to_string(), "open", error))
}
