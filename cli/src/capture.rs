//! Snapshots of the running machine, as the control API asks for them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use squib_formats::{image::ImageOptions, manifest::MEMORY_IMAGE, snapshot_dir::Snapshot};
use squib_snapshot::{
    Durability, Existing,
    capture::{After, CaptureError, CaptureOptions, CaptureTimings, Captured, DiskMode, capture},
    inspect::inspect,
    observe::{Observer, Phase as Step, Run},
};
use squib_vmm::{config::MachineConfig, machine::Machine};

use crate::{
    api::types::{
        self, DiskModeParam, DiskReport, Phase, SnapshotCreateParams, SnapshotProgress,
        SnapshotReport,
    },
    home::Home,
    output::ms,
};

/// How long a guest has to come to rest.
pub(crate) const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// How far a snapshot is, for whoever asks, and the way to make it stop.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    progress: Mutex<SnapshotProgress>,
    writing: Mutex<Writing>,
}

#[derive(Debug, Default)]
struct Writing {
    /// The VM is ending: nothing is to be written any more.
    ending: bool,
    /// Set to make the snapshot that is being written end with an error.
    give_up: Option<Arc<AtomicBool>>,
}

impl Gauge {
    pub(crate) fn read(&self) -> SnapshotProgress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a snapshot that is being written, and every later one, end with an error.
    pub(crate) fn cancel(&self) {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.ending = true;
        if let Some(give_up) = &writing.give_up {
            give_up.store(true, Ordering::Relaxed);
        }
    }

    /// Takes note that a snapshot is written which `give_up` ends, or that none is.
    fn writing(&self, give_up: Option<&Arc<AtomicBool>>) {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.give_up = give_up.cloned();
        if let (true, Some(give_up)) = (writing.ending, give_up) {
            give_up.store(true, Ordering::Relaxed);
        }
    }

    fn set(&self, progress: SnapshotProgress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}

impl Observer for Gauge {
    fn begin(&self, step: &Step) {
        self.set(SnapshotProgress { phase: step_name(step), ..SnapshotProgress::default() });
    }

