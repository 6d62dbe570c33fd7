//! A disk into a snapshot.

use std::{path::Path, sync::Arc};

use squib_devices::{
    granules::{Baseline, Frozen},
    virtio::block::{DiskGranules, FileDisk},
};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{CHUNK_SIZE, ImageOptions, ImageReader, Scheme, WrittenImage, write_raw_image},
    manifest::{DiskRecord, DiskStorage},
    publish::{ClonedFile, Staging},
};
use squib_vmm::config::DiskConfig;

use super::{DiskError, digest::digest as digest_of};
use crate::{
    capture::{CaptureError, DiskMode, Guest, Parent, write},
    memory::{FrozenSource, PublishedBaseline},
    observe::{Phase, Run},
};

/// A disk that is to go into a snapshot.
pub(crate) struct Disk<'a> {
    config: &'a DiskConfig,
    path: String,
    mode: DiskMode,
    granules: Arc<DiskGranules>,
    /// The file system has shown that it can clone the disk into the snapshot.
    can_clone: bool,
}

impl<'a> Disk<'a> {
    pub(crate) fn open(
        guest: &dyn Guest,
        config: &'a DiskConfig,
        mode: Option<DiskMode>,
    ) -> Result<Self, DiskError> {
        let mode = mode.unwrap_or(match config.read_only {
            true => DiskMode::Reference,
            false => DiskMode::Capture,
        });
        // A restore may begin in another directory.
        let path = std::path::absolute(&config.path).map_err(|source| {
            let (id, path) = (config.id.clone(), config.path.clone());
            DiskError::Io { id, path, action: "find", source }
        })?;
        let path = path
            .into_os_string()
            .into_string()
            .map_err(|path| DiskError::Path { id: config.id.clone(), path: path.into() })?;
        Ok(Self { config, path, mode, granules: guest.open_disk(config)?, can_clone: false })
    }

    /// Finds out whether the disk can be cloned into the snapshot, while the guest still runs. A file system
    /// writes out what it has of the disk in memory before it clones it; with that done once, the clone in the
    /// pause has little left of it.
    ///
    /// A disk of which the parent has an image is stored as the difference to it.
    pub(crate) fn try_clone(
        &mut self,
        staging: &Staging,
        parent: Option<&Parent>,
    ) -> Result<(), FormatError> {
        let has_base = parent.is_some_and(|parent| parent.image(&self.image_name()).is_some());
        if self.mode == DiskMode::Capture
            && !has_base
            && let Some(clone) = self.clone_into(staging)?
        {
            staging.discard(clone)?;
            self.can_clone = true;
        }
        Ok(())
    }

    /// The disk as it is now, as a file of the snapshot. `None` if that cannot be, or it is not all there.
    fn clone_into(&self, staging: &Staging) -> Result<Option<ClonedFile>, FormatError> {
        let granules = &self.granules;
        if granules.next_absent(0).is_some() {
            return Ok(None);
        }
        let name = format!("{}.raw", self.image_name());
        staging.clone_file(&name, granules.store().file(), granules.size())
    }

    /// Holds the bytes of this moment, in which the guest is at rest: in a clone if that can be; else at most
    /// `limit` bytes are put aside.
    pub(crate) fn freeze(
        self,
        limit: u64,
        staging: &Staging,
    ) -> Result<FrozenDisk<'a>, CaptureError> {
        let frozen = self.granules.freeze(limit);
        let frozen = frozen.ok_or_else(|| DiskError::Frozen { id: self.config.id.clone() })?;
        let clone = if self.can_clone { self.clone_into(staging)? } else { None };
        Ok(FrozenDisk { disk: self, frozen, clone, digest: Digest([0; 32]), baseline: None })
    }

    fn image_name(&self) -> String {
        format!("disk-{}", self.config.id)
    }
}

/// A disk at the moment of the capture. The guest may run.
///
/// Dropped without [`keep`](Self::keep) it forgets nothing that had changed before.
pub(crate) struct FrozenDisk<'a> {
    disk: Disk<'a>,
    frozen: Frozen<FileDisk>,
    /// Its bytes, if the disk could be cloned, until they are an image.
    clone: Option<ClonedFile>,
    /// Known once the disk has been taken.
    digest: Digest,
    /// What the disk's chunks hold, if the next capture can use it.
    baseline: Option<Known>,
}

/// Where the digests of a disk's chunks are.
enum Known {
    /// In the image in the snapshot.
    Image,
    /// Here.
    Digests(Arc<dyn Baseline>),
}

impl FrozenDisk<'_> {
    /// The disk's id.
    pub(crate) fn id(&self) -> &str {
        &self.disk.config.id
    }

    /// Whether the guest may run without anything being put aside or lost.
    pub(crate) fn is_safe(&self) -> bool {
        self.clone.is_some() || self.disk.config.read_only
    }

    /// Lets the guest write without keeping what it writes over, if there is a clone that keeps it.
    pub(crate) fn let_go(&self) {
        if self.clone.is_some() {
            self.frozen.skip_all();
        }
    }

    /// Writes the disk into the snapshot, or digests it where it stays.
    pub(crate) fn take(
        &mut self,
        staging: &mut Staging,
        parent: Option<&Parent>,
        options: ImageOptions,
        run: &Run<'_>,
    ) -> Result<Option<WrittenImage>, FormatError> {
        let Self { disk, frozen, clone, digest, baseline } = self;
        run.phase(Phase::Disk(disk.config.id.clone()), |control| match disk.mode {
            DiskMode::Capture => {
                let name = disk.image_name();
                let image = if let Some(clone) = clone.take() {
                    let known = |offset, len| frozen.known_digest(offset, len);
                    write_raw_image(staging, &name, clone, &known, options, control)?
                } else {
                    let base = parent.and_then(|parent| parent.image(&name));
                    let source = FrozenSource::new(frozen, base.map(ImageReader::index));
                    write(staging, &name, &source, parent, options, control)?
                };
                *digest = image.record.digest;
                if u64::from(image.record.chunk_size) == frozen.granule_size() {
                    *baseline = Some(Known::Image);
                }
                Ok(Some(image))
            }
            DiskMode::Reference => {
                let found = digest_of(&disk.path, frozen, CHUNK_SIZE, Scheme::WRITTEN, control)?;
                *digest = found.0;
                *baseline = found.1.map(Known::Digests);
                Ok(None)
            }
        })
    }

    /// The disk's record in the manifest, once it has been taken.
    pub(crate) fn record(&self) -> DiskRecord {
        let Disk { config, path, mode, granules, can_clone: _ } = &self.disk;
        DiskRecord {
            id: config.id.clone(),
            path: path.clone(),
            size: granules.size(),
            read_only: config.read_only,
            storage: match mode {
                DiskMode::Capture => DiskStorage::Captured,
                DiskMode::Reference => DiskStorage::Reference(Scheme::WRITTEN),
            },
            digest: self.digest,
        }
    }

    /// How often the guest had to wait where it wrote to the disk.
    pub(crate) fn throttled(&self) -> u64 {
        self.frozen.throttled()
    }

    /// The snapshot `id` is in its place: what is not written to from the moment on need not be digested the
    /// next time.
    pub(crate) fn keep(self, snapshot: &Path, id: Digest) {
        match self.baseline {
            Some(Known::Digests(digests)) => self.frozen.keep(digests),
            Some(Known::Image) => {
                let name = self.disk.image_name();
                let baseline = PublishedBaseline::of_new(snapshot, id, &name);
                self.frozen.keep(Arc::new(baseline));
            }
            None => {}
        }
    }
}
