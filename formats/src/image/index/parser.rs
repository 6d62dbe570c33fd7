//! Bytes of an index into its runs.

use super::{
    super::{Layout, MAX_SIZE, Scheme, bitmap_len, digest::ImageHasher, zero_digest},
    Beside, DATA, HEADER_LEN, Index, MAGIC, PARENT, PATCH, RAW, RECORD_LEN, Record, VERSION, ZERO,
};
use crate::{digest::Digest, error::FormatError, manifest::ImageRecord};

/// Takes an index apart record by record, so that a hostile one claims no more memory than it has bytes.
pub(crate) struct Parser<'a> {
    image: &'a ImageRecord,
    layout: Layout,
    beside: Beside,
    zero: Digest,
    longest_frame: u32,
    hasher: ImageHasher,
    /// Records taken so far.
    taken: u64,
    /// Chunks in them.
    chunks: u64,
    starts: Vec<u32>,
    records: Vec<Record>,
}

impl<'a> Parser<'a> {
    /// For the index of `image`.
    pub(crate) fn new(image: &'a ImageRecord, beside: Beside) -> Self {
        let layout = Layout { size: image.size, chunk_size: image.chunk_size };
        debug_assert!(image.size <= MAX_SIZE, "the manifest has been checked");
        Self {
            image,
            layout,
            beside,
            zero: zero_digest(image.chunk_size),
            longest_frame: zstd::zstd_safe::compress_bound(image.chunk_size as usize) as u32,
            hasher: ImageHasher::new(beside.scheme),
            taken: 0,
            chunks: 0,
            starts: Vec::new(),
            records: Vec::new(),
        }
    }

    /// Bytes before the first record.
    pub(crate) fn header_len(&self) -> usize {
        match self.beside.scheme {
            Scheme::Chunks => 0,
            Scheme::Runs => HEADER_LEN,
        }
    }

    /// Checks the bytes before the first record.
    pub(crate) fn header(&self, bytes: &[u8]) -> Result<(), FormatError> {
        if self.beside.scheme == Scheme::Chunks {
            return Ok(());
        }
        let wrong = |what: &str, why| Err(FormatError::field(self.image.index_file(), what, why));
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return wrong("header", format!("{} bytes instead of {HEADER_LEN}", bytes.len()));
        };
        if header[..8] != MAGIC {
            let (found, magic) = (header[..8].escape_ascii(), MAGIC.escape_ascii());
            return wrong("magic", format!("`{found}` instead of `{magic}`"));
        }
        let version = u16::from_le_bytes([header[8], header[9]]);
        if version != VERSION {
            return wrong("version", format!("{version}, this build reads {VERSION}"));
        }
        match header[10..] == [0; 6] {
            true => Ok(()),
            false => wrong("reserved bytes", "not zero".to_owned()),
        }
    }

    /// Takes the next whole records.
    pub(crate) fn records(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let (records, rest) = bytes.as_chunks::<RECORD_LEN>();
        debug_assert!(rest.is_empty());
        records.iter().try_for_each(|record| self.take(record))
    }

    /// The index, if all records were there and make up the image digest of the manifest.
    pub(crate) fn finish(mut self) -> Result<Index, FormatError> {
        let (file, chunks) = (self.image.index_file(), self.layout.chunks());
        if self.chunks != chunks {
            let why = format!("its records are of {} chunks, the image has {chunks}", self.chunks);
            return Err(FormatError::field(file, "number of chunks", why));
        }
        let found = self.hasher.finish(self.layout);
        if found != self.image.digest {
            return Err(FormatError::Digest {
                file,
                what: "the image digest".into(),
                expected: self.image.digest,
                found,
            });
        }
        self.starts.shrink_to_fit();
        self.records.shrink_to_fit();
        let Self { layout, zero, starts, records, .. } = self;
        Ok(Index { layout, zero, starts, records })
    }

    fn take(&mut self, bytes: &[u8; RECORD_LEN]) -> Result<(), FormatError> {
        self.parse(bytes).map_err(|(field, why)| {
            let (number, chunk) = (self.taken, self.chunks);
            let field = match self.beside.scheme {
                Scheme::Chunks => format!("chunk {chunk}: {field}"),
                Scheme::Runs => format!("record {number}, chunk {chunk}: {field}"),
            };
            FormatError::field(self.image.index_file(), field, why)
        })
    }

    fn parse(&mut self, bytes: &[u8; RECORD_LEN]) -> Result<(), (&'static str, String)> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let kind = bytes[0];
        let (length, count) = match self.beside.scheme {
            Scheme::Chunks if bytes[1..4] != [0; 3] => {
                return Err(("reserved bytes", format!("{:?} instead of zeros", &bytes[1..4])));
            }
            Scheme::Chunks => (word(4), 1),
            Scheme::Runs => (word(0) >> 8, word(4)),
        };
        let left = self.layout.chunks() - self.chunks;
        if count == 0 || u64::from(count) > left {
            return Err(("number of chunks", format!("{count}, it must be 1 to {left}")));
        }
        // So that what is to be looked at follows the length of the index, and not what it claims.
        if kind == PATCH && count > 1 {
            return Err(("number of chunks", format!("{count}, a patch is of one chunk")));
        }
        let record = self.record(kind, length, bytes)?;
        match self.records.last() == Some(&record) {
            true if self.beside.scheme == Scheme::Runs && kind != PATCH => {
                return Err((
                    "record",
                    "the same as the one before, with which it is one run".into(),
                ));
            }
            true => {}
            false => {
                // An image has at most 2^30 chunks.
                self.starts.push(self.chunks as u32);
                self.records.push(record);
            }
        }
        self.hasher.add(digest(bytes), count.into());
        self.taken += 1;
        self.chunks += u64::from(count);
        Ok(())
    }

    fn record(
        &self,
        kind: u8,
        length: u32,
        bytes: &[u8; RECORD_LEN],
    ) -> Result<Record, (&'static str, String)> {
        let mut offset = [0; 8];
        offset.copy_from_slice(&bytes[8..16]);
        let offset = u64::from_le_bytes(offset);
        let digest = digest(bytes);
        let wrong = |what: &'static str, why: String| Err((what, why));
        let bitmap = bitmap_len(self.layout.chunk_size) as u32;
        Ok(match kind {
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
        })
    }
}

