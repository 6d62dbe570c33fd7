//! A machine into a snapshot.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use squib_devices::{
    granules::Frozen,
    memory::RamStore,
    virtio::block::{DiskGranules, TrackedDisk},
};
use squib_formats::{
    chain::MAX_CHAIN,
    digest::Digest,
    error::FormatError,
    image::{Control, ImageOptions, ImageReader, Source, WrittenImage, write_diff, write_image},
    manifest::{MAX_HINT, MEMORY_IMAGE, Manifest},
    persist::Section,
    publish::{Durability, Existing, Staging},
    sections::write_sections,
    snapshot_dir::Snapshot,
};
use squib_vmm::{
    config::{DiskConfig, MachineConfig},
    hypervisor::{CpuIdentity, HostSystem},
    machine::{Hold, Machine, MachineError, RunState},
};

pub use crate::disks::DiskError;
use crate::{
    boot_files::{self, BootFileError},
    config,
    disks::{self, Disk, FrozenDisk},
    memory::{FrozenSource, PublishedBaseline},
    observe::{Phase, Run},
    remove::{self, Dependent},
};

/// What a capture needs of a machine.
pub trait Guest: Sync {
    /// What it is made of.
    fn config(&self) -> &MachineConfig;
    /// Whether it is paused already.
    fn is_paused(&self) -> bool;
    /// Brings it to rest within `deadline`; on an error it runs on.
    fn pause(&self, deadline: Duration) -> Result<(), MachineError>;
    /// Keeps the paused machine paused while the answer lives, if others could let it run.
    fn hold(&self) -> Result<Option<Hold<'_>>, MachineError> {
        Ok(None)
    }
    /// Lets it run.
    fn resume(&self) -> Result<(), MachineError>;
    /// Ends it.
    fn stop(&self);
    /// Its state at rest, but for memory and disks.
    fn save(&self) -> Result<Vec<Section>, MachineError>;
    /// The memory of the paused machine as it is now, for reading while it goes on: see
    /// [`Machine::freeze`].
    fn freeze(&self, limit: u64) -> Result<Frozen<RamStore>, MachineError>;
    /// What it sees of its CPUs.
    fn cpu_identity(&self) -> CpuIdentity;
    /// What is known of the host's system, if its backend is a part of it.
    fn host_system(&self) -> Option<HostSystem> {
        None
    }
    /// The wall time that goes into the manifest, in nanoseconds since 1970-01-01 00:00 UTC. For a
    /// deterministic machine its own, so that equal runs give equal snapshots.
    fn wall_ns(&self) -> u64;
    /// One of its disks; of what lies at its path, nothing is known but the bytes.
    fn open_disk(&self, disk: &DiskConfig) -> Result<Arc<DiskGranules>, DiskError> {
        let file = disks::open(&disk.id, &disk.path, true)?;
        Ok(Arc::new(TrackedDisk::granules_of(&disk.id, file, false)))
    }
}

impl Guest for Machine {
    fn config(&self) -> &MachineConfig {
        Machine::config(self)
    }

    fn is_paused(&self) -> bool {
        Machine::state(self) == RunState::Paused
    }

    fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        Machine::pause(self, deadline)
    }

    fn hold(&self) -> Result<Option<Hold<'_>>, MachineError> {
        Machine::hold(self).map(Some)
    }

    fn resume(&self) -> Result<(), MachineError> {
        Machine::resume(self)
    }

    fn stop(&self) {
        Machine::stop(self);
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        Machine::save(self)
    }

    fn freeze(&self, limit: u64) -> Result<Frozen<RamStore>, MachineError> {
        Machine::freeze(self, limit)
    }

    fn cpu_identity(&self) -> CpuIdentity {
        Machine::cpu_identity(self)
    }

    fn host_system(&self) -> Option<HostSystem> {
        Machine::host_system(self)
    }

    fn wall_ns(&self) -> u64 {
        Machine::time(self).wall_ns
    }

    fn open_disk(&self, disk: &DiskConfig) -> Result<Arc<DiskGranules>, DiskError> {
        self.disk_granules(&disk.id).cloned().ok_or_else(|| DiskError::Io {
            id: disk.id.clone(),
            path: disk.path.clone(),
            action: "read",
            source: std::io::ErrorKind::NotFound.into(),
        })
    }
}

/// Where the bytes of a disk go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskMode {
    /// Into the snapshot.
    Capture,
    /// They stay where they are; the snapshot holds path, size and digest, and a restore checks them.
    Reference,
}

/// What happens to the guest once the snapshot has what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum After {
    /// It goes on if it was running; if it was paused it stays so.
    #[default]
    GoOn,
    /// It is ended once the snapshot is in its place. If there is no snapshot it goes on.
    Stop,
}

