//! A snapshot into a machine.

use std::{
    collections::BTreeMap,
    fmt,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use squib_devices::{granules::Baseline, memory::GuestRam};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{ImageReader, Loaded},
    manifest::{DiskRecord, DiskStorage, MEMORY_IMAGE, Manifest},
    sections::Sections,
    snapshot_dir::Snapshot,
    working_set::WorkingSet,
};
use squib_vmm::{
    config::{BackendKind, ConfigError, MachineConfig, OnReset},
    hypervisor,
    machine::{self, Contents, Machine, MachineError, Place},
};

pub use crate::disks::{DiskError, DiskLoad, FinishError, finish_disks};
use crate::{
    boot_files::{self, BootFileError, BootFiles},
    compat::{self, Mismatch},
    config,
    disks::{self, ChangedDisks, CheckError, Disks, Outside},
    host,
    memory::{
        self, CacheError, ImageBaseline, Loader, MemoryError, PublishedBaseline, Ration, Room,
        TemplateCache,
    },
    observe::{Phase, Run},
};

/// How guest memory comes back. The guest sees the same bytes in all of these, and each is verified before it
/// is used.
#[derive(Clone, Debug, Default)]
pub enum MemoryLoad {
    /// All of it before the guest runs, on all cores.
    Eager,
    /// The guest runs at once; a chunk is brought when it is first touched, and a thread brings the others
    /// meanwhile. A chunk that is damaged or cannot be read ends the machine.
    #[default]
    Lazy,
    /// As [`Lazy`](Self::Lazy) without that thread, so that the machine's granules
    /// [record](squib_devices::granules::Granules::recorded) what the guest needs.
    Record,
    /// As a copy-on-write view of a template in this cache, which is made first if need be.
    Template(TemplateCache),
}

impl MemoryLoad {
    /// Whether the restore brings all bytes by itself into memory that nobody shares.
    pub(crate) fn brings_all(&self) -> bool {
        matches!(self, Self::Eager | Self::Lazy)
    }
}

/// Choices of a restore.
#[derive(Clone, Default)]
pub struct RestoreOptions<'a> {
    /// Name of the machine; `None` for the one in the snapshot.
    pub name: Option<String>,
    /// The backend that is to go on with it; `None` for the one in the snapshot. Another is refused with
    /// everything that it has otherwise.
    pub backend: Option<BackendKind>,
    /// Existing directory for the captured disks: each becomes `ID.img` in it, a new private file. Only
    /// a snapshot without captured disks does without.
    pub disk_dir: Option<PathBuf>,
    /// Files to use as the disks of these ids, whether captured or not. Their bytes are checked.
    pub disk_places: BTreeMap<String, PathBuf>,
    /// A disk outside the snapshot is opened where the snapshot says only if it really lies, symbolic links
    /// resolved, at or below one of these paths. A relative path in a snapshot is always refused.
    pub allowed_disks: Vec<PathBuf>,
    /// What to do with a disk outside the snapshot that has changed.
    pub changed_disks: ChangedDisks,
    /// Where else to look for the snapshots that a difference builds on: snapshots, or directories of them.
    pub parents: Vec<PathBuf>,
    /// How memory comes back.
    pub memory: MemoryLoad,
    /// How captured disks come back.
    pub disks: DiskLoad,
    /// Take the risk that the host's memory is too small: see [`MemoryError`].
    pub overcommit: bool,
    /// Identity and time of the machine.
    pub machine: machine::RestoreOptions,
    /// What a reset by the guest does; `None` for what the snapshot says.
    pub on_reset: Option<OnReset>,
    /// What a reset boots again.
    pub boot_files: BootFiles,
    /// How it runs.
    pub run: Run<'a>,
}

/// A machine that has been brought back. It is paused.
pub struct Restored {
    /// The machine.
    pub machine: Machine,
    /// Id of the snapshot.
    pub id: Digest,
    /// What the snapshot says of itself.
    pub manifest: Manifest,
    /// Why the machine cannot boot again after a reset, as far as that shows beforehand.
    pub reboot: Result<(), BootFileError>,
    /// Disks that were made from the snapshot: id and path. They belong to the caller.
    pub disks: Vec<(String, PathBuf)>,
    /// What was read of the memory's image before the guest could run; all zero unless it was eager.
    pub memory: Loaded,
    /// How long it took.
    pub timings: RestoreTimings,
}

/// How long the parts of a restore took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreTimings {
    /// Checking header, manifest, sections and indexes.
    pub open: Duration,
    /// Making or checking disks.
    pub disks: Duration,
    /// Loading memory, or making it ready to be loaded.
    pub memory: Duration,
    /// Putting the machine together and giving it its state.
    pub machine: Duration,
    /// All of it.
    pub total: Duration,
}

