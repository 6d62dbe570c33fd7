//! The digest of a disk at one moment, and of each of its chunks, so that the next time only what has changed
//! is read.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use squib_devices::{
    granules::{Baseline, Frozen},
    virtio::block::FileDisk,
};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Content, Control, Source, digest_chunks, zero_digest},
};

use crate::memory::FrozenSource;

/// The image digest of the moment in chunks of `chunk_size` bytes, and the digests of its granules if those are
/// the chunks. `name` stands in errors.
pub(super) fn digest(
    name: &str,
    frozen: &Frozen<FileDisk>,
    chunk_size: u32,
    control: Control<'_>,
) -> Result<(Digest, Option<Arc<dyn Baseline>>), FormatError> {
    let source = FrozenSource::new(frozen, None);
    if frozen.granule_size() != u64::from(chunk_size) {
        return Ok((digest_chunks(name, &source, chunk_size, control)?.digest, None));
    }
    let count = frozen.size().div_ceil(frozen.granule_size());
    let digests = (0..count).map(|_| OnceLock::new()).collect();
    let collector =
        Collector { source, frozen, digests: Digests(digests), zero: zero_digest(chunk_size) };
    let digest = digest_chunks(name, &collector, chunk_size, control)?.digest;
    Ok((digest, Some(Arc::new(collector.digests))))
}

struct Digests(Box<[OnceLock<Digest>]>);

impl Baseline for Digests {
    fn digest(&self, granule: u64) -> Option<Digest> {
        self.0.get(usize::try_from(granule).ok()?)?.get().copied()
    }
}

/// A disk that digests its own chunks as they are asked for, and writes down what it finds.
struct Collector<'a> {
    source: FrozenSource<'a, FileDisk>,
    frozen: &'a Frozen<FileDisk>,
    digests: Digests,
    zero: Digest,
}

impl Collector<'_> {
    /// blake3 of the granule at `offset`, `len` bytes long, continued with zeros.
    fn granule(&self, offset: u64, len: usize) -> io::Result<(Digest, Content, Vec<u8>)> {
        let mut bytes = vec![0; self.frozen.granule_size() as usize];
        let content = self.frozen.read(offset, &mut bytes[..len])?;
        let digest = match content {
            Content::Zero => self.zero,
            Content::Data => Digest::of(&bytes),
        };
        self.note(offset, digest);
        Ok((digest, content, bytes))
    }

    fn note(&self, offset: u64, digest: Digest) {
        if let Some(place) = self.digests.0.get((offset / self.frozen.granule_size()) as usize) {
            place.get_or_init(|| digest);
        }
    }
}

impl Source for Collector<'_> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    /// Called for the last chunk, if that is a short one, and where something cannot be read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        let (_, content, bytes) = self.granule(offset, into.len())?;
        into.copy_from_slice(&bytes[..into.len()]);
        Ok(content)
    }

    fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
        if let Some(known) = self.frozen.known_digest(offset, len) {
            self.frozen.skip(offset, len);
            self.note(offset, known);
            return Some(known);
        }
        // What cannot be read is asked for again, and then says why.
        self.granule(offset, len).ok().map(|(digest, ..)| digest)
    }
}
