//! Writing a snapshot so that it is there whole or not at all.
//!
//! Everything is written into a staging directory beside the place of the snapshot; at the end every
//! file is synced, then the directory takes its place in one rename and the parent is synced. A staging
//! directory is locked while its writer lives; one that a killed writer left behind is removed by the
//! next writer of a snapshot of the same name.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags},
    io::Errno,
};

use crate::{
    digest::Digest,
    error::FormatError,
    header::{self, Header},
    layer::{Layer, Real, remove_files},
    manifest::{self, FileRecord, Manifest},
    names,
    snapshot_dir::Snapshot,
    storage,
};

/// Bytes that are gathered before a write; a quarter of that is written as it comes.
const BUFFER: usize = 1 << 20;
/// Bytes after which the storage is set to work on a file that will be synced.
const WRITEBACK: u64 = 8 << 20;

/// What to do with a snapshot that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Leave it, and refuse.
    Refuse,
    /// Replace it in one step once the new one is safe. Only a snapshot in whose directory nothing else is, or
    /// an empty directory is replaced. What comes into it meanwhile is kept, beside it.
    Replace,
}

/// What is on the storage itself before a snapshot counts as published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// Everything: the snapshot survives a loss of power.
    #[default]
    Full,
    /// Nothing is waited for. After a loss of power the snapshot may be there and damaged, which
    /// its digests show.
    None,
}

/// A snapshot being written. Dropped without [`publish`](Self::publish) it leaves nothing behind.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    parent: PathBuf,
    path: PathBuf,
    existing: Existing,
    layer: Arc<dyn Layer>,
    /// The staging directory, locked.
    dir: OwnedFd,
    files: Vec<(FileRecord, File)>,
    durability: Durability,
    /// Bytes that may still be written, if there is a limit.
    room: Option<Arc<AtomicU64>>,
    published: bool,
}

impl Staging {
    /// Begins a snapshot that will lie at `target`, in a directory that exists.
    pub fn new(target: &Path, existing: Existing) -> Result<Self, FormatError> {
        Self::begin(target, existing, Arc::new(Real))
    }

    /// As [`new`](Self::new), with every step through `layer`.
    #[cfg(feature = "faults")]
    pub fn with_layer(
        target: &Path,
        existing: Existing,
        layer: Arc<dyn Layer>,
    ) -> Result<Self, FormatError> {
        Self::begin(target, existing, layer)
    }

