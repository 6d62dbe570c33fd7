//! The index: one record of 48 bytes a chunk.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | kind: 0 zero, 1 data, 2 patch, 3 parent |
//! | 1 | 3 | zero |
//! | 4 | 4 | length of the frame in bytes |
//! | 8 | 8 | offset of the frame in the data file |
//! | 16 | 32 | blake3 of the raw chunk |

use super::{Layout, digest::ImageHasher, zero_digest};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord};

/// Length of a record in bytes.
pub const RECORD_LEN: usize = 48;

const ZERO: u8 = 0;
const DATA: u8 = 1;
const PATCH: u8 = 2;
const PARENT: u8 = 3;

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
}

impl Record {
    /// The bytes of the record; `zero` is the digest of a chunk of zeros.
    pub fn encode(&self, zero: Digest) -> [u8; RECORD_LEN] {
        let (kind, length, offset, digest) = match self {
            Self::Zero => (ZERO, 0, 0, zero),
            Self::Data { offset, length, digest } => (DATA, *length, *offset, *digest),
        };
        let mut bytes = [0; RECORD_LEN];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&u32::to_le_bytes(length));
        bytes[8..16].copy_from_slice(&u64::to_le_bytes(offset));
        bytes[16..48].copy_from_slice(&digest.0);
        bytes
    }
}

/// The parsed and checked index of an image.
#[derive(Clone, Debug)]
pub struct Index {
    layout: Layout,
    zero: Digest,
    records: Vec<Record>,
}

impl Index {
    /// Size of the raw image in bytes.
    pub fn size(&self) -> u64 {
        self.layout.size
    }

    /// Size of a chunk in bytes.
    pub fn chunk_size(&self) -> u32 {
        self.layout.chunk_size
    }

    /// One record a chunk.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// blake3 of the raw chunk, for every chunk in order.
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.records.iter().map(|record| match record {
            Record::Zero => self.zero,
            Record::Data { digest, .. } => *digest,
        })
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

/// Takes an index apart record by record, so that a hostile one claims no more memory than it has bytes.
pub(super) struct Parser<'a> {
    image: &'a ImageRecord,
    layout: Layout,
    data_length: u64,
    zero: Digest,
    longest_frame: u32,
    hasher: ImageHasher,
    records: Vec<Record>,
}

impl<'a> Parser<'a> {
    /// For the index of `image`, whose data file is `data_length` bytes long.
    pub(super) fn new(image: &'a ImageRecord, data_length: u64) -> Self {
        let layout = Layout { size: image.size, chunk_size: image.chunk_size };
        Self {
            image,
            layout,
            data_length,
            zero: zero_digest(image.chunk_size),
            longest_frame: zstd::zstd_safe::compress_bound(image.chunk_size as usize) as u32,
            hasher: ImageHasher::new(),
            records: Vec::new(),
        }
    }

    /// Takes the next whole records.
    pub(super) fn records(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let (records, rest) = bytes.as_chunks::<RECORD_LEN>();
        debug_assert!(rest.is_empty());
        records.iter().try_for_each(|record| self.record(record))
    }

    /// The index, if all records were there and make up the image digest of the manifest.
    pub(super) fn finish(self) -> Result<Index, FormatError> {
        if self.records.len() as u64 != self.layout.chunks() {
            return Err(FormatError::Length {
                file: self.image.index_file(),
                what: "the file".into(),
                expected: self.layout.chunks() * RECORD_LEN as u64,
                found: (self.records.len() * RECORD_LEN) as u64,
            });
        }
        let found = self.hasher.finish(self.layout);
        if found != self.image.digest {
            return Err(FormatError::Digest {
                file: self.image.index_file(),
                what: "the image digest".into(),
                expected: self.image.digest,
                found,
            });
        }
        Ok(Index { layout: self.layout, zero: self.zero, records: self.records })
    }

