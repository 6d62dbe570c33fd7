//! Templates: guest memory as raw files that machines map copy-on-write.
//!
//! A template is made once a host, from verified chunks, into a directory that only its owner can enter:
//!
//! ```text
//! CACHE/DIGEST/memory    the raw bytes, mode 0400; zero chunks are holes
//! CACHE/DIGEST/seal      what the file was when it was complete: inode, size, times of change
//! CACHE/.making-DIGEST/  one that is being made, locked by who makes it
//! ```
//!
//! DIGEST is the image digest of the memory. Checking all bytes at each use would make a restore as slow as
//! loading them; so a use checks owner, modes and the seal instead: no write to the file, and no exchange for
//! another one, leaves inode and times of change as they were. The seal's own time is that of the last use.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat, Timestamps, UTIME_NOW},
    io::Errno,
};
use squib_devices::{
    granules::{READABLE, Store},
    memory::{FromFileError, GuestRam},
};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Control, ImageReader, Index, Sink},
    manifest::{ImageRecord, MEMORY_IMAGE},
    snapshot_dir::Snapshot,
    storage,
};

use crate::disks::{data_bytes, free};

const MEMORY: &str = "memory";
const SEAL: &str = "seal";
const MAKING: &str = ".making-";
const GONE: &str = ".gone-";
/// How often one that waits for another maker looks whether that is done.
const WAIT: Duration = Duration::from_millis(5);

/// The templates of one user, in one folder.
#[derive(Clone, Debug)]
pub struct TemplateCache {
    dir: PathBuf,
    limit: u64,
}

/// A template that is complete and nobody has changed. The file that was checked is the one that is mapped.
#[derive(Debug)]
pub struct Template {
    file: File,
    /// As it was when it was checked.
    stat: Stat,
    size: u64,
    chunk_size: u32,
}

/// A template as it lies in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateInfo {
    /// Image digest of the memory, in hexadecimal.
    pub digest: String,
    /// Where it is.
    pub path: PathBuf,
    /// Size of the memory in bytes.
    pub size: u64,
    /// Bytes that it takes on the disk.
    pub stored: u64,
    /// When it was last used.
    pub used: SystemTime,
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The folder or a file in it cannot be used.
    #[error("template cache: {}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// Others could put something else in a template's place.
    #[error("template cache: {}: it must belong to this user and be closed to others (chmod 700)", path.display())]
    NotPrivate {
        /// The folder.
        path: PathBuf,
    },
    /// The file system has no room for it.
    #[error("template cache: {}: no room: {needed} bytes needed, {free} free", path.display())]
    NoRoom {
        /// The folder.
        path: PathBuf,
        /// Bytes that the template would take.
        needed: u64,
        /// Bytes that can be written there.
        free: u64,
    },
    /// The image cannot be read, or the operation was cancelled.
    #[error(transparent)]
    Image(#[from] FormatError),
}

impl Template {
    /// Memory that begins as the template and shares its pages until it writes to them. Where nothing can keep
    /// the file from being changed meanwhile, it is a copy: that takes time and room, and is sound.
    pub fn map(self) -> io::Result<GuestRam> {
        let Self { file, stat, size, chunk_size } = self;
        let shift = chunk_size.trailing_zeros();
        let changed = || io::Error::other("the template was changed just now; try again");
        let reader = file.try_clone()?;
        match GuestRam::from_file(file, size, shift, |file| is_same(file, &stat)) {
            Ok(ram) => Ok(ram),
            Err(FromFileError::Unguarded(why)) => {
                tracing::info!("the template is copied, since its file cannot be guarded: {why}");
                let ram = copy(&reader, size, shift)?;
                if is_same(&reader, &stat) { Ok(ram) } else { Err(changed()) }
            }
            Err(FromFileError::Changed) => Err(changed()),
            Err(FromFileError::Io(error)) => Err(error),
        }
    }
}

impl TemplateCache {
    /// The cache in `dir`, which is made if it is not there. Whenever a template is made, the least recently
    /// used others are removed until all take at most `limit` bytes.
    pub fn new(dir: impl Into<PathBuf>, limit: u64) -> Self {
        Self { dir: dir.into(), limit }
    }

