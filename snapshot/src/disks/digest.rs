//! The digest of a disk at one moment, and of each of its chunks, so that the next time only what has changed
//! is read.

use std::{io, ops::Range, sync::Arc};

use squib_devices::{
    granules::{Baseline, Frozen},
    virtio::block::FileDisk,
};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Content, Control, Scheme, Source, digest_and_keep},
};

use crate::memory::{FrozenSource, KnownDigests, MOST_KEPT};

/// The image digest of the moment in chunks of `chunk_size` bytes, as snapshots of that scheme have it, and the
/// digests of its granules if those are the chunks and can be kept. `name` stands in errors.
pub(super) fn digest(
    name: &str,
    frozen: &Frozen<FileDisk>,
    chunk_size: u32,
    scheme: Scheme,
    control: Control<'_>,
) -> Result<(Digest, Option<Arc<dyn Baseline>>), FormatError> {
    let source = Digested { source: FrozenSource::new(frozen, None), frozen };
    let (image, chunks) = digest_and_keep(name, &source, chunk_size, scheme, MOST_KEPT, control)?;
    let kept = chunks.filter(|_| frozen.granule_size() == u64::from(chunk_size));
    Ok((image.digest, kept.map(|chunks| Arc::new(KnownDigests(chunks)) as Arc<dyn Baseline>)))
}

/// A disk of which nobody wants the bytes of what is known.
struct Digested<'a> {
    source: FrozenSource<'a, FileDisk>,
    frozen: &'a Frozen<FileDisk>,
}

impl Source for Digested<'_> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        self.source.read(offset, into)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.source.data(offset)
    }

    fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
        let known = self.frozen.known_digest(offset, len)?;
        self.frozen.skip(offset, len);
        Some(known)
    }
}
