//! The advisory file `working-set`: the chunks of guest RAM that were touched after a restore, in the order of
//! their first touch.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 2 | version: 1 |
//! | 10 | 2 | zero |
//! | 12 | 4 | chunk size of the image in bytes |
//! | 16 | 32 | image digest of the image `memory` that the chunks are of |
//! | 48 | 4 | number of chunks |
//! | 52 | 4 | zero |
//! | 56 | 4 each | numbers of the chunks, none twice |
//! | behind | 32 | blake3 of everything before |
//!
//! It may be added to a snapshot that is published already, so no digest in the manifest covers it, and nothing
//! that a guest sees depends on it. It belongs to the image by the image digest, which stays the same when the
//! image is stored in another order. Whoever cannot read it does without.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{AtFlags, FlockOperation, Mode, OFlags},
    io::Errno,
};

use crate::{
    digest::Digest,
    error::FormatError,
    image,
    manifest::{ImageRecord, MEMORY_IMAGE, WORKING_SET_FILE as FILE},
    snapshot_dir::Snapshot,
    storage,
};

/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"\x89SQBWS\r\n";
/// The version that this build writes and reads.
pub const VERSION: u16 = 1;
/// Most chunks in a working set: 1 TiB in chunks of 64 KiB.
pub const MAX_CHUNKS: usize = 1 << 24;

/// Bytes before the first chunk.
const HEADER: usize = 56;
/// Bytes of the digest at the end.
const DIGEST: usize = 32;
/// What the name of a file begins with while it is being written.
const PARTIAL: &str = ".working-set.partial-";

/// The order of first touch of an image's chunks. Every number is that of a chunk of the image, none is there
/// twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    image: Digest,
    chunk_size: u32,
    chunks: Vec<u32>,
}

impl WorkingSet {
    /// The chunks of `image` in the order in which they were first touched. What is behind the first
    /// [`MAX_CHUNKS`] is left out.
    pub fn new(image: &ImageRecord, mut chunks: Vec<u32>) -> Result<Self, FormatError> {
        chunks.truncate(MAX_CHUNKS);
        check_chunks(image, &chunks)?;
        Ok(Self { image: image.digest, chunk_size: image.chunk_size, chunks })
    }

    /// Numbers of the chunks in the order of their first touch.
    pub fn chunks(&self) -> &[u32] {
        &self.chunks
    }

