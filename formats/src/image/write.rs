//! Raw bytes into an image, on all cores.
//!
//! Workers take batches of consecutive chunks, read, hash and compress them; the calling thread takes the
//! results in order and writes. What is written depends on the raw bytes only, never on which worker was
//! faster: a chunk's frame is the one of its first occurrence, and a worker leaves out the compression
//! only of a chunk that a lower-numbered equal one has already been claimed for.

use std::{
    collections::HashMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use zstd::bulk::Compressor;

use super::{
    CHUNK_SIZE, ChunkReader, Content, Control, ImageReader, LEVEL, Layout, MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE, PAGE_SIZE, Record, Source, bitmap_len, digest::ImageHasher, digest::read_chunk,
    is_chunk_size, is_zero, zero_digest,
};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord, publish::Staging};

/// How an image is stored. The raw bytes that are read back do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageOptions {
    /// Size of a chunk in bytes: a power of two from [`MIN_CHUNK_SIZE`](super::MIN_CHUNK_SIZE) to
    /// [`MAX_CHUNK_SIZE`](super::MAX_CHUNK_SIZE). The image digest depends on it.
    pub chunk_size: u32,
    /// The zstd level of the frames.
    pub level: i32,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self { chunk_size: CHUNK_SIZE, level: LEVEL }
    }
}

impl ImageOptions {
    /// Whether the image `name` can be written so.
    fn check(&self, name: &str) -> Result<(), FormatError> {
        let Self { chunk_size, level } = *self;
        if !is_chunk_size(chunk_size) {
            let why = format!(
                "{chunk_size}, it must be a power of two from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE}"
            );
            return Err(FormatError::field(name, "chunk size", why));
        }
        let levels = zstd::compression_level_range();
        if !levels.contains(&level) {
            let (least, most) = (levels.start(), levels.end());
            let why = format!("{level}, zstd has {least} to {most}");
            return Err(FormatError::field(name, "compression level", why));
        }
        Ok(())
    }
}

/// What [`write_image`] wrote.
#[derive(Clone, Debug)]
pub struct WrittenImage {
    /// The image's record in the manifest.
    pub record: ImageRecord,
    /// Bytes in chunks that are all zeros, which are not stored.
    pub zero: u64,
    /// Bytes in chunks that are equal to an earlier one, which are not stored again.
    pub duplicate: u64,
    /// Bytes in chunks that are the parent's, which are not stored.
    pub parent: u64,
    /// Bytes in chunks of which only the pages that differ from the parent's are stored.
    pub patched: u64,
    /// Bytes of all frames.
    pub stored: u64,
}

/// Writes all of `source` as the image `name` into `staging`.
pub fn write_image(
    staging: &mut Staging,
    name: &str,
    source: &dyn Source,
    options: ImageOptions,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    write(staging, name, source, None, options, control)
}

/// Writes `source` as the image `name` into `staging`, as a difference to `base`, the image of that name in
/// the parent. What is equal is found by the digests of chunks and by comparing pages, so the image read
/// back is `source`, whatever wrote to it; a chunk whose digest the source knows and the base has is not
/// read. A base of another size or chunk size does not serve, and all is written.
pub fn write_diff(
    staging: &mut Staging,
    name: &str,
    source: &dyn Source,
    base: &ImageReader,
    options: ImageOptions,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    let record = base.record();
    let serves = (record.size, record.chunk_size) == (source.size(), options.chunk_size);
    write(staging, name, source, serves.then_some(base), options, control)
}

