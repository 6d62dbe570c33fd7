//! What a capture leaves on the disk, and what it does to the guest.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use squib_formats::{
    image::{Control, ImageReader, Scheme, digest_file},
    manifest::DiskStorage,
    snapshot_dir::Snapshot,
};
use squib_snapshot::{
    Existing, FormatError,
    capture::{After, CaptureError, CaptureOptions, DiskMode, capture},
    inspect::inspect,
    observe::{Observer, Phase, Run},
    verify::verify,
};

use crate::guest::{Asked, Still};

/// Disks as frames, also where they could be cloned.
fn frames() -> CaptureOptions<'static> {
    CaptureOptions { reflink: false, ..CaptureOptions::default() }
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_capture_holds_memory_disks_sections_and_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");
    let captured = capture(&guest, &path, &frames()).unwrap();
    assert_eq!(guest.asked(), [Asked::Pause, Asked::Save, Asked::Resume]);

    let verified =
        verify(&path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    assert_eq!(verified.snapshot.id(), captured.id);
    let manifest = verified.snapshot.manifest();
    assert_eq!(manifest.created, 1_767_225_600_000_000_000);
    assert_eq!(manifest.cpu.id_registers, [(0xc000, 2), (0xc030, 1)]);
    let kinds: Vec<_> = manifest.sections.iter().map(|section| &*section.kind).collect();
    assert_eq!(kinds, ["serial", "vcpu"]);

    let of_file = |at: usize| digest_file(guest.disk_path(at), Control::default()).unwrap().digest;
    let [root, data] = &manifest.machine.disks[..] else { panic!() };
    assert_eq!((root.storage, root.digest), (DiskStorage::Captured, of_file(0)));
    assert_eq!((data.storage, data.digest), (DiskStorage::Reference(Scheme::Runs), of_file(1)));
    assert_eq!(Path::new(&data.path), guest.disk_path(1));

    let memory = ImageReader::open(&verified.snapshot, "memory").unwrap();
    let raw = dir.path().join("raw");
    fs::write(&raw, guest.bytes()).unwrap();
    assert_eq!(memory.record().digest, digest_file(&raw, Control::default()).unwrap().digest);
    assert_eq!(captured.memory.record.digest, memory.record().digest);

    let found = inspect(&path, &[]).unwrap();
    assert_eq!((found.id, &*found.format, &*found.arch), (captured.id, "1.4", "aarch64"));
    let memory = &found.images[0];
    assert_eq!(memory.chunks, 1024);
    assert_eq!(memory.zero_chunks << 16, captured.memory.zero);
    assert_eq!(memory.stored, captured.memory.stored);
    let on_disk: u64 =
        names(&path).iter().map(|name| fs::metadata(path.join(name)).unwrap().len()).sum();
    assert_eq!(found.stored, on_disk);
}

#[test]
fn a_paused_guest_stays_paused() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    guest.paused.store(true, Ordering::Relaxed);
    let captured = capture(&guest, &dir.path().join("snap"), &CaptureOptions::default()).unwrap();
    assert!(guest.paused.load(Ordering::Relaxed));
    assert_eq!(guest.asked(), [Asked::Pause, Asked::Save]);
    assert!(captured.timings.downtime.is_zero());
}

#[test]
fn a_guest_is_stopped_only_when_the_snapshot_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");
    let options = CaptureOptions { after: After::Stop, ..CaptureOptions::default() };
    capture(&guest, &path, &CaptureOptions { limit: Some(100), ..options.clone() }).unwrap_err();
    assert_eq!(guest.asked(), [Asked::Pause, Asked::Save, Asked::Resume]);
    capture(&guest, &path, &options).unwrap();
    assert_eq!(guest.asked(), [Asked::Pause, Asked::Save, Asked::Stop]);
}

#[test]
fn after_a_full_disk_the_guest_goes_on_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");
    let whole = capture(&guest, &dir.path().join("whole"), &frames()).unwrap();
    guest.asked();
    for limit in [0, 100, 10_000, whole.stored - 1, whole.stored + 10] {
        let options = CaptureOptions { limit: Some(limit), ..frames() };
        let error = capture(&guest, &path, &options).unwrap_err();
        assert!(
            matches!(error, CaptureError::Format(FormatError::NoRoom { .. })),
            "{limit}: {error}"
        );
        assert_eq!(guest.asked(), [Asked::Pause, Asked::Save, Asked::Resume]);
        assert_eq!(names(dir.path()), ["data", "root", "whole"]);
    }
}

