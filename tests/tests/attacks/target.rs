//! A good snapshot, attacked copies of it, and what `check` and `restore` say of them.

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use squib_formats::{
    digest::Digest,
    header::{ARCH_AARCH64, Header},
    manifest::{Manifest, STATE_FILE, SectionRecord},
    snapshot_dir::Snapshot,
};
use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    check::{CheckOptions, Report, check},
    restore::{RestoreOptions, Restored, restore},
};
use squib_tests::hostile;
use squib_vmm::{
    config::MachineConfig,
    machine::{Machine, Outcome, RunUntil},
};
use tempfile::TempDir;

/// Far more than any of it takes; longer is a hang.
const HANG: Duration = Duration::from_secs(120);

/// A good snapshot and a place for copies.
pub(crate) struct Target {
    dir: TempDir,
    pub(crate) manifest: Manifest,
    pub(crate) state: Vec<u8>,
    pub(crate) accepted: usize,
    pub(crate) refused: usize,
}

impl Target {
    /// Of a deterministic machine with a captured disk, one outside, and a source of entropy.
    pub(crate) fn devices() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disks = vec![
            hostile::disk(dir.path(), "vda", false, 1 << 20),
            hostile::disk(dir.path(), "data", true, 1 << 16),
        ];
        let machine = hostile::machine(dir.path(), disks);
        Self::of(dir, &machine)
    }

    /// Of a machine of two vCPUs on the host's clock that has just booted.
    pub(crate) fn smp() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Any guest serves: none of its instructions is executed before the capture.
        drop(hostile::machine(dir.path(), vec![]));
        let config = MachineConfig {
            memory: squib_devices::map::RAM_MIN,
            vcpus: 2,
            ..MachineConfig::new("smp", dir.path().join("Image"))
        };
        let machine = Machine::boot(config, Box::new(io::sink())).unwrap();
        Self::of(dir, &machine)
    }

    fn of(dir: TempDir, machine: &Machine) -> Self {
        let path = dir.path().join("good");
        let options = CaptureOptions {
            reflink: false,
            durability: Durability::None,
            ..CaptureOptions::default()
        };
        capture(machine, &path, &options).unwrap();
        let manifest = Snapshot::open(&path).unwrap().manifest().clone();
        let state = fs::read(path.join(STATE_FILE)).unwrap();
        fs::create_dir(dir.path().join("disks")).unwrap();
        let mut target = Self { dir, manifest, state, accepted: 0, refused: 0 };
        let manifest = target.manifest.clone();
        assert!(target.answers("nothing", &manifest), "the good snapshot");
        target
    }

    /// Where the good snapshot lies.
    pub(crate) fn good(&self) -> PathBuf {
        self.dir.path().join("good")
    }

    /// The payload of a section.
    pub(crate) fn payload(&self, section: &SectionRecord) -> &[u8] {
        &self.state[section.offset as usize..][..section.length as usize]
    }

    /// The manifest with another payload of the section of that number, and the `state` that goes with it.
    pub(crate) fn with_payload(&self, number: usize, payload: &[u8]) -> (Manifest, Vec<u8>) {
        let mut manifest = self.manifest.clone();
        let mut state = Vec::new();
        for (at, section) in manifest.sections.iter_mut().enumerate() {
            let bytes = if at == number { payload } else { self.payload(section) };
            let bytes = bytes.to_vec();
            section.offset = state.len() as u64;
            section.length = bytes.len() as u64;
            section.digest = Digest::of(&bytes);
            state.extend(bytes);
        }
        set_file(&mut manifest, STATE_FILE, &state);
        (manifest, state)
    }

    /// What `check` and `restore` answer to a snapshot with this manifest and the good one's other files.
    pub(crate) fn answers(&mut self, what: &str, manifest: &Manifest) -> bool {
        self.answers_with(what, manifest, &[])
    }

    /// [`answers`](Self::answers) with other files in the place of the good ones.
    pub(crate) fn answers_with(
        &mut self,
        what: &str,
        manifest: &Manifest,
        files: &[(&str, &[u8])],
    ) -> bool {
        let body = manifest.encode_unchecked().unwrap();
        self.answers_to_body(what, manifest.minor(), &body, files)
    }

    /// [`answers_with`](Self::answers_with) with a body as bytes.
    pub(crate) fn answers_to_body(
        &mut self,
        what: &str,
        minor: u16,
        body: &[u8],
        files: &[(&str, &[u8])],
    ) -> bool {
        let good = self.good();
        let path = self.dir.path().join("attacked");
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        for entry in fs::read_dir(&good).unwrap() {
            let name = entry.unwrap().file_name();
            fs::hard_link(good.join(&name), path.join(&name)).unwrap();
        }
        let header = Header::new(ARCH_AARCH64, minor, body).encode();
        let head = [&header[..], body].concat();
        for (name, bytes) in files.iter().copied().chain([("manifest", &head[..])]) {
            let _ = fs::remove_file(path.join(name));
            fs::write(path.join(name), bytes).unwrap();
        }
        let begun = Instant::now();
        let both = catch_unwind(AssertUnwindSafe(|| self.both(what, &path)));
        let Ok(accepted) = both else { panic!("while trying {what}") };
        assert!(begun.elapsed() < HANG, "{what}: it hung");
        *if accepted { &mut self.accepted } else { &mut self.refused } += 1;
        accepted
    }

    /// Asks both. What is restored runs on, and its state is saved and taken back.
    fn both(&self, what: &str, path: &Path) -> bool {
        let disk_dir = self.dir.path().join("disks");
        let options = options(&disk_dir);
        let report = check(path, &same(&options));
        let restored = restore(path, &options, Box::new(io::sink()));
        let said = report.as_ref().is_ok_and(|report: &Report| report.accepted);
        match restored {
            Err(error) => {
                assert!(!said, "{what}: `check` accepts, `restore` does not: {error}");
                assert!(!error.to_string().is_empty());
                assert!(fs::read_dir(&disk_dir).unwrap().next().is_none(), "{what}: left files");
                false
            }
            Ok(restored) => {
                assert!(said, "{what}: `restore` accepts, `check` does not: {report:#?}");
                for (_, path) in &restored.disks {
                    fs::remove_file(path).unwrap();
                }
                run(what, restored);
                true
            }
        }
    }
}

