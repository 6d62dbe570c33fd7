//! Finding the snapshots that a difference builds on.
//!
//! A difference names its parent by id. Where the parent lies is not part of that: the hint in the manifest,
//! the places that the caller gives, and the neighbours of the snapshot are looked at, and only a snapshot of
//! the right id counts. Since an id commits to the parent's own id, a chain cannot be a cycle.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use crate::{digest::Digest, error::FormatError, snapshot_dir::Snapshot};

/// Most snapshots in a chain, the full one at its end included.
pub const MAX_CHAIN: usize = 64;

impl Snapshot {
    /// Opens the snapshot at `path` and all that it builds on, so that its images can be read. A parent is
    /// looked for in each of `places`, which is a snapshot or a directory of snapshots; where the manifest
    /// says that it was; and beside the snapshots that are known already.
    pub fn open_chain(path: &Path, places: &[PathBuf]) -> Result<Self, FormatError> {
        let mut links = vec![Self::open(path)?];
        let mut finder = Finder::default();
        while let Some(last) = links.last()
            && let Some(id) = last.manifest().parent
        {
            if links.len() >= MAX_CHAIN {
                return Err(FormatError::ChainTooLong { path: path.to_owned() });
            }
            let parent = finder.find(last, id, places)?;
            links.push(parent);
        }
        let mut chain: Option<Self> = None;
        while let Some(mut link) = links.pop() {
            link.parent = chain.map(Box::new);
            chain = Some(link);
        }
        // `links` had the snapshot itself.
        chain.ok_or_else(|| FormatError::ChainTooLong { path: path.to_owned() })
    }

    /// The snapshot and everything that it builds on, as far as it was looked for, the full one last.
    pub fn chain(&self) -> impl Iterator<Item = &Snapshot> {
        std::iter::successors(Some(self), |snapshot| snapshot.parent())
    }
}

/// The snapshots met while looking for parents. Every directory is read once, however long the chain.
#[derive(Default)]
struct Finder {
    known: HashMap<Digest, PathBuf>,
    listed: HashSet<PathBuf>,
    looked: Vec<String>,
}

impl Finder {
    fn find(
        &mut self,
        child: &Snapshot,
        id: Digest,
        places: &[PathBuf],
    ) -> Result<Snapshot, FormatError> {
        self.looked.clear();
        let hint = child.manifest().parent_hint.as_deref().map(Path::new);
        let own = fs::canonicalize(child.path()).ok();
        // A hint that is relative says where the parent is from the child.
        let hint = match (hint, &own) {
            (Some(hint), Some(own)) => Some(own.join(hint)),
            _ => None,
        };
        let beside = own.as_deref().and_then(Path::parent);
        for place in places {
            if let Some(found) = self.look(place, id) {
                return Ok(found);
            }
            if let Some(found) = self.list(place, id) {
                return Ok(found);
            }
        }
        if let Some(found) = hint.and_then(|hint| self.look(&hint, id)) {
            return Ok(found);
        }
        if let Some(found) = beside.and_then(|dir| self.list(dir, id)) {
            return Ok(found);
        }
        let known = self.known.get(&id).cloned();
        known.and_then(|path| self.look(&path, id)).ok_or_else(|| FormatError::MissingParent {
            path: child.path().to_owned(),
            id,
            looked: std::mem::take(&mut self.looked),
        })
    }

    /// The snapshot at `place`, if it is the one of that id.
    fn look(&mut self, place: &Path, id: Digest) -> Option<Snapshot> {
        let found = fs::canonicalize(place)
            .map_err(|error| FormatError::io(place.display().to_string(), "open", error))
            .and_then(|place| Snapshot::open(&place));
        match found {
            Ok(found) if found.id() == id => return Some(found),
            Ok(found) => {
                self.looked.push(format!("{} is {}", place.display(), found.id()));
                self.known.insert(found.id(), found.path().to_owned());
            }
            Err(error) => self.looked.push(error.to_string()),
        }
        None
    }

    /// The snapshot of that id in the directory `dir`.
    fn list(&mut self, dir: &Path, id: Digest) -> Option<Snapshot> {
        let dir = fs::canonicalize(dir).ok()?;
        if self.listed.insert(dir.clone()) {
            for entry in fs::read_dir(&dir).ok()?.flatten() {
                // What is being written, or was left by a writer that was killed, is no snapshot yet.
                let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
                if !hidden
                    && let Ok(path) = fs::canonicalize(entry.path())
                    && let Ok(found) = Snapshot::open(&path)
                {
                    self.known.insert(found.id(), path);
                }
            }
        }
        let path = self.known.get(&id)?.clone();
        Snapshot::open(&path).ok().filter(|found| found.id() == id)
    }
}