fn digest(bytes: &[u8; RECORD_LEN]) -> Digest {
    let mut digest = Digest([0; 32]);
    digest.0.copy_from_slice(&bytes[16..48]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageRecord {
        let digest = Digest::of(b"");
        ImageRecord { name: "memory".into(), size: 3 << 16, chunk_size: 1 << 16, digest }
    }

    const FULL: Beside =
        Beside { data_length: 1000, is_diff: false, is_raw: false, scheme: Scheme::Chunks };
    const DIFF: Beside = Beside { is_diff: true, ..FULL };
    const RAW_FULL: Beside = Beside { data_length: 0, is_raw: true, ..FULL };
    const RAW_DIFF: Beside = Beside { is_diff: true, ..RAW_FULL };

    fn first_record(
        beside: Beside,
        change: impl Fn(&mut [u8; RECORD_LEN]),
    ) -> Result<(), FormatError> {
        let image = image();
        let mut parser = Parser::new(&image, beside);
        let data = Record::Data { offset: 100, length: 900, digest: Digest::of(b"x") };
        let mut bytes = data.encode(Scheme::Chunks, 1, parser.zero);
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
        let zero = Record::Zero.encode(Scheme::Chunks, 1, parser.zero);
        parser.records(&[zero, zero].concat()).unwrap();
        let text = parser.finish().unwrap_err().to_string();
        assert!(text.contains("number of chunks: its records are of 2 chunks"), "{text}");
        let mut parser = Parser::new(&image, FULL);
        parser.records(&[zero, zero, zero].concat()).unwrap();
        assert!(matches!(parser.finish(), Err(FormatError::Digest { .. })));
    }
    /// A good index of runs of the image: two zero chunks and one of data.
    fn runs() -> (ImageRecord, Vec<u8>) {
        let mut image = image();
        let zero = zero_digest(image.chunk_size);
        let data = Record::Data { offset: 100, length: 900, digest: Digest::of(b"x") };
        let mut hasher = ImageHasher::new(Scheme::Runs);
        hasher.add(zero, 2);
        hasher.add(Digest::of(b"x"), 1);
        image.digest = hasher.finish(Layout { size: image.size, chunk_size: image.chunk_size });
        let records =
            [Record::Zero.encode(Scheme::Runs, 2, zero), data.encode(Scheme::Runs, 1, zero)];
        (image, [&super::super::header()[..], &records.concat()].concat())
    }

    const RUNS: Beside = Beside { scheme: Scheme::Runs, ..FULL };

    #[test]
    fn an_index_of_runs_that_no_writer_writes_is_refused_by_name() {
        type Change = fn(&mut Vec<u8>);
        const SECOND: usize = HEADER_LEN + RECORD_LEN;
        let cases: &[(&str, Change)] = &[
            ("magic: `\\x88SQBIX", |i| i[0] -= 1),
            ("version: 2, this build reads 1", |i| i[8] = 2),
            ("reserved bytes", |i| i[15] = 1),
            ("record 0, chunk 0: number of chunks: 0", |i| i[HEADER_LEN + 4] = 0),
            ("record 0, chunk 0: number of chunks: 4, it must be 1 to 3", |i| {
                i[HEADER_LEN + 4] = 4
            }),
            ("number of chunks: 4294967042", |i| i[HEADER_LEN + 5..SECOND - 40].fill(0xff)),
            ("record 1, chunk 2: number of chunks: 2, it must be 1 to 1", |i| i[SECOND + 4] = 2),
            ("record 1, chunk 1: number of chunks: 3, it must be 1 to 2", |i| {
                (i[HEADER_LEN + 4], i[SECOND + 4]) = (1, 3);
            }),
            ("number of chunks: its records are of 2 chunks, the image has 3", |i| {
                i[HEADER_LEN + 4] = 1;
            }),
            ("record 1, chunk 2: record: the same as the one before", |i| {
                i.copy_within(HEADER_LEN..SECOND, SECOND);
                i[SECOND + 4] = 1;
            }),
            ("record 1, chunk 2: frame length: 16777092", |i| i[SECOND + 2..SECOND + 4].fill(0xff)),
            ("record 0, chunk 0: frame: 1 bytes at 0 for a zero chunk", |i| i[HEADER_LEN + 1] = 1),
            ("the image digest", |i| i[SECOND + 16] ^= 1),
            ("the file is 15 bytes long, expected 64", |i| i.truncate(15)),
            ("the file is 16 bytes long, expected 64", |i| i.truncate(HEADER_LEN)),
            ("the file is 111 bytes long, expected 64", |i| i.truncate(111)),
            ("the file is 208 bytes long, expected 160", |i| i.resize(208, 0)),
        ];
        let (image, good) = runs();
        let index = Index::decode(&image, RUNS, &good).unwrap();
        assert_eq!((index.chunks(), index.runs().count()), (3, 2));
        for (expected, change) in cases {
            let mut bytes = good.clone();
            change(&mut bytes);
            let text = Index::decode(&image, RUNS, &bytes).expect_err(expected).to_string();
            assert!(text.starts_with("memory.idx"), "{text}");
            assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        }
        let diff = Beside { is_diff: true, ..RUNS };
        let mut bytes = good.clone();
        bytes[HEADER_LEN] = PATCH;
        let text = Index::decode(&image, diff, &bytes).unwrap_err().to_string();
        assert!(text.contains("chunk 0: number of chunks: 2, a patch is of one chunk"), "{text}");
        // An index of the one kind is none of the other.
        assert!(Index::decode(&image, FULL, &good).is_err());
    }

    #[test]
    fn an_image_of_no_bytes_has_an_index_without_records() {
        let digest = ImageHasher::new(Scheme::Runs).finish(Layout { size: 0, chunk_size: 1 << 16 });
        let image = ImageRecord { size: 0, digest, ..image() };
        let header = super::super::header();
        assert_eq!(Index::decode(&image, RUNS, &header).unwrap().chunks(), 0);
        assert!(Index::decode(&image, RUNS, &[]).is_err());
    }
}