/// Choices of a capture.
#[derive(Clone)]
pub struct CaptureOptions<'a> {
    /// What to do with a snapshot that is there already.
    pub existing: Existing,
    /// What the snapshot must survive once it is there.
    pub durability: Durability,
    /// How long vCPUs and devices may take to come to rest.
    pub pause_deadline: Duration,
    /// What happens to the guest.
    pub after: After,
    /// Let the guest go on as soon as its state is saved, while memory and disks are written as they were at
    /// that moment.
    /// Not together with [`After::Stop`], which has nothing to go on.
    pub live: bool,
    /// Most bytes of memory, and of each disk, that a live capture puts aside when the guest writes to them
    /// before they are stored. Then the guest waits where it writes.
    pub aside: u64,
    /// How images are stored.
    pub image: ImageOptions,
    /// Disks by id; those not named are captured if the guest can write to them, else referenced.
    pub disks: BTreeMap<String, DiskMode>,
    /// Clone a captured disk into the snapshot where the file system can: at once, however large it is, and
    /// both share what lies on the storage. Not a disk of which the parent has an image, or that is not all there
    /// yet, since it is being restored.
    pub reflink: bool,
    /// Put the kernel and the initrd into the snapshot.
    pub with_kernel: bool,
    /// Make it a difference to this snapshot, which must stay for as long as the new one is wanted.
    pub parent: Option<PathBuf>,
    /// Where else snapshots may lie that need one that is to be replaced: see
    /// [`dependents`](crate::remove::dependents).
    pub dependents_in: Vec<PathBuf>,
    /// Most bytes that the snapshot may take; more is answered as a full disk is.
    pub limit: Option<u64>,
    /// How it runs.
    pub run: Run<'a>,
}

impl Default for CaptureOptions<'_> {
    /// Refuses an existing snapshot, syncs everything, two seconds to come to rest, the guest goes on once
    /// everything has been read; a live capture puts at most 256 MiB aside; disks are cloned where that can be.
    fn default() -> Self {
        Self {
            existing: Existing::Refuse,
            durability: Durability::Full,
            pause_deadline: Duration::from_secs(2),
            after: After::GoOn,
            live: false,
            aside: 256 << 20,
            image: ImageOptions::default(),
            disks: BTreeMap::new(),
            reflink: true,
            with_kernel: false,
            parent: None,
            dependents_in: Vec::new(),
            limit: None,
            run: Run::default(),
        }
    }
}

/// A snapshot that has been written.
#[derive(Debug)]
pub struct Captured {
    /// The snapshot's id.
    pub id: Digest,
    /// Where it lies.
    pub path: PathBuf,
    /// Guest memory, with what was not stored.
    pub memory: WrittenImage,
    /// The captured disks by id.
    pub disks: Vec<(String, WrittenImage)>,
    /// Bytes of all files but the manifest.
    pub stored: u64,
    /// How long it took.
    pub timings: CaptureTimings,
}

/// How long the parts of a capture took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureTimings {
    /// Until vCPUs and devices were at rest.
    pub pause: Duration,
    /// Saving and writing the sections.
    pub state: Duration,
    /// Writing guest memory.
    pub memory: Duration,
    /// Writing or digesting disks.
    pub disks: Duration,
    /// Syncing and renaming.
    pub publish: Duration,
    /// The guest stood still for so long because of the capture; zero if it was paused before.
    pub downtime: Duration,
    /// How often the guest had to wait in a live capture, since too much had been put aside.
    pub throttled: u64,
    /// All of it.
    pub total: Duration,
}

/// Why there is no snapshot. The guest runs on if it was running, and nothing is left on the disk.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Writing failed, or there is something at the place of the snapshot.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The machine cannot be paused or saved.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A disk cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The snapshot would replace one that it builds on.
    #[error("{}: the new snapshot would build on it, so it is not replaced", .path.display())]
    ReplacesParent {
        /// The one that would be lost.
        path: PathBuf,
    },
    /// The snapshot would replace one that others build on.
    #[error("{}: {}; it is not replaced", .path.display(), remove::needed(.dependents))]
    ReplacesNeeded {
        /// The one that would be lost.
        path: PathBuf,
        /// Those that need it.
        dependents: Vec<Dependent>,
    },
    /// Kernel or initrd are to be put into the snapshot, and they are not where the guest was booted from.
    #[error(transparent)]
    BootFile(#[from] BootFileError),
    /// The options name a disk that the machine does not have.
    #[error("the machine has no disk `{id}`")]
    NoSuchDisk {
        /// The id.
        id: String,
    },
}