    /// Whether the template of the memory of `snapshot`, with `index`, is there or has room.
    pub(crate) fn room_for(&self, snapshot: &Snapshot, index: &Index) -> Result<(), CacheError> {
        match self.find(snapshot.manifest().image(MEMORY_IMAGE)?)? {
            Some(_) => Ok(()),
            None => self.room(index),
        }
    }

    /// Whether a template of the image with `index` has room.
    pub(crate) fn room(&self, index: &Index) -> Result<(), CacheError> {
        // The folder is made with the first template, in one that is there.
        let place = self.dir.ancestors().find(|dir| dir.is_dir());
        // If that cannot be told, writing tells.
        let Some(Ok(free)) = place.map(free) else { return Ok(()) };
        let needed = data_bytes(index);
        match needed <= free {
            true => Ok(()),
            false => Err(CacheError::NoRoom { path: self.dir.clone(), needed, free }),
        }
    }

    /// The template of an image, if it is there.
    pub fn find(&self, image: &ImageRecord) -> Result<Option<Template>, CacheError> {
        let path = self.place(image);
        let dir = match open_dir(&path) {
            Err(Errno::NOENT) => return Ok(None),
            dir => dir.map_err(failed(&path, "open"))?,
        };
        check_private(&path, &dir)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&dir, MEMORY, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            file => File::from(file.map_err(failed(&path, "open the memory of"))?),
        };
        let stat = rustix::fs::fstat(&file).map_err(failed(&path, "read"))?;
        let mut seal = Vec::new();
        match rustix::fs::openat(&dir, SEAL, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            found => {
                let found = File::from(found.map_err(failed(&path, "open the seal of"))?);
                found
                    .take(1024)
                    .read_to_end(&mut seal)
                    .map_err(|e| failed_io(&path, "read the seal of", e))?;
            }
        }
        let whole = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && stat.st_mode & 0o7777 == 0o400
            && stat.st_nlink == 1
            && stat.st_uid == rustix::process::geteuid().as_raw()
            && seal == self::seal(image, &stat);
        if !whole {
            tracing::warn!("{}: the template was changed and is made again", path.display());
            return Ok(None);
        }
        // Only the order of eviction depends on it.
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        let _ = rustix::fs::utimensat(&dir, SEAL, &times, AtFlags::SYMLINK_NOFOLLOW);
        Ok(Some(Template { file, stat, size: image.size, chunk_size: image.chunk_size }))
    }

    /// The template of `image`, made if it is not there. Of several processes that want one, one makes it and
    /// the others wait.
    pub fn get(&self, image: &ImageReader, control: Control<'_>) -> Result<Template, CacheError> {
        let record = image.record();
        let making = self.dir.join(format!("{MAKING}{}", record.digest));
        loop {
            if let Some(template) = self.find(record)? {
                return Ok(template);
            }
            self.make_dir()?;
            let Some(dir) = lock_dir(&making, control)? else { continue };
            // Whoever had the lock may have finished it.
            if let Some(template) = self.find(record)? {
                remove(&making);
                return Ok(template);
            }
            let made = self.make(image, &making, &dir, control);
            if made.is_err() {
                remove(&making);
            }
            made?;
            self.prune_others(&record.digest.to_string());
            // Found as any other: the file that was written to is closed by now.
        }
    }

    /// All templates, the least recently used first.
    pub fn list(&self) -> Result<Vec<TemplateInfo>, CacheError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| failed_io(&self.dir, "list", e))?,
        };
        let mut templates = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| failed_io(&self.dir, "list", e))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with('.') {
                continue;
            }
            // One that is being removed is none.
            let (Ok(memory), Ok(seal)) =
                (fs::symlink_metadata(path.join(MEMORY)), fs::symlink_metadata(path.join(SEAL)))
            else {
                continue;
            };
            templates.push(TemplateInfo {
                digest: name.to_owned(),
                size: memory.len(),
                stored: memory.blocks() * 512,
                used: seal.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                path,
            });
        }
        templates.sort_by(|a, b| (a.used, &a.digest).cmp(&(b.used, &b.digest)));
        Ok(templates)
    }

    /// Removes the least recently used templates until the others take at most `limit` bytes, and what makers
    /// that were killed have left. Machines that use one are not disturbed. Answers what was removed.
    pub fn prune(&self, limit: u64) -> Result<Vec<TemplateInfo>, CacheError> {
        self.sweep();
        self.evict(limit, None)
    }

    fn evict(&self, limit: u64, keep: Option<&str>) -> Result<Vec<TemplateInfo>, CacheError> {
        let templates = self.list()?;
        let mut stored: u64 = templates.iter().map(|template| template.stored).sum();
        let mut removed = Vec::new();
        for template in templates {
            if stored <= limit {
                break;
            }
            if keep == Some(&*template.digest) {
                continue;
            }
            // Renamed first, so that nobody finds half of it.
            let gone = self.dir.join(format!("{GONE}{}-{}", template.digest, std::process::id()));
            match fs::rename(&template.path, &gone) {
                // Somebody else was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                renamed => renamed.map_err(|e| failed_io(&template.path, "remove", e))?,
            }
            remove(&gone);
            stored -= template.stored;
            removed.push(template);
        }
        Ok(removed)
    }

    fn prune_others(&self, keep: &str) {
        if let Err(error) = self.evict(self.limit, Some(keep)) {
            tracing::warn!("{error}");
        }
    }

    /// Removes what was being made or removed when its process was killed.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let dead = name.starts_with(GONE)
                || name.starts_with(MAKING)
                    && open_dir(&entry.path()).is_ok_and(|dir| {
                        rustix::fs::flock(dir, FlockOperation::NonBlockingLockExclusive).is_ok()
                    });
            if dead {
                remove(&entry.path());
            }
        }
    }

    fn place(&self, image: &ImageRecord) -> PathBuf {
        self.dir.join(image.digest.to_string())
    }

    /// Makes the cache's own folder and checks that it is private.
    fn make_dir(&self) -> Result<(), CacheError> {
        use std::os::unix::fs::DirBuilderExt;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|e| failed_io(&self.dir, "create", e))?;
        let dir = open_dir(&self.dir).map_err(failed(&self.dir, "open"))?;
        check_private(&self.dir, &dir)
    }

    /// Fills the locked directory `dir`, which is at `making`, and puts it in its place.
    fn make(
        &self,
        image: &ImageReader,
        making: &Path,
        dir: &OwnedFd,
        control: Control<'_>,
    ) -> Result<(), CacheError> {
        let record = image.record();
        let create = |name: &str| {
            // What a maker that was killed has left is not trusted.
            let _ = rustix::fs::unlinkat(dir, name, AtFlags::empty());
            let flags =
                OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map(File::from)
        };
        let path = making.join(MEMORY);
        let file = create(MEMORY).map_err(failed(&path, "create"))?;
        file.set_len(record.size).map_err(|e| failed_io(&path, "set the size of", e))?;
        image.load(&Raw(&file), control)?;
        rustix::fs::fchmod(&file, Mode::RUSR).map_err(failed(&path, "protect"))?;
        // A loss of power must not leave a seal over bytes that never reached the disk.
        storage::sync(&file).map_err(|e| failed_io(&path, "sync", e))?;
        let stat = rustix::fs::fstat(&file).map_err(failed(&path, "read"))?;
        let path = making.join(SEAL);
        let mut sealed = create(SEAL).map_err(failed(&path, "create"))?;
        sealed
            .write_all(&seal(record, &stat))
            .and_then(|()| storage::sync(&sealed))
            .map_err(|e| failed_io(&path, "write", e))?;
        let place = self.place(record);
        // What stands there is damaged, or `find` would have found it.
        if fs::symlink_metadata(&place).is_ok() {
            remove(&place);
        }
        fs::rename(making, &place).map_err(|e| failed_io(&place, "rename into place", e))?;
        let synced = File::open(&self.dir).and_then(storage::sync);
        synced.map_err(|e| failed_io(&self.dir, "sync", e))
    }
}