    /// What is touched after every restore: the chunks of `old` that `new`, of a later run, has as well, in the
    /// order of `old`. If there are none, or the two are not of the same image, it is `new`.
    pub fn intersect(old: &Self, new: &Self) -> Self {
        let touched: HashSet<u32> = new.chunks.iter().copied().collect();
        let both = old.chunks.iter().copied().filter(|chunk| touched.contains(chunk));
        let chunks: Vec<u32> = both.collect();
        match (old.image, old.chunk_size) == (new.image, new.chunk_size) && !chunks.is_empty() {
            true => Self { chunks, ..*old },
            false => new.clone(),
        }
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let Self { image, chunk_size, chunks } = self;
        let mut bytes = Vec::with_capacity(HEADER + 4 * chunks.len() + DIGEST);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(chunk_size.to_le_bytes());
        bytes.extend(image.0);
        // At most MAX_CHUNKS.
        bytes.extend((chunks.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(chunks.iter().flat_map(|chunk| chunk.to_le_bytes()));
        bytes.extend(Digest::of(&bytes).0);
        bytes
    }

    /// Parses the bytes of a file, which must be of `image`.
    pub fn decode(image: &ImageRecord, bytes: &[u8]) -> Result<Self, FormatError> {
        let length = |expected: usize| FormatError::Length {
            file: FILE.into(),
            what: "the file".into(),
            expected: expected as u64,
            found: bytes.len() as u64,
        };
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(length(HEADER + DIGEST));
        };
        if header[..8] != MAGIC {
            let why =
                format!("`{}` instead of `{}`", header[..8].escape_ascii(), MAGIC.escape_ascii());
            return Err(field("magic", why));
        }
        let version = u16::from_le_bytes([header[8], header[9]]);
        if version != VERSION {
            return Err(field("version", format!("{version}, this build reads {VERSION}")));
        }
        let u32_at = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (chunk_size, count) = (u32_at(12), u32_at(48) as usize);
        if count > MAX_CHUNKS {
            return Err(field("number of chunks", format!("{count}, at most {MAX_CHUNKS}")));
        }
        let Some((numbers, digest)) = rest.split_last_chunk::<DIGEST>() else {
            return Err(length(HEADER + 4 * count + DIGEST));
        };
        let (numbers, left) = numbers.as_chunks::<4>();
        if numbers.len() != count || !left.is_empty() {
            return Err(length(HEADER + 4 * count + DIGEST));
        }
        let found = Digest::of(&bytes[..bytes.len() - DIGEST]);
        if found != Digest(*digest) {
            return Err(FormatError::Digest {
                file: FILE.into(),
                what: "the file".into(),
                expected: Digest(*digest),
                found,
            });
        }
        if header[10..12] != [0; 2] || header[52..56] != [0; 4] {
            return Err(field("reserved bytes", "not zero".to_owned()));
        }
        let mut of = Digest([0; 32]);
        of.0.copy_from_slice(&header[16..48]);
        if of != image.digest {
            let why = format!("{of}, image {} has {}", image.name, image.digest);
            return Err(field("image digest", why));
        }
        if chunk_size != image.chunk_size {
            let why = format!("{chunk_size}, image {} has {}", image.name, image.chunk_size);
            return Err(field("chunk size", why));
        }
        let chunks: Vec<u32> = numbers.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        check_chunks(image, &chunks)?;
        Ok(Self { image: of, chunk_size, chunks })
    }

    /// Reads the working set of `snapshot`; `None` if it has none. An error is no reason not to restore.
    pub fn read(snapshot: &Snapshot) -> Result<Option<Self>, FormatError> {
        let image = snapshot.manifest().image(MEMORY_IMAGE)?;
        let file = match snapshot.open_unlisted(FILE) {
            Err(FormatError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            file => file?,
        };
        let io = |error| FormatError::io(FILE, "read", error);
        let longest = (HEADER + 4 * MAX_CHUNKS + DIGEST) as u64;
        let found = file.metadata().map_err(io)?.len();
        if found > longest {
            return Err(field("length", format!("{found} bytes, at most {longest}")));
        }
        let mut bytes = Vec::new();
        file.take(longest).read_to_end(&mut bytes).map_err(io)?;
        Self::decode(image, &bytes).map(Some)
    }

    /// Puts it beside the manifest of `snapshot`, in one step, in the place of the one that is there.
    pub fn write(&self, snapshot: &Snapshot) -> Result<(), FormatError> {
        // It must be one that `read` takes.
        let bytes = self.encode();
        Self::decode(snapshot.manifest().image(MEMORY_IMAGE)?, &bytes)?;
        let dir = snapshot.dir();
        sweep(snapshot, dir);
        let io = |action| move |error: io::Error| FormatError::io(FILE, action, error);
        let (name, mut file) = create(dir).map_err(|e| io("create")(e.into()))?;
        let put = (|| {
            file.write_all(&bytes).map_err(io("write"))?;
            storage::sync(&file).map_err(io("sync"))?;
            rustix::fs::renameat(dir, &name, dir, FILE)
                .map_err(|e| io("rename into place")(e.into()))
        })();
        if put.is_err() {
            // The first error is the one to tell.
            let _ = rustix::fs::unlinkat(dir, &name, AtFlags::empty());
        }
        put?;
        storage::sync(dir).map_err(io("sync the place of"))
    }
}

/// Whether every chunk is one of `image`, and none is there twice.
fn check_chunks(image: &ImageRecord, chunks: &[u32]) -> Result<(), FormatError> {
    if !image::is_chunk_size(image.chunk_size) {
        return Err(field("chunk size", format!("{} is not allowed", image.chunk_size)));
    }
    let all = image.size.div_ceil(image.chunk_size.into());
    let mut sorted = chunks.to_vec();
    sorted.sort_unstable();
    if let Some(last) = sorted.last()
        && u64::from(*last) >= all
    {
        return Err(field("chunks", format!("{last}, image {} has {all}", image.name)));
    }
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(field("chunks", format!("{} is there twice", pair[0]))),
        None => Ok(()),
    }
}

/// Makes a file of a new name and locks it, so that it is not swept.
fn create(dir: BorrowedFd<'_>) -> Result<(String, File), Errno> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PARTIAL}{}-{count}", std::process::id());
        match rustix::fs::openat(dir, &name, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) => continue,
            file => {
                let file = file?;
                match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    // A sweeper has come between.
                    Err(Errno::WOULDBLOCK) => continue,
                    locked => locked?,
                }
                return Ok((name, File::from(file)));
            }
        }
    }
}

/// Removes files whose writers were killed. What cannot be removed does no harm.
fn sweep(snapshot: &Snapshot, dir: BorrowedFd<'_>) {
    for name in snapshot.unlisted().unwrap_or_default() {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if name.starts_with(PARTIAL)
            && let Ok(file) = rustix::fs::openat(dir, &*name, flags, Mode::empty())
            && rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = rustix::fs::unlinkat(dir, &*name, AtFlags::empty());
        }
    }
}

fn field(field: &str, why: String) -> FormatError {
    FormatError::field(FILE, field, why)
}
