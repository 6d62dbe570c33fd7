//! Where differences were written, by the id of their parent.
//!
//! ```text
//! STATE/children/lock        held while a list is read and written
//! STATE/children/PARENT_ID   one path a line, each a JSON string
//! ```
//!
//! The lists are advice: a path counts only if a difference to that parent lies there, and what does not is
//! dropped from the list. A difference that was moved or copied is not in them.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use squib_formats::{digest::Digest, snapshot_dir::Snapshot};

/// How often the lock is tried, and how long between two tries: a second in all. Who holds it reads a few files.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The lists in a state folder.
#[derive(Debug, Clone)]
pub struct Children {
    dir: PathBuf,
}

impl Children {
    /// The lists in `dir`, which exists.
    pub(crate) fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Takes note that a difference to `parent` lies at `path`.
    pub fn record(&self, parent: Digest, path: &Path) -> io::Result<()> {
        let path = fs::canonicalize(path)?;
        let Some(text) = path.to_str() else {
            return Err(io::Error::other(format!("{} is not UTF-8", path.display())));
        };
        let _lock = self.lock()?;
        if self.read(parent).contains(&path) {
            return Ok(());
        }
        let mut line = serde_json::to_vec(text)?;
        line.push(b'\n');
        File::options().append(true).create(true).open(self.list(parent))?.write_all(&line)
    }

    /// The places of differences to `parent` that are still there.
    pub fn of(&self, parent: Digest) -> Vec<PathBuf> {
        // A list that cannot be locked or written is still worth reading.
        let lock = self.lock();
        let all = self.read(parent);
        let is_child = |path: &PathBuf| {
            Snapshot::open(path).is_ok_and(|found| found.manifest().parent == Some(parent))
        };
        let there: Vec<PathBuf> = all.iter().filter(|path| is_child(path)).cloned().collect();
        if lock.is_ok()
            && there.len() < all.len()
            && let Err(error) = self.write(parent, &there)
        {
            tracing::debug!("{}: {error}", self.list(parent).display());
        }
        there
    }

    /// The places of all that builds on `ancestor`, directly or through others, as far as the lists tell.
    pub fn below(&self, ancestor: Digest) -> Vec<PathBuf> {
        let (mut found, mut met, mut next) = (Vec::new(), HashSet::new(), vec![ancestor]);
        while let Some(id) = next.pop() {
            if met.insert(id) {
                let children = self.of(id);
                next.extend(
                    children.iter().filter_map(|path| Some(Snapshot::open(path).ok()?.id())),
                );
                found.extend(children);
            }
        }
        found
    }

    fn list(&self, parent: Digest) -> PathBuf {
        self.dir.join(parent.to_string())
    }

    fn read(&self, parent: Digest) -> Vec<PathBuf> {
        let text = fs::read_to_string(self.list(parent)).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str::<PathBuf>(line).ok()).collect()
    }

    fn write(&self, parent: Digest, paths: &[PathBuf]) -> io::Result<()> {
        let list = self.list(parent);
        if paths.is_empty() {
            return fs::remove_file(list);
        }
        let mut text = Vec::new();
        for path in paths {
            serde_json::to_writer(&mut text, path)?;
            text.push(b'\n');
        }
        let staged = list.with_extension("new");
        fs::write(&staged, text)?;
        fs::rename(staged, list)
    }

    fn lock(&self) -> io::Result<File> {
        let path = self.dir.join("lock");
        let file = File::options().write(true).create(true).truncate(false).open(&path)?;
        // A process that was stopped while it held it must not stop others.
        for _ in 0..LOCK_TRIES {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => thread::sleep(LOCK_PAUSE),
                done => return Ok(done.map(|()| file)?),
            }
        }
        let held = format!("another process holds {}", path.display());
        Err(io::Error::new(io::ErrorKind::TimedOut, held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_where_no_such_difference_lies_is_dropped_from_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let children = Children::at(dir.path().to_owned());
        let parent = Digest::of(b"parent");
        assert!(children.of(parent).is_empty());
        let place = dir.path().join("a\nb");
        fs::create_dir(&place).unwrap();
        children.record(parent, &place).unwrap();
        children.record(parent, &place).unwrap();
        assert_eq!(children.read(parent).len(), 1);
        assert_eq!(children.read(parent), [fs::canonicalize(&place).unwrap()]);
        assert!(children.below(parent).is_empty());
        assert!(!children.list(parent).exists());
    }

    #[test]
    fn a_damaged_list_is_no_list() {
        let dir = tempfile::tempdir().unwrap();
        let children = Children::at(dir.path().to_owned());
        let parent = Digest::of(b"parent");
        fs::write(children.list(parent), b"\"/a\"\n{\n\xff").unwrap();
        assert!(children.of(parent).is_empty());
    }
}