/// Writes a snapshot of `guest` to `output`. The guest is paused for the time that its state, memory and
/// writable disks are read; disks that are all cloned are read after that.
pub fn capture(
    guest: &dyn Guest,
    output: &Path,
    options: &CaptureOptions<'_>,
) -> Result<Captured, CaptureError> {
    capture_into(guest, output, options, || Staging::new(output, options.existing))
}

/// As [`capture`], with every step of writing through `layer`.
#[cfg(feature = "faults")]
pub fn capture_with_layer(
    guest: &dyn Guest,
    output: &Path,
    options: &CaptureOptions<'_>,
    layer: Arc<dyn squib_formats::layer::Layer>,
) -> Result<Captured, CaptureError> {
    let begin = || Staging::with_layer(output, options.existing, layer);
    capture_into(guest, output, options, begin)
}

fn capture_into(
    guest: &dyn Guest,
    output: &Path,
    options: &CaptureOptions<'_>,
    begin: impl FnOnce() -> Result<Staging, FormatError>,
) -> Result<Captured, CaptureError> {
    let start = Instant::now();
    let mut timings = CaptureTimings::default();
    let config = guest.config();
    if let Some(id) = options.disks.keys().find(|id| config.disks.iter().all(|d| d.id != **id)) {
        return Err(CaptureError::NoSuchDisk { id: id.clone() });
    }
    // Everything that can fail without the guest's help fails before it is paused.
    let parent = options.parent.as_deref().map(|path| Parent::open(path, output)).transpose()?;
    let parent = parent.as_ref();
    check_replaced(output, options)?;
    let mut staging = begin()?;
    staging.durability(options.durability);
    if let Some(limit) = options.limit {
        staging.limit(limit);
    }
    let mut disks = Vec::new();
    for disk in &config.disks {
        let mut disk = Disk::open(guest, disk, options.disks.get(&disk.id).copied())?;
        if options.reflink {
            disk.try_clone(&staging, parent)?;
        }
        disks.push(disk);
    }

    if options.with_kernel {
        boot_files::store(&mut staging, config)?;
    }

    let run = &options.run;
    let started = Instant::now();
    let paused = run.phase(Phase::Pause, |_| Paused::new(guest, options.pause_deadline))?;
    timings.pause = started.elapsed();

    let started = Instant::now();
    let sections = run.phase(Phase::State, |_| -> Result<_, CaptureError> {
        Ok(write_sections(&mut staging, &guest.save()?)?)
    })?;
    let created = guest.wall_ns();
    timings.state = started.elapsed();

    // Memory is held last and let go first, so that whoever has the disks can have the memory too.
    let disks = disks.into_iter().map(|disk| disk.freeze(options.aside, &staging));
    let mut disks = disks.collect::<Result<Vec<_>, _>>()?;
    let frozen = guest.freeze(options.aside)?;
    let mut paused = Some(paused);
    if options.live && options.after == After::GoOn {
        timings.downtime = paused.take().map_or(Ok(Duration::ZERO), Paused::go_on)?;
        disks.iter().for_each(FrozenDisk::let_go);
    }

    let started = Instant::now();
    let base = parent.and_then(|parent| parent.image(MEMORY_IMAGE)).map(ImageReader::index);
    let memory = run.phase(Phase::Memory, |control| {
        let source = FrozenSource::new(&frozen, base);
        write(&mut staging, MEMORY_IMAGE, &source, parent, options.image, control)
    })?;
    timings.memory = started.elapsed();
    if options.after == After::GoOn
        && disks.iter().all(FrozenDisk::is_safe)
        && let Some(paused) = paused.take()
    {
        timings.downtime = paused.go_on()?;
        disks.iter().for_each(FrozenDisk::let_go);
    }

    let started = Instant::now();
    let (mut images, mut captured) = (vec![memory.record.clone()], Vec::new());
    for disk in &mut disks {
        if let Some(image) = disk.take(&mut staging, parent, options.image, run)? {
            images.push(image.record.clone());
            captured.push((disk.id().to_owned(), image));
        }
    }
    timings.disks = started.elapsed();

    // From here on nothing is read that the guest could change.
    if options.after == After::GoOn
        && let Some(paused) = paused.take()
    {
        timings.downtime = paused.go_on()?;
    }

    let started = Instant::now();
    let records = disks.iter().map(FrozenDisk::record).collect();
    let (machine, operation) = config::to_manifest(config, records);
    let manifest = Manifest {
        writer: concat!("squib ", env!("CARGO_PKG_VERSION")).to_owned(),
        host: crate::host::name(),
        created,
        parent: parent.map(|parent| parent.snapshot.id()),
        parent_hint: parent.and_then(Parent::hint),
        host_backend: guest.host_system().map(config::host_backend),
        operation: Some(operation),
        machine,
        cpu: config::identity(guest.cpu_identity()),
        images,
        sections,
        files: Vec::new(),
    };
    let stored = staging.stored();
    let id = run.phase(Phase::Publish, |_| staging.publish(manifest))?;
    timings.publish = started.elapsed();
    let granule_size = frozen.granule_size();
    timings.throttled = frozen.throttled() + disks.iter().map(FrozenDisk::throttled).sum::<u64>();
    if granule_size == u64::from(memory.record.chunk_size) {
        frozen.keep(Arc::new(PublishedBaseline::of_new(output, id, MEMORY_IMAGE)));
    }
    disks.into_iter().for_each(|disk| disk.keep(output, id));
    if let Some(paused) = paused {
        timings.downtime = paused.stop();
    }
    timings.total = start.elapsed();
    Ok(Captured { id, path: output.to_owned(), memory, disks: captured, stored, timings })
}