fn options(disk_dir: &Path) -> RestoreOptions<'static> {
    RestoreOptions {
        disk_dir: Some(disk_dir.to_owned()),
        // Where the disk outside lies; a path that an attack changes is no longer in it.
        allowed_disks: disk_dir.parent().map(Path::to_owned).into_iter().collect(),
        ..RestoreOptions::default()
    }
}

/// What a check is told where a restore is told `options`.
fn same(options: &RestoreOptions<'_>) -> CheckOptions<'static> {
    CheckOptions {
        backend: options.backend,
        disk_dir: options.disk_dir.clone(),
        disk_places: options.disk_places.clone(),
        allowed_disks: options.allowed_disks.clone(),
        changed_disks: options.changed_disks,
        parents: options.parents.clone(),
        memory: options.memory.clone(),
        disks: options.disks,
        overcommit: options.overcommit,
        machine: options.machine,
        ..CheckOptions::default()
    }
}

/// Lets the guest go on for a while if its time is its own, and takes its state back.
fn run(what: &str, restored: Restored) {
    let machine = restored.machine;
    if machine.config().deterministic.is_some() {
        // A chunk that cannot be had ends it at any time.
        let Ok(retired) = machine.retired() else { return };
        let now = retired[0].unwrap_or(0);
        let ended = machine.run_until(now.saturating_add(3_000));
        if let Ok(RunUntil::Ended(Outcome::Crashed(crash))) = ended {
            panic!("{what}: {crash}");
        }
    }
    // A machine that has ended saves nothing.
    let Ok(sections) = machine.save() else { return };
    let config = machine.config().clone();
    let disks = restored.manifest.machine.disks.iter();
    let sizes = disks.map(|disk| (disk.id.clone(), disk.size)).collect();
    let again = Machine::try_restore(config, sections, Default::default(), sizes);
    again.unwrap_or_else(|error| panic!("{what}: what is saved is not restored: {error}"));
}

/// Puts length and digest of a file into the manifest.
pub(crate) fn set_file(manifest: &mut Manifest, name: &str, bytes: &[u8]) {
    let file = manifest.files.iter_mut().find(|file| file.name == name).unwrap();
    (file.length, file.digest) = (bytes.len() as u64, Digest::of(bytes));
}
