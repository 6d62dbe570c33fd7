//! Disks that are cloned into the snapshot.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{fd::BorrowedFd, unix::fs::FileExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use squib_formats::{
    image::{Control, ImageReader, Record},
    layer::{Layer, Real},
    publish::{Durability, Existing},
    snapshot_dir::Snapshot,
    verify::verify,
};
use squib_snapshot::{
    capture::{CaptureError, CaptureOptions, Captured, DiskMode, capture, capture_with_layer},
    flatten::flatten,
    inspect::inspect,
    observe::{Observer, Phase, Run},
    restore::DiskLoad,
};
use squib_vmm::machine::{Machine, RunState};

use crate::disks::{
    CHUNK, COUNT, SIZE, absent, back, behind_its_back, captured_bytes, changed, contents, machine,
    read, write,
};

/// A file system that can clone, for tests on one that cannot: it copies. One of the clones may fail.
#[derive(Debug, Default)]
struct Copies {
    clones: AtomicUsize,
    /// The clone that fails, counted from 0, and how.
    fails: Option<(usize, Errno)>,
}

impl Copies {
    fn failing(at: usize, errno: Errno) -> Arc<Self> {
        Arc::new(Self { fails: Some((at, errno)), ..Self::default() })
    }
}

impl Layer for Copies {
    fn clone_file(&self, dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<File> {
        let at = self.clones.fetch_add(1, Ordering::Relaxed);
        if let Some((_, errno)) = self.fails.filter(|(fails, _)| *fails == at) {
            return Err(errno.into());
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let copy = File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?);
        let mut bytes = vec![0; file.metadata()?.len() as usize];
        file.read_exact_at(&mut bytes, 0)?;
        copy.write_all_at(&bytes, 0)?;
        Ok(copy)
    }
}

fn take_with(
    machine: &Machine,
    path: &Path,
    options: &CaptureOptions<'_>,
    layer: Arc<dyn Layer>,
) -> Captured {
    let captured = capture_with_layer(machine, path, options, layer).unwrap();
    verify(path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    captured
}

/// A capture that clones.
fn take(machine: &Machine, path: &Path) -> Captured {
    take_with(machine, path, &CaptureOptions::default(), Arc::new(Copies::default()))
}

fn is_raw(path: &Path) -> bool {
    let snapshot = Snapshot::open(path).unwrap();
    let listed = snapshot.manifest().file("disk-root.raw").is_ok();
    assert_eq!(path.join("disk-root.raw").exists(), listed);
    listed
}

#[test]
fn a_cloned_disk_comes_back_in_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let path = dir.path().join("snap");
    let captured = take(&machine, &path);
    assert!(is_raw(&path));
    let zero = contents().chunks(CHUNK).filter(|c| c.iter().all(|b| *b == 0)).count() * CHUNK;
    let image = &captured.disks[0].1;
    assert_eq!((image.raw, image.zero), ((SIZE - zero) as u64, zero as u64));
    assert!(fs::read(path.join("disk-root.raw")).unwrap() == contents());
    assert!(captured_bytes(&path) == contents());
    let found = inspect(&path, &[]).unwrap();
    assert_eq!(found.format, "1.4");
    let image = &found.images[1];
    assert_eq!(image.raw_chunks + image.zero_chunks, COUNT);
    assert_eq!(image.stored, SIZE as u64);
    drop(machine);
    for disks in [DiskLoad::Eager, DiskLoad::Lazy, DiskLoad::Demand] {
        let machine = back(dir.path(), &path, disks).machine;
        write(&machine, 7 * CHUNK + 512, &[5; 512]);
        let mut expected = contents();
        expected[7 * CHUNK + 512..][..512].fill(5);
        assert!(read(&machine, 0, SIZE) == expected, "{disks:?}");
        // What the restored guest writes is not in the snapshot.
        assert!(captured_bytes(&path) == contents());
    }
}

#[test]
fn a_damaged_raw_chunk_ends_a_restore_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    take(&machine(dir.path()), &path);
    let file = File::options().write(true).open(path.join("disk-root.raw")).unwrap();
    file.write_all_at(&[0xee], 12 * CHUNK as u64 + 9).unwrap();
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    assert_eq!(read(&machine, 11 * CHUNK, CHUNK), contents()[11 * CHUNK..12 * CHUNK]);
    let again = dir.path().join("again");
    let error = capture(&machine, &again, &CaptureOptions::default()).unwrap_err().to_string();
    assert!(error.contains("disk-root.raw: chunk 12"), "{error}");
}