    fn begin(
        target: &Path,
        existing: Existing,
        layer: Arc<dyn Layer>,
    ) -> Result<Self, FormatError> {
        let Some(name) = target.file_name() else {
            return Err(FormatError::Name { name: target.display().to_string() });
        };
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        // The path without a trailing slash, with which a rename means something else.
        let target = parent.join(name);
        check_place(&target, existing)?;
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".partial-");
        sweep(&parent, &prefix);
        let (path, dir) = make_locked(&*layer, &parent, &prefix)?;
        Ok(Self {
            target,
            parent,
            path,
            existing,
            layer,
            dir,
            files: Vec::new(),
            durability: Durability::Full,
            room: None,
            published: false,
        })
    }

    /// Sets what [`publish`](Self::publish) waits for.
    pub fn durability(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// Lets the snapshot take at most `bytes`; more is answered as a full disk is. Clones take nothing of it:
    /// what they share is there already.
    pub fn limit(&mut self, bytes: u64) {
        self.room = Some(Arc::new(AtomicU64::new(bytes)));
    }

    /// A new file in the snapshot.
    pub fn create(&self, name: &str) -> Result<StagedFile, FormatError> {
        names::check(name)?;
        let file = self.layer.create(self.dir.as_fd(), name);
        let file = file.map_err(|error| FormatError::io(name, "create", error))?;
        Ok(StagedFile {
            name: name.to_owned(),
            file,
            layer: self.layer.clone(),
            buffer: Vec::with_capacity(BUFFER),
            hasher: blake3::Hasher::new(),
            put: 0,
            room: self.room.clone(),
            writeback: (self.durability == Durability::Full).then_some(0),
        })
    }

    /// Ends a file: all bytes are with the operating system, and the file is in the manifest's list.
    pub fn finish(&mut self, file: StagedFile) -> Result<(), FormatError> {
        self.files.push(file.finish()?);
        Ok(())
    }

    /// A new file in the snapshot with the bytes that `file`, which has `size`, holds at this moment: a clone
    /// that shares what lies on the storage with it, made at once however large it is. What is written to
    /// `file` from then on does not show in it.
    ///
    /// `None`, and no file, if the file system cannot do that, the snapshot lies on another one, or `file` is
    /// of another size.
    pub fn clone_file(
        &self,
        name: &str,
        file: &File,
        size: u64,
    ) -> Result<Option<ClonedFile>, FormatError> {
        const UNABLE: [Errno; 6] = [
            Errno::OPNOTSUPP,
            Errno::NOTSUP,
            Errno::NOTTY,
            Errno::XDEV,
            Errno::INVAL,
            Errno::NOSYS,
        ];
        names::check(name)?;
        let io = |error| FormatError::io(name, "clone", error);
        let cloned = match self.layer.clone_file(self.dir.as_fd(), name, file) {
            Err(error) if Errno::from_io_error(&error).is_some_and(|e| UNABLE.contains(&e)) => {
                tracing::debug!("{name}: will be copied, it cannot be cloned: {error}");
                return Ok(None);
            }
            cloned => cloned.map_err(io)?,
        };
        let found = cloned.metadata().map_err(io)?.len();
        let cloned = ClonedFile { name: name.to_owned(), file: cloned, size };
        if found != size {
            self.discard(cloned)?;
            return Ok(None);
        }
        Ok(Some(cloned))
    }

    /// Removes a clone that is not wanted.
    pub fn discard(&self, clone: ClonedFile) -> Result<(), FormatError> {
        let removed = self.layer.unlink(self.dir.as_fd(), &clone.name);
        removed.map_err(|error| FormatError::io(clone.name, "remove", error))
    }

    /// Ends a clone that holds the raw bytes of the image with the image digest `digest`.
    pub(crate) fn finish_raw(&mut self, clone: ClonedFile, digest: Digest) {
        let ClonedFile { name, file, size } = clone;
        self.files.push((FileRecord { name, length: size, digest }, file));
    }

    /// Bytes of the files that are finished.
    pub fn stored(&self) -> u64 {
        self.files.iter().map(|(record, _)| record.length).sum()
    }

    /// Writes `manifest`, with the list of the finished files, and puts the snapshot in its place.
    /// Answers the snapshot's id.
    pub fn publish(mut self, mut manifest: Manifest) -> Result<Digest, FormatError> {
        manifest.files = self.files.iter().map(|(record, _)| record.clone()).collect();
        // What came from an older format becomes one of this.
        manifest.operation.get_or_insert_default();
        let body = manifest.encode()?;
        if body.len() as u64 > header::MAX_BODY {
            let why = format!("{} bytes, at most {} are allowed", body.len(), header::MAX_BODY);
            return Err(FormatError::field(manifest::FILE, "body length", why));
        }
        let header = Header::new(header::ARCH_AARCH64, header::MINOR, &body).encode();
        let mut file = self.create(manifest::FILE)?;
        file.write(&header)?;
        file.write(&body)?;
        let manifest = file.finish()?;
        self.files.push(manifest);
        self.sync()?;
        self.put_in_place()?;
        Ok(header::snapshot_id(&header, &body))
    }

    fn sync(&self) -> Result<(), FormatError> {
        if self.durability == Durability::None {
            return Ok(());
        }
        for (record, file) in &self.files {
            let synced = self.layer.sync(&record.name, file);
            synced.map_err(|error| FormatError::io(&record.name, "sync", error))?;
        }
        let synced = self.layer.sync_dir(&self.path);
        synced.map_err(|error| FormatError::io(self.path.display().to_string(), "sync", error))
    }

    fn put_in_place(&mut self) -> Result<(), FormatError> {
        let io = |action| {
            let name = self.target.display().to_string();
            move |error| FormatError::io(name, action, error)
        };
        let replaced = check_place(&self.target, self.existing)?;
        let replaces = replaced.is_some();
        let flags = match replaces {
            true => RenameFlags::EXCHANGE,
            false => RenameFlags::NOREPLACE,
        };
        let mut old = self.path.clone();
        let renamed = self.layer.rename(&self.path, &self.target, flags);
        match renamed.as_ref().map_err(Errno::from_io_error) {
            Ok(()) => {}
            Err(Some(Errno::EXIST | Errno::NOTEMPTY)) => {
                return Err(FormatError::Exists { path: self.target.clone() });
            }
            // The file system has neither flag: the best that is left is two renames.
            Err(Some(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP)) => {
                if replaces {
                    old.as_mut_os_string().push("-old");
                    self.rename(&self.target, &old).map_err(io("replace"))?;
                }
                if let Err(error) = self.rename(&self.path, &self.target) {
                    if replaces {
                        self.rename(&old, &self.target).map_err(io("put back"))?;
                    }
                    return Err(io("rename into place")(error));
                }
            }
            Err(_) => renamed.map_err(io("rename into place"))?,
        }
        if self.durability == Durability::Full
            && let Err(error) = self.layer.sync_dir(&self.parent)
        {
            // Nobody knows what a loss of power would leave: as after any error, all is as it was before.
            let undone = match replaces {
                true if old == self.path => {
                    self.layer.rename(&self.path, &self.target, RenameFlags::EXCHANGE)
                }
                true => self
                    .rename(&self.target, &self.path)
                    .and_then(|()| self.rename(&old, &self.target)),
                false => self.rename(&self.target, &self.path),
            };
            // What cannot be taken back must not be removed, whichever of the two it is.
            self.published = undone.is_err();
            undone.map_err(io("put back"))?;
            return Err(io("sync the place of")(error));
        }
        self.published = true;
        if let Some(names) = replaced {
            match self.layer.remove_old(&old, &names) {
                Ok(true) => {}
                Ok(false) => self.keep_rest(&old),
                // The new snapshot is safe; the next writer to this place sweeps what is left of the old.
                Err(error) => {
                    tracing::warn!(
                        "{}: cannot remove the replaced snapshot: {error}",
                        old.display()
                    );
                }
            }
        }
        Ok(())
    }

    /// Gives what came into the replaced directory at the last moment a place where it is found and not swept.
    fn keep_rest(&self, old: &Path) {
        for count in 0..100 {
            let mut kept = self.target.clone();
            kept.as_mut_os_string().push(format!(".rest-{}-{count}", std::process::id()));
            match fs::symlink_metadata(&kept) {
                Ok(_) => continue,
                Err(_) => match self.rename(old, &kept) {
                    Ok(()) => tracing::warn!(
                        "{}: what came into the replaced snapshot meanwhile is in {}",
                        self.target.display(),
                        kept.display()
                    ),
                    Err(error) => tracing::warn!("{}: cannot rename: {error}", old.display()),
                },
            }
            return;
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.layer.rename(from, to, RenameFlags::empty())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = self.layer.remove(&self.path)
        {
            tracing::warn!("{}: cannot remove: {error}", self.path.display());
        }
    }
}

/// A file of a snapshot being written that shares what lies on the storage with another: see
/// [`Staging::clone_file`]. One that is neither made an image nor [discarded](Staging::discard) is left over
/// in the snapshot.
#[derive(Debug)]
#[must_use = "a clone becomes an image or is discarded"]
pub struct ClonedFile {
    name: String,
    file: File,
    size: u64,
}

impl ClonedFile {
    /// Its name in the snapshot.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The clone, open for reading.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// A file of a snapshot being written.
#[derive(Debug)]
pub struct StagedFile {
    name: String,
    file: File,
    layer: Arc<dyn Layer>,
    buffer: Vec<u8>,
    hasher: blake3::Hasher,
    /// Bytes handed to the operating system.
    put: u64,
    room: Option<Arc<AtomicU64>>,
    /// Bytes that the storage has been set to work on, if the file will be synced.
    writeback: Option<u64>,
}

impl StagedFile {
    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        if bytes.len() >= BUFFER / 4 {
            self.flush()?;
            return self.put(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        match self.buffer.len() < BUFFER {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Bytes appended so far.
    pub fn length(&self) -> u64 {
        self.put + self.buffer.len() as u64
    }

    fn flush(&mut self) -> Result<(), FormatError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.put(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let io = |error| FormatError::io(&self.name, "write", error);
        if let Some(room) = &self.room {
            let need = bytes.len() as u64;
            let take = |room: u64| room.checked_sub(need);
            room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map_err(|room| {
                let why = format!("{need} bytes more than the {room} left of the snapshot's limit");
                io(io::Error::new(io::ErrorKind::StorageFull, why))
            })?;
        }
        self.hasher.update(bytes);
        let mut left = bytes;
        while !left.is_empty() {
            match self.layer.write(&self.name, &self.file, left) {
                Ok(0) => return Err(io(io::ErrorKind::WriteZero.into())),
                Ok(len) => left = &left[len..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io(error)),
            }
        }
        self.put += bytes.len() as u64;
        self.start_writeback();
        Ok(())
    }

    /// Lets the storage write while there is still more to come, so that the sync at the end has little
    /// left to wait for.
    fn start_writeback(&mut self) {
        if let Some(begun) = self.writeback
            && self.put - begun >= WRITEBACK
        {
            storage::start_writeback(&self.file, begun, self.put - begun);
            self.writeback = Some(self.put);
        }
    }

    fn finish(mut self) -> Result<(FileRecord, File), FormatError> {
        self.flush()?;
        let Self { name, file, layer: _, buffer: _, hasher, put, room: _, writeback: _ } = self;
        Ok((FileRecord { name, length: put, digest: hasher.finalize().into() }, file))
    }
}

/// Whether a snapshot may be put at `target`, and the names of the files that it replaces there, if there is
/// something.
fn check_place(target: &Path, existing: Existing) -> Result<Option<Vec<String>>, FormatError> {
    let io = |error| FormatError::io(target.display().to_string(), "look at", error);
    let refused = |why: String| {
        let why = format!("{why}; it is not replaced");
        Err(FormatError::NotASnapshot { path: target.to_owned(), why })
    };
    let kind = match fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found.map_err(io)?.file_type(),
    };
    if existing == Existing::Refuse {
        return Err(FormatError::Exists { path: target.to_owned() });
    }
    if !kind.is_dir() {
        return refused("it is not a directory".into());
    }
    if fs::read_dir(target).map_err(io)?.next().is_none() {
        return Ok(Some(Vec::new()));
    }
    // Only a manifest that can be read tells which files are the snapshot's.
    let snapshot = match Snapshot::open(target) {
        Ok(snapshot) => snapshot,
        Err(FormatError::NotASnapshot { .. }) => {
            return refused("it has files, but no squib manifest".into());
        }
        Err(error) => return refused(format!("what is in it cannot be told ({error})")),
    };
    let names = snapshot.unlisted()?;
    match names.is_empty() {
        true => Ok(Some(snapshot.own_names().map(str::to_owned).collect())),
        false => Err(FormatError::Foreign { path: target.to_owned(), names }),
    }
}

/// Removes staging directories whose writers are gone: those with a name that a writer gives, and of what is in
/// them regular files only. What cannot be removed does no harm.
fn sweep(parent: &Path, prefix: &OsString) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes()) else {
            continue;
        };
        if !is_staging(rest) {
            continue;
        }
        let path = entry.path();
        if let Ok(Some(_lock)) = open_locked(&path) {
            let files = fs::read_dir(&path).into_iter().flatten().flatten();
            let names = files.filter_map(|file| file.file_name().into_string().ok());
            let names: Vec<String> = names.filter(|name| is_a_writers(name)).collect();
            match remove_files(&path, names.iter().map(String::as_str)) {
                Ok(true) => {}
                Ok(false) => tracing::warn!("{}: it holds more than a snapshot", path.display()),
                Err(error) => tracing::warn!("{}: cannot remove: {error}", path.display()),
            }
        }
    }
}

/// Whether a snapshot can have a file of that name.
fn is_a_writers(name: &str) -> bool {
    let fixed = [
        manifest::FILE,
        manifest::STATE_FILE,
        manifest::WORKING_SET_FILE,
        manifest::KERNEL_FILE,
        manifest::INITRD_FILE,
    ];
    let image = [".idx", ".zst", ".raw"].iter().any(|end| name.ends_with(end));
    names::check(name).is_ok() && (image || fixed.contains(&name))
}

/// Whether `name` is what a writer or a removal puts behind the prefix of its directories: PID-COUNT,
/// PID-COUNT-old or PID-removed-COUNT.
fn is_staging(name: &[u8]) -> bool {
    let name = name.strip_suffix(b"-old").unwrap_or(name);
    let mut parts = name.split(|byte| *byte == b'-').filter(|part| *part != b"removed");
    let number = |part: Option<&[u8]>| {
        part.is_some_and(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit))
    };
    number(parts.next()) && number(parts.next()) && parts.next().is_none()
}

