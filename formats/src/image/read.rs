//! An image back into raw bytes, on all cores, every chunk verified before it is handed over.

use std::{
    fs::File,
    io::Read,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use zstd::{bulk::Decompressor, zstd_safe};

use super::{
    Control, PAGE_SIZE, RECORD_LEN, Record, Sink, bitmap_len,
    index::{Beside, Index, Parser},
    is_zero,
    plan::Plan,
};
use crate::{
    digest::Digest, error::FormatError, manifest::ImageRecord, snapshot_dir::Snapshot,
    storage::next_data,
};

/// Bytes of the index that are read at once; a multiple of [`RECORD_LEN`].
const INDEX_STEP: usize = 4096 * RECORD_LEN;
/// Most bytes of frames that a worker reads at once, unless one frame is longer.
const READ_STEP: u64 = 1 << 20;
/// Most bytes between two frames that are read along with them, since that is faster than two reads.
const READ_GAP: u64 = 32 << 10;
/// Most chunks that are looked at for frames to read ahead.
const MAX_AHEAD: usize = 256;

/// An image of a snapshot, its index checked against the manifest. Clones and the readers of
/// [`chunks`](Self::chunks) share what is open, so that they can live in threads of their own.
#[derive(Clone, Debug)]
pub struct ImageReader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    record: ImageRecord,
    index: Index,
    data: File,
    /// The raw bytes, if the image is stored so.
    raw: Option<File>,
    base: Option<Base>,
}

/// The parent's image that a difference builds on.
#[derive(Debug)]
struct Base {
    image: ImageReader,
    /// Where the parent lies, for errors.
    dir: PathBuf,
}

/// What [`ImageReader::load`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Raw bytes of the image.
    pub size: u64,
    /// Raw bytes in zero chunks.
    pub zero: u64,
    /// Bytes of frames that were decompressed, counting a frame each time, and of raw chunks that were read.
    pub stored: u64,
}

impl ImageReader {
    /// Opens the image called `name` and checks its index: the file's digest, every record, and that
    /// the records make up the image digest; and likewise the parent's image where the index needs it,
    /// which only a snapshot from [`Snapshot::open_chain`] has. No chunk has been looked at yet.
    pub fn open(snapshot: &Snapshot, name: &str) -> Result<Self, FormatError> {
        let mut image = Inner::open(snapshot, name)?;
        let needs_base =
            |record: &Record| matches!(record, Record::Patch { .. } | Record::Parent { .. });
        if let Some(id) = snapshot.manifest().parent
            && image.index.runs().any(|(_, record)| needs_base(record))
        {
            let parent = snapshot.parent().ok_or_else(|| FormatError::MissingParent {
                path: snapshot.path().to_owned(),
                id,
                looked: Vec::new(),
            })?;
            let base = Self::open(parent, name).map_err(|error| error.within(parent.path()))?;
            image.check_base(&base)?;
            image.base = Some(Base { image: base, dir: parent.path().to_owned() });
        }
        Ok(Self { inner: Arc::new(image) })
    }

    /// The checked index of the image called `name`. The parent of a difference is not needed for it.
    pub fn open_index(snapshot: &Snapshot, name: &str) -> Result<Index, FormatError> {
        Ok(Inner::open(snapshot, name)?.index)
    }

    /// The checked index.
    pub fn index(&self) -> &Index {
        &self.inner.index
    }

    /// The image's record in the manifest.
    pub fn record(&self) -> &ImageRecord {
        &self.inner.record
    }

    /// A reader of single chunks, for one thread. It reads the frames of the `ahead` chunks that
    /// follow at the same time, where they lie close behind each other. Readers are cheap.
    pub fn chunks(&self, ahead: u64) -> Result<ChunkReader, FormatError> {
        let decompressor = Decompressor::new()
            .map_err(|error| FormatError::io(self.record().data_file(), "decompress", error))?;
        Ok(ChunkReader {
            image: self.inner.clone(),
            ahead,
            decompressor,
            raw: Vec::new(),
            pages: Vec::new(),
            frames: Vec::new(),
            frames_at: 0,
            stored: 0,
            base: None,
        })
    }