#[test]
fn only_what_was_written_since_the_last_clone_is_digested_again() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    take(&machine, &first);
    assert!(changed(&machine, "root").is_empty());
    write(&machine, 4 * CHUNK + 512, &[3; 512]);
    assert_eq!(changed(&machine, "root"), [4]);
    take(&machine, &second);
    let mut expected = contents();
    expected[4 * CHUNK + 512..][..512].fill(3);
    assert!(is_raw(&second) && captured_bytes(&second) == expected);
    // Nobody may write to the disk behind the machine's back. Nobody looks, and so it is found as damage.
    behind_its_back(&machine, 0, 6);
    let third = dir.path().join("3");
    let layer = Arc::new(Copies::default());
    capture_with_layer(&machine, &third, &CaptureOptions::default(), layer).unwrap();
    let damage = verify(&third, &[], Control::default()).unwrap_err().to_string();
    assert!(damage.starts_with("disk-root.raw: chunk 6 is damaged"), "{damage}");
}

/// Overwrites all of the disk at the phase, in which the guest must run.
struct Overtaken<'a> {
    machine: &'a Machine,
    at: Phase,
    done: Mutex<bool>,
}

impl Observer for Overtaken<'_> {
    fn begin(&self, phase: &Phase) {
        if *phase == self.at {
            assert_eq!(self.machine.state(), RunState::Running);
            (0..SIZE / 4096).for_each(|at| write(self.machine, at * 4096, &[0xff; 4096]));
            *self.done.lock() = true;
        }
    }
}

#[test]
fn a_guest_goes_on_while_its_cloned_disk_is_digested_and_never_waits() {
    for (live, at) in [(true, Phase::Memory), (false, Phase::Disk("root".into()))] {
        let dir = tempfile::tempdir().unwrap();
        let machine = machine(dir.path());
        machine.resume().unwrap();
        let observer = Overtaken { machine: &machine, at, done: Mutex::default() };
        let run = Run { observer: &observer, ..Run::default() };
        // Nobody reads the disk while memory is written: with no more than this, a writer would wait for ever.
        let aside = CHUNK as u64;
        let options = CaptureOptions { live, run, aside, ..CaptureOptions::default() };
        let path = dir.path().join("snap");
        let captured = take_with(&machine, &path, &options, Arc::new(Copies::default()));
        assert!(*observer.done.lock());
        assert_eq!(captured.timings.throttled, 0);
        assert!(is_raw(&path) && captured_bytes(&path) == contents());
        assert_eq!(changed(&machine, "root").len() as u64, COUNT);
        assert!(read(&machine, 0, SIZE) == [0xff; SIZE]);
    }
}

#[test]
fn where_a_disk_cannot_be_cloned_it_is_stored_as_frames() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    // It may show only in the pause.
    for at in [0, 1] {
        let path = dir.path().join(format!("unable-{at}"));
        let layer = Copies::failing(at, Errno::OPNOTSUPP);
        take_with(&machine, &path, &CaptureOptions::default(), layer.clone());
        assert_eq!(layer.clones.load(Ordering::Relaxed), at + 1);
        assert!(!is_raw(&path) && captured_bytes(&path) == contents());
    }
    let (layer, path) = (Arc::new(Copies::default()), dir.path().join("unwanted"));
    let options = CaptureOptions { reflink: false, ..CaptureOptions::default() };
    take_with(&machine, &path, &options, layer.clone());
    assert!(!is_raw(&path) && captured_bytes(&path) == contents());
    let disks = BTreeMap::from([("root".to_owned(), DiskMode::Reference)]);
    let options = CaptureOptions { disks, ..CaptureOptions::default() };
    let path = dir.path().join("reference");
    take_with(&machine, &path, &options, layer.clone());
    assert!(!is_raw(&path));
    assert_eq!(layer.clones.load(Ordering::Relaxed), 0);
}

