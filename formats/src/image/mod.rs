//! Chunked images: guest RAM and disks, as `NAME.idx` and `NAME.zst`.
//!
//! A raw image of any size is cut into chunks of one size, a power of two; the last chunk is
//! continued with zeros. The index holds one fixed-size record for each run of equal chunks, the data
//! file one independent zstd frame for each different chunk that is not all zeros, in the order of their
//! first use. So what an image costs follows what is in it: a source says where it may have something
//! else than zeros, and nobody looks at the rest.
//!
//! In a difference to a parent snapshot, a chunk that is the parent's chunk of the same number is a *parent*
//! record without bytes, and one that shares pages with it may be a *patch*: the changed pages only.
//!
//! An image may have its raw bytes in a file `NAME.raw` instead of frames, a clone of where they came from;
//! then a chunk that is not all zeros is a *raw* record, and lies there at its own place.
//!
//! The *image digest* is the blake3 over the runs of chunks with equal digests, see [`Scheme`], followed by
//! the raw size and the chunk size as u64. It depends on the raw bytes and the chunk size only.

mod digest;
mod index;
mod pipeline;
mod plan;
mod raw;
mod read;
mod reorder;
mod runs;
mod source;
mod write;

use std::{
    io,
    num::NonZeroUsize,
    ops::{Range, RangeInclusive},
    sync::atomic::{AtomicBool, Ordering},
};

pub use digest::{
    ImageDigest, digest_and_keep, digest_chunks, digest_file, digest_reader, digest_source,
};
pub use index::{Beside, HEADER_LEN, Index, RECORD_LEN, Record, header as index_header};
pub use raw::write_raw_image;
pub use read::{ChunkReader, ImageReader, Loaded};
pub use reorder::reorder_image;
pub use runs::DigestRuns;
pub use source::{FileSource, ImageSource};
pub use write::{ImageOptions, WrittenImage, write_diff, write_image};

use crate::{digest::Digest, error::FormatError};

/// Size of a chunk unless a writer is told otherwise, in bytes.
pub const CHUNK_SIZE: u32 = 64 << 10;
/// Smallest chunk size in bytes: Apple's page.
pub const MIN_CHUNK_SIZE: u32 = 16 << 10;
/// Largest chunk size in bytes.
pub const MAX_CHUNK_SIZE: u32 = 4 << 20;
/// Largest raw image, in bytes.
pub const MAX_SIZE: u64 = 16 << 40;
/// Granularity of a patch in bytes: the guest's smallest page.
pub const PAGE_SIZE: usize = 4096;
/// Most worker threads of an operation. Each holds up to 16 MiB.
pub const MAX_THREADS: usize = 256;
/// The zstd level of the frames unless a writer is told otherwise.
pub const LEVEL: i32 = 1;

/// Raw bytes that a worker takes at once, unless one chunk has more. Enough for sequential I/O, few enough
/// for all cores to finish together.
const BATCH: u32 = 1 << 20;

/// How a format counts the chunks of an image, in its index and in its image digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Formats 1.0 to 1.3: each on its own. The image digest is over the digest of every chunk.
    Chunks,
    /// From format 1.4 on: by runs. The image digest is over each longest run of chunks with equal digests:
    /// their number as u64, and the digest.
    Runs,
}

impl Scheme {
    /// That of the snapshots that this build writes.
    pub const WRITTEN: Self = Self::Runs;
}

/// Where the raw bytes of an image come from. Called from many threads at once.
pub trait Source: Sync {
    /// Size of the raw image in bytes.
    fn size(&self) -> u64;

    /// Reads the bytes at `offset` into all of `into`, which lies inside the image; or answers
    /// [`Content::Zero`] if they are known to be zero without reading, and leaves `into` as it is.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content>;

    /// The first bytes at or behind `offset` that may be something else than zeros, found without reading
    /// any; `None` if there are none up to the end. What lies before them is not asked for.
    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then(|| offset..self.size()))
    }

    /// blake3 of the `len` bytes at `offset`, if it is known without reading: nobody has written to them
    /// since they were digested. Asked for whole chunks only, of the chunk size of whoever asks. A wrong
    /// answer makes a wrong image.
    fn known_digest(&self, _offset: u64, _len: usize) -> Option<Digest> {
        None
    }
}

/// What a [`Source`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All bytes are zero; they have not been read.
    Zero,
    /// The bytes have been read.
    Data,
}

/// Where the raw bytes of an image go. Called from many threads at once.
pub trait Sink: Sync {
    /// Whether the `len` bytes at `offset` are known to be zero, so that zeros need not be
    /// written there.
    fn is_zero(&self, offset: u64, len: u64) -> bool;

