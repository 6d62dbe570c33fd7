//! Disks of a snapshot, ready for a machine.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use squib_devices::{
    granules::{READABLE, Store, Unavailable},
    virtio::block::{BlockError, DiskGranules, TrackedDisk},
};
use squib_formats::{
    error::FormatError,
    image::{CHUNK_SIZE, Control, ImageReader, Scheme, Sink},
    manifest::{DiskRecord, DiskStorage, Manifest},
};
use squib_vmm::machine::Machine;

use super::{ChangedDisks, DiskError, Outside, create, data_bytes, digest, lock, remove, room};
use crate::memory::{ImageBaseline, ImageOrigin, Loader, set_zeros};

/// How captured disks come back. The guest sees the same bytes in both, and each is verified before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiskLoad {
    /// All of them before the guest runs, on all cores.
    Eager,
    /// The guest runs at once; a chunk is brought when it is first touched, and a thread brings the others
    /// meanwhile. A chunk that is damaged or cannot be read ends the machine. Until all is there, which
    /// [`finish_disks`] waits for, the files are of no use without the snapshot and this machine.
    #[default]
    Lazy,
    /// As [`Lazy`](Self::Lazy) without that thread: what nobody touches takes no room and no time.
    Demand,
}

/// Why [`finish_disks`] did not bring all.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// A chunk is damaged or cannot be had or put.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// Brings all that is not there yet of the machine's disks, so that their files serve without the snapshot. It
/// may run, be paused, or have ended.
pub fn finish_disks(machine: &Machine, control: Control<'_>) -> Result<(), FinishError> {
    let ids = machine.config().disks.iter().map(|disk| &disk.id);
    let disks: Vec<_> = ids.filter_map(|id| machine.disk_granules(id)).collect();
    let total = disks.iter().map(|disk| disk.size()).sum();
    let mut done = 0;
    for disk in disks {
        let mut next = 0;
        while let Some(granule) = disk.next_absent(next) {
            control.check().map_err(|_| FinishError::Cancelled)?;
            let offset = granule * disk.granule_size();
            disk.allow(offset, 1, false)?;
            if granule % 64 == 63 {
                control.progress.advanced(done + offset, total, 0);
            }
            next = granule + 1;
        }
        done += disk.size();
        control.progress.advanced(done, total, 0);
    }
    Ok(())
}

/// Why a disk is not [placed](Disks).
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// How the digest of a disk was taken.
#[derive(Clone, Copy)]
pub(crate) struct DigestKind {
    chunk_size: u32,
    scheme: Scheme,
}

/// How the digest of the disk in `record` was taken.
pub(crate) fn digest_kind(manifest: &Manifest, record: &DiskRecord) -> DigestKind {
    match (record.storage, manifest.image(&record.image_name())) {
        (DiskStorage::Reference(scheme), _) => DigestKind { chunk_size: CHUNK_SIZE, scheme },
        (DiskStorage::Captured, image) => DigestKind {
            chunk_size: image.map_or(CHUNK_SIZE, |image| image.chunk_size),
            scheme: manifest.scheme(),
        },
    }
}

/// Checks that `disk` is still what `record` says, and that nobody who may write to it uses it.
pub(crate) fn check(
    record: &DiskRecord,
    disk: Outside,
    kind: DigestKind,
    changed: ChangedDisks,
    control: Control<'_>,
) -> Result<(), CheckError> {
    unchanged(record, disk, true, kind, changed, control).map(|_| ())
}

