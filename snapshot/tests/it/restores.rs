//! Real machines with a tiny program, captured, restored and compared.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use squib_formats::{
    error::FormatError,
    image::{Control, digest_file},
    manifest::{MachineInfo, Manifest},
    snapshot_dir::Snapshot,
};
use squib_snapshot::{
    ChangedDisks,
    capture::{CaptureOptions, capture},
    observe::{Observer, Phase, Run},
    restore::{DiskError, DiskLoad, MemoryLoad, RestoreError, RestoreOptions, Restored, restore},
};
use squib_vmm::{
    config::{Deterministic, DiskConfig, MachineConfig},
    machine::{Machine, RunState, RunUntil},
};
use vm_memory::{Bytes, GuestAddress};

/// Where the program counts.
const COUNTER: u64 = 0x8300_0000;

/// An arm64 Image that counts at [`COUNTER`] for ever.
fn kernel() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut word = |at: usize, word: u32| image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    word(0, 0x1400_0010); // b #64
    word(16, 4096); // image_size
    word(24, 2); // flags: 4 KiB pages
    word(56, 0x644d_5241); // "ARM\x64"
    word(64, 0xd2a0_0001 | 0x8300 << 5); // movz x1, #0x8300, lsl #16
    word(68, 0xd280_0000); // movz x0, #0
    word(72, 0x9100_0400); // add x0, x0, #1
    word(76, 0xf900_0020); // str x0, [x1]
    word(80, 0x17ff_fffe); // b #-8
    image
}

/// A deterministic machine with a writable and a read-only disk in `dir`.
pub(crate) fn machine(dir: &Path) -> Machine {
    fs::write(dir.join("Image"), kernel()).unwrap();
    let disk = |id: &str, read_only: bool, size: u64| {
        let path = dir.join(id);
        let file = fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(b"squib", 3 << 20).unwrap();
        DiskConfig { id: id.to_owned(), path, read_only }
    };
    let config = MachineConfig {
        memory: 64 << 20,
        disks: vec![disk("root", false, 16 << 20), disk("data", true, 4 << 20)],
        deterministic: Some(Deterministic::default()),
        ..MachineConfig::new("tiny", dir.join("Image"))
    };
    Machine::boot(config, Box::new(std::io::sink())).unwrap()
}

fn counter(machine: &Machine) -> u64 {
    machine.ram().read_obj(GuestAddress(COUNTER)).unwrap()
}

fn memory(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; machine.ram().size() as usize];
    machine.ram().read_slice(&mut bytes, GuestAddress(machine.ram().base())).unwrap();
    bytes
}

/// A snapshot of a machine that has retired 10000 instructions, the machine itself gone.
pub(crate) fn snapshot(dir: &Path) -> (PathBuf, Vec<u8>) {
    let machine = machine(dir);
    assert_eq!(machine.run_until(10_000).unwrap(), RunUntil::Reached);
    let path = dir.join("snap");
    // The format of the snapshot does not depend on what the file system can do.
    let frames = CaptureOptions { reflink: false, ..CaptureOptions::default() };
    capture(&machine, &path, &frames).unwrap();
    assert_eq!(machine.state(), RunState::Paused);
    (path, memory(&machine))
}

pub(crate) fn options(dir: &Path) -> RestoreOptions<'static> {
    let disk_dir = dir.join("disks");
    fs::create_dir(&disk_dir).unwrap();
    let allowed_disks = vec![dir.to_owned()];
    RestoreOptions { disk_dir: Some(disk_dir), allowed_disks, ..RestoreOptions::default() }
}

pub(crate) fn back(path: &Path, options: &RestoreOptions<'_>) -> Result<Restored, RestoreError> {
    restore(path, options, Box::new(std::io::sink()))
}

fn error(path: &Path, options: &RestoreOptions<'_>) -> RestoreError {
    match back(path, options) {
        Ok(_) => panic!("restored"),
        Err(error) => error,
    }
}

