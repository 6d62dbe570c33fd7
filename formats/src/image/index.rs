//! The index: which chunks are where.
//!
//! In memory, and on disk from format 1.4 on, chunks in a row with equal records are one *run*, so that an index
//! is as large as what is in the image, not as the image. Before 1.4 there was a record for each chunk.
//!
//! A file of runs begins with 16 bytes: [`MAGIC`], [`VERSION`] as u16, six zeros. A record of a run, and of a
//! chunk before 1.4:
//!
//! | offset | size | field of a run | of a chunk |
//! |---|---|---|---|
//! | 0 | 1 | kind: 0 zero, 1 data, 2 patch, 3 parent, 4 raw | the same |
//! | 1 | 3 | length of the frame in bytes | zero |
//! | 4 | 4 | number of chunks | length of the frame in bytes |
//! | 8 | 8 | offset of the frame in the data file | the same |
//! | 16 | 32 | blake3 of the raw chunk | the same |

mod parser;
mod writer;

use std::ops::Range;

pub(super) use parser::Parser;
pub(super) use writer::IndexWriter;

use super::{Layout, Scheme, digest::ImageHasher};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord};

/// Length of a record in bytes.
pub const RECORD_LEN: usize = 48;
/// The first eight bytes of an index of runs.
const MAGIC: [u8; 8] = *b"\x89SQBIX\r\n";
/// The version of an index of runs that this build writes and reads.
const VERSION: u16 = 1;
/// Bytes before the first record of an index of runs.
pub const HEADER_LEN: usize = 16;

const ZERO: u8 = 0;
const DATA: u8 = 1;
const PATCH: u8 = 2;
const PARENT: u8 = 3;
const RAW: u8 = 4;

/// Where a chunk's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// All bytes are zero.
    Zero,
    /// The chunk is the zstd frame at `offset` of the data file.
    Data {
        /// Offset of the frame in bytes.
        offset: u64,
        /// Length of the frame in bytes.
        length: u32,
        /// blake3 of the raw chunk.
        digest: Digest,
    },
    /// The chunk is the parent's, with some pages replaced: a bitmap of these pages, and behind it the zstd
    /// frame of their bytes, lie at `offset` of the data file.
    Patch {
        /// Offset of the bitmap in bytes.
        offset: u64,
        /// Length of bitmap and frame in bytes.
        length: u32,
        /// blake3 of the raw chunk.
        digest: Digest,
    },
    /// The chunk is the parent's chunk of the same number.
    Parent {
        /// blake3 of the raw chunk.
        digest: Digest,
    },
    /// The chunk is what lies at its own place in the raw file.
    Raw {
        /// blake3 of the raw chunk.
        digest: Digest,
    },
}

/// What there is beside an index. It decides which records can be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beside {
    /// Length of the data file in bytes.
    pub data_length: u64,
    /// The snapshot is a difference: there is an image of the parent.
    pub is_diff: bool,
    /// There is a file with the raw bytes of the image.
    pub is_raw: bool,
    /// How the snapshot's format counts chunks.
    pub scheme: Scheme,
}

impl Record {
    /// The bytes of the record for `count` chunks in a row; `zero` is the digest of a chunk of zeros. Where
    /// each chunk is counted on its own, `count` says nothing.
    pub fn encode(&self, scheme: Scheme, count: u32, zero: Digest) -> [u8; RECORD_LEN] {
        let (kind, length, offset, digest) = match self {
            Self::Zero => (ZERO, 0, 0, zero),
            Self::Data { offset, length, digest } => (DATA, *length, *offset, *digest),
            Self::Patch { offset, length, digest } => (PATCH, *length, *offset, *digest),
            Self::Parent { digest } => (PARENT, 0, 0, *digest),
            Self::Raw { digest } => (RAW, 0, 0, *digest),
        };
        let mut bytes = [0; RECORD_LEN];
        match scheme {
            Scheme::Chunks => bytes[4..8].copy_from_slice(&length.to_le_bytes()),
            Scheme::Runs => {
                // The longest frame, of a chunk of 4 MiB, has 23 bits.
                bytes[..4].copy_from_slice(&(length << 8).to_le_bytes());
                bytes[4..8].copy_from_slice(&count.to_le_bytes());
            }
        }
        bytes[0] = kind;
        bytes[8..16].copy_from_slice(&u64::to_le_bytes(offset));
        bytes[16..48].copy_from_slice(&digest.0);
        bytes
    }

    /// Offset and length of what the data file has of the chunk.
    pub fn stored(&self) -> Option<(u64, u32)> {
        match *self {
            Self::Data { offset, length, .. } | Self::Patch { offset, length, .. } => {
                Some((offset, length))
            }
            Self::Zero | Self::Parent { .. } | Self::Raw { .. } => None,
        }
    }
}

/// The bytes before the records of an index of runs.
pub fn header() -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// The parsed and checked index of an image: runs of chunks with equal records.
#[derive(Clone, Debug)]
pub struct Index {
    layout: Layout,
    zero: Digest,
    /// The first chunk of each run. An image has at most 2^30 chunks.
    starts: Vec<u32>,
    records: Vec<Record>,
}

