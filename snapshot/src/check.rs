//! Whether this host can restore a snapshot, told before anything is mapped or made.

mod disks;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use squib_devices::map;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    header::{self, Header},
    image::ImageReader,
    manifest::{HostBackend, MEMORY_IMAGE, Manifest},
    persist::{PersistError, Section},
    sections::{Misfit, Sections, misfits},
    snapshot_dir::Snapshot,
};
use squib_vmm::{
    config::{BackendKind, ConfigError, MEMORY_MAX, MEMORY_STEP, MachineConfig},
    hypervisor,
    machine::{self, Machine, MachineError, Place, places},
};

use crate::{
    ChangedDisks, compat, config,
    disks::data_bytes,
    host::HostMemory,
    memory::Room,
    observe::{Phase, Run},
    restore::{DiskLoad, MemoryLoad},
};

/// What a restore would be told.
#[derive(Clone, Default)]
pub struct CheckOptions<'a> {
    /// The backend that is to go on with it; `None` for the one in the snapshot.
    pub backend: Option<BackendKind>,
    /// Existing directory for the captured disks.
    pub disk_dir: Option<PathBuf>,
    /// Files to use as the disks of these ids.
    pub disk_places: BTreeMap<String, PathBuf>,
    /// Places of this host in which the snapshot may name a disk: see
    /// [`RestoreOptions`](crate::restore::RestoreOptions).
    pub allowed_disks: Vec<PathBuf>,
    /// What to do with a disk outside the snapshot that has changed.
    pub changed_disks: ChangedDisks,
    /// Where else to look for the snapshots that a difference builds on.
    pub parents: Vec<PathBuf>,
    /// How memory would come back.
    pub memory: MemoryLoad,
    /// How captured disks would come back.
    pub disks: DiskLoad,
    /// Take the risk that the host's memory is too small.
    pub overcommit: bool,
    /// Identity and time of the machine.
    pub machine: machine::RestoreOptions,
    /// How it runs. Only disks outside the snapshot, which are read whole, take time.
    pub run: Run<'a>,
}

/// What [`check`] finds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The snapshot.
    pub path: PathBuf,
    /// Its id, where this build can read its manifest.
    pub id: Option<Digest>,
    /// Whether a restore would be accepted, as far as that can be told: no line differs and nothing is missing.
    pub accepted: bool,
    /// One line a property.
    pub lines: Vec<Line>,
}

/// What was found of one property.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The property: "architecture", "ID_AA64ISAR0_EL1", "disk vda".
    pub what: String,
    /// Whether it stands in the way.
    pub verdict: Verdict,
    /// What the snapshot has and what this host has.
    pub found: String,
    /// What to do, where something can be done.
    pub advice: Option<String>,
}

/// Whether a property stands in the way of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It does not.
    Ok,
    /// This host, this build or a disk has it otherwise than the snapshot.
    Differs,
    /// Something that a restore needs is not there.
    Missing,
    /// Only a restore can tell.
    Unsure,
}

/// Compares the snapshot at `path` with this host and this build. Everything that a restore checks is checked,
/// by the same code, but for the bytes of chunks (`verify` reads them): header, manifest, indexes, CPU, parents,
/// disks, room on the disk and in memory; and a machine takes over the state, as in a restore, and is dropped.
/// No file is made and no vCPU runs. A snapshot of a newer format or another architecture is told from its
/// plain header alone.
///
/// An error means that there is no snapshot, or that the caller asked to stop.
pub fn check(path: &Path, options: &CheckOptions<'_>) -> Result<Report, FormatError> {
    options.run.observer.begin(&Phase::Open);
    let header = Snapshot::peek(path)?;
    let mut report = Lines::default();
    report.header(&header);
    if !report.accepts() {
        return Ok(report.finish(path, None));
    }
    let snapshot = match Snapshot::open(path) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            report.differs("manifest", error, "the snapshot is damaged: use another copy of it");
            return Ok(report.finish(path, None));
        }
    };
    let manifest = snapshot.manifest();
    report.age(manifest);
    let room = Room::here(options.overcommit);
    let config = report.machine(manifest, &room);
    report.cpu(manifest, config.as_ref(), options.backend);
    report.host_build(manifest, config.as_ref());
    // Without its parents the snapshot's own indexes can still be looked at.
    let chain = report.parents(path, &options.parents);
    let snapshot = chain.unwrap_or(snapshot);
    let manifest = snapshot.manifest();
    report.state(&snapshot, config.as_ref(), options);
    if report.indexes_fit(&snapshot, &room) {
        report.memory_image(&snapshot, &room, &options.memory);
        report.disks(&snapshot, options)?;
    }
    report.page_size(manifest);
    Ok(report.finish(path, Some(snapshot.id())))
}