/// Whether the file is as it was: no write to it leaves all of this the same.
fn is_same(file: &File, before: &Stat) -> bool {
    let key = |stat: &Stat| {
        (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec)
    };
    rustix::fs::fstat(file).is_ok_and(|now| key(&now) == key(before))
}

/// The bytes of the file in memory of its own.
fn copy(file: &File, size: u64, shift: u32) -> io::Result<GuestRam> {
    let ram = GuestRam::absent(size, shift)?;
    let mut bytes = vec![0; 1 << 20];
    for offset in (0..size).step_by(bytes.len()) {
        let len = (size - offset).min(bytes.len() as u64);
        if !storage::is_hole(file, offset, len) {
            let piece = &mut bytes[..len as usize];
            file.read_exact_at(piece, offset)?;
            ram.granules().store().fill(offset, piece)?;
        }
    }
    ram.granules().set_all(READABLE);
    Ok(ram)
}

/// What the complete file is known by.
fn seal(image: &ImageRecord, stat: &Stat) -> Vec<u8> {
    let Digest(digest) = image.digest;
    let mut seal = b"squib template 1\n".to_vec();
    seal.extend(digest);
    let numbers = [
        i128::from(image.size),
        i128::from(image.chunk_size),
        i128::from(stat.st_dev),
        i128::from(stat.st_ino),
        i128::from(stat.st_size),
        i128::from(stat.st_mtime),
        i128::from(stat.st_mtime_nsec),
        i128::from(stat.st_ctime),
        i128::from(stat.st_ctime_nsec),
    ];
    seal.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    let sum = Digest::of(&seal);
    seal.extend(sum.0);
    seal
}

