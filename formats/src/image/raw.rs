//! The raw bytes of an image as they lie in a file, shared with the file that they came from.
//!
//! Nothing is copied and nothing compressed: the file in the snapshot is a clone, and the index says what is
//! in it.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::{
    Content, Control, ImageOptions, Layout, Record, Source, WrittenImage,
    digest::{ImageHasher, read_chunk},
    pipeline::run_in_order,
    zero_digest,
};
use crate::{
    digest::Digest,
    error::FormatError,
    manifest::ImageRecord,
    publish::{ClonedFile, Staging},
    storage::is_hole,
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
    let mut record = ImageRecord {
        name: name.to_owned(),
        size: layout.size,
        chunk_size: layout.chunk_size,
        digest: Digest([0; 32]),
    };
    debug_assert_eq!(clone.name(), record.raw_file());
    let source = ClonedSource { file: clone.file(), size: layout.size, known };
    let mut index = staging.create(&record.index_file())?;
    // Empty: a reader finds the same files in every image.
    let data = staging.create(&record.data_file())?;
    let zero = zero_digest(layout.chunk_size);
    let mut hasher = ImageHasher::new();
    let (mut zeros, mut raw) = (0, 0);
    let digest = |buffer: &mut Vec<u8>, chunk| {
        if let Some(known) = layout.known_digest(&source, chunk) {
            return Ok(known);
        }
        Ok(match read_chunk(clone.name(), &source, layout, chunk, buffer)? {
            Content::Zero => zero,
            Content::Data => Digest::of(buffer),
        })
    };
    let new_worker = || Ok(vec![0; layout.chunk_size as usize]);
    let work = |buffer: &mut Vec<u8>, chunks: Range<u64>| {
        chunks.map(|chunk| digest(buffer, chunk)).collect::<Result<Vec<_>, _>>()
    };
    run_in_order(layout, control, new_worker, work, |chunks, digests: Vec<Digest>| {
        for (chunk, digest) in chunks.zip(digests) {
            let len = layout.len(chunk) as u64;
            let record = match digest == zero {
                true => Record::Zero,
                false => Record::Raw { digest },
            };
            *(if record == Record::Zero { &mut zeros } else { &mut raw }) += len;
            let bytes = record.encode(zero);
            hasher.record(&bytes);
            index.write(&bytes)?;
        }
        Ok(0)
    })?;
    record.digest = hasher.finish(layout);
    staging.finish(index)?;
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
        if is_hole(self.file, offset, into.len() as u64) {
            return Ok(Content::Zero);
        }
        self.file.read_exact_at(into, offset)?;
        Ok(Content::Data)
    }

    fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
        (self.known)(offset, len)
    }
}