    /// Verifies every chunk, and that the raw file, if the image has one, is zero where the index says so: then
    /// its bytes have the image digest. The error is the one of the lowest-numbered chunk that is damaged; a
    /// chunk of zeros is looked at when all others are right.
    pub fn verify(&self, control: Control<'_>) -> Result<Loaded, FormatError> {
        let loaded = self.run(&Nowhere, Plan::to_verify(self), control)?;
        self.check_raw_zeros(control)?;
        Ok(loaded)
    }

    fn check_raw_zeros(&self, control: Control<'_>) -> Result<(), FormatError> {
        let Some(file) = &self.inner.raw else { return Ok(()) };
        let layout = self.index().layout();
        let mut raw = vec![0; layout.chunk_size as usize];
        let zeros = self.index().runs().filter(|(_, record)| **record == Record::Zero);
        for (mut chunks, _) in zeros {
            let end = layout.offset(chunks.end).min(layout.size);
            while let Some(data) = next_data(file, layout.offset(chunks.start), end) {
                let first = data.start / u64::from(layout.chunk_size);
                let behind = data.end.div_ceil(layout.chunk_size.into());
                for chunk in first..behind {
                    control.check()?;
                    self.inner.fill_raw(chunk, &mut raw)?;
                    self.inner.check_raw(chunk, self.index().digest(chunk), &raw)?;
                }
                chunks.start = behind;
            }
        }
        Ok(())
    }

    /// The chunk up to which all from `chunk` on have their bytes from one place.
    pub(super) fn same_until(&self, chunk: u64) -> u64 {
        let (record, run) = (self.index().record(chunk), self.index().digest_run(chunk));
        let end = run.map_or(chunk + 1, |(_, count)| chunk + count);
        match (record, &self.inner.base) {
            (Record::Zero | Record::Data { .. }, _) => end,
            (Record::Parent { .. }, Some(base)) => end.min(base.image.same_until(chunk)),
            _ => chunk + 1,
        }
    }

    /// The file with the raw bytes, if the image is stored so.
    pub(super) fn raw(&self) -> Option<&File> {
        self.inner.raw.as_ref()
    }

    /// Hands every chunk to `sink`, verified, from many threads and in no particular order; zero chunks
    /// only if the sink needs them. After an error the sink has some of the chunks. The error is the
    /// one of the lowest-numbered chunk that is damaged.
    pub fn load(&self, sink: &dyn Sink, control: Control<'_>) -> Result<Loaded, FormatError> {
        let plan = match sink.is_zero(0, self.index().size()) {
            true => Plan::of_index(self.index()),
            false => Plan::all(self.index().layout()),
        };
        self.run(sink, plan, control)
    }

    fn run<'a>(
        &'a self,
        sink: &'a dyn Sink,
        plan: Plan<'a>,
        control: Control<'a>,
    ) -> Result<Loaded, FormatError> {
        let job = Load {
            image: self,
            sink,
            control,
            plan: Mutex::new(plan),
            failed: Mutex::new((u64::MAX, None)),
            stop: AtomicU64::new(u64::MAX),
            done: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        };
        let layout = self.index().layout();
        thread::scope(|scope| {
            let most = layout.chunks().div_ceil(layout.batch_len());
            for _ in 1..most.min(control.workers()) {
                // This thread works too: without any other it takes longer.
                if thread::Builder::new().spawn_scoped(scope, || job.work()).is_err() {
                    break;
                }
            }
            job.work();
        });
        if let (_, Some(error)) = job.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        control.check()?;
        let zeros = self.index().runs().filter(|(_, record)| **record == Record::Zero);
        Ok(Loaded {
            size: layout.size,
            zero: zeros.map(|(chunks, _)| layout.bytes(&chunks)).sum(),
            stored: job.stored.into_inner(),
        })
    }
}

