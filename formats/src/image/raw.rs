//! The raw bytes of an image as they lie in a file, shared with the file that they came from.
//!
//! Nothing is copied and nothing compressed: the file in the snapshot is a clone, and the index says what is
//! in it.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::{
    Content, Control, ImageOptions, Layout, Record, Source, WrittenImage, digest::digest_in_order,
    index::IndexWriter,
};
use crate::{
    digest::Digest,
    error::FormatError,
    manifest::ImageRecord,
    publish::{ClonedFile, Staging},
    storage::next_data,
};

/// Makes `clone`, whose name is that of the image's raw file, the image `name` of the snapshot. Its bytes are
/// read for their digests only, on all cores, and holes not even for that.
///
/// `known` answers blake3 of the bytes at an offset and of a length, if it is known without reading; it is asked
/// for whole chunks only, which are then not read. A wrong answer makes an image that is found damaged.
pub fn write_raw_image(
    staging: &mut Staging,
    name: &str,
    clone: ClonedFile,
    known: &(dyn Fn(u64, usize) -> Option<Digest> + Sync),
    options: ImageOptions,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    options.check(name)?;
    let layout = Layout { size: clone.size(), chunk_size: options.chunk_size };
    layout.check(name)?;
    let mut record = ImageRecord {
        name: name.to_owned(),
        size: layout.size,
        chunk_size: layout.chunk_size,
        digest: Digest([0; 32]),
    };
    debug_assert_eq!(clone.name(), record.raw_file());
    let source = ClonedSource { file: clone.file(), size: layout.size, known };
    let mut index = IndexWriter::new(staging, &record.index_file(), layout)?;
    // Empty: a reader finds the same files in every image.
    let data = staging.create(&record.data_file())?;
    let (mut zeros, mut raw) = (0, 0);
    digest_in_order(clone.name(), &source, layout, control, |chunks, digest, is_zero| {
        let record = match is_zero {
            true => Record::Zero,
            false => Record::Raw { digest },
        };
        *(if is_zero { &mut zeros } else { &mut raw }) += layout.bytes(&chunks);
        index.push(record, chunks.end - chunks.start)
    })?;
    record.digest = index.finish(staging)?;
    staging.finish(data)?;
    staging.finish_raw(clone, record.digest);
    Ok(WrittenImage { record, zero: zeros, duplicate: 0, parent: 0, patched: 0, raw, stored: 0 })
}

/// A cloned file, and what is known of its bytes.
struct ClonedSource<'a> {
    file: &'a File,
    size: u64,
    known: &'a (dyn Fn(u64, usize) -> Option<Digest> + Sync),
}

impl Source for ClonedSource<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        self.file.read_exact_at(into, offset)?;
        Ok(Content::Data)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(next_data(self.file, offset, self.size))
    }

    fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
        (self.known)(offset, len)
    }
}