/// The disk, locked, which is still what `record` says.
fn unchanged(
    record: &DiskRecord,
    disk: Outside,
    read_only: bool,
    kind: DigestKind,
    changed: ChangedDisks,
    control: Control<'_>,
) -> Result<Arc<DiskGranules>, CheckError> {
    let DiskRecord { id, size, digest: expected, .. } = record;
    let Outside { file, path } = disk;
    let file = lock(id, file, &path, read_only, *size).map_err(|error| match error {
        DiskError::Block(error) => CheckError::Block(error),
        error => CheckError::Disk(error),
    })?;
    let granules = Arc::new(TrackedDisk::granules_of(id, file, read_only));
    // Nobody else has it yet, so it can be frozen, and nothing is ever put aside.
    let frozen = granules.freeze(0).ok_or_else(|| DiskError::Frozen { id: id.clone() })?;
    let (found, digests) = digest::digest(
        &path.display().to_string(),
        &frozen,
        kind.chunk_size,
        kind.scheme,
        control,
    )?;
    if let Some(digests) = digests {
        frozen.keep(digests);
    }
    if found != *expected {
        let (id, expected) = (id.clone(), *expected);
        let error = DiskError::Changed { id, path, expected, found };
        match changed {
            ChangedDisks::Refuse => return Err(error.into()),
            ChangedDisks::Accept => tracing::warn!("{error}; going on, as asked for"),
        }
    }
    Ok(granules)
}

/// Disks for a machine. Files that were made for it are removed again unless they are kept.
#[derive(Default)]
pub(crate) struct Disks {
    granules: BTreeMap<String, Arc<DiskGranules>>,
    /// Those that a thread is to bring.
    wanted: Vec<(Arc<DiskGranules>, Arc<ImageReader>)>,
    made: Vec<PathBuf>,
    /// Bytes that the thread will write.
    promised: u64,
}

impl Disks {
    /// Makes the disk from `image` as a new private file at `path`. Zero chunks become holes.
    pub(crate) fn make(
        &mut self,
        id: &str,
        image: &Arc<ImageReader>,
        path: &Path,
        load: DiskLoad,
        control: Control<'_>,
    ) -> Result<(), CheckError> {
        let record = image.record();
        if load != DiskLoad::Demand {
            let needed = data_bytes(image.index());
            room::check(id, path, needed, self.promised)?;
            if load == DiskLoad::Lazy {
                self.promised = self.promised.saturating_add(needed);
            }
        }
        let file = create(id, path, record.size)?;
        self.made.push(path.to_owned());
        let granules = Arc::new(TrackedDisk::absent(id, file, record.chunk_size.trailing_zeros()));
        set_zeros(&granules, image.index());
        granules.set_baseline(Arc::new(ImageBaseline(Arc::clone(image))));
        match load {
            DiskLoad::Eager => {
                image.load(&FileSink { granules: &granules, path }, control)?;
                granules.set_all(READABLE);
            }
            DiskLoad::Lazy | DiskLoad::Demand => {
                granules.set_origin(Arc::new(ImageOrigin::new(Arc::clone(image))));
                if load == DiskLoad::Lazy {
                    self.wanted.push((Arc::clone(&granules), Arc::clone(image)));
                }
            }
        }
        self.granules.insert(id.to_owned(), granules);
        Ok(())
    }

    /// Takes `disk`, which must still be what `record` says.
    pub(crate) fn take(
        &mut self,
        record: &DiskRecord,
        disk: Outside,
        kind: DigestKind,
        changed: ChangedDisks,
        control: Control<'_>,
    ) -> Result<(), CheckError> {
        let granules = unchanged(record, disk, record.read_only, kind, changed, control)?;
        self.granules.insert(record.id.clone(), granules);
        Ok(())
    }

    /// The disks by id, for the machine.
    pub(crate) fn granules(&self) -> BTreeMap<String, Arc<DiskGranules>> {
        self.granules.clone()
    }

    /// Leaves the files where they are. What is not there yet is brought for as long as `machine` lives.
    pub(crate) fn keep(mut self, machine: &Machine) -> Result<(), FormatError> {
        for (disk, image) in &self.wanted {
            machine.attach(Box::new(Loader::start(disk, image, &[], None)?));
        }
        self.made.clear();
        Ok(())
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        self.made.iter().for_each(|path| remove(path));
    }
}

/// A new file, nothing but one hole.
struct FileSink<'a> {
    granules: &'a DiskGranules,
    path: &'a Path,
}

impl Sink for FileSink<'_> {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        true
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.granules.store().fill(offset, bytes);
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", self.path.display()))
        };
        written.map_err(named)
    }
}