pub(crate) fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn a_restored_machine_goes_on_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().unwrap();
    let straight = {
        let machine = machine(dir.path());
        machine.run_until(30_000).unwrap();
        (counter(&machine), memory(&machine), machine.save().unwrap())
    };
    let (path, saved_memory) = snapshot(dir.path());
    let eager = RestoreOptions { memory: MemoryLoad::Eager, ..options(dir.path()) };
    let restored = back(&path, &eager).unwrap();
    assert_eq!(restored.machine.state(), RunState::Paused);
    assert_eq!(restored.machine.config().name, "tiny");
    assert!(memory(&restored.machine) == saved_memory);
    assert_eq!(restored.memory.size, 64 << 20);
    assert_eq!(restored.machine.run_until(30_000).unwrap(), RunUntil::Reached);
    assert_eq!(counter(&restored.machine), straight.0);
    assert!(straight.0 > 5000);
    assert!(memory(&restored.machine) == straight.1);
    assert_eq!(restored.machine.save().unwrap(), straight.2);
}

#[test]
fn a_snapshot_of_a_restored_machine_is_the_same_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let restored = back(&path, &options(dir.path())).unwrap();
    let again = dir.path().join("again");
    capture(&restored.machine, &again, &CaptureOptions::default()).unwrap();
    let manifest = |path: &Path| {
        let mut manifest = Snapshot::open(path).unwrap().manifest().clone();
        // The captured disk has moved into its own file.
        manifest.machine.disks[0].path.clear();
        manifest
    };
    assert_eq!(manifest(&again), manifest(&path));
}

#[test]
fn a_chain_of_differences_restores_to_the_machine_that_ran_through() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    machine.run_until(10_000).unwrap();
    let at = |name: &str| dir.path().join(name);
    capture(&machine, &at("0"), &CaptureOptions::default()).unwrap();
    for round in 1..4 {
        machine.run_until(10_000 + round * 3_000).unwrap();
        let parent = Some(at(&(round - 1).to_string()));
        let options = CaptureOptions { parent, ..CaptureOptions::default() };
        capture(&machine, &at(&round.to_string()), &options).unwrap();
    }
    let (saved_memory, saved) = (memory(&machine), machine.save().unwrap());
    drop(machine);
    let restored = back(&at("3"), &options(dir.path())).unwrap();
    assert!(memory(&restored.machine) == saved_memory);
    assert_eq!(restored.machine.save().unwrap(), saved);
    assert!(counter(&restored.machine) > 0);
    drop(restored);
    fs::rename(at("1"), at("disks/1")).unwrap();
    let error =
        error(&at("3"), &RestoreOptions { disk_dir: Some(at("disks")), ..Default::default() });
    assert!(matches!(error, RestoreError::Format(FormatError::MissingParent { .. })), "{error}");
}