/// Why a snapshot cannot be restored. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot is damaged, incomplete, or not one.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The machine in the manifest is not one that this build can have.
    #[error("manifest: {0}")]
    Config(#[from] ConfigError),
    /// This host cannot go on with it.
    #[error("this host cannot go on with the snapshot:{}", Lines(.0))]
    Incompatible(Vec<Mismatch>),
    /// A disk outside the snapshot.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The options name a disk that the snapshot does not have.
    #[error("the snapshot has no disk `{id}`")]
    NoSuchDisk {
        /// The id.
        id: String,
    },
    /// The options name a kernel or initrd that is not what the guest was booted from.
    #[error(transparent)]
    BootFile(#[from] BootFileError),
    /// There are captured disks and no directory for them.
    #[error("disk `{id}` is in the snapshot, and there is no directory to put it into")]
    NoDiskDir {
        /// The first of them.
        id: String,
    },
    /// The template cannot be made or used.
    #[error(transparent)]
    Template(CacheError),
    /// This host's memory is too small for it.
    #[error(transparent)]
    Room(#[from] MemoryError),
    /// Memory for the guest could not be had.
    #[error("{size} bytes of guest memory: {source}")]
    Memory {
        /// Bytes asked for.
        size: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// The machine cannot be made, or a section is not for it.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Brings the snapshot at `path` back as a paused machine. What the guest writes to its console goes to
/// `console`.
///
/// Before any byte of memory is loaded: header, manifest, every section's and index's digest, the
/// machine's configuration, whether this host's CPU is the same, and disks.
pub fn restore(
    path: &Path,
    options: &RestoreOptions<'_>,
    console: Box<dyn Write + Send>,
) -> Result<Restored, RestoreError> {
    let start = Instant::now();
    let opened = Opened::new(path, options)?;
    let mut timings = RestoreTimings { open: start.elapsed(), ..RestoreTimings::default() };
    let Opened { snapshot, sections, mut config, images, room } = opened;
    boot_files::check_named(&options.boot_files, &config)?;

    let started = Instant::now();
    let mut disks = Disks::default();
    let mut new_disks = Vec::new();
    for (disk, record) in config.disks.iter_mut().zip(&snapshot.manifest().machine.disks) {
        let image = images.iter().find(|(id, _)| *id == record.id).map(|(_, image)| image);
        disk.path = place_disk(&snapshot, record, image, options, &mut disks)?;
        if image.is_some() {
            new_disks.push((record.id.clone(), disk.path.clone()));
        }
    }
    timings.disks = started.elapsed();

    let started = Instant::now();
    let Memory { ram, loaded, prefetch } = Memory::new(&snapshot, options, &room)?;
    timings.memory = started.elapsed();

    let started = Instant::now();
    options.run.observer.begin(&Phase::Machine);
    config.on_reset = options.on_reset.unwrap_or(config.on_reset);
    let reboot = boot_files::place(&snapshot, &options.boot_files, &mut config);
    let contents = Contents { ram: ram.clone(), disks: disks.granules() };
    let sections = sections.into_rest();
    let machine = Machine::restore(config, sections, options.machine, contents, console)?;
    if let Some(image) = prefetch {
        let first = working_set(&snapshot);
        let ration = Ration::new(host::memory);
        machine.attach(Box::new(Loader::start(ram.granules(), &image, &first, Some(ration))?));
    }
    disks.keep(&machine)?;
    timings.machine = started.elapsed();
    timings.total = start.elapsed();
    Ok(Restored {
        machine,
        id: snapshot.id(),
        manifest: snapshot.manifest().clone(),
        reboot,
        disks: new_disks,
        memory: loaded,
        timings,
    })
}

impl From<CacheError> for RestoreError {
    fn from(error: CacheError) -> Self {
        match error {
            // That is the snapshot's fault, not the cache's.
            CacheError::Image(error) => Self::Format(error),
            error => Self::Template(error),
        }
    }
}

impl From<CheckError> for RestoreError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Disk(error) => Self::Disk(error),
            CheckError::Block(error) => Self::Machine(error.into()),
            CheckError::Format(error) => Self::Format(error),
        }
    }
}

/// What is known of a snapshot before anything is made.
struct Opened {
    snapshot: Snapshot,
    sections: Sections,
    config: MachineConfig,
    /// Images of the disks that are to be made, by id.
    images: Vec<(String, Arc<ImageReader>)>,
    room: Room,
}

impl Opened {
    fn new(path: &Path, options: &RestoreOptions<'_>) -> Result<Self, RestoreError> {
        options.run.observer.begin(&Phase::Open);
        let snapshot = Snapshot::open_chain(path, &options.parents)?;
        let manifest = snapshot.manifest();
        let mut config = config::from_manifest(manifest)?;
        if let Some(name) = &options.name {
            config.name = name.clone();
            config.validate()?;
        }
        let records = &manifest.machine.disks;
        let known = |id: &String| records.iter().any(|disk| disk.id == *id);
        if let Some(id) = options.disk_places.keys().find(|id| !known(id)) {
            return Err(RestoreError::NoSuchDisk { id: id.clone() });
        }
        let taken = config.backend;
        config.backend = options.backend.unwrap_or(taken);
        let host = hypervisor::identity(&config).map_err(MachineError::from)?;
        let mut mismatches = compat::compare(&manifest.cpu, &config::identity(host));
        mismatches.extend(compat::irq_chip(taken, config.backend));
        if !mismatches.is_empty() {
            return Err(RestoreError::Incompatible(mismatches));
        }
        let room = Room::here(options.overcommit);
        if let Some(warning) = room.size(config.memory)? {
            tracing::warn!("{warning}");
        }
        let places = machine::places(&config);
        let wanted: Vec<_> = places.iter().map(Place::wanted).collect();
        let sections = Sections::read_exactly(&snapshot, &wanted)?;
        room.indexes(&snapshot)?;
        let mut images = Vec::new();
        for disk in records {
            if disk.storage == DiskStorage::Captured && !options.disk_places.contains_key(&disk.id)
            {
                if options.disk_dir.is_none() {
                    return Err(RestoreError::NoDiskDir { id: disk.id.clone() });
                }
                let image = ImageReader::open(&snapshot, &disk.image_name())?;
                images.push((disk.id.clone(), Arc::new(image)));
            }
        }
        Ok(Self { snapshot, sections, config, images, room })
    }
}

/// Guest memory, ready for the guest.
struct Memory {
    ram: GuestRam,
    loaded: Loaded,
    /// The image from which a thread is to bring what is not there.
    prefetch: Option<Arc<ImageReader>>,
}

impl Memory {
    fn new(
        snapshot: &Snapshot,
        options: &RestoreOptions<'_>,
        room: &Room,
    ) -> Result<Self, RestoreError> {
        let record = snapshot.manifest().image(MEMORY_IMAGE)?;
        let failed = |source| RestoreError::Memory { size: record.size, source };
        let open = || ImageReader::open(snapshot, MEMORY_IMAGE).map(Arc::new);
        let with = |ram: GuestRam, baseline: Arc<dyn Baseline>, loaded, prefetch| {
            ram.granules().set_baseline(baseline);
            Ok(Self { ram, loaded, prefetch })
        };
        options.run.phase(Phase::Memory, |control| match &options.memory {
            MemoryLoad::Eager => {
                let image = open()?;
                room.data(image.index())?;
                let ram = memory::absent_ram(&image).map_err(failed)?;
                let loaded = memory::load_all(&ram, &image, control)?;
                with(ram, Arc::new(ImageBaseline(image)), loaded, None)
            }
            MemoryLoad::Lazy | MemoryLoad::Record => {
                let image = open()?;
                if options.memory.brings_all() {
                    room.data(image.index())?;
                }
                let ram = memory::absent_ram(&image).map_err(failed)?;
                memory::load_lazily(&ram, &image);
                let prefetch = match options.memory {
                    MemoryLoad::Record => {
                        ram.granules().start_recording();
                        None
                    }
                    _ => Some(Arc::clone(&image)),
                };
                with(ram, Arc::new(ImageBaseline(image)), Loaded::default(), prefetch)
            }
            MemoryLoad::Template(cache) => {
                let template = match cache.find(record)? {
                    Some(template) => template,
                    None => {
                        let image = open()?;
                        cache.room(image.index())?;
                        cache.get(&image, control)?
                    }
                };
                let ram = template.map().map_err(failed)?;
                let (path, id) = (snapshot.path(), snapshot.id());
                let baseline = PublishedBaseline::new(path, id, MEMORY_IMAGE);
                with(ram, Arc::new(baseline), Loaded::default(), None)
            }
        })
    }
}

/// The chunks that the guest will touch first, as far as that is known.
fn working_set(snapshot: &Snapshot) -> Vec<u32> {
    match WorkingSet::read(snapshot) {
        Ok(found) => found.map_or(Vec::new(), |found| found.chunks().to_vec()),
        Err(error) => {
            // Only the order of loading depends on it.
            tracing::warn!("the working set is not used: {error}");
            Vec::new()
        }
    }
}

/// Makes or checks a disk, and says where it is.
fn place_disk(
    snapshot: &Snapshot,
    record: &DiskRecord,
    image: Option<&Arc<ImageReader>>,
    options: &RestoreOptions<'_>,
    made: &mut Disks,
) -> Result<PathBuf, RestoreError> {
    options.run.phase(Phase::Disk(record.id.clone()), |control| match (image, &options.disk_dir) {
        (Some(image), Some(dir)) => {
            let path = dir.join(format!("{}.img", record.id));
            made.make(&record.id, image, &path, options.disks, control)?;
            Ok(path)
        }
        _ => {
            let disk = Outside::open(record, &options.disk_places, &options.allowed_disks)?;
            let path = disk.path.clone();
            let kind = disks::digest_kind(snapshot.manifest(), record);
            made.take(record, disk, kind, options.changed_disks, control)?;
            Ok(path)
        }
    })
}

struct Lines<'a>(&'a [Mismatch]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|mismatch| write!(f, "\n  {mismatch}"))
    }
}