/// Makes a directory of a new name, mode 0700, and locks it.
fn make_locked(
    layer: &dyn Layer,
    parent: &Path,
    prefix: &OsString,
) -> Result<(PathBuf, OwnedFd), FormatError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut name = prefix.clone();
        name.push(format!("{}-{count}", std::process::id()));
        let path = parent.join(name);
        let io = |error| FormatError::io(path.display().to_string(), "create", error);
        match layer.make_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            made => made.map_err(io)?,
        }
        // A sweeper may have come between; then the directory is gone or going, and another is made.
        match open_locked(&path) {
            Ok(Some(dir)) if is_at(&dir, &path) => return Ok((path, dir)),
            Ok(_) | Err(Errno::NOENT) => continue,
            Err(error) => {
                // Empty; if it cannot be removed either, the next writer sweeps it.
                let _ = fs::remove_dir(&path);
                return Err(io(error.into()));
            }
        }
    }
}

/// Whether the open directory is still the one at `path`. How many links a removed one has is not the same on
/// all systems.
fn is_at(dir: &OwnedFd, path: &Path) -> bool {
    let ours = rustix::fs::fstat(dir);
    let there = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW);
    match (ours, there) {
        (Ok(ours), Ok(there)) => (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino),
        _ => false,
    }
}

/// Opens and locks a directory; `None` if somebody else has the lock.
fn open_locked(path: &Path) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(dir)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error),
    }
}
