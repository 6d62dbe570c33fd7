//! Guest RAM as the source of an image, and back from one: at once, on first touch, or as a template.

mod baseline;
mod loader;
mod origin;
mod room;
mod template;

use std::{io, ops::Range, sync::Arc};

use squib_devices::{
    granules::{Frozen, Granules, READABLE, Store},
    memory::GuestRam,
};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Content, Control, ImageReader, Index, Loaded, Record, Sink, Source, zero_digest},
};

pub(crate) use baseline::{ImageBaseline, KnownDigests, MOST_KEPT, PublishedBaseline};
pub(crate) use loader::Loader;
pub(crate) use origin::ImageOrigin;
pub use room::{MOST_OVERCOMMIT, MemoryError};
pub(crate) use room::{Ration, Room};
pub use template::{CacheError, Template, TemplateCache, TemplateInfo};

/// The RAM or disk of a moment. What has not changed since its digest was taken is not read where that serves.
pub(crate) struct FrozenSource<'a, S: Store> {
    frozen: &'a Frozen<S>,
    /// What the image is a difference to.
    base: Option<&'a Index>,
    zero: Digest,
}

impl<'a, S: Store> FrozenSource<'a, S> {
    /// For an image that is a difference to `base`, if there is one.
    pub(crate) fn new(frozen: &'a Frozen<S>, base: Option<&'a Index>) -> Self {
        let granule_size = frozen.granule_size();
        let serves = |base: &&Index| {
            (base.size(), u64::from(base.chunk_size())) == (frozen.size(), granule_size)
        };
        // At most the largest chunk size.
        Self { frozen, base: base.filter(serves), zero: zero_digest(granule_size as u32) }
    }
}

impl<S: Store> Source for FrozenSource<'_, S> {
    fn size(&self) -> u64 {
        self.frozen.size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        self.frozen.read(offset, into)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.frozen.data(offset, self.zero)
    }

    fn known_digest(&self, offset: u64, len: usize) -> Option<Digest> {
        let digest = self.frozen.known_digest(offset, len)?;
        let chunk = offset / self.frozen.granule_size();
        if digest == self.zero || self.base.is_some_and(|base| base.digest(chunk) == digest) {
            // The writer will not ask for the bytes, so nobody has to keep them.
            self.frozen.skip(offset, len);
        }
        Some(digest)
    }
}

/// RAM for the image: none of it is there, and its granules are the image's chunks.
pub(crate) fn absent_ram(image: &ImageReader) -> io::Result<GuestRam> {
    let record = image.record();
    let ram = GuestRam::absent(record.size, record.chunk_size.trailing_zeros())?;
    set_zeros(ram.granules(), image.index());
    Ok(ram)
}

/// Says of new granules, which are the chunks of `index`, that those are there that are all zeros.
pub(crate) fn set_zeros<S: Store>(granules: &Granules<S>, index: &Index) {
    let zeros = index.runs().filter(|(_, record)| **record == Record::Zero);
    zeros.for_each(|(chunks, _)| granules.set(chunks, READABLE));
}

/// Brings all of `ram` at once, on all cores.
pub(crate) fn load_all(
    ram: &GuestRam,
    image: &ImageReader,
    control: Control<'_>,
) -> Result<Loaded, FormatError> {
    let loaded = image.load(&RamSink(ram), control)?;
    ram.granules().set_all(READABLE);
    Ok(loaded)
}

/// RAM of which nothing is there yet: all zeros.
struct RamSink<'a>(&'a GuestRam);

impl Sink for RamSink<'_> {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        true
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.granules().store().fill(offset, bytes)
    }
}

/// Lets `ram` take its bytes from `image` when they are first touched.
pub(crate) fn load_lazily(ram: &GuestRam, image: &Arc<ImageReader>) {
    ram.granules().set_origin(Arc::new(ImageOrigin::new(Arc::clone(image))));
}