const OVERCOMMIT: &str = "use a host with more memory, or --overcommit at its risk";

/// A report in the making.
#[derive(Default)]
struct Lines(Vec<Line>);

impl Lines {
    fn accepts(&self) -> bool {
        self.0.iter().all(|line| matches!(line.verdict, Verdict::Ok | Verdict::Unsure))
    }

    fn finish(self, path: &Path, id: Option<Digest>) -> Report {
        Report { path: path.to_owned(), id, accepted: self.accepts(), lines: self.0 }
    }

    fn ok(&mut self, what: impl Into<String>, found: impl ToString) {
        self.push(what.into(), Verdict::Ok, found.to_string(), None);
    }

    fn differs(&mut self, what: impl Into<String>, found: impl ToString, advice: &str) {
        self.push(what.into(), Verdict::Differs, found.to_string(), Some(advice.to_owned()));
    }

    fn missing(&mut self, what: impl Into<String>, found: impl ToString, advice: &str) {
        self.push(what.into(), Verdict::Missing, found.to_string(), Some(advice.to_owned()));
    }

    fn push(&mut self, what: String, verdict: Verdict, found: String, advice: Option<String>) {
        self.0.push(Line { what, verdict, found, advice });
    }

    /// What the plain header says.
    fn header(&mut self, header: &Header) {
        let arch = header.arch_text();
        match header.arch == header::ARCH_AARCH64 {
            true => self.ok("architecture", arch),
            false => self.differs(
                "architecture",
                format!("{arch}, this build runs aarch64 only"),
                "restore it where a squib for that architecture is",
            ),
        }
        let (major, minor) = (header::MAJOR, header::MINOR);
        let found = format!(
            "{}.{}, written by squib {}; this build reads {major}.0 to {major}.{minor}",
            header.major,
            header.minor,
            header.writer_text()
        );
        match header.check_readable() {
            Ok(()) => self.ok("format", found),
            Err(FormatError::Format { .. }) => {
                let writer = header.writer_text();
                let advice = format!("restore it with squib {writer} or a later one");
                self.differs("format", found, &advice);
            }
            Err(error) => {
                self.differs("format", error, "the snapshot is damaged: use another copy of it");
            }
        }
    }