fn write(
    staging: &mut Staging,
    name: &str,
    source: &dyn Source,
    base: Option<&ImageReader>,
    options: ImageOptions,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    options.check(name)?;
    let layout = Layout { size: source.size(), chunk_size: options.chunk_size };
    let mut record = ImageRecord {
        name: name.to_owned(),
        size: layout.size,
        chunk_size: layout.chunk_size,
        digest: Digest([0; 32]),
    };
    let mut index = staging.create(&record.index_file())?;
    let mut data = staging.create(&record.data_file())?;
    let zero = zero_digest(layout.chunk_size);
    let mut hasher = ImageHasher::new();
    let mut written: HashMap<Digest, Record> = HashMap::new();
    let (mut zeros, mut duplicate, mut parent, mut patched) = (0, 0, 0, 0);
    let claims = Mutex::new(HashMap::new());
    let new_worker = || Worker::new(name, base, options, zero);
    let work = |worker: &mut Worker<'_>, chunk| worker.chunk(name, source, layout, chunk, &claims);
    run_in_order(layout, control, new_worker, work, |chunk, done: Chunk| {
        let raw = layout.len(chunk) as u64;
        let record = match done {
            Chunk::Zero => {
                zeros += raw;
                hasher.chunk(zero);
                Record::Zero
            }
            Chunk::Parent { digest } => {
                hasher.chunk(digest);
                parent += raw;
                Record::Parent { digest }
            }
            Chunk::Patch { digest, patch } => {
                hasher.chunk(digest);
                match written.get(&digest) {
                    Some(first) => {
                        duplicate += raw;
                        *first
                    }
                    None => {
                        patched += raw;
                        let (offset, length) = (data.length(), patch.len() as u32);
                        data.write(&patch)?;
                        Record::Patch { offset, length, digest }
                    }
                }
            }
            Chunk::Data { digest, frame } => {
                hasher.chunk(digest);
                match (written.get(&digest), frame) {
                    (Some(first), _) => {
                        duplicate += raw;
                        *first
                    }
                    (None, Some(frame)) => {
                        let (offset, length) = (data.length(), frame.len() as u32);
                        data.write(&frame)?;
                        let record = Record::Data { offset, length, digest };
                        written.insert(digest, record);
                        record
                    }
                    // The claim of a lower-numbered equal chunk is what leaves out the frame.
                    (None, None) => unreachable!("the first of equal chunks has a frame"),
                }
            }
        };
        index.write(&record.encode(zero))?;
        Ok(data.length())
    })?;
    record.digest = hasher.finish(layout);
    let stored = data.length();
    staging.finish(index)?;
    staging.finish(data)?;
    Ok(WrittenImage { record, zero: zeros, duplicate, parent, patched, stored })
}

/// A chunk on its way from a worker to the writer.
enum Chunk {
    Zero,
    /// `None` where an equal chunk of a lower number has the frame.
    Data {
        digest: Digest,
        frame: Option<Vec<u8>>,
    },
    Patch {
        digest: Digest,
        patch: Vec<u8>,
    },
    Parent {
        digest: Digest,
    },
}

struct Worker<'a> {
    /// The digest of a chunk of zeros.
    zero: Digest,
    raw: Vec<u8>,
    compressor: Compressor<'static>,
    /// The parent's image and a reader of its chunks.
    base: Option<(&'a ImageReader, ChunkReader<'a>)>,
}

impl<'a> Worker<'a> {
    fn new(
        name: &str,
        base: Option<&'a ImageReader>,
        options: ImageOptions,
        zero: Digest,
    ) -> Result<Self, FormatError> {
        let compressor =
            Compressor::new(options.level).map_err(|e| FormatError::io(name, "compress", e))?;
        let base = match base {
            Some(base) => Some((base, base.chunks(0)?)),
            None => None,
        };
        Ok(Self { zero, raw: vec![0; options.chunk_size as usize], compressor, base })
    }

