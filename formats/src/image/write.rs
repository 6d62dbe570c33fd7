//! Raw bytes into an image, on all cores.
//!
//! Workers take batches of consecutive chunks, read, hash and compress them; the calling thread takes the
//! results in order and writes them. What is written depends on the raw bytes only, never on which worker was
//! faster: a chunk's frame is the one of its first occurrence, and a worker leaves out the compression
//! only of a chunk that a lower-numbered equal one has already been claimed for.

use std::{collections::HashMap, io, ops::Range, sync::Mutex};

use zstd::bulk::Compressor;

use super::{
    CHUNK_SIZE, ChunkReader, Content, Control, ImageReader, LEVEL, Layout, MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE, PAGE_SIZE, Record, Source, bitmap_len,
    digest::read_chunk,
    index::IndexWriter,
    is_chunk_size, is_zero, levels,
    pipeline::{lock, run_in_order},
    plan::{Batch, Piece, Plan},
};
use crate::{
    digest::Digest,
    error::FormatError,
    manifest::ImageRecord,
    publish::{StagedFile, Staging},
};

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
    pub(super) fn check(&self, name: &str) -> Result<(), FormatError> {
        let Self { chunk_size, level } = *self;
        if !is_chunk_size(chunk_size) {
            let why = format!(
                "{chunk_size}, it must be a power of two from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE}"
            );
            return Err(FormatError::field(name, "chunk size", why));
        }
        let levels = levels();
        if !levels.contains(&level) {
            let (least, most) = (levels.start(), levels.end());
            let why = format!("{level}, zstd has {least} to {most}");
            return Err(FormatError::field(name, "compression level", why));
        }
        Ok(())
    }
}

/// What [`write_image`] or [`write_raw_image`](super::write_raw_image) wrote.
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
    /// Bytes in chunks that lie in the raw file, which shares them with the file that it is a clone of.
    pub raw: u64,
    /// Bytes of all frames.
    pub stored: u64,
}

/// Writes all of `source` as the image `name` into `staging`. What is in memory at a time is bounded, however
/// slow the disk: for each thread, raw bytes and frames of two batches of 1 MiB, or of two chunks if those are
/// larger; and 100 bytes for each chunk of the image that is stored.
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
    layout.check(name)?;
    let mut record = ImageRecord {
        name: name.to_owned(),
        size: layout.size,
        chunk_size: layout.chunk_size,
        digest: Digest([0; 32]),
    };
    let mut index = IndexWriter::new(staging, &record.index_file(), layout)?;
    let mut data = staging.create(&record.data_file())?;
    let zero = index.zero();
    let mut written: HashMap<Digest, Record> = HashMap::new();
    let (mut zeros, mut duplicate, mut parent, mut patched) = (0, 0, 0, 0);
    let claims = Mutex::new(HashMap::new());
    // Batches that have been written, whose buffers are used again.
    let spare: Mutex<Vec<Done>> = Mutex::default();
    let new_worker = || Worker::new(name, base, options, zero);
    let work = |worker: &mut Worker<'_>, batch: &Batch| {
        let mut done = lock(&spare).pop().unwrap_or_default();
        done.chunks.clear();
        done.used = 0;
        for chunk in batch.chunks() {
            let found = worker.chunk(source, layout, chunk, &claims, &mut done)?;
            done.chunks.push(found);
        }
        Ok(done)
    };
    let plan = Plan::of_source(layout, source, name);
    run_in_order(layout, plan, control, new_worker, work, |batch, results: Done| {
        let mut run = Run { frames: &results.frames, range: 0..0 };
        let mut chunks = results.chunks.iter();
        for piece in batch.pieces() {
            let (chunk, done) = match piece {
                Piece::Zeros(range) => {
                    zeros += layout.bytes(&range);
                    index.push(Record::Zero, range.end - range.start)?;
                    continue;
                }
                // There are as many results as chunks.
                Piece::Chunk(chunk) => (chunk, chunks.next().unwrap_or(&Chunk::Zero)),
            };
            let raw = layout.len(chunk) as u64;
            let first = done.stored().and_then(|digest| written.get(&digest));
            let record = match (done, first) {
                (Chunk::Zero, _) => {
                    zeros += raw;
                    Record::Zero
                }
                (Chunk::Parent { digest }, _) => {
                    parent += raw;
                    Record::Parent { digest: *digest }
                }
                (_, Some(first)) => {
                    duplicate += raw;
                    *first
                }
                (Chunk::Patch { digest, patch }, None) => {
                    patched += raw;
                    let (offset, length) = run.append(&mut data, patch)?;
                    Record::Patch { offset, length, digest: *digest }
                }
                (Chunk::Data { digest, frame: Some(frame) }, None) => {
                    let (offset, length) = run.append(&mut data, frame)?;
                    let record = Record::Data { offset, length, digest: *digest };
                    written.insert(*digest, record);
                    record
                }
                // The claim of a lower-numbered equal chunk is what leaves out the frame.
                (Chunk::Data { frame: None, .. }, None) => {
                    unreachable!("the first of equal chunks has a frame")
                }
            };
            index.push(record, 1)?;
        }
        run.write(&mut data)?;
        lock(&spare).push(results);
        Ok(data.length())
    })?;
    let stored = data.length();
    record.digest = index.finish(staging)?;
    staging.finish(data)?;
    Ok(WrittenImage { record, zero: zeros, duplicate, parent, patched, raw: 0, stored })
}