/// Reads chunks of an image one at a time. See [`ImageReader::chunks`].
pub struct ChunkReader {
    image: Arc<Inner>,
    ahead: u64,
    decompressor: Decompressor<'static>,
    raw: Vec<u8>,
    /// The pages of a patch.
    pages: Vec<u8>,
    /// Frames read ahead, and the offset of the first in the data file.
    frames: Vec<u8>,
    frames_at: u64,
    /// Bytes of the frames decompressed and raw chunks read so far.
    stored: u64,
    /// The reader of the parent's image, once a chunk has needed it.
    base: Option<Box<ChunkReader>>,
}

impl ChunkReader {
    /// The raw, verified bytes of `chunk`, which is less than the index's number of records; `None`
    /// if all are zero. The last chunk ends where the image ends.
    pub fn read(&mut self, chunk: u64) -> Result<Option<&[u8]>, FormatError> {
        let record = self.image.index.record(chunk);
        let digest = match record {
            Record::Zero => return Ok(None),
            Record::Parent { .. } => return self.read_base(chunk),
            Record::Raw { digest } => return self.read_raw(chunk, digest).map(Some),
            Record::Data { digest, .. } | Record::Patch { digest, .. } => digest,
        };
        let (offset, length) = record.stored().unwrap_or_default();
        let image = self.image.clone();
        let last = (chunk + 1).saturating_add(self.ahead);
        let following = image.index.runs_from(chunk + 1);
        let following = following.take_while(|(chunks, _)| chunks.start < last);
        self.fill(offset, length, following.filter_map(|(_, record)| record.stored()))?;
        let start = (offset - self.frames_at) as usize;
        let stored = start..start + length as usize;
        self.stored += u64::from(length);
        match record {
            Record::Patch { .. } => self.patch(chunk, stored)?,
            _ => {
                self.raw.resize(self.image.record.chunk_size as usize, 0);
                let frame = &self.frames[stored];
                let done = decompress(&mut self.decompressor, frame, &mut self.raw);
                done.map_err(|why| self.image.chunk_error(chunk, why))?;
            }
        }
        let found = Digest::of(&self.raw);
        if found != digest {
            return Err(FormatError::Digest {
                file: self.image.record.data_file(),
                what: format!("chunk {chunk}"),
                expected: digest,
                found,
            });
        }
        let (bytes, behind) = self.raw.split_at(self.image.index.layout().len(chunk));
        match is_zero(behind) {
            true => Ok(Some(bytes)),
            false => {
                let why = "bytes behind the end of the image are not zero".to_owned();
                Err(self.image.chunk_error(chunk, why))
            }
        }
    }

    /// The chunk from the raw file, verified.
    fn read_raw(&mut self, chunk: u64, digest: Digest) -> Result<&[u8], FormatError> {
        self.raw.resize(self.image.record.chunk_size as usize, 0);
        let len = self.image.fill_raw(chunk, &mut self.raw)?;
        self.stored += len as u64;
        self.image.check_raw(chunk, digest, &self.raw)?;
        Ok(&self.raw[..len])
    }

    /// Bytes of frames that were decompressed and raw chunks that were read since the last call, the parents'
    /// included.
    fn take_stored(&mut self) -> u64 {
        let base = self.base.as_mut().map_or(0, |base| base.take_stored());
        std::mem::take(&mut self.stored).saturating_add(base)
    }

    /// The parent's chunk, verified by the parent's own digest.
    fn read_base(&mut self, chunk: u64) -> Result<Option<&[u8]>, FormatError> {
        let image = self.image.clone();
        let Some(base) = &image.base else {
            // An image with such records is not opened without its base.
            return Err(image.chunk_error(chunk, "there is no parent".to_owned()));
        };
        let read = self.base_reader(base)?.read(chunk);
        read.map_err(|error| error.within(&base.dir))
    }

    fn base_reader(&mut self, base: &Base) -> Result<&mut ChunkReader, FormatError> {
        Ok(match &mut self.base {
            Some(reader) => reader,
            none => none.insert(Box::new(base.image.chunks(self.ahead)?)),
        })
    }