#[test]
fn after_a_missed_deadline_or_a_failed_save_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let guest = Still { pause_fails: true, ..Still::new(dir.path()) };
    capture(&guest, &path, &CaptureOptions::default()).unwrap_err();
    assert_eq!(guest.asked(), [Asked::Pause]);
    let guest = Still { save_fails: true, ..Still::new(dir.path()) };
    let error = capture(&guest, &path, &CaptureOptions::default()).unwrap_err();
    assert!(error.to_string().contains("serial"), "{error}");
    assert_eq!(guest.asked(), [Asked::Pause, Asked::Save, Asked::Resume]);
    assert_eq!(names(dir.path()), ["data", "root"]);
}

#[test]
fn what_cannot_work_is_refused_before_the_guest_is_paused() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");

    let disks = BTreeMap::from([("swap".to_owned(), DiskMode::Capture)]);
    let options = CaptureOptions { disks, ..CaptureOptions::default() };
    let error = capture(&guest, &path, &options).unwrap_err();
    assert!(matches!(error, CaptureError::NoSuchDisk { id } if id == "swap"));

    fs::create_dir(&path).unwrap();
    let error = capture(&guest, &path, &CaptureOptions::default()).unwrap_err();
    assert!(matches!(error, CaptureError::Format(FormatError::Exists { .. })));
    fs::remove_dir(&path).unwrap();

    fs::remove_file(guest.disk_path(0)).unwrap();
    let error = capture(&guest, &path, &CaptureOptions::default()).unwrap_err().to_string();
    assert!(error.contains("disk `root`") && error.contains("cannot open"), "{error}");
    assert_eq!(guest.asked(), []);
    assert_eq!(names(dir.path()), ["data"]);
}

#[test]
fn disks_go_where_they_are_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");
    let disks = BTreeMap::from([
        ("root".to_owned(), DiskMode::Reference),
        ("data".to_owned(), DiskMode::Capture),
    ]);
    let options = CaptureOptions { disks, ..CaptureOptions::default() };
    let captured = capture(&guest, &path, &options).unwrap();
    let ids: Vec<_> = captured.disks.iter().map(|(id, _)| &**id).collect();
    assert_eq!(ids, ["data"]);
    let snapshot = Snapshot::open(&path).unwrap();
    let storage = snapshot.manifest().machine.disks.iter().map(|disk| disk.storage);
    assert_eq!(
        storage.collect::<Vec<_>>(),
        [DiskStorage::Reference(Scheme::Runs), DiskStorage::Captured]
    );
}

#[test]
fn a_snapshot_is_replaced_only_on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");
    let first = capture(&guest, &path, &CaptureOptions::default()).unwrap();
    // Equal state at an equal time is an equal snapshot.
    let options = CaptureOptions { existing: Existing::Replace, ..CaptureOptions::default() };
    assert_eq!(capture(&guest, &path, &options).unwrap().id, first.id);
    fs::write(guest.disk_path(0), [1; 4096]).unwrap();
    let second = capture(&guest, &path, &options).unwrap();
    assert_ne!(second.id, first.id);
    assert_eq!(Snapshot::open(&path).unwrap().id(), second.id);
    assert_eq!(names(dir.path()), ["data", "root", "snap"]);
}

#[test]
fn phases_come_in_order_and_each_can_be_cancelled() {
    struct Watch<'a> {
        cancel: &'a AtomicBool,
        at: Option<&'a Phase>,
        seen: Mutex<Vec<Phase>>,
    }
    impl Observer for Watch<'_> {
        fn begin(&self, phase: &Phase) {
            self.seen.lock().unwrap().push(phase.clone());
            if Some(phase) == self.at {
                self.cancel.store(true, Ordering::Relaxed);
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let path = dir.path().join("snap");
    let disk = |id: &str| Phase::Disk(id.to_owned());
    let run = |at: Option<&Phase>| {
        let cancel = AtomicBool::new(false);
        let watch = Watch { cancel: &cancel, at, seen: Mutex::default() };
        let run = Run { observer: &watch, cancel: &cancel, ..Run::default() };
        let result = capture(&guest, &path, &CaptureOptions { run, ..CaptureOptions::default() });
        (result, watch.seen.into_inner().unwrap())
    };
    for at in [Phase::Memory, disk("root"), disk("data")] {
        let (result, _) = run(Some(&at));
        assert!(matches!(result, Err(CaptureError::Format(FormatError::Cancelled))), "{at:?}");
        assert!(!guest.paused.load(Ordering::Relaxed));
        assert_eq!(names(dir.path()), ["data", "root"]);
    }
    let (result, seen) = run(None);
    result.unwrap();
    use Phase::{Memory, Pause, Publish, State};
    assert_eq!(seen, [Pause, State, Memory, disk("root"), disk("data"), Publish]);
}
