//! A snapshot into a machine.

use std::{
    collections::BTreeMap,
    fmt,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use squib_devices::memory::GuestRam;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{ImageReader, Loaded},
    manifest::{DiskRecord, DiskStorage, MEMORY_IMAGE, Manifest},
    sections::Sections,
    snapshot_dir::Snapshot,
};
use squib_vmm::{
    config::{ConfigError, MachineConfig},
    hypervisor,
    machine::{self, Machine, MachineError},
};

pub use crate::disks::DiskError;
use crate::{
    compat::{self, Mismatch},
    config,
    disks::{self, ChangedDisks, CheckError, Made},
    memory::RamSink,
    observe::{Phase, Run},
};

/// Choices of a restore.
#[derive(Clone, Default)]
pub struct RestoreOptions<'a> {
    /// Name of the machine; `None` for the one in the snapshot.
    pub name: Option<String>,
    /// Existing directory for the captured disks: each becomes `ID.img` in it, a new private file. Only
    /// a snapshot without captured disks does without.
    pub disk_dir: Option<PathBuf>,
    /// Files to use as the disks of these ids, whether captured or not. Their bytes are checked.
    pub disk_places: BTreeMap<String, PathBuf>,
    /// What to do with a disk outside the snapshot that has changed.
    pub changed_disks: ChangedDisks,
    /// Where else to look for the snapshots that a difference builds on: snapshots, or directories of them.
    pub parents: Vec<PathBuf>,
    /// Identity and time of the machine.
    pub machine: machine::RestoreOptions,
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
    /// Disks that were made from the snapshot: id and path. They belong to the caller.
    pub disks: Vec<(String, PathBuf)>,
    /// What was read of the memory's image.
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
    /// Loading memory.
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
    /// There are captured disks and no directory for them.
    #[error("disk `{id}` is in the snapshot, and there is no directory to put it into")]
    NoDiskDir {
        /// The first of them.
        id: String,
    },
    /// The machine cannot be made, or a section is not for it.
    #[error(transparent)]
    Machine(MachineError),
}

/// Brings the snapshot at `path` back as a paused machine. What the guest writes to its console goes to
/// `console`.
///
/// Before any byte of memory is loaded: header, manifest, every section's and index's digest, the
/// machine's configuration, disks, and whether this host's CPU is the same.
pub fn restore(
    path: &Path,
    options: &RestoreOptions<'_>,
    console: Box<dyn Write + Send>,
) -> Result<Restored, RestoreError> {
    let start = Instant::now();
    let opened = Opened::new(path, options)?;
    let mut timings = RestoreTimings { open: start.elapsed(), ..RestoreTimings::default() };
    let Opened { snapshot, sections, mut config, memory, disks } = opened;

    let started = Instant::now();
    let mut made = Made::default();
    let mut new_disks = Vec::new();
    for (disk, record) in config.disks.iter_mut().zip(&snapshot.manifest().machine.disks) {
        let image = disks.iter().find(|(id, _)| *id == record.id).map(|(_, image)| image);
        disk.path = place_disk(record, image, options, &mut made)?;
        if image.is_some() {
            new_disks.push((record.id.clone(), disk.path.clone()));
        }
    }
    timings.disks = started.elapsed();

    let started = Instant::now();
    let mut loaded = (Loaded::default(), Duration::ZERO);
    let fill = |ram: &GuestRam, host: &hypervisor::CpuIdentity| {
        let started = Instant::now();
        let host = config::identity(host.clone());
        let mismatches = compat::compare(&snapshot.manifest().cpu, &host);
        if !mismatches.is_empty() {
            return Err(RestoreError::Incompatible(mismatches));
        }
        let sink = RamSink(ram);
        let memory = options.run.phase(Phase::Memory, |control| memory.load(&sink, control))?;
        loaded = (memory, started.elapsed());
        Ok(())
    };
    options.run.observer.begin(&Phase::Machine);
    let machine = Machine::restore(config, sections.into_rest(), options.machine, console, fill)
        .map_err(RestoreError::from_machine)?;
    made.keep();
    (timings.memory, timings.machine) = (loaded.1, started.elapsed().saturating_sub(loaded.1));
    timings.total = start.elapsed();
    Ok(Restored {
        machine,
        id: snapshot.id(),
        manifest: snapshot.manifest().clone(),
        disks: new_disks,
        memory: loaded.0,
        timings,
    })
}

impl RestoreError {
    /// What the memory's loader said comes back through the machine as it was.
    fn from_machine(error: MachineError) -> Self {
        match error {
            MachineError::Fill(error) => match error.downcast::<Self>() {
                Ok(error) => *error,
                Err(error) => Self::Machine(MachineError::Fill(error)),
            },
            error => Self::Machine(error),
        }
    }
}

impl From<CheckError> for RestoreError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Disk(error) => Self::Disk(error),
            CheckError::Format(error) => Self::Format(error),
        }
    }
}

/// What is known of a snapshot before anything is made.
struct Opened {
    snapshot: Snapshot,
    sections: Sections,
    config: MachineConfig,
    memory: ImageReader,
    /// Images of the disks that are to be made, by id.
    disks: Vec<(String, ImageReader)>,
}

impl Opened {
    fn new(path: &Path, options: &RestoreOptions<'_>) -> Result<Self, RestoreError> {
        options.run.observer.begin(&Phase::Open);
        let snapshot = Snapshot::open_chain(path, &options.parents)?;
        let manifest = snapshot.manifest();
        let mut config = config::from_manifest(&manifest.machine)?;
        if let Some(name) = &options.name {
            config.name = name.clone();
            config.validate()?;
        }
        let records = &manifest.machine.disks;
        let known = |id: &String| records.iter().any(|disk| disk.id == *id);
        if let Some(id) = options.disk_places.keys().find(|id| !known(id)) {
            return Err(RestoreError::NoSuchDisk { id: id.clone() });
        }
        let sections = Sections::read(&snapshot)?;
        let memory = ImageReader::open(&snapshot, MEMORY_IMAGE)?;
        let mut disks = Vec::new();
        for disk in records {
            if disk.storage == DiskStorage::Captured && !options.disk_places.contains_key(&disk.id)
            {
                if options.disk_dir.is_none() {
                    return Err(RestoreError::NoDiskDir { id: disk.id.clone() });
                }
                disks.push((disk.id.clone(), ImageReader::open(&snapshot, &disk.image_name())?));
            }
        }
        Ok(Self { snapshot, sections, config, memory, disks })
    }
}

/// Makes or checks a disk, and says where it is.
fn place_disk(
    record: &DiskRecord,
    image: Option<&ImageReader>,
    options: &RestoreOptions<'_>,
    made: &mut Made,
) -> Result<PathBuf, RestoreError> {
    options.run.phase(Phase::Disk(record.id.clone()), |control| match (image, &options.disk_dir) {
        (Some(image), Some(dir)) => {
            let path = dir.join(format!("{}.img", record.id));
            made.make(&record.id, image, &path, control)?;
            Ok(path)
        }
        _ => {
            let place = options.disk_places.get(&record.id);
            let path = place.map_or(Path::new(&record.path), PathBuf::as_path);
            disks::check(record, path, options.changed_disks, control)?;
            Ok(path.to_owned())
        }
    })
}

struct Lines<'a>(&'a [Mismatch]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|mismatch| write!(f, "\n  {mismatch}"))
    }
}