    /// Puts the parent's chunk with the pages of the patch at `stored` of `frames` into `raw`.
    fn patch(&mut self, chunk: u64, stored: Range<usize>) -> Result<(), FormatError> {
        let chunk_size = self.image.record.chunk_size;
        let mut raw = std::mem::take(&mut self.raw);
        raw.clear();
        raw.extend_from_slice(self.read_base(chunk)?.unwrap_or_default());
        raw.resize(chunk_size as usize, 0);
        self.raw = raw;
        let (bitmap, frame) = self.frames[stored].split_at(bitmap_len(chunk_size));
        let bits: usize = bitmap.iter().map(|byte| byte.count_ones() as usize).sum();
        let wrong = |why: String| Err(self.image.chunk_error(chunk, why));
        if bits == 0 {
            return wrong("a patch without pages".to_owned());
        }
        self.pages.resize(bits * PAGE_SIZE, 0);
        if let Err(why) = decompress(&mut self.decompressor, frame, &mut self.pages) {
            return wrong(why);
        }
        let mut pages = self.pages.chunks_exact(PAGE_SIZE);
        let set = |page: &usize| bitmap[page / 8] >> (page % 8) & 1 == 1;
        for page in (0..bitmap.len() * 8).filter(set) {
            let Some(place) = self.raw.get_mut(page * PAGE_SIZE..(page + 1) * PAGE_SIZE) else {
                return wrong(format!("the patch has a page {page}"));
            };
            // There are as many pages as bits.
            place.copy_from_slice(pages.next().unwrap_or(&[0; PAGE_SIZE]));
        }
        Ok(())
    }

    /// Reads what the data file has of the first of the chunks `upcoming`, which the caller will read next
    /// and in this order, and of as many of the others as lie close behind each other in the file: a sweep in
    /// the order of the file takes few, large reads. Does nothing if the first is there already. Chunks that
    /// the image does not have are passed over.
    pub fn read_ahead(&mut self, upcoming: &[u64]) -> Result<(), FormatError> {
        let upcoming = &upcoming[..upcoming.len().min(MAX_AHEAD)];
        let image = self.image.clone();
        let chunks = image.index.chunks();
        let record = |chunk: &u64| (*chunk < chunks).then(|| image.index.record(*chunk));
        let mut places = upcoming.iter().filter_map(|chunk| record(chunk)?.stored());
        if let Some((offset, length)) = places.next() {
            self.fill(offset, length, places)?;
        }
        if let Some(base) = &image.base {
            let theirs = |chunk: &u64| {
                matches!(record(chunk), Some(Record::Parent { .. } | Record::Patch { .. }))
            };
            let theirs: Vec<u64> = upcoming.iter().copied().filter(|chunk| theirs(chunk)).collect();
            if !theirs.is_empty() {
                let read = self.base_reader(base)?.read_ahead(&theirs);
                return read.map_err(|error| error.within(&base.dir));
            }
        }
        Ok(())
    }

    /// Bytes that the data file has of `chunk`, which has just been read.
    pub(super) fn stored(&self, chunk: u64) -> &[u8] {
        let place = self.image.index.record(chunk).stored();
        let start = place.and_then(|(offset, _)| offset.checked_sub(self.frames_at));
        let end = place.zip(start).map(|((_, length), start)| start + u64::from(length));
        let range = start.zip(end).map(|(start, end)| start as usize..end as usize);
        range.and_then(|range| self.frames.get(range)).unwrap_or_default()
    }

    /// Makes `frames` hold what lies at `offset`, and what of `following` lies close behind.
    fn fill(
        &mut self,
        offset: u64,
        length: u32,
        following: impl Iterator<Item = (u64, u32)>,
    ) -> Result<(), FormatError> {
        let have = self.frames_at..self.frames_at + self.frames.len() as u64;
        let mut end = offset + u64::from(length);
        if have.start <= offset && end <= have.end {
            return Ok(());
        }
        for (at, length) in following {
            if end - offset >= READ_STEP {
                break;
            }
            if (end..=end.saturating_add(READ_GAP)).contains(&at) {
                end = at + u64::from(length);
            }
        }
        self.frames.resize((end - offset) as usize, 0);
        self.frames_at = offset;
        let read = self.image.data.read_exact_at(&mut self.frames, offset);
        if read.is_err() {
            self.frames.clear();
        }
        read.map_err(|error| FormatError::io(self.image.record.data_file(), "read", error))
    }
}