/// The chunks of a [`Batch`] on their way from a worker to the writer. Its buffers go round, so that nothing
/// is allocated for a chunk.
#[derive(Default)]
struct Done {
    chunks: Vec<Chunk>,
    /// Frames and patches one behind the other in the first `used` bytes; what is behind is left over.
    frames: Vec<u8>,
    used: usize,
}

/// What a worker has found of a chunk; ranges are places in [`Done::frames`].
enum Chunk {
    Zero,
    /// `None` where an equal chunk of a lower number has the frame.
    Data {
        digest: Digest,
        frame: Option<Range<usize>>,
    },
    Patch {
        digest: Digest,
        patch: Range<usize>,
    },
    Parent {
        digest: Digest,
    },
}

impl Chunk {
    /// The digest of a chunk that needs bytes in the data file.
    fn stored(&self) -> Option<Digest> {
        match self {
            Self::Data { digest, .. } | Self::Patch { digest, .. } => Some(*digest),
            Self::Zero | Self::Parent { .. } => None,
        }
    }
}

/// Frames of a batch on their way into the data file: those that lie one behind the other go in one write.
struct Run<'a> {
    frames: &'a [u8],
    range: Range<usize>,
}

impl Run<'_> {
    /// Appends the bytes at `place`. Answers their offset and length in the data file.
    fn append(
        &mut self,
        data: &mut StagedFile,
        place: &Range<usize>,
    ) -> Result<(u64, u32), FormatError> {
        if self.range.end != place.start {
            self.write(data)?;
            self.range = place.start..place.start;
        }
        let offset = data.length() + self.range.len() as u64;
        self.range.end = place.end;
        Ok((offset, place.len() as u32))
    }

    fn write(&mut self, data: &mut StagedFile) -> Result<(), FormatError> {
        let range = std::mem::replace(&mut self.range, 0..0);
        data.write(&self.frames[range])
    }
}