    fn age(&mut self, manifest: &Manifest) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        let Manifest { writer, host, created, machine, .. } = manifest;
        let created = u128::from(*created);
        let age = match (machine.deterministic, now.checked_sub(created)) {
            (Some(_), _) => "at a time of the deterministic machine's own".to_owned(),
            (None, Some(passed)) => format!("{} ago", span(passed)),
            (None, None) => {
                format!("{} ahead of this host's clock", span(created.saturating_sub(now)))
            }
        };
        self.ok("captured", format!("{age}, by {writer} on {host}"));
    }

    /// The machine's configuration; `None` if this build cannot have such a machine.
    fn machine(&mut self, manifest: &Manifest, room: &Room) -> Option<MachineConfig> {
        let machine = &manifest.machine;
        let advice = "no squib of this version can have such a machine";
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let vcpus = format!("{}, at most {}; {cores} cores here", machine.vcpus, map::MAX_VCPUS);
        match (1..=map::MAX_VCPUS).contains(&machine.vcpus) {
            true => self.ok("vCPUs", vcpus),
            false => self.differs("vCPUs", vcpus, advice),
        }
        let memory = machine.memory_size;
        let found = format!("{}, at most {}{}", size(memory), size(MEMORY_MAX), host_memory(room));
        match (map::RAM_MIN..=MEMORY_MAX).contains(&memory) && memory.is_multiple_of(MEMORY_STEP) {
            true => match room.size(memory) {
                Ok(None) => self.ok("memory", found),
                Ok(Some(why)) => self.push("memory".into(), Verdict::Unsure, why, None),
                Err(error) => self.missing("memory", error, OVERCOMMIT),
            },
            false => self.differs("memory", found, advice),
        }
        match config::from_manifest(manifest) {
            Ok(config) => {
                let disks = config.disks.len();
                self.ok("machine", format!("`{}`, {disks} disk(s), valid", config.name));
                Some(config)
            }
            // These have lines of their own.
            Err(
                ConfigError::Vcpus { .. }
                | ConfigError::Memory { .. }
                | ConfigError::UnknownBackend { .. },
            ) => None,
            Err(error) => {
                self.differs("machine", error, advice);
                None
            }
        }
    }

    /// The backend, and what it shows a guest of its CPUs.
    fn cpu(
        &mut self,
        manifest: &Manifest,
        config: Option<&MachineConfig>,
        wanted: Option<BackendKind>,
    ) {
        let backend = &manifest.machine.backend;
        let advice = "restore it with a squib, and on a host, that has this backend";
        if let Err(error) = backend.parse::<BackendKind>() {
            return self.missing("backend", error, advice);
        }
        let Some(config) = config else { return };
        let wanted = MachineConfig { backend: wanted.unwrap_or(config.backend), ..config.clone() };
        let host = match hypervisor::identity(&wanted) {
            Ok(host) => config::identity(host),
            Err(error) => return self.missing("backend", error, advice),
        };
        let mut mismatches = compat::compare(&manifest.cpu, &host);
        let differs = |what: &str| mismatches.iter().any(|mismatch| mismatch.what == what);
        if !differs("backend") {
            self.ok("backend", backend);
        }
        if !differs("CNTFRQ_EL0") {
            self.ok("CNTFRQ_EL0", format!("{} Hz", host.counter_frequency));
        }
        let registers =
            mismatches.iter().filter(|m| !["backend", "CNTFRQ_EL0"].contains(&&*m.what));
        if registers.count() == 0 {
            self.ok("ID registers", format!("{}, all the same", host.id_registers.len()));
        }
        mismatches.extend(compat::irq_chip(config.backend, wanted.backend));
        let advice = match wanted.backend == config.backend {
            true => "restore it on a host with the same CPU".to_owned(),
            false => format!("restore it with the backend that it was taken with, {backend}"),
        };
        for mismatch in mismatches {
            let text = mismatch.to_string();
            let found = text.strip_prefix(&*mismatch.what).map_or(&*text, |rest| &rest[2..]);
            self.differs(&*mismatch.what, found, &advice);
        }
    }

    /// The host's system, where the backend is a part of it.
    fn host_build(&mut self, manifest: &Manifest, config: Option<&MachineConfig>) {
        let (Some(HostBackend { build, unreadable: _ }), Some(config)) =
            (&manifest.host_backend, config)
        else {
            return;
        };
        match hypervisor::host_build(config) {
            Ok(Some(here)) if here == *build => self.ok("host build", here),
            Ok(Some(here)) => {
                let found =
                    format!("{build}, here {here}: it may refuse the interrupt controller's state");
                let advice = "if a restore fails, use a host of that build or boot the guest anew";
                self.push("host build".into(), Verdict::Unsure, found, Some(advice.to_owned()));
            }
            // The backend is not here, which has a line of its own.
            Ok(None) | Err(_) => {}
        }
    }

    /// The sections: their names, versions and lengths, then their digests and forms, and at last whether a
    /// machine takes them over.
    fn state(
        &mut self,
        snapshot: &Snapshot,
        config: Option<&MachineConfig>,
        options: &CheckOptions<'_>,
    ) {
        let damaged = "the snapshot is damaged: use another copy of it";
        let newer = "restore it with a newer squib";
        let Some(config) = config else { return };
        let places = places(config);
        let wanted: Vec<_> = places.iter().map(Place::wanted).collect();
        let what = |kind: &str, instance: &str| format!("section {kind} {instance}");
        let before = self.0.len();
        for Misfit { kind, instance, error } in misfits(&snapshot.manifest().sections, &wanted) {
            let what = what(&kind, &instance);
            match error {
                FormatError::MissingSection { .. } => {
                    self.missing(what, "the machine needs it", damaged);
                }
                FormatError::UnknownSections { .. } => {
                    self.differs(what, "nothing in this build's machine takes it", newer);
                }
                FormatError::Persist(PersistError::UnknownVersion { .. }) => {
                    self.differs(what, error, newer);
                }
                error => self.differs(what, error, damaged),
            }
        }
        if self.0.len() > before {
            return;
        }
        let sections = match Sections::read_exactly(snapshot, &wanted) {
            Ok(sections) => sections.into_rest(),
            Err(error) => return self.differs("state", error, damaged),
        };
        for (place, section) in places.iter().flat_map(|place| {
            let is_here = |section: &&Section| {
                (&*section.kind, &section.instance) == (place.kind, &place.instance)
            };
            sections.iter().find(is_here).map(|section| (place, section))
        }) {
            if let Err(error) = place.decodes(section) {
                self.differs(what(place.kind, &place.instance), error, damaged);
            }
        }
        if !self.accepts() {
            // Another machine than this host can have says nothing of the state.
            return;
        }
        let disks = snapshot.manifest().machine.disks.iter();
        let sizes = disks.map(|disk| (disk.id.clone(), disk.size)).collect();
        let config =
            MachineConfig { backend: options.backend.unwrap_or(config.backend), ..config.clone() };
        match Machine::try_restore(config, sections, options.machine, sizes) {
            Ok(()) => self.ok("sections", format!("{}, all taken over", places.len())),
            Err(MachineError::State { instance, source }) => {
                self.differs(format!("section {}", instance.replace('`', "")), source, damaged);
            }
            Err(error) => self.differs("machine", error, "no restore on this host can make it"),
        }
    }

    /// Whether the indexes may be read.
    fn indexes_fit(&mut self, snapshot: &Snapshot, room: &Room) -> bool {
        match room.indexes(snapshot) {
            Ok(()) => true,
            Err(error) => {
                self.missing("indexes", error, OVERCOMMIT);
                false
            }
        }
    }

    /// The snapshot with everything that it builds on.
    fn parents(&mut self, path: &Path, places: &[PathBuf]) -> Option<Snapshot> {
        match Snapshot::open_chain(path, places) {
            Ok(chain) => {
                for link in chain.chain().skip(1) {
                    self.ok("parent", format!("{} at {}", link.id(), link.path().display()));
                }
                Some(chain)
            }
            Err(error @ FormatError::MissingParent { .. }) => {
                self.missing("parent", error, "if it is elsewhere, say where with --parent DIR");
                None
            }
            Err(error) => {
                self.differs("parent", error, "`squib snapshot verify` lists all damage");
                None
            }
        }
    }

    fn memory_image(&mut self, snapshot: &Snapshot, room: &Room, load: &MemoryLoad) {
        let Some(index) = self.image("memory image", snapshot, MEMORY_IMAGE) else { return };
        let found = format!("{} of data in {} chunks", size(data_bytes(&index)), index.chunks());
        let mode = "use --mode template, which takes room on the disk instead, or --overcommit";
        match load {
            MemoryLoad::Template(cache) => match cache.room_for(snapshot, &index) {
                Ok(()) => self.ok("memory image", found),
                Err(error) => self.missing("memory image", error, "make room, or use --mode lazy"),
            },
            load if load.brings_all() => match room.data(&index) {
                Ok(()) => self.ok("memory image", found),
                Err(error) => self.missing("memory image", error, mode),
            },
            _ => self.ok("memory image", found),
        }
    }

    /// The index of an image, checked as a restore checks it. A difference whose parent is missing is
    /// looked at as far as it goes.
    fn image(
        &mut self,
        what: &str,
        snapshot: &Snapshot,
        name: &str,
    ) -> Option<squib_formats::image::Index> {
        let alone = snapshot.manifest().parent.is_some() && snapshot.parent().is_none();
        let index = match alone {
            true => ImageReader::open_index(snapshot, name),
            false => ImageReader::open(snapshot, name).map(|image| image.index().clone()),
        };
        match index {
            Ok(index) => Some(index),
            Err(error) => {
                self.differs(what, error, "`squib snapshot verify` lists all damage");
                None
            }
        }
    }

    fn page_size(&mut self, manifest: &Manifest) {
        let page = rustix::param::page_size();
        let chunks = manifest.images.iter().map(|image| image.chunk_size).min().unwrap_or(0);
        let whole = (chunks as usize).is_multiple_of(page);
        let note = if whole { "" } else { ", which are not whole pages: loading is slower" };
        self.ok("page size", format!("{page} bytes here, chunks of {chunks}{note}"));
    }
}

/// What is known of this host's memory, as the end of a sentence.
fn host_memory(room: &Room) -> String {
    let Some(HostMemory { total, available, group }) = &room.host else { return String::new() };
    let place = match group {
        Some(group) => format!("the control group {group}"),
        None => "this host".to_owned(),
    };
    let available =
        available.map_or(String::new(), |free| format!(", {} of it available", size(free)));
    format!("; {place} has {}{available}", size(*total))
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    let (value, unit) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => (bytes as f64 / 1024.0, "KiB"),
        0x10_0000..0x4000_0000 => (bytes as f64 / f64::from(1 << 20), "MiB"),
        _ => (bytes as f64 / f64::from(1 << 30), "GiB"),
    };
    format!("{value:.1} {unit}")
}

/// A length of time for people, from nanoseconds.
fn span(ns: u128) -> String {
    let seconds = ns / 1_000_000_000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