    fn chunk(
        &mut self,
        name: &str,
        source: &dyn Source,
        layout: Layout,
        chunk: u64,
        claims: &Mutex<HashMap<Digest, u64>>,
    ) -> Result<Chunk, FormatError> {
        if let Some(digest) = layout.known_digest(source, chunk) {
            if digest == self.zero {
                return Ok(Chunk::Zero);
            }
            if let Some((base, _)) = &self.base
                && base.index().digest(chunk) == digest
            {
                return Ok(Chunk::Parent { digest });
            }
        }
        if read_chunk(name, source, layout, chunk, &mut self.raw)? == Content::Zero {
            return Ok(Chunk::Zero);
        }
        let digest = Digest::of(&self.raw);
        if let Some((base, reader)) = &mut self.base {
            if base.index().digest(chunk) == digest {
                return Ok(Chunk::Parent { digest });
            }
            // A page on top of zeros is hardly smaller than the chunk, and would need the parent.
            if let Some(before) = reader.read(chunk)? {
                let pages = changed_pages(before, &self.raw);
                let frame = compress(&mut self.compressor, name, &self.raw)?;
                if let Some((mut patch, pages)) = pages {
                    patch.extend(compress(&mut self.compressor, name, &pages)?);
                    if patch.len() < frame.len() {
                        return Ok(Chunk::Patch { digest, patch });
                    }
                }
                // No claim: a chunk without a frame relies on one that has claimed and is sure to have one.
                return Ok(Chunk::Data { digest, frame: Some(frame) });
            }
        }
        let first = {
            let mut claims = lock(claims);
            let first = claims.entry(digest).or_insert(chunk);
            *first = chunk.min(*first);
            *first
        };
        let frame = match first == chunk {
            true => Some(compress(&mut self.compressor, name, &self.raw)?),
            false => None,
        };
        Ok(Chunk::Data { digest, frame })
    }
}

fn compress(
    compressor: &mut Compressor<'_>,
    name: &str,
    bytes: &[u8],
) -> Result<Vec<u8>, FormatError> {
    compressor.compress(bytes).map_err(|error| FormatError::io(name, "compress", error))
}

/// The bitmap and the bytes of the pages in which `now`, a whole chunk, differs from `before`, which may end
/// earlier and is continued with zeros; `None` if that is all of them.
fn changed_pages(before: &[u8], now: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut bitmap = vec![0; bitmap_len(now.len() as u32)];
    let mut changed = Vec::new();
    for (page, bytes) in now.chunks_exact(PAGE_SIZE).enumerate() {
        let end = before.len();
        let old = &before[(page * PAGE_SIZE).min(end)..((page + 1) * PAGE_SIZE).min(end)];
        let (same, behind) = bytes.split_at(old.len());
        if same != old || !is_zero(behind) {
            bitmap[page / 8] |= 1 << (page % 8);
            changed.extend_from_slice(bytes);
        }
    }
    (changed.len() < now.len()).then_some((bitmap, changed))
}

/// Runs `work` for every chunk on worker threads, each with its own value of `new_worker`, and hands the
/// results to `take` on the calling thread in the order of the chunks. `take` answers how many bytes are
/// stored so far. Workers run at most a few batches ahead, so memory stays bounded.
///
/// The error is the one of the lowest-numbered chunk that failed, whatever the timing.
pub(super) fn run_in_order<W, T: Send>(
    layout: Layout,
    control: Control<'_>,
    new_worker: impl Fn() -> Result<W, FormatError> + Sync,
    work: impl Fn(&mut W, u64) -> Result<T, FormatError> + Sync,
    mut take: impl FnMut(u64, T) -> Result<u64, FormatError>,
) -> Result<(), FormatError> {
    let line = Line::new(layout.batches(), control.threads.get() as u64 * 2);
    std::thread::scope(|scope| {
        for _ in 0..line.batches.min(control.threads.get() as u64) {
            scope.spawn(|| {
                // A panic in `work` must not leave the calling thread waiting for the batch.
                let _closes = CloseOnPanic(&line);
                let mut worker = None;
                while let Some(batch) = line.next() {
                    let results = layout.batch(batch).map(|chunk| {
                        control.check()?;
                        let worker = match &mut worker {
                            Some(worker) => worker,
                            none => none.insert(new_worker()?),
                        };
                        work(worker, chunk)
                    });
                    line.put(batch, results.collect());
                }
            });
        }
        let mut run = || {
            for batch in 0..line.batches {
                let Some(results) = line.get(batch) else {
                    break;
                };
                let mut stored = 0;
                for (chunk, result) in layout.batch(batch).zip(results?) {
                    stored = take(chunk, result)?;
                }
                control.check()?;
                let done =
                    ((batch + 1) * super::BATCH * u64::from(layout.chunk_size)).min(layout.size);
                control.progress.advanced(done, layout.size, stored);
            }
            Ok(())
        };
        let result = run();
        line.close();
        result
    })
}