struct Worker<'a> {
    name: &'a str,
    /// The digest of a chunk of zeros.
    zero: Digest,
    raw: Vec<u8>,
    compressor: Compressor<'static>,
    /// The parent's image and a reader of its chunks.
    base: Option<(&'a ImageReader, ChunkReader)>,
    /// Bitmap and bytes of the pages that differ from the parent's.
    bitmap: Vec<u8>,
    pages: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(
        name: &'a str,
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
        let raw = vec![0; options.chunk_size as usize];
        let bitmap = vec![0; bitmap_len(options.chunk_size)];
        Ok(Self { name, zero, raw, compressor, base, bitmap, pages: Vec::new() })
    }

    fn chunk(
        &mut self,
        source: &dyn Source,
        layout: Layout,
        chunk: u64,
        claims: &Mutex<HashMap<Digest, u64>>,
        batch: &mut Done,
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
        if read_chunk(self.name, source, layout, chunk, &mut self.raw)? == Content::Zero {
            return Ok(Chunk::Zero);
        }
        let digest = Digest::of(&self.raw);
        let (compressor, raw) = (&mut self.compressor, &self.raw);
        let mut frame = |batch: &mut Done, bytes: &[u8]| {
            let done = batch.compress(compressor, bytes);
            done.map_err(|error| FormatError::io(self.name, "compress", error))
        };
        if let Some((base, reader)) = &mut self.base {
            if base.index().digest(chunk) == digest {
                return Ok(Chunk::Parent { digest });
            }
            // A page on top of zeros is hardly smaller than the chunk, and would need the parent.
            if let Some(before) = reader.read(chunk)? {
                let whole = frame(batch, raw)?;
                if changed_pages(before, raw, &mut self.bitmap, &mut self.pages) {
                    let start = batch.push(&self.bitmap);
                    let patch = start..frame(batch, &self.pages)?.end;
                    if patch.len() < whole.len() {
                        batch.frames.copy_within(patch.clone(), whole.start);
                        batch.used = whole.start + patch.len();
                        return Ok(Chunk::Patch { digest, patch: whole.start..batch.used });
                    }
                    batch.used = whole.end;
                }
                // No claim: a chunk without a frame relies on one that has claimed and is sure to have one.
                return Ok(Chunk::Data { digest, frame: Some(whole) });
            }
        }
        let first = {
            let mut claims = lock(claims);
            let first = claims.entry(digest).or_insert(chunk);
            *first = chunk.min(*first);
            *first
        };
        let frame = match first == chunk {
            true => Some(frame(batch, raw)?),
            false => None,
        };
        Ok(Chunk::Data { digest, frame })
    }
}

impl Done {
    /// Appends the frame of `bytes`. Answers where it is.
    fn compress(
        &mut self,
        compressor: &mut Compressor<'_>,
        bytes: &[u8],
    ) -> io::Result<Range<usize>> {
        let start = self.used;
        let place = self.room(zstd::zstd_safe::compress_bound(bytes.len()));
        let len = compressor.compress_to_buffer(bytes, place)?;
        self.used = start + len;
        Ok(start..self.used)
    }

    /// Appends `bytes` as they are. Answers where they begin.
    fn push(&mut self, bytes: &[u8]) -> usize {
        let start = self.used;
        self.room(bytes.len()).copy_from_slice(bytes);
        self.used += bytes.len();
        start
    }

    /// The `len` bytes behind those in use.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.used + len;
        if self.frames.len() < end {
            self.frames.resize(end, 0);
        }
        &mut self.frames[self.used..end]
    }
}

/// Finds the pages in which `now`, a whole chunk, differs from `before`, which may end earlier and is
/// continued with zeros. `false` if that is all of them; else `bitmap` and `changed` say which they are and
/// what is in them.
fn changed_pages(before: &[u8], now: &[u8], bitmap: &mut [u8], changed: &mut Vec<u8>) -> bool {
    bitmap.fill(0);
    changed.clear();
    for (page, bytes) in now.chunks_exact(PAGE_SIZE).enumerate() {
        let end = before.len();
        let old = &before[(page * PAGE_SIZE).min(end)..((page + 1) * PAGE_SIZE).min(end)];
        let (same, behind) = bytes.split_at(old.len());
        if same != old || !is_zero(behind) {
            bitmap[page / 8] |= 1 << (page % 8);
            changed.extend_from_slice(bytes);
        }
    }
    changed.len() < now.len()
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