    /// Takes the verified `bytes` of one chunk, which belong at `offset` of the image.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Told how far a long operation is.
pub trait Progress: Sync {
    /// `done` of `total` raw bytes are through; `stored` bytes have been written or read on disk for
    /// them. Called from any thread, every few megabytes.
    fn advanced(&self, done: u64, total: u64, stored: u64);
}

/// Progress that nobody looks at.
impl Progress for () {
    fn advanced(&self, _: u64, _: u64, _: u64) {}
}

/// How a long operation runs: threads, progress, and a way to stop it.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    /// Worker threads; more than [`MAX_THREADS`] count as so many.
    pub threads: NonZeroUsize,
    /// Told how far it is.
    pub progress: &'a dyn Progress,
    /// Set by anyone to make the operation end with [`FormatError::Cancelled`].
    pub cancel: &'a AtomicBool,
}

impl Default for Control<'_> {
    /// All cores, no progress, never cancelled.
    fn default() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { threads, progress: &(), cancel: &NEVER }
    }
}

impl Control<'_> {
    /// How many worker threads there are to be.
    fn workers(&self) -> u64 {
        self.threads.get().min(MAX_THREADS) as u64
    }

    /// The error of a cancelled operation if the caller asked to stop.
    pub fn check(&self) -> Result<(), FormatError> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(FormatError::Cancelled),
            false => Ok(()),
        }
    }
}

/// Whether `size` can be a chunk size: a power of two from [`MIN_CHUNK_SIZE`] to [`MAX_CHUNK_SIZE`].
pub fn is_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&size)
}

/// The levels that zstd has.
pub fn levels() -> RangeInclusive<i32> {
    zstd::compression_level_range()
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Wide blocks without an early exit inside them, so that the compiler uses vector registers.
    let (blocks, rest) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Bytes of a patch's bitmap: one bit a page.
fn bitmap_len(chunk_size: u32) -> usize {
    (chunk_size as usize / PAGE_SIZE).div_ceil(8)
}

/// The digest of a chunk of `chunk_size` zeros.
pub fn zero_digest(chunk_size: u32) -> Digest {
    Digest::of(&vec![0; chunk_size as usize])
}

/// A place in the cut of an image into chunks.
#[derive(Clone, Copy, Debug)]
struct Layout {
    size: u64,
    chunk_size: u32,
}

impl Layout {
    /// Whether the image `name` can be so large.
    fn check(self, name: &str) -> Result<(), FormatError> {
        match self.size <= MAX_SIZE {
            true => Ok(()),
            false => {
                let why = format!("{} bytes, at most {MAX_SIZE}", self.size);
                Err(FormatError::field(name, "size", why))
            }
        }
    }

    fn chunks(self) -> u64 {
        self.size.div_ceil(u64::from(self.chunk_size))
    }

    /// Chunks in a batch, which is what a worker takes at once.
    fn batch_len(self) -> u64 {
        (BATCH / self.chunk_size).max(1).into()
    }

    /// Raw bytes in those chunks.
    fn bytes(self, chunks: &Range<u64>) -> u64 {
        self.offset(chunks.end).min(self.size) - self.offset(chunks.start).min(self.size)
    }

    fn offset(self, chunk: u64) -> u64 {
        chunk * u64::from(self.chunk_size)
    }

    /// The digest of `chunk`, if it is a whole one and `source` knows it without reading.
    fn known_digest(self, source: &dyn Source, chunk: u64) -> Option<Digest> {
        let len = self.len(chunk);
        match len == self.chunk_size as usize {
            true => source.known_digest(self.offset(chunk), len),
            false => None,
        }
    }

    /// Bytes of the raw image in a chunk: less than the chunk size in the last one.
    fn len(self, chunk: u64) -> usize {
        (self.size - self.offset(chunk)).min(u64::from(self.chunk_size)) as usize
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A source over bytes in memory.
    pub(crate) struct Bytes(pub(crate) Vec<u8>);

    impl Source for Bytes {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
            into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
            Ok(Content::Data)
        }
    }

    #[test]
    fn a_single_byte_anywhere_is_not_zero() {
        for len in [0, 1, 255, 256, 257, 1000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn chunk_sizes_are_powers_of_two_within_limits() {
        for size in [0, 1, 4096, 8192, 65535, 65537, 8 << 20, u32::MAX] {
            assert!(!is_chunk_size(size), "{size}");
        }
        for size in [16 << 10, 64 << 10, 4 << 20] {
            assert!(is_chunk_size(size), "{size}");
        }
    }
}
