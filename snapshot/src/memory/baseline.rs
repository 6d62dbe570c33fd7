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
        let index = self.0.index();
        (granule < index.records().len() as u64).then(|| index.digest(granule))
    }
}

/// Chunks whose digests are kept from the start: 32 MiB of digests.
const MOST_KEPT: usize = 1 << 20;

/// The chunks of an image in a snapshot that lies on the disk. Its index is read when it is first needed; if
/// the snapshot is gone by then, or is another, nothing is known.
pub(crate) struct PublishedBaseline {
    path: PathBuf,
    id: Digest,
    image: String,
    digests: OnceLock<Option<Vec<Digest>>>,
}

impl PublishedBaseline {
    pub(crate) fn new(path: &Path, id: Digest, image: &str) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self { path, id, image: image.to_owned(), digests: OnceLock::new() }
    }

    /// Of a snapshot that has just been written: what it knows does not depend on how long that stays, unless
    /// the image has more chunks than can be kept.
    pub(crate) fn of_new(path: &Path, id: Digest, image: &str, chunks: u64) -> Self {
        let baseline = Self::new(path, id, image);
        if chunks <= MOST_KEPT as u64 {
            baseline.digests();
        }
        baseline
    }

    fn digests(&self) -> Option<&Vec<Digest>> {
        let read = || self.open().map(|index| index.digests().collect());
        self.digests.get_or_init(read).as_ref()
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
        self.digests()?.get(usize::try_from(granule).ok()?).copied()
    }
}