/// Whether nothing builds on the snapshot that is to be replaced.
fn check_replaced(output: &Path, options: &CaptureOptions<'_>) -> Result<(), CaptureError> {
    if options.existing == Existing::Refuse {
        return Ok(());
    }
    // What cannot be read as a snapshot is looked at when it is replaced.
    match remove::dependents(output, &options.dependents_in) {
        Ok(dependents) if !dependents.is_empty() => {
            Err(CaptureError::ReplacesNeeded { path: output.to_owned(), dependents })
        }
        _ => Ok(()),
    }
}

/// The snapshot that the new one is a difference to, all its images open.
pub(crate) struct Parent {
    snapshot: Snapshot,
    images: Vec<ImageReader>,
    /// It stays until what builds on it is published.
    _kept: Option<OwnedFd>,
}

impl Parent {
    /// Opens the snapshot at `path`, on which one at `output` will build.
    fn open(path: &Path, output: &Path) -> Result<Self, CaptureError> {
        let path = std::fs::canonicalize(path)
            .map_err(|error| FormatError::io(path.display().to_string(), "open", error))?;
        let kept = remove::keep(&path);
        let snapshot = Snapshot::open_chain(&path, &[])?;
        if snapshot.chain().count() >= MAX_CHAIN {
            return Err(FormatError::ChainTooLong { path: output.to_owned() }.into());
        }
        if let Ok(output) = std::fs::canonicalize(output)
            && let Some(link) = snapshot.chain().find(|link| link.path() == output)
        {
            return Err(CaptureError::ReplacesParent { path: link.path().to_owned() });
        }
        let records = snapshot.manifest().images.iter();
        let images = records.map(|record| ImageReader::open(&snapshot, &record.name));
        let images = images.collect::<Result<_, _>>()?;
        Ok(Self { snapshot, images, _kept: kept })
    }

    pub(crate) fn image(&self, name: &str) -> Option<&ImageReader> {
        self.images.iter().find(|image| image.record().name == name)
    }

    /// Where it is, if that can be written down.
    fn hint(&self) -> Option<String> {
        let hint = self.snapshot.path().to_str()?;
        (hint.len() <= MAX_HINT).then(|| hint.to_owned())
    }
}

/// Writes an image, as a difference if the parent has one of that name.
pub(crate) fn write(
    staging: &mut Staging,
    name: &str,
    source: &dyn Source,
    parent: Option<&Parent>,
    options: ImageOptions,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    match parent.and_then(|parent| parent.image(name)) {
        Some(base) => write_diff(staging, name, source, base, options, control),
        None => write_image(staging, name, source, options, control),
    }
}

/// A guest at rest, which goes on when this is dropped if it was running before.
struct Paused<'a> {
    guest: &'a dyn Guest,
    hold: Option<Hold<'a>>,
    was_running: bool,
    since: Instant,
}

impl<'a> Paused<'a> {
    fn new(guest: &'a dyn Guest, deadline: Duration) -> Result<Self, MachineError> {
        let since = Instant::now();
        let was_running = !guest.is_paused();
        guest.pause(deadline)?;
        let mut paused = Self { guest, hold: None, was_running, since };
        paused.hold = guest.hold()?;
        Ok(paused)
    }

    /// Back to what it did before. Answers how long it stood still.
    fn go_on(mut self) -> Result<Duration, MachineError> {
        self.hold = None;
        if !std::mem::take(&mut self.was_running) {
            return Ok(Duration::ZERO);
        }
        self.guest.resume()?;
        Ok(self.since.elapsed())
    }

    /// Ends it. Answers how long it had stood still.
    fn stop(mut self) -> Duration {
        self.guest.stop();
        match std::mem::take(&mut self.was_running) {
            true => self.since.elapsed(),
            false => Duration::ZERO,
        }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.hold = None;
        if self.was_running
            && let Err(error) = self.guest.resume()
        {
            tracing::error!("after a failed capture the guest does not go on: {error}");
        }
    }
}
