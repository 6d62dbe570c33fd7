//! What unchanged memory holds, by digest.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use squib_devices::granules::Baseline;
use squib_formats::{
    digest::Digest,
    image::{DigestRuns, ImageReader, Index, RECORD_LEN},
    snapshot_dir::Snapshot,
};

/// The chunks of an image that is open.
pub(crate) struct ImageBaseline(pub(crate) Arc<ImageReader>);

impl Baseline for ImageBaseline {
    fn digest(&self, granule: u64) -> Option<Digest> {
        self.run(granule).map(|(digest, _)| digest)
    }

    fn run(&self, granule: u64) -> Option<(Digest, u64)> {
        self.0.index().digest_run(granule)
    }
}

/// The chunks of an image or disk, by digests that are at hand.
impl Baseline for KnownDigests {
    fn digest(&self, granule: u64) -> Option<Digest> {
        self.run(granule).map(|(digest, _)| digest)
    }

    fn run(&self, granule: u64) -> Option<(Digest, u64)> {
        self.0.get(granule)
    }
}

/// The digests of chunks.
pub(crate) struct KnownDigests(pub(crate) DigestRuns);

/// Runs of equal chunks whose digests are kept: 36 MiB.
pub(crate) const MOST_KEPT: usize = 1 << 20;

/// The chunks of an image in a snapshot that lies on the disk. Its index is read when it is first needed; if
/// the snapshot is gone by then, or is another, nothing is known.
pub(crate) struct PublishedBaseline {
    path: PathBuf,
    id: Digest,
    image: String,
    digests: OnceLock<Option<DigestRuns>>,
}

impl PublishedBaseline {
    pub(crate) fn new(path: &Path, id: Digest, image: &str) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self { path, id, image: image.to_owned(), digests: OnceLock::new() }
    }

    /// Of a snapshot that has just been written: what it knows does not depend on how long that stays, unless
    /// more is in the image than can be kept.
    pub(crate) fn of_new(path: &Path, id: Digest, image: &str) -> Self {
        let baseline = Self::new(path, id, image);
        let length = Snapshot::open(&baseline.path).and_then(|snapshot| {
            let record = snapshot.manifest().image(image)?;
            Ok(snapshot.manifest().file(&record.index_file())?.length)
        });
        if length.is_ok_and(|length| length <= (MOST_KEPT * RECORD_LEN) as u64) {
            baseline.digests();
        }
        baseline
    }

    fn digests(&self) -> Option<&DigestRuns> {
        let read = || self.open().map(|index| DigestRuns::of(&index));
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
        self.run(granule).map(|(digest, _)| digest)
    }

    fn run(&self, granule: u64) -> Option<(Digest, u64)> {
        self.digests()?.get(granule)
    }
}