    fn record(&mut self, bytes: &[u8; RECORD_LEN]) -> Result<(), FormatError> {
        let chunk = self.records.len() as u64;
        let [kind, pad @ .., l0, l1, l2, l3] =
            bytes.first_chunk::<8>().copied().unwrap_or_default();
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let mut offset = [0; 8];
        offset.copy_from_slice(&bytes[8..16]);
        let offset = u64::from_le_bytes(offset);
        let mut digest = Digest([0; 32]);
        digest.0.copy_from_slice(&bytes[16..48]);
        let wrong = |what: &str, why: String| {
            Err(FormatError::field(self.image.index_file(), format!("chunk {chunk}: {what}"), why))
        };
        if pad != [0; 3] {
            return wrong("reserved bytes", format!("{pad:?} instead of zeros"));
        }
        let record = match kind {
            ZERO if (offset, length) != (0, 0) => {
                return wrong("frame", format!("{length} bytes at {offset} for a zero chunk"));
            }
            ZERO if digest != self.zero => {
                return wrong("digest", format!("{digest}, a zero chunk has {}", self.zero));
            }
            ZERO => Record::Zero,
            DATA if length == 0 || length > self.longest_frame => {
                let limit = self.longest_frame;
                return wrong("frame length", format!("{length}, it must be 1 to {limit}"));
            }
            DATA if offset.checked_add(length.into()).is_none_or(|end| end > self.data_length) => {
                let (file, end) = (self.image.data_file(), self.data_length);
                return wrong("frame", format!("{length} bytes at {offset}, {file} has {end}"));
            }
            DATA => Record::Data { offset, length, digest },
            PATCH | PARENT => {
                return Err(FormatError::NotSupported {
                    file: self.image.index_file(),
                    chunk,
                    kind: if kind == PATCH { "patch" } else { "parent" },
                });
            }
            other => return wrong("kind", format!("{other} is not known")),
        };
        self.hasher.chunk(digest);
        self.records.push(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageRecord {
        let digest = Digest::of(b"");
        ImageRecord { name: "memory".into(), size: 3 << 16, chunk_size: 1 << 16, digest }
    }

    fn first_record(change: impl Fn(&mut [u8; RECORD_LEN])) -> Result<(), FormatError> {
        let image = image();
        let mut parser = Parser::new(&image, 1000);
        let data = Record::Data { offset: 100, length: 900, digest: Digest::of(b"x") };
        let mut bytes = data.encode(parser.zero);
        change(&mut bytes);
        parser.records(&bytes)
    }

    #[test]
    fn a_record_that_no_writer_writes_is_refused_by_name() {
        type Change = fn(&mut [u8; RECORD_LEN]);
        let cases: &[(&str, Change)] = &[
            ("chunk 0: kind: 4 is not known", |r| r[0] = 4),
            ("chunk 0 is a patch record", |r| r[0] = 2),
            ("chunk 0 is a parent record", |r| r[0] = 3),
            ("chunk 0: frame: 900 bytes at 100 for a zero chunk", |r| r[0] = 0),
            ("chunk 0: reserved bytes", |r| r[3] = 1),
            ("chunk 0: frame length: 0", |r| r[4..8].fill(0)),
            ("chunk 0: frame length: 4294967295", |r| r[4..8].fill(0xff)),
            ("memory.zst has 1000", |r| r[8] = 101),
            ("memory.zst has 1000", |r| r[8..16].fill(0xff)),
            ("a zero chunk has", |r| r[..16].fill(0)),
        ];
        for (expected, change) in cases {
            let text = first_record(change).expect_err(expected).to_string();
            assert!(text.starts_with("memory.idx"), "{text}");
            assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        }
        first_record(|_| ()).unwrap();
    }

    #[test]
    fn records_that_do_not_make_up_the_image_digest_are_refused() {
        let image = image();
        let mut parser = Parser::new(&image, 1000);
        let zero = Record::Zero.encode(parser.zero);
        parser.records(&[zero, zero].concat()).unwrap();
        assert!(matches!(parser.finish(), Err(FormatError::Length { found: 96, .. })));
        let mut parser = Parser::new(&image, 1000);
        parser.records(&[zero, zero, zero].concat()).unwrap();
        assert!(matches!(parser.finish(), Err(FormatError::Digest { .. })));
    }
}