#[test]
fn a_running_machine_is_captured_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("Image"), kernel()).unwrap();
    let config = MachineConfig {
        memory: 64 << 20,
        vcpus: 2,
        ..MachineConfig::new("tiny", dir.path().join("Image"))
    };
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    machine.resume().unwrap();
    while counter(&machine) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let path = dir.path().join("snap");
    let options = CaptureOptions { pause_deadline: Duration::from_secs(60), ..Default::default() };
    let captured = capture(&machine, &path, &options).unwrap();
    assert!(captured.timings.downtime >= captured.timings.memory);
    let restored = back(&path, &RestoreOptions::default()).unwrap();
    let saved = counter(&restored.machine);
    assert!(saved > 0);
    while counter(&machine) == saved {
        std::thread::sleep(Duration::from_millis(1));
    }
    restored.machine.resume().unwrap();
    while counter(&restored.machine) == saved {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nobody_lets_a_machine_run_while_it_is_captured() {
    struct Impatient {
        machine: Arc<Machine>,
        resuming: Mutex<Option<JoinHandle<()>>>,
    }
    impl Observer for Impatient {
        fn begin(&self, phase: &Phase) {
            if *phase == Phase::Memory {
                let machine = Arc::clone(&self.machine);
                let resuming = std::thread::spawn(move || machine.resume().unwrap());
                *self.resuming.lock() = Some(resuming);
            }
        }

        fn advanced(&self, phase: &Phase, _: u64, _: u64, _: u64) {
            // The read-only disk is digested later, when the guest may run again.
            if *phase == Phase::Memory || *phase == Phase::Disk("root".into()) {
                assert_eq!(self.machine.state(), RunState::Paused);
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Arc::new(machine(dir.path()));
    let observer = Impatient { machine: Arc::clone(&machine), resuming: Mutex::default() };
    let run = Run { observer: &observer, ..Run::default() };
    // A disk that is cloned is read later too.
    let options = CaptureOptions { reflink: false, run, ..CaptureOptions::default() };
    capture(&*machine, &dir.path().join("snap"), &options).unwrap();
    observer.resuming.into_inner().unwrap().join().unwrap();
    assert_eq!(machine.state(), RunState::Running);
}

#[test]
fn a_captured_disk_becomes_a_private_sparse_file_and_the_old_one_is_not_needed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let old = digest_file(&dir.path().join("root"), Control::default()).unwrap();
    fs::remove_file(dir.path().join("root")).unwrap();
    let options = RestoreOptions { disks: DiskLoad::Eager, ..options(dir.path()) };
    let restored = back(&path, &options).unwrap();
    let new = options.disk_dir.unwrap().join("root.img");
    assert_eq!(restored.disks, [("root".to_owned(), new.clone())]);
    assert_eq!(restored.machine.config().disks[0].path, new);
    assert_eq!(digest_file(&new, Control::default()).unwrap(), old);
    let about = fs::metadata(&new).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o600);
    assert!(about.blocks() * 512 < 1 << 20, "{} blocks", about.blocks());
}

#[test]
fn the_disk_that_the_machine_has_open_is_captured_whatever_lies_at_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let right = digest_file(&dir.path().join("root"), Control::default()).unwrap();
    fs::rename(dir.path().join("root"), dir.path().join("moved")).unwrap();
    fs::write(dir.path().join("root"), [1; 512]).unwrap();
    let path = dir.path().join("snap");
    let captured = capture(&machine, &path, &CaptureOptions::default()).unwrap();
    assert_eq!(captured.disks[0].1.record.digest, right.digest);
}

#[test]
fn a_referenced_disk_must_be_unchanged_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let data = dir.path().join("data");
    let mut options = options(dir.path());
    let disks = options.disk_dir.clone().unwrap();

    fs::rename(&data, dir.path().join("moved")).unwrap();
    let missing = error(&path, &options);
    assert!(matches!(missing, RestoreError::Disk(DiskError::Io { ref id, .. }) if id == "data"));
    assert!(is_empty(&disks), "what was made for a failed restore is removed");

    options.disk_places = BTreeMap::from([("data".to_owned(), dir.path().join("moved"))]);
    drop(back(&path, &options).unwrap());
    fs::remove_file(disks.join("root.img")).unwrap();

    options.disk_places.clear();
    fs::write(&data, vec![9; 4 << 20]).unwrap();
    let changed = error(&path, &options);
    let RestoreError::Disk(DiskError::Changed { expected, found, .. }) = changed else {
        panic!("{changed}");
    };
    assert_ne!(expected, found);
    options.changed_disks = ChangedDisks::Accept;
    drop(back(&path, &options).unwrap());
    fs::remove_file(disks.join("root.img")).unwrap();

    fs::write(&data, vec![9; 2 << 20]).unwrap();
    let resized = error(&path, &options);
    assert!(matches!(resized, RestoreError::Disk(DiskError::Size { found: 0x20_0000, .. })));
}