impl Inner {
    /// Whether the parent's image is the one that the index was made against.
    fn check_base(&self, base: &ImageReader) -> Result<(), FormatError> {
        let file = || self.record.index_file();
        let cut = |record: &ImageRecord| (record.size, record.chunk_size);
        let (own, theirs) = (cut(&self.record), cut(base.record()));
        if own != theirs {
            let why = format!("size and chunk size {theirs:?}, this has {own:?}");
            return Err(FormatError::field(file(), "the parent's image", why));
        }
        for (mut chunks, record) in self.index.runs() {
            let Record::Parent { digest } = record else { continue };
            while let Some(chunk) = chunks.next()
                && let Some((theirs, count)) = base.index().digest_run(chunk)
            {
                if theirs != *digest {
                    let why = format!("{digest}, the parent has {theirs}");
                    return Err(FormatError::field(file(), format!("chunk {chunk}: digest"), why));
                }
                chunks.start = chunk + count;
            }
        }
        Ok(())
    }

    fn open(snapshot: &Snapshot, name: &str) -> Result<Self, FormatError> {
        let record = snapshot.manifest().image(name)?.clone();
        let (data, data_file) = snapshot.open_file(&record.data_file())?;
        let (mut file, index_file) = snapshot.open_file(&record.index_file())?;
        let io = |error| FormatError::io(&index_file.name, "read", error);
        let raw = match snapshot.manifest().raw_file(&record) {
            Some(raw) => Some(snapshot.open_file(&raw.name)?.0),
            None => None,
        };
        let beside = Beside {
            data_length: data_file.length,
            is_diff: snapshot.manifest().parent.is_some(),
            is_raw: raw.is_some(),
            scheme: snapshot.manifest().scheme(),
        };
        let mut parser = Parser::new(&record, beside);
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; INDEX_STEP];
        let (mut left, mut header) = (index_file.length, parser.header_len());
        while left > 0 {
            let most = if header > 0 { header } else { INDEX_STEP };
            let step = &mut buffer[..left.min(most as u64) as usize];
            file.read_exact(step).map_err(io)?;
            hasher.update(step);
            let parsed = match std::mem::take(&mut header) {
                0 => parser.records(step),
                _ => parser.header(step),
            };
            // A damaged byte is reported as such, with both digests, rather than as the odd value
            // that it makes; only a file that its digest confirms is wrong in its values.
            if let Err(error) = parsed {
                std::io::copy(&mut file, &mut hasher).map_err(io)?;
                index_file.check(hasher.finalize().into())?;
                return Err(error);
            }
            left -= step.len() as u64;
        }
        index_file.check(hasher.finalize().into())?;
        Ok(Self { index: parser.finish()?, record: record.clone(), data, raw, base: None })
    }

    /// Reads the whole of `chunk` from the raw file into `raw`, which has its size, continued with zeros behind
    /// the end of the image. Answers how many bytes are before that.
    fn fill_raw(&self, chunk: u64, raw: &mut [u8]) -> Result<usize, FormatError> {
        let Some(file) = &self.raw else {
            // An image without the file has no such records.
            return Err(self.chunk_error(chunk, "there is no raw file".to_owned()));
        };
        let layout = self.index.layout();
        let (bytes, behind) = raw.split_at_mut(layout.len(chunk));
        behind.fill(0);
        let read = file.read_exact_at(bytes, layout.offset(chunk));
        read.map_err(|error| FormatError::io(self.record.raw_file(), "read", error))?;
        Ok(bytes.len())
    }

    /// Whether `raw`, the whole of `chunk` from the raw file, has the digest on record.
    fn check_raw(&self, chunk: u64, expected: Digest, raw: &[u8]) -> Result<(), FormatError> {
        let found = Digest::of(raw);
        match found == expected {
            true => Ok(()),
            false => Err(FormatError::Digest {
                file: self.record.raw_file(),
                what: format!("chunk {chunk}"),
                expected,
                found,
            }),
        }
    }

    fn chunk_error(&self, chunk: u64, why: String) -> FormatError {
        FormatError::Chunk { file: self.record.data_file(), chunk, why }
    }
}