    fn advanced(&self, step: &Step, done: u64, total: u64, stored: u64) {
        self.set(SnapshotProgress { phase: step_name(step), done, total, stored });
    }
}

/// Writes a snapshot of `machine`, unless `give_up` becomes true before it is published: then the
/// guest goes on and nothing is left behind. With `stop` the machine is ended once the snapshot is safe.
pub(crate) fn write(
    machine: &Machine,
    params: &SnapshotCreateParams,
    gauge: &Gauge,
    give_up: &Arc<AtomicBool>,
) -> anyhow::Result<SnapshotReport> {
    let image = ImageOptions::default();
    let options = CaptureOptions {
        existing: if params.force { Existing::Replace } else { Existing::Refuse },
        durability: match params.durability {
            Some(types::Durability::None) => Durability::None,
            Some(types::Durability::Full) | None => Durability::Full,
        },
        pause_deadline: PAUSE_DEADLINE,
        parent: params.parent_path.clone(),
        dependents_in: if params.force { children_of(&params.snapshot_path) } else { Vec::new() },
        after: if params.stop { After::Stop } else { After::GoOn },
        live: params.live,
        with_kernel: params.with_kernel,
        disks: disk_modes(machine.config(), &params.disk_mode),
        reflink: !params.no_reflink,
        image: ImageOptions {
            chunk_size: params.chunk_size.unwrap_or(image.chunk_size),
            level: params.level.unwrap_or(image.level),
        },
        run: Run {
            observer: gauge,
            cancel: give_up,
            threads: params.threads.unwrap_or(Run::default().threads),
        },
        ..CaptureOptions::default()
    };
    gauge.writing(Some(give_up));
    let captured = capture(machine, &params.snapshot_path, &options);
    gauge.writing(None);
    gauge.set(SnapshotProgress::default());
    let captured = captured.map_err(advise)?;
    note(&captured);
    report(&params.snapshot_path, &captured)
}

/// Where snapshots were written that build on the one at `path`, if there is one.
fn children_of(path: &Path) -> Vec<PathBuf> {
    match (Snapshot::open(path), Home::open()) {
        (Ok(snapshot), Ok(home)) => home.children().below(snapshot.id()),
        _ => Vec::new(),
    }
}

/// Takes note of where a difference lies, for whoever wants to remove its parent.
fn note(captured: &Captured) {
    let Some(parent) = Snapshot::open(&captured.path).ok().and_then(|s| s.manifest().parent) else {
        return;
    };
    match Home::open().map(|home| home.children().record(parent, &captured.path)) {
        Ok(Ok(())) => {}
        // It is advice only.
        Ok(Err(error)) => tracing::warn!("{}: not noted: {error}", captured.path.display()),
        Err(error) => tracing::warn!("{}: not noted: {error}", captured.path.display()),
    }
}

/// The mode of each disk that has one. A disk that the machine does not have stays in: the capture names it.
fn disk_modes(config: &MachineConfig, params: &[DiskModeParam]) -> BTreeMap<String, DiskMode> {
    let mode = |param: &DiskModeParam| match param.mode {
        types::DiskMode::Capture => DiskMode::Capture,
        types::DiskMode::Reference => DiskMode::Reference,
    };
    let mut modes = BTreeMap::new();
    for param in params.iter().filter(|param| param.disk_id.is_none()) {
        modes.extend(config.disks.iter().map(|disk| (disk.id.clone(), mode(param))));
    }
    for param in params {
        modes.extend(param.disk_id.iter().map(|id| (id.clone(), mode(param))));
    }
    modes
}

/// What a step is called where people and clients read it.
pub(crate) fn step_name(step: &Step) -> String {
    match step {
        Step::Pause => "pause".into(),
        Step::State => "state".into(),
        Step::Memory => "memory".into(),
        Step::Disk(id) => format!("disk {id}"),
        Step::Publish => "publish".into(),
        Step::Open => "check".into(),
        Step::Machine => "machine".into(),
    }
}

/// Says what to do next where that is not plain.
fn advise(error: CaptureError) -> anyhow::Error {
    use squib_snapshot::FormatError;
    let advice = match &error {
        CaptureError::Format(FormatError::Exists { .. }) => {
            "name another directory, or replace it with --force"
        }
        CaptureError::Format(FormatError::NoRoom { .. }) => {
            "the guest runs on and nothing is left behind; make room and try again"
        }
        CaptureError::Format(FormatError::ChainTooLong { .. }) => {
            "make a full snapshot, or one that builds on a flattened parent"
        }
        CaptureError::ReplacesParent { .. } => "name another directory",
        CaptureError::ReplacesNeeded { .. } => {
            "name another directory, or flatten, rebase or remove those first"
        }
        _ => return error.into(),
    };
    anyhow::anyhow!("{error}: {advice}")
}

fn report(path: &Path, captured: &Captured) -> anyhow::Result<SnapshotReport> {
    let Captured { id, memory, stored, timings, .. } = captured;
    let inspection = inspect(path, &[])?;
    debug_assert_eq!(memory.record.name, MEMORY_IMAGE);
    let disks = inspection.manifest.machine.disks.iter().map(|disk| DiskReport {
        id: disk.id.clone(),
        digest: disk.digest.to_string(),
        bytes: disk.size,
    });
    let CaptureTimings { pause, state, memory: written, disks: disk_time, publish, .. } = *timings;
    let phases = [
        ("pause", pause),
        ("state", state),
        ("memory", written),
        ("disks", disk_time),
        ("publish", publish),
    ];
    Ok(SnapshotReport {
        path: path.to_owned(),
        id: id.to_string(),
        memory_digest: memory.record.digest.to_string(),
        disks: disks.collect(),
        memory_bytes: memory.record.size,
        raw_bytes: captured
            .disks
            .iter()
            .fold(memory.record.size, |sum, (_, disk)| sum.saturating_add(disk.record.size)),
        stored_bytes: *stored,
        downtime_ms: ms(timings.downtime),
        timings: phases
            .into_iter()
            .map(|(name, took)| Phase { name: name.into(), ms: ms(took) })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use squib_vmm::config::DiskConfig;

    use super::*;

    #[test]
    fn a_mode_for_one_disk_goes_before_one_for_all() {
        let disk = |id: &str| DiskConfig { id: id.into(), path: "/d".into(), read_only: false };
        let disks = vec![disk("root"), disk("data")];
        let config = MachineConfig { disks, ..MachineConfig::new("vm", "/boot/Image") };
        let param = |mode, id: Option<&str>| DiskModeParam { mode, disk_id: id.map(Into::into) };
        let one = param(types::DiskMode::Capture, Some("root"));
        let all = param(types::DiskMode::Reference, None);
        let expected = [("data", DiskMode::Reference), ("root", DiskMode::Capture)];
        for params in [[one.clone(), all.clone()], [all, one]] {
            let modes = disk_modes(&config, &params);
            let modes: Vec<_> = modes.iter().map(|(id, mode)| (&**id, *mode)).collect();
            assert_eq!(modes, expected);
        }
        let unknown = disk_modes(&config, &[param(types::DiskMode::Capture, Some("swap"))]);
        assert!(unknown.contains_key("swap"), "the capture says that there is none");
        assert!(disk_modes(&config, &[]).is_empty());
    }
}