/// The order of batches between workers and the calling thread.
struct Line<T> {
    batches: u64,
    ahead: u64,
    inner: Mutex<LineInner<T>>,
    changed: Condvar,
}

struct LineInner<T> {
    next: u64,
    taken: u64,
    done: HashMap<u64, Result<Vec<T>, FormatError>>,
    closed: bool,
}

impl<T> Line<T> {
    fn new(batches: u64, ahead: u64) -> Self {
        let inner = LineInner { next: 0, taken: 0, done: HashMap::new(), closed: false };
        Self { batches, ahead, inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// The next batch to work on; `None` if there is none left.
    fn next(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        while !inner.closed && inner.next < self.batches && inner.next - inner.taken >= self.ahead {
            inner = self.wait(inner);
        }
        if inner.closed || inner.next >= self.batches {
            return None;
        }
        inner.next += 1;
        Some(inner.next - 1)
    }

    fn put(&self, batch: u64, results: Result<Vec<T>, FormatError>) {
        lock(&self.inner).done.insert(batch, results);
        self.changed.notify_all();
    }

    /// Waits for the results of `batch`; `None` if a worker panicked.
    fn get(&self, batch: u64) -> Option<Result<Vec<T>, FormatError>> {
        let mut inner = lock(&self.inner);
        loop {
            if let Some(results) = inner.done.remove(&batch) {
                inner.taken = batch + 1;
                self.changed.notify_all();
                return Some(results);
            }
            if inner.closed {
                return None;
            }
            inner = self.wait(inner);
        }
    }

    fn close(&self) {
        lock(&self.inner).closed = true;
        self.changed.notify_all();
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, LineInner<T>>) -> MutexGuard<'a, LineInner<T>> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }
}

struct CloseOnPanic<'a, T>(&'a Line<T>);

impl<T> Drop for CloseOnPanic<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}