/// Makes `frame` fill all of `into`.
fn decompress(
    decompressor: &mut Decompressor<'_>,
    frame: &[u8],
    into: &mut [u8],
) -> Result<(), String> {
    let end = zstd_safe::find_frame_compressed_size(frame);
    // What is damaged inside shows below; a second frame behind the first shows only here.
    if let Ok(end) = end
        && end != frame.len()
    {
        return Err(format!("the frame ends after {end} of {} bytes", frame.len()));
    }
    match decompressor.decompress_to_buffer(frame, into) {
        Ok(len) if len == into.len() => Ok(()),
        Ok(len) => Err(format!("{len} bytes decompressed, expected {}", into.len())),
        Err(error) => Err(format!("does not decompress to {} bytes: {error}", into.len())),
    }
}

/// Takes chunks that only had to be verified.
struct Nowhere;

impl Sink for Nowhere {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        true
    }

    fn write(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

struct Load<'a> {
    image: &'a ImageReader,
    sink: &'a dyn Sink,
    control: Control<'a>,
    /// The batches that nobody works on.
    plan: Mutex<Plan<'a>>,
    /// The lowest chunk that failed.
    failed: Mutex<(u64, Option<FormatError>)>,
    /// No chunk from this one on is worth looking at.
    stop: AtomicU64,
    done: AtomicU64,
    stored: AtomicU64,
}

impl Load<'_> {
    fn work(&self) {
        let layout = self.image.index().layout();
        let mut reader = None;
        loop {
            let next = self.plan.lock().unwrap_or_else(PoisonError::into_inner).next();
            // An index has nothing to fail with.
            let Ok(Some(batch)) = next else { return };
            for chunk in batch.chunks() {
                if chunk >= self.stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.chunk(&mut reader, chunk) {
                    return self.fail(chunk, error);
                }
            }
            let bytes = layout.bytes(&batch.span);
            let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            self.control.progress.advanced(done, layout.size, self.stored.load(Ordering::Relaxed));
        }
    }

    fn chunk(&self, reader: &mut Option<ChunkReader>, chunk: u64) -> Result<(), FormatError> {
        self.control.check()?;
        let layout = self.image.index().layout();
        let is_zero = || self.sink.is_zero(layout.offset(chunk), layout.len(chunk) as u64);
        if self.image.index().record(chunk) == Record::Zero && is_zero() {
            return Ok(());
        }
        let reader = match reader {
            Some(reader) => reader,
            none => none.insert(self.image.chunks(layout.batch_len())?),
        };
        let at = layout.offset(chunk);
        let failed = |error| FormatError::io(&self.image.record().name, "write back", error);
        match reader.read(chunk)? {
            Some(bytes) => self.sink.write(at, bytes).map_err(failed)?,
            None if is_zero() => {}
            None => self.sink.write(at, &vec![0; layout.len(chunk)]).map_err(failed)?,
        }
        self.stored.fetch_add(reader.take_stored(), Ordering::Relaxed);
        Ok(())
    }

    fn fail(&self, chunk: u64, error: FormatError) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if chunk < failed.0 {
            *failed = (chunk, Some(error));
            self.stop.store(chunk, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_shared_between_threads_and_a_reader_moves_to_one() {
        fn shared<T: Send + Sync + Clone + 'static>() {}
        fn moved<T: Send + 'static>() {}
        shared::<ImageReader>();
        moved::<ChunkReader>();
    }
}
