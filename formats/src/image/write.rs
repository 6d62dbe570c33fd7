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
    CHUNK_SIZE, ChunkReader, Content, Control, ImageReader, LEVEL, Layout, PAGE_SIZE, Record,
    Source, bitmap_len, digest::ImageHasher, digest::read_chunk, is_zero, zero_digest,
};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord, publish::Staging};

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
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    write(staging, name, source, None, control)
}

/// Writes `source` as the image `name` into `staging`, as a difference to `base`, the image of that name in
/// the parent. What is equal is found by the digests of chunks and by comparing pages, so the image read
/// back is `source`, whatever wrote to it. A base of another size or chunk size does not serve, and all is
/// written.
pub fn write_diff(
    staging: &mut Staging,
    name: &str,
    source: &dyn Source,
    base: &ImageReader,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    let record = base.record();
    let serves = (record.size, record.chunk_size) == (source.size(), CHUNK_SIZE);
    write(staging, name, source, serves.then_some(base), control)
}

fn write(
    staging: &mut Staging,
    name: &str,
    source: &dyn Source,
    base: Option<&ImageReader>,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    let layout = Layout { size: source.size(), chunk_size: CHUNK_SIZE };
    let mut record = ImageRecord {
        name: name.to_owned(),
        size: layout.size,
        chunk_size: CHUNK_SIZE,
        digest: Digest([0; 32]),
    };
    let mut index = staging.create(&record.index_file())?;
    let mut data = staging.create(&record.data_file())?;
    let zero = zero_digest(CHUNK_SIZE);
    let mut hasher = ImageHasher::new();
    let mut written: HashMap<Digest, Record> = HashMap::new();
    let (mut zeros, mut duplicate, mut parent, mut patched) = (0, 0, 0, 0);
    let claims = Mutex::new(HashMap::new());
    let new_worker = || Worker::new(name, base);
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
    raw: Vec<u8>,
    compressor: Compressor<'static>,
    /// The parent's image and a reader of its chunks.
    base: Option<(&'a ImageReader, ChunkReader<'a>)>,
}

impl<'a> Worker<'a> {
    fn new(name: &str, base: Option<&'a ImageReader>) -> Result<Self, FormatError> {
        let compressor =
            Compressor::new(LEVEL).map_err(|e| FormatError::io(name, "compress", e))?;
        let base = match base {
            Some(base) => Some((base, base.chunks(0)?)),
            None => None,
        };
        Ok(Self { raw: vec![0; CHUNK_SIZE as usize], compressor, base })
    }

    fn chunk(
        &mut self,
        name: &str,
        source: &dyn Source,
        layout: Layout,
        chunk: u64,
        claims: &Mutex<HashMap<Digest, u64>>,
    ) -> Result<Chunk, FormatError> {
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
