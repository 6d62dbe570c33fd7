//! The index: one record of 48 bytes a chunk.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | kind: 0 zero, 1 data, 2 patch, 3 parent, 4 raw |
//! | 1 | 3 | zero |
//! | 4 | 4 | length of the frame in bytes |
//! | 8 | 8 | offset of the frame in the data file |
//! | 16 | 32 | blake3 of the raw chunk |

use super::{Layout, bitmap_len, digest::ImageHasher, zero_digest};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord};

/// Length of a record in bytes.
pub const RECORD_LEN: usize = 48;

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
}

impl Record {
    /// The bytes of the record; `zero` is the digest of a chunk of zeros.
    pub fn encode(&self, zero: Digest) -> [u8; RECORD_LEN] {
        let (kind, length, offset, digest) = match self {
            Self::Zero => (ZERO, 0, 0, zero),
            Self::Data { offset, length, digest } => (DATA, *length, *offset, *digest),
            Self::Patch { offset, length, digest } => (PATCH, *length, *offset, *digest),
            Self::Parent { digest } => (PARENT, 0, 0, *digest),
            Self::Raw { digest } => (RAW, 0, 0, *digest),
        };
        let mut bytes = [0; RECORD_LEN];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&u32::to_le_bytes(length));
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

/// The parsed and checked index of an image.
#[derive(Clone, Debug)]
pub struct Index {
    layout: Layout,
    zero: Digest,
    records: Vec<Record>,
}

impl Index {
    /// Parses and checks `bytes`, all records of the index of `image`. Only a difference has patch and parent
    /// records, and an image with a raw file has zero and raw records only.
    pub fn decode(image: &ImageRecord, beside: Beside, bytes: &[u8]) -> Result<Self, FormatError> {
        let mut parser = Parser::new(image, beside);
        let whole = bytes.len() / RECORD_LEN * RECORD_LEN;
        parser.records(&bytes[..whole])?;
        let index = parser.finish()?;
        match whole == bytes.len() {
            true => Ok(index),
            false => Err(FormatError::Length {
                file: image.index_file(),
                what: "the file".into(),
                expected: whole as u64,
                found: bytes.len() as u64,
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

    /// One record a chunk.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// blake3 of the raw chunk, for every chunk in order.
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.records.iter().map(|record| self.digest_of(record))
    }

    /// blake3 of the raw chunk of that number, which is less than the number of records.
    pub fn digest(&self, chunk: u64) -> Digest {
        self.digest_of(&self.records[chunk as usize])
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

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

/// Takes an index apart record by record, so that a hostile one claims no more memory than it has bytes.
pub(super) struct Parser<'a> {
    image: &'a ImageRecord,
    layout: Layout,
    beside: Beside,
    zero: Digest,
    longest_frame: u32,
    hasher: ImageHasher,
    records: Vec<Record>,
}

impl<'a> Parser<'a> {
    /// For the index of `image`.
    pub(super) fn new(image: &'a ImageRecord, beside: Beside) -> Self {
        let layout = Layout { size: image.size, chunk_size: image.chunk_size };
        Self {
            image,
            layout,
            beside,
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
        let bitmap = bitmap_len(self.layout.chunk_size) as u32;
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
            DATA | PATCH | PARENT if self.beside.is_raw => {
                let name = ["data", "patch", "parent"][usize::from(kind - DATA)];
                return wrong("kind", format!("a {name} record, but the image has a raw file"));
            }
            RAW if !self.beside.is_raw => {
                let why = format!("a raw record, but there is no {}", self.image.raw_file());
                return wrong("kind", why);
            }
            PATCH | PARENT if !self.beside.is_diff => {
                let name = if kind == PATCH { "patch" } else { "parent" };
                return wrong("kind", format!("a {name} record in a snapshot without a parent"));
            }
            PARENT | RAW if (offset, length) != (0, 0) => {
                let name = if kind == PARENT { "parent" } else { "raw" };
                return wrong("frame", format!("{length} bytes at {offset} for a {name} record"));
            }
            PARENT => Record::Parent { digest },
            RAW => Record::Raw { digest },
            DATA if length == 0 || length > self.longest_frame => {
                let limit = self.longest_frame;
                return wrong("frame length", format!("{length}, it must be 1 to {limit}"));
            }
            PATCH if length <= bitmap || length > bitmap + self.longest_frame => {
                let limit = bitmap + self.longest_frame;
                let why = format!("{length}, it must be {} to {limit}", bitmap + 1);
                return wrong("patch length", why);
            }
            DATA | PATCH
                if offset
                    .checked_add(length.into())
                    .is_none_or(|end| end > self.beside.data_length) =>
            {
                let (file, end) = (self.image.data_file(), self.beside.data_length);
                return wrong("frame", format!("{length} bytes at {offset}, {file} has {end}"));
            }
            DATA => Record::Data { offset, length, digest },
            PATCH => Record::Patch { offset, length, digest },
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

    const FULL: Beside = Beside { data_length: 1000, is_diff: false, is_raw: false };
    const DIFF: Beside = Beside { is_diff: true, ..FULL };
    const RAW_FULL: Beside = Beside { data_length: 0, is_diff: false, is_raw: true };
    const RAW_DIFF: Beside = Beside { is_diff: true, ..RAW_FULL };

    fn first_record(
        beside: Beside,
        change: impl Fn(&mut [u8; RECORD_LEN]),
    ) -> Result<(), FormatError> {
        let image = image();
        let mut parser = Parser::new(&image, beside);
        let data = Record::Data { offset: 100, length: 900, digest: Digest::of(b"x") };
        let mut bytes = data.encode(parser.zero);
        change(&mut bytes);
        parser.records(&bytes)
    }

    #[test]
    fn a_record_that_no_writer_writes_is_refused_by_name() {
        type Change = fn(&mut [u8; RECORD_LEN]);
        let cases: &[(&str, Change)] = &[
            ("chunk 0: kind: 5 is not known", |r| r[0] = 5),
            ("chunk 0: kind: a raw record, but there is no memory.raw", |r| r[0] = 4),
            ("chunk 0: kind: a patch record in a snapshot without", |r| r[0] = 2),
            ("chunk 0: kind: a parent record in a snapshot without", |r| r[0] = 3),
            ("chunk 0: frame: 900 bytes at 100 for a zero chunk", |r| r[0] = 0),
            ("chunk 0: reserved bytes", |r| r[3] = 1),
            ("chunk 0: frame length: 0", |r| r[4..8].fill(0)),
            ("chunk 0: frame length: 4294967295", |r| r[4..8].fill(0xff)),
            ("memory.zst has 1000", |r| r[8] = 101),
            ("memory.zst has 1000", |r| r[8..16].fill(0xff)),
            ("a zero chunk has", |r| r[..16].fill(0)),
        ];
        for (expected, change) in cases {
            let text = first_record(FULL, change).expect_err(expected).to_string();
            assert!(text.starts_with("memory.idx"), "{text}");
            assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        }
        first_record(FULL, |_| ()).unwrap();
        let cases: &[(&str, Change)] = &[
            ("900 bytes at 100 for a parent record", |r| r[0] = 3),
            ("patch length: 2", |r| (r[0], r[4], r[5]) = (2, 2, 0)),
            ("memory.zst has 1000", |r| (r[0], r[8]) = (2, 101)),
        ];
        for (expected, change) in cases {
            let text = first_record(DIFF, change).expect_err(expected).to_string();
            assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        }
        first_record(DIFF, |r| r[0] = 2).unwrap();
    }

    #[test]
    fn an_image_with_a_raw_file_has_zero_and_raw_records_only() {
        type Change = fn(&mut [u8; RECORD_LEN]);
        let cases: &[(&str, Change)] = &[
            ("chunk 0: kind: a data record, but the image has a raw file", |_| ()),
            ("chunk 0: kind: a patch record, but the image has a raw file", |r| r[0] = 2),
            ("chunk 0: kind: a parent record, but the image has a raw file", |r| r[0] = 3),
            ("900 bytes at 100 for a raw record", |r| r[0] = 4),
            ("0 bytes at 100 for a raw record", |r| (r[0], r[4], r[5]) = (4, 0, 0)),
            ("reserved bytes", |r| (r[0], r[1]) = (4, 1)),
        ];
        for beside in [RAW_FULL, RAW_DIFF] {
            for (expected, change) in cases {
                let text = first_record(beside, change).expect_err(expected).to_string();
                assert!(text.contains(expected), "expected `{expected}` in `{text}`");
            }
            let raw: Change = |r| {
                r[..16].fill(0);
                r[0] = 4;
            };
            first_record(beside, raw).unwrap();
        }
    }

    #[test]
    fn records_that_do_not_make_up_the_image_digest_are_refused() {
        let image = image();
        let mut parser = Parser::new(&image, FULL);
        let zero = Record::Zero.encode(parser.zero);
        parser.records(&[zero, zero].concat()).unwrap();
        assert!(matches!(parser.finish(), Err(FormatError::Length { found: 96, .. })));
        let mut parser = Parser::new(&image, FULL);
        parser.records(&[zero, zero, zero].concat()).unwrap();
        assert!(matches!(parser.finish(), Err(FormatError::Digest { .. })));
    }
}