impl Index {
    /// Parses and checks `bytes`, the whole index of `image`. Only a difference has patch and parent
    /// records, and an image with a raw file has zero and raw records only.
    pub fn decode(image: &ImageRecord, beside: Beside, bytes: &[u8]) -> Result<Self, FormatError> {
        Self::check_length(image, beside.scheme, bytes.len() as u64)?;
        let mut parser = Parser::new(image, beside);
        let header = parser.header_len().min(bytes.len());
        parser.header(&bytes[..header])?;
        parser.records(&bytes[header..])?;
        parser.finish()
    }

    /// Whether the index of `image` can have that length in bytes.
    pub(crate) fn check_length(
        image: &ImageRecord,
        scheme: Scheme,
        length: u64,
    ) -> Result<(), FormatError> {
        let chunks = image.size.div_ceil(image.chunk_size.into());
        let record = RECORD_LEN as u64;
        let expected = match scheme {
            Scheme::Chunks => chunks * record,
            Scheme::Runs => {
                let header = HEADER_LEN as u64;
                let records = length.checked_sub(header).map(|records| records / record);
                let fit = records.unwrap_or(0).clamp(u64::from(chunks > 0), chunks);
                header + fit * record
            }
        };
        match length == expected {
            true => Ok(()),
            false => Err(FormatError::Length {
                file: image.index_file(),
                what: "the file".into(),
                expected,
                found: length,
            }),
        }
    }

    /// Size of the raw image in bytes.
    pub fn size(&self) -> u64 {
        self.layout.size
    }

    /// Size of a chunk in bytes.
    pub fn chunk_size(&self) -> u32 {
        self.layout.chunk_size
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.layout.chunks()
    }

    /// The record of that chunk, which is less than the number of chunks.
    pub fn record(&self, chunk: u64) -> Record {
        self.records[self.run_of(chunk)]
    }

    /// The record of every chunk in order. That takes as long as the image is large.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let repeated = |(chunks, record): (Range<u64>, &Record)| {
            chunks.map({
                let record = *record;
                move |_| record
            })
        };
        self.runs().flat_map(repeated)
    }

    /// Chunks in a row with equal records, and their record, in order and without a gap.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, &Record)> + '_ {
        (0..self.records.len()).map(|run| (self.run(run), &self.records[run]))
    }

    /// As [`runs`](Self::runs), from the run on that has `chunk`.
    pub(super) fn runs_from(&self, chunk: u64) -> impl Iterator<Item = (Range<u64>, &Record)> + '_ {
        let first = if chunk < self.chunks() { self.run_of(chunk) } else { self.records.len() };
        (first..self.records.len()).map(|run| (self.run(run), &self.records[run]))
    }

    /// blake3 of the raw chunk of that number, which is less than the number of chunks.
    pub fn digest(&self, chunk: u64) -> Digest {
        self.digest_of(&self.record(chunk))
    }

    /// blake3 of the raw chunk of that number, and how many chunks from there on are known to have the same;
    /// `None` if there is no such chunk.
    pub fn digest_run(&self, chunk: u64) -> Option<(Digest, u64)> {
        if chunk >= self.chunks() {
            return None;
        }
        let run = self.run_of(chunk);
        Some((self.digest_of(&self.records[run]), self.run(run).end - chunk))
    }

    /// Chunks in a row with equal digests, and that digest, in order and without a gap. Two in a row may have
    /// the same.
    pub fn digest_runs(&self) -> impl Iterator<Item = (Range<u64>, Digest)> + '_ {
        self.runs().map(|(chunks, record)| (chunks, self.digest_of(record)))
    }

    /// The first chunks at or behind `chunk` that are not known to be zero; `None` if there are none.
    pub fn next_data(&self, chunk: u64) -> Option<Range<u64>> {
        let mut runs = self.runs_from(chunk);
        let (found, _) = runs.find(|(_, record)| **record != Record::Zero)?;
        Some(found.start.max(chunk)..found.end)
    }

    /// Raw bytes in those chunks, which end where the image ends.
    pub fn bytes(&self, chunks: &Range<u64>) -> u64 {
        self.layout.bytes(chunks)
    }

    /// The image digest of the chunks, as snapshots of that scheme have it.
    pub fn image_digest(&self, scheme: Scheme) -> Digest {
        let mut hasher = ImageHasher::new(scheme);
        self.digest_runs()
            .for_each(|(chunks, digest)| hasher.add(digest, chunks.end - chunks.start));
        hasher.finish(self.layout)
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    fn run_of(&self, chunk: u64) -> usize {
        assert!(chunk < self.chunks(), "chunk {chunk} of {}", self.chunks());
        match self.starts.len() as u64 == self.chunks() {
            true => chunk as usize,
            // The first run begins at 0.
            false => self.starts.partition_point(|start| u64::from(*start) <= chunk) - 1,
        }
    }

    fn run(&self, run: usize) -> Range<u64> {
        let end = self.starts.get(run + 1).map_or(self.chunks(), |next| u64::from(*next));
        u64::from(self.starts[run])..end
    }

    fn digest_of(&self, record: &Record) -> Digest {
        match record {
            Record::Zero => self.zero,
            Record::Data { digest, .. }
            | Record::Patch { digest, .. }
            | Record::Parent { digest }
            | Record::Raw { digest } => *digest,
        }
    }
}
