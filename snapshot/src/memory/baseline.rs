//! What unchanged memory holds, by digest.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use squib_devices::granules::Baseline;
use squib_formats::{
    digest::Digest,
    image::{ImageReader, Index},
    snapshot_dir::Snapshot,
};

/// The chunks of an image that is open.
pub(crate) struct ImageBaseline(pub(crate) Arc<ImageReader>);

impl Baseline for ImageBaseline {
    fn digest(&self, granule: u64) -> Option<Digest> {
        digest(self.0.index(), granule)
    }
}

/// The chunks of an image in a snapshot that lies on the disk. Its index is read when it is first needed; if
/// the snapshot is gone by then, or is another, nothing is known.
pub(crate) struct PublishedBaseline {
    path: PathBuf,
    id: Digest,
    image: String,
    index: OnceLock<Option<Index>>,
}

impl PublishedBaseline {
    pub(crate) fn new(path: &Path, id: Digest, image: &str) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self { path, id, image: image.to_owned(), index: OnceLock::new() }
    }

    fn open(&self) -> Option<Index> {
        let found =
            Snapshot::open(&self.path).and_then(|snapshot| match snapshot.id() == self.id {
                true => ImageReader::open_index(&snapshot, &self.image).map(Some),
                false => Ok(None),
            });
        found.unwrap_or_else(|error| {
            tracing::debug!("{}: every chunk will be hashed: {error}", self.path.display());
            None
        })
    }
}

impl Baseline for PublishedBaseline {
    fn digest(&self, granule: u64) -> Option<Digest> {
        digest(self.index.get_or_init(|| self.open()).as_ref()?, granule)
    }
}

fn digest(index: &Index, granule: u64) -> Option<Digest> {
    (granule < index.records().len() as u64).then(|| index.digest(granule))
}