#[test]
fn a_disk_place_serves_for_a_captured_disk_if_its_bytes_are_right() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let place = BTreeMap::from([("root".to_owned(), dir.path().join("root"))]);
    let options = RestoreOptions { disk_places: place, ..options(dir.path()) };
    let restored = back(&path, &options).unwrap();
    assert_eq!(restored.machine.config().disks[0].path, dir.path().join("root"));
    assert_eq!(restored.disks, []);
}

#[test]
fn options_that_do_not_fit_the_snapshot_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let none = error(&path, &RestoreOptions::default());
    assert!(matches!(none, RestoreError::NoDiskDir { id } if id == "root"));
    let disk_places = BTreeMap::from([("swap".to_owned(), PathBuf::from("/dev/null"))]);
    let unknown = error(&path, &RestoreOptions { disk_places, ..RestoreOptions::default() });
    assert!(matches!(unknown, RestoreError::NoSuchDisk { id } if id == "swap"));
    let name = Some("../x".to_owned());
    let named = error(&path, &RestoreOptions { name, ..options(dir.path()) });
    assert!(matches!(named, RestoreError::Config(_)));
}

/// Publishes a copy of the snapshot with another manifest.
pub(crate) fn changed_copy(dir: &Path, change: impl Fn(&mut Manifest)) -> PathBuf {
    let path = dir.join("changed");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir(&path).unwrap();
    for entry in fs::read_dir(dir.join("snap")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
    let mut manifest = Snapshot::open(&path).unwrap().manifest().clone();
    change(&mut manifest);
    let body = manifest.encode().unwrap();
    let header = squib_formats::header::Header::new(
        squib_formats::header::ARCH_AARCH64,
        manifest.minor(),
        &body,
    );
    fs::write(path.join("manifest"), [&header.encode()[..], &body].concat()).unwrap();
    path
}

#[test]
fn a_snapshot_from_another_cpu_is_refused_with_a_line_a_difference() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let options = options(dir.path());
    let path = changed_copy(dir.path(), |manifest| {
        manifest.cpu.counter_frequency += 1;
        manifest.cpu.id_registers[0].1 ^= 1;
    });
    let error = error(&path, &options);
    let RestoreError::Incompatible(mismatches) = &error else { panic!("{error}") };
    assert_eq!(mismatches.len(), 2);
    assert_eq!(error.to_string().lines().count(), 3);
    assert!(is_empty(options.disk_dir.as_deref().unwrap()));
}

#[test]
fn sections_and_the_machine_must_fit_each_other() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let options = options(dir.path());
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 4] = [
        ("nothing takes `virtio-rng`", |m| m.machine.rng = false),
        ("`vcpu` of instance `1` is missing", |m| {
            m.machine.vcpus = 2;
            m.machine.deterministic = None;
        }),
        ("section `serial` of instance `0` is missing", |m| m.sections[0].kind = "floppy".into()),
        ("backend", |m| m.machine = MachineInfo { backend: "x".into(), ..m.machine.clone() }),
    ];
    for (expected, change) in cases {
        let text = error(&changed_copy(dir.path(), change), &options).to_string();
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        assert!(is_empty(options.disk_dir.as_deref().unwrap()));
    }
}

#[test]
fn a_damaged_chunk_of_memory_ends_the_restore_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let options = RestoreOptions { memory: MemoryLoad::Eager, ..options(dir.path()) };
    let file = path.join("memory.zst");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let error = error(&path, &options);
    assert!(matches!(error, RestoreError::Format(_)), "{error}");
    assert!(error.to_string().starts_with("memory.zst: chunk "), "{error}");
    assert!(is_empty(options.disk_dir.as_deref().unwrap()));
}

#[test]
fn a_disk_in_use_is_not_shared_with_a_second_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let place = BTreeMap::from([("root".to_owned(), dir.path().join("root"))]);
    let options = RestoreOptions { disk_places: place, ..options(dir.path()) };
    let _first = back(&path, &options).unwrap();
    let second = error(&path, &options);
    assert!(matches!(second, RestoreError::Machine(_)), "{second}");
    assert!(second.to_string().contains("in use"), "{second}");
}
