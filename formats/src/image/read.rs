//! An image back into raw bytes, on all cores, every chunk verified before it is handed over.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use zstd::{bulk::Decompressor, zstd_safe};

use super::{
    BATCH, Control, RECORD_LEN, Record, Sink,
    index::{Index, Parser},
    is_zero,
};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord, snapshot_dir::Snapshot};

/// Bytes of the index that are read at once; a multiple of [`RECORD_LEN`].
const INDEX_STEP: usize = 4096 * RECORD_LEN;
/// Most bytes of frames that a worker reads at once, unless one frame is longer.
const READ_STEP: u64 = 1 << 20;

/// An image of a snapshot, its index checked against the manifest.
#[derive(Debug)]
pub struct ImageReader {
    record: ImageRecord,
    index: Index,
    data: File,
}

/// What [`ImageReader::load`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Raw bytes of the image.
    pub size: u64,
    /// Raw bytes in zero chunks.
    pub zero: u64,
    /// Bytes of frames that were decompressed, counting a frame each time.
    pub stored: u64,
}

impl ImageReader {
    /// Opens the image called `name` and checks its index: the file's digest, every record, and that
    /// the records make up the image digest. No chunk has been looked at yet.
    pub fn open(snapshot: &Snapshot, name: &str) -> Result<Self, FormatError> {
        let record = snapshot.manifest().image(name)?.clone();
        let (data, data_file) = snapshot.open_file(&record.data_file())?;
        let (mut file, index_file) = snapshot.open_file(&record.index_file())?;
        let io = |error| FormatError::io(&index_file.name, "read", error);
        let mut parser = Parser::new(&record, data_file.length);
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; INDEX_STEP];
        let mut left = index_file.length;
        while left > 0 {
            let step = &mut buffer[..left.min(INDEX_STEP as u64) as usize];
            file.read_exact(step).map_err(io)?;
            hasher.update(step);
            // A damaged byte is reported as such, with both digests, rather than as the odd value
            // that it makes; only a file that its digest confirms is wrong in its values.
            if let Err(error) = parser.records(step) {
                std::io::copy(&mut file, &mut hasher).map_err(io)?;
                index_file.check(hasher.finalize().into())?;
                return Err(error);
            }
            left -= step.len() as u64;
        }
        index_file.check(hasher.finalize().into())?;
        Ok(Self { index: parser.finish()?, record: record.clone(), data })
    }

    /// The checked index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The image's record in the manifest.
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }

    /// A reader of single chunks, for one thread. It reads the frames of the `ahead` chunks that
    /// follow at the same time, where they lie one behind the other.
    pub fn chunks(&self, ahead: u64) -> Result<ChunkReader<'_>, FormatError> {
        let decompressor = Decompressor::new()
            .map_err(|error| FormatError::io(self.record.data_file(), "decompress", error))?;
        Ok(ChunkReader {
            image: self,
            ahead,
            decompressor,
            raw: vec![0; self.record.chunk_size as usize],
            frames: Vec::new(),
            frames_at: 0,
        })
    }

    /// Hands every chunk to `sink`, verified, from many threads and in no particular order; zero chunks
    /// only if the sink needs them. After an error the sink has some of the chunks. The error is the
    /// one of the lowest-numbered chunk that is damaged.
    pub fn load(&self, sink: &dyn Sink, control: Control<'_>) -> Result<Loaded, FormatError> {
        let job = Load {
            image: self,
            sink,
            control,
            next: AtomicU64::new(0),
            failed: Mutex::new((u64::MAX, None)),
            stop: AtomicU64::new(u64::MAX),
            done: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        };
        let layout = self.index.layout();
        std::thread::scope(|scope| {
            for _ in 1..layout.batches().min(control.threads.get() as u64) {
                scope.spawn(|| job.work());
            }
            job.work();
        });
        if let (_, Some(error)) = job.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let records = self.index.records().iter().zip(0..);
        let zeros = records.filter(|(record, _)| **record == Record::Zero);
        Ok(Loaded {
            size: layout.size,
            zero: zeros.map(|(_, chunk)| layout.len(chunk) as u64).sum(),
            stored: job.stored.into_inner(),
        })
    }
}

/// Reads chunks of an image one at a time. See [`ImageReader::chunks`].
pub struct ChunkReader<'a> {
    image: &'a ImageReader,
    ahead: u64,
    decompressor: Decompressor<'static>,
    raw: Vec<u8>,
    /// Frames read ahead, and the offset of the first in the data file.
    frames: Vec<u8>,
    frames_at: u64,
}