/// The directory at `path`, made if need be, once this process has its lock. `None` if it has been moved
/// away meanwhile.
fn lock_dir(path: &Path, control: Control<'_>) -> Result<Option<OwnedFd>, CacheError> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(failed(path, "create")(error)),
    }
    let dir = match open_dir(path) {
        Err(Errno::NOENT) => return Ok(None),
        dir => dir.map_err(failed(path, "open"))?,
    };
    loop {
        control.check()?;
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) => thread::sleep(WAIT),
            Err(error) => return Err(failed(path, "lock")(error)),
        }
    }
    let ours = rustix::fs::fstat(&dir).map_err(failed(path, "look at"))?;
    let there = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW);
    let same = there.is_ok_and(|there| (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino));
    Ok(same.then_some(dir))
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
}

fn check_private(path: &Path, dir: &OwnedFd) -> Result<(), CacheError> {
    let stat = rustix::fs::fstat(dir).map_err(failed(path, "look at"))?;
    match stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o077 == 0 {
        true => Ok(()),
        false => Err(CacheError::NotPrivate { path: path.to_owned() }),
    }
}

/// Removes a directory of the cache. What stays is swept later.
fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("{}: cannot remove: {error}", path.display());
    }
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(Errno) -> CacheError {
    let path = path.to_owned();
    move |error| CacheError::Io { path, action, source: error.into() }
}

fn failed_io(path: &Path, action: &'static str, source: io::Error) -> CacheError {
    CacheError::Io { path: path.to_owned(), action, source }
}

/// A new file, nothing but one hole.
struct Raw<'a>(&'a File);

impl Sink for Raw<'_> {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        true
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_holds_the_bytes_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        let size = (2 << 20) + (64 << 10);
        file.set_len(size).unwrap();
        file.write_all_at(b"squib", (1 << 20) - 2).unwrap();
        file.write_all_at(b"end", size - 3).unwrap();
        let ram = copy(&file, size, 16).unwrap();
        let mut bytes = vec![0; size as usize];
        ram.granules().store().read(0, &mut bytes).unwrap();
        let mut expected = vec![0; size as usize];
        file.read_exact_at(&mut expected, 0).unwrap();
        assert!(bytes == expected && !ram.granules().is_absent(0));
    }
}