#[test]
fn a_clone_that_fails_leaves_the_guest_running_and_nothing_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    take(&machine, &dir.path().join("first"));
    write(&machine, 4 * CHUNK, &[3; 512]);
    machine.resume().unwrap();
    let before = names(dir.path());
    for (errno, expected) in [(Errno::IO, "cannot clone"), (Errno::NOSPC, "no room left")] {
        for at in [0, 1] {
            let path = dir.path().join("snap");
            let layer = Copies::failing(at, errno);
            let failed = capture_with_layer(&machine, &path, &CaptureOptions::default(), layer);
            let error = failed.unwrap_err();
            assert!(matches!(error, CaptureError::Format(_)), "{error:?}");
            let text = error.to_string();
            assert!(text.starts_with("disk-root.raw: ") && text.contains(expected), "{text}");
            assert_eq!(machine.state(), RunState::Running);
            assert_eq!(names(dir.path()), before);
            assert_eq!(changed(&machine, "root"), [4]);
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_disk_that_is_not_all_there_is_not_cloned() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    take(&machine(dir.path()), &path);
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    read(&machine, 0, 20 * CHUNK);
    let (part, whole) = (dir.path().join("part"), dir.path().join("whole"));
    let layer = Arc::new(Copies::default());
    take_with(&machine, &part, &CaptureOptions::default(), layer.clone());
    assert_eq!(layer.clones.load(Ordering::Relaxed), 0);
    assert!(!is_raw(&part) && captured_bytes(&part) == contents());
    // Chunks of zeros may still be where they come from.
    assert!(read(&machine, 0, SIZE) == contents());
    assert_eq!(absent(&machine), 0);
    take(&machine, &whole);
    assert!(is_raw(&whole) && captured_bytes(&whole) == contents());
}

#[test]
fn a_difference_to_a_snapshot_with_a_cloned_disk_stores_what_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let (first, diff) = (dir.path().join("first"), dir.path().join("diff"));
    take(&machine, &first);
    write(&machine, 4 * CHUNK + 512, &[3; 512]);
    let options = CaptureOptions { parent: Some(first.clone()), ..CaptureOptions::default() };
    let layer = Arc::new(Copies::default());
    let captured = take_with(&machine, &diff, &options, layer.clone());
    assert_eq!(layer.clones.load(Ordering::Relaxed), 0);
    assert!(captured.disks[0].1.stored < 1000);
    let mut expected = contents();
    expected[4 * CHUNK + 512..][..512].fill(3);
    assert!(!is_raw(&diff) && captured_bytes(&diff) == expected);
    let index = ImageReader::open_index(&Snapshot::open(&diff).unwrap(), "disk-root").unwrap();
    assert!(matches!(index.record(4), Record::Patch { .. }));
    assert!(matches!(index.record(6), Record::Parent { .. }));
    let restored = back(dir.path(), &diff, DiskLoad::Demand).machine;
    assert!(read(&restored, 0, SIZE) == expected);

    let flat = dir.path().join("flat");
    flatten(&diff, &[], &flat, Existing::Refuse, Durability::None, &Run::default()).unwrap();
    verify(&flat, &[], Control::default()).unwrap();
    assert!(!is_raw(&flat) && captured_bytes(&flat) == expected);
}

#[test]
fn a_disk_of_which_the_parent_has_no_image_is_cloned_into_a_difference() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let (first, diff) = (dir.path().join("first"), dir.path().join("diff"));
    let disks = BTreeMap::from([("root".to_owned(), DiskMode::Reference)]);
    capture(&machine, &first, &CaptureOptions { disks, ..CaptureOptions::default() }).unwrap();
    let options = CaptureOptions { parent: Some(first), ..CaptureOptions::default() };
    take_with(&machine, &diff, &options, Arc::new(Copies::default()));
    assert!(is_raw(&diff) && captured_bytes(&diff) == contents());
    assert!(Snapshot::open(&diff).unwrap().manifest().parent.is_some());
}

#[test]
fn the_file_system_clones_the_disk_if_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let path = dir.path().join("snap");
    take_with(&machine, &path, &CaptureOptions::default(), Arc::new(Real));
    write(&machine, 4 * CHUNK, &[3; CHUNK]);
    assert!(captured_bytes(&path) == contents());
    if !is_raw(&path) {
        eprintln!("skipped: {} is on a file system that cannot clone", dir.path().display());
    }
}