impl ChunkReader<'_> {
    /// The raw, verified bytes of `chunk`, which is less than the index's number of records; `None`
    /// if all are zero. The last chunk ends where the image ends.
    pub fn read(&mut self, chunk: u64) -> Result<Option<&[u8]>, FormatError> {
        let Record::Data { offset, length, digest } = self.image.index.records()[chunk as usize]
        else {
            return Ok(None);
        };
        self.fill(chunk, offset, length.into())?;
        let start = (offset - self.frames_at) as usize;
        let frame = &self.frames[start..start + length as usize];
        let wrong = |why: String| {
            Err(FormatError::Chunk { file: self.image.record.data_file(), chunk, why })
        };
        let end = zstd_safe::find_frame_compressed_size(frame);
        if end != Ok(frame.len()) {
            // What is damaged inside shows below; a second frame behind the first shows only here.
            if let Ok(end) = end {
                return wrong(format!("the frame ends after {end} of {length} bytes"));
            }
        }
        match self.decompressor.decompress_to_buffer(frame, &mut self.raw[..]) {
            Ok(len) if len == self.raw.len() => {}
            Ok(len) => {
                return wrong(format!("{len} bytes decompressed, expected {}", self.raw.len()));
            }
            Err(error) => return wrong(format!("does not decompress to the chunk size: {error}")),
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
            false => wrong("bytes behind the end of the image are not zero".to_owned()),
        }
    }

    /// Makes `frames` hold the frame at `offset`.
    fn fill(&mut self, chunk: u64, offset: u64, length: u64) -> Result<(), FormatError> {
        let have = self.frames_at..self.frames_at + self.frames.len() as u64;
        if have.start <= offset && offset + length <= have.end {
            return Ok(());
        }
        let records = self.image.index.records();
        let last = (chunk + 1).saturating_add(self.ahead).min(records.len() as u64);
        let mut end = offset + length;
        for record in &records[chunk as usize + 1..last as usize] {
            match record {
                Record::Data { offset, length, .. }
                    if *offset == end && end - offset < READ_STEP =>
                {
                    end += u64::from(*length);
                }
                _ => {}
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

struct Load<'a> {
    image: &'a ImageReader,
    sink: &'a dyn Sink,
    control: Control<'a>,
    /// The next batch that nobody works on.
    next: AtomicU64,
    /// The lowest chunk that failed.
    failed: Mutex<(u64, Option<FormatError>)>,
    /// No chunk from this one on is worth looking at.
    stop: AtomicU64,
    done: AtomicU64,
    stored: AtomicU64,
}

impl Load<'_> {
    fn work(&self) {
        let layout = self.image.index.layout();
        let mut reader = None;
        loop {
            let batch = self.next.fetch_add(1, Ordering::Relaxed);
            if batch >= layout.batches() {
                return;
            }
            for chunk in layout.batch(batch) {
                if chunk >= self.stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.chunk(&mut reader, chunk) {
                    return self.fail(chunk, error);
                }
            }
            let bytes: u64 = layout.batch(batch).map(|chunk| layout.len(chunk) as u64).sum();
            let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            self.control.progress.advanced(done, layout.size, self.stored.load(Ordering::Relaxed));
        }
    }

    fn chunk<'a>(
        &'a self,
        reader: &mut Option<ChunkReader<'a>>,
        chunk: u64,
    ) -> Result<(), FormatError> {
        self.control.check()?;
        let layout = self.image.index.layout();
        let record = self.image.index.records()[chunk as usize];
        if record == Record::Zero && self.sink.is_zero(layout.offset(chunk), layout.len(chunk)) {
            return Ok(());
        }
        let reader = match reader {
            Some(reader) => reader,
            none => none.insert(self.image.chunks(BATCH)?),
        };
        let zeros;
        let bytes = match reader.read(chunk)? {
            Some(bytes) => bytes,
            None => {
                zeros = vec![0; layout.len(chunk)];
                &zeros
            }
        };
        if let Record::Data { length, .. } = record {
            self.stored.fetch_add(length.into(), Ordering::Relaxed);
        }
        let written = self.sink.write(layout.offset(chunk), bytes);
        written.map_err(|error| FormatError::io(&self.image.record.name, "write back", error))
    }

    fn fail(&self, chunk: u64, error: FormatError) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if chunk < failed.0 {
            *failed = (chunk, Some(error));
            self.stop.store(chunk, Ordering::Relaxed);
        }
    }
}