/// Locks; nothing under these locks can be left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::atomic::{AtomicBool, AtomicU64, Ordering},
    };

    use super::*;
    use crate::{
        image::{digest_source, tests::Bytes},
        publish::Existing,
        snapshot_dir::Snapshot,
    };

    const CHUNK: usize = CHUNK_SIZE as usize;

    /// A source that knows the digests of all its chunks and counts what it has to read.
    struct Knows {
        bytes: Bytes,
        trusted: AtomicBool,
        read: AtomicU64,
    }

    impl Knows {
        fn new(bytes: Vec<u8>) -> Self {
            Self { bytes: Bytes(bytes), trusted: true.into(), read: 0.into() }
        }
    }

    impl Source for Knows {
        fn size(&self) -> u64 {
            self.bytes.size()
        }

        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
            self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
            self.bytes.read(offset, into)
        }

        fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
            assert_eq!((offset % CHUNK as u64, len), (0, CHUNK), "a whole chunk");
            let known = self.trusted.load(Ordering::Relaxed);
            known.then(|| Digest::of(&self.bytes.0[offset as usize..][..len]))
        }
    }

    /// Three and a half chunks: data, zeros, data, data.
    fn bytes(fill: u8) -> Vec<u8> {
        let mut bytes = vec![fill; 3 * CHUNK + CHUNK / 2];
        bytes[CHUNK..2 * CHUNK].fill(0);
        bytes[2 * CHUNK..].fill(0x22);
        bytes
    }

    /// A published image `memory` of those bytes, and the folder that keeps it.
    fn base(bytes: Vec<u8>, options: ImageOptions) -> (tempfile::TempDir, ImageReader) {
        let dir = tempfile::tempdir().unwrap();
        let mut staging = Staging::new(&dir.path().join("base"), Existing::Refuse).unwrap();
        staging.finish(staging.create("state").unwrap()).unwrap();
        let image = write_image(&mut staging, "memory", &Bytes(bytes), options, Control::default());
        let mut manifest = crate::manifest::tests::sample();
        manifest.machine.disks.clear();
        manifest.sections.clear();
        manifest.images = vec![image.unwrap().record];
        manifest.machine.memory_size = manifest.images[0].size;
        staging.publish(manifest).unwrap();
        let snapshot = Snapshot::open(&dir.path().join("base")).unwrap();
        let image = ImageReader::open(&snapshot, "memory").unwrap();
        (dir, image)
    }

    fn diff(source: &Knows, base: &ImageReader, options: ImageOptions) -> WrittenImage {
        let dir = tempfile::tempdir().unwrap();
        let mut staging = Staging::new(&dir.path().join("diff"), Existing::Refuse).unwrap();
        write_diff(&mut staging, "memory", source, base, options, Control::default()).unwrap()
    }

    #[test]
    fn a_chunk_whose_digest_is_known_and_the_parents_is_not_read() {
        let (_keep, base) = base(bytes(0x11), ImageOptions::default());
        let source = Knows::new(bytes(0x11));
        let written = diff(&source, &base, ImageOptions::default());
        assert_eq!(written.record.digest, base.record().digest);
        // Only the last chunk, which is not a whole one, was read.
        assert_eq!(source.read.into_inner(), CHUNK as u64 / 2);
        assert_eq!(written.zero, CHUNK as u64);
        assert_eq!((written.parent, written.stored), (2 * CHUNK as u64 + CHUNK as u64 / 2, 0));
    }

    #[test]
    fn a_known_digest_that_is_not_the_parents_still_reads() {
        let (_keep, base) = base(bytes(0x77), ImageOptions::default());
        let source = Knows::new(bytes(0x11));
        let known = diff(&source, &base, ImageOptions::default());
        assert_eq!(source.read.swap(0, Ordering::Relaxed), CHUNK as u64 + CHUNK as u64 / 2);
        source.trusted.store(false, Ordering::Relaxed);
        let unknown = diff(&source, &base, ImageOptions::default());
        assert_eq!(source.read.into_inner(), source.bytes.size());
        assert_eq!(known.record.digest, unknown.record.digest);
        assert_eq!((known.parent, known.stored), (unknown.parent, unknown.stored));
        assert!(known.stored > 0);
    }

    #[test]
    fn a_base_of_another_chunk_size_does_not_serve() {
        let small = ImageOptions { chunk_size: MIN_CHUNK_SIZE, ..ImageOptions::default() };
        let (_keep, base) = base(bytes(0x11), small);
        let source = Knows::new(bytes(0x11));
        let written = diff(&source, &base, ImageOptions::default());
        assert_eq!((written.parent, written.record.chunk_size), (0, CHUNK_SIZE));
    }

    #[test]
    fn known_digests_are_not_read_for_an_image_digest() {
        let source = Knows::new(bytes(0x11));
        let known = digest_source("memory", &source, Control::default()).unwrap();
        assert_eq!(source.read.swap(0, Ordering::Relaxed), CHUNK as u64 / 2);
        source.trusted.store(false, Ordering::Relaxed);
        assert_eq!(digest_source("memory", &source, Control::default()).unwrap(), known);
        assert_eq!(known.zero, CHUNK as u64);
    }

    #[test]
    fn options_that_no_image_has_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let ImageOptions { chunk_size, level } = ImageOptions::default();
        for (options, expected) in [
            (ImageOptions { chunk_size: 4096, level }, "memory: chunk size: 4096"),
            (ImageOptions { chunk_size: 8 << 20, level }, "memory: chunk size: 8388608"),
            (ImageOptions { chunk_size, level: 23 }, "memory: compression level: 23"),
        ] {
            let mut staging = Staging::new(&dir.path().join("snap"), Existing::Refuse).unwrap();
            let source = Bytes(vec![1; 10]);
            let refused = write_image(&mut staging, "memory", &source, options, Control::default());
            let text = refused.unwrap_err().to_string();
            assert!(text.starts_with(expected), "{text}");
        }
    }
}
