//! Disks that are captured while the guest goes on and restored while it runs already.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use squib_devices::virtio::block::{Disk, DiskGranules, TrackedDisk};
use squib_formats::{
    image::{Control, ImageOptions, ImageReader, Record, Scheme, digest_file},
    manifest::{DiskRecord, DiskStorage},
    snapshot_dir::Snapshot,
};
use squib_snapshot::{
    capture::{CaptureOptions, Captured, DiskMode, capture},
    observe::{Observer, Phase, Run},
    restore::{DiskLoad, FinishError, MemoryLoad, RestoreOptions, Restored, finish_disks, restore},
    verify::verify,
};
use squib_vmm::{
    config::{Deterministic, DiskConfig, MachineConfig},
    machine::{Machine, Outcome, RunState},
};
use vm_memory::VolatileSlice;

pub(crate) const CHUNK: usize = 64 << 10;
/// The last chunk is a short one.
pub(crate) const SIZE: usize = 32 * CHUNK + 4096;
pub(crate) const COUNT: u64 = 33;
/// Chunks that are not all zeros, and are brought by a restore.
const DATA: u64 = 25;

/// An arm64 Image that does nothing for ever.
fn kernel() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut word = |at: usize, word: u32| image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    word(0, 0x1400_0010); // b #64
    word(16, 4096); // image_size
    word(24, 2); // flags: 4 KiB pages
    word(56, 0x644d_5241); // "ARM\x64"
    word(64, 0x1400_0000); // b #0
    image
}

/// Every chunk is another one, but for some that are zeros.
pub(crate) fn contents() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE).map(|at| (at / 4096 * 31 + at % 251) as u8).collect();
    bytes.chunks_mut(CHUNK).skip(1).step_by(4).for_each(|chunk| chunk.fill(0));
    bytes
}

/// A deterministic machine with the disks `root`, which the guest can write to, and `data`.
pub(crate) fn machine(dir: &Path) -> Machine {
    fs::write(dir.join("Image"), kernel()).unwrap();
    let disk = |id: &str, read_only: bool| {
        let path = dir.join(id);
        fs::write(&path, contents()).unwrap();
        DiskConfig { id: id.to_owned(), path, read_only }
    };
    let config = MachineConfig {
        memory: 64 << 20,
        disks: vec![disk("root", false), disk("data", true)],
        deterministic: Some(Deterministic::default()),
        ..MachineConfig::new("idle", dir.join("Image"))
    };
    Machine::boot(config, Box::new(std::io::sink())).unwrap()
}

pub(crate) fn back(dir: &Path, path: &Path, disks: DiskLoad) -> Restored {
    let disk_dir = tempfile::tempdir_in(dir).unwrap().keep();
    let options = RestoreOptions {
        disk_dir: Some(disk_dir),
        disks,
        memory: MemoryLoad::Record,
        allowed_disks: vec![dir.to_owned()],
        ..RestoreOptions::default()
    };
    restore(path, &options, Box::new(std::io::sink())).unwrap()
}

fn granules<'a>(machine: &'a Machine, id: &str) -> &'a Arc<DiskGranules> {
    machine.disk_granules(id).unwrap()
}

pub(crate) fn absent(machine: &Machine) -> u64 {
    let granules = granules(machine, "root");
    (0..granules.count()).filter(|granule| granules.is_absent(*granule)).count() as u64
}

pub(crate) fn changed(machine: &Machine, id: &str) -> Vec<u64> {
    let granules = granules(machine, id);
    (0..granules.count()).filter(|granule| granules.is_changed(*granule)).collect()
}

/// What a request of the guest's does.
pub(crate) fn write(machine: &Machine, at: usize, bytes: &[u8]) {
    let disk = TrackedDisk::new(granules(machine, "root").clone());
    disk.write_at(at as u64, &[VolatileSlice::from(&mut bytes.to_vec()[..])]).unwrap();
}

fn try_read(machine: &Machine, at: usize, len: usize) -> std::io::Result<Vec<u8>> {
    let disk = TrackedDisk::new(granules(machine, "root").clone());
    let mut bytes = vec![0xee; len];
    disk.read_at(at as u64, &[VolatileSlice::from(&mut bytes[..])])?;
    Ok(bytes)
}

pub(crate) fn read(machine: &Machine, at: usize, len: usize) -> Vec<u8> {
    try_read(machine, at, len).unwrap()
}

/// Disks as frames, also where they could be cloned.
fn frames() -> CaptureOptions<'static> {
    CaptureOptions { reflink: false, ..CaptureOptions::default() }
}

fn take(machine: &Machine, path: &Path, parent: Option<&Path>) -> Captured {
    let parent = parent.map(Path::to_owned);
    let captured = capture(machine, path, &CaptureOptions { parent, ..frames() }).unwrap();
    verify(path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    captured
}

/// The bytes of the captured disk in the snapshot at `path`.
pub(crate) fn captured_bytes(path: &Path) -> Vec<u8> {
    let snapshot = Snapshot::open_chain(path, &[]).unwrap();
    let image = ImageReader::open(&snapshot, "disk-root").unwrap();
    let mut reader = image.chunks(0).unwrap();
    let mut bytes = Vec::new();
    for chunk in 0..COUNT {
        let len = CHUNK.min(SIZE - bytes.len());
        match reader.read(chunk).unwrap() {
            Some(chunk) => bytes.extend_from_slice(chunk),
            None => bytes.resize(bytes.len() + len, 0),
        }
    }
    bytes
}

fn snapshot(dir: &Path) -> PathBuf {
    let path = dir.join("snap");
    take(&machine(dir), &path, None);
    path
}

fn record(path: &Path, id: &str) -> DiskRecord {
    let snapshot = Snapshot::open(path).unwrap();
    let disks = &snapshot.manifest().machine.disks;
    disks.iter().find(|disk| disk.id == id).unwrap().clone()
}

pub(crate) fn wait_for(what: impl Fn() -> bool) {
    while !what() {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_lazily_restored_disk_reads_right_and_brings_only_what_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    fs::remove_file(dir.path().join("root")).unwrap();
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    assert_eq!(absent(&machine), DATA);
    let mut expected = contents();
    assert_eq!(read(&machine, 5 * CHUNK - 512, 1024), expected[5 * CHUNK - 512..][..1024]);
    // Of two chunks, of which one is zeros.
    assert_eq!(absent(&machine), DATA - 1);
    write(&machine, 9 * CHUNK, &[7; CHUNK]);
    write(&machine, SIZE - 512, &[8; 512]);
    expected[9 * CHUNK..10 * CHUNK].fill(7);
    expected[SIZE - 512..].fill(8);
    assert_eq!(absent(&machine), DATA - 2);
    assert!(read(&machine, 0, SIZE) == expected);
    assert_eq!(absent(&machine), 0);
    assert!(fs::read(&machine.config().disks[0].path).unwrap() == expected);
}

#[test]
fn a_thread_completes_a_lazily_restored_disk_and_a_finished_one_stands_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(dir.path(), &path, DiskLoad::Lazy).machine;
    wait_for(|| absent(&machine) == 0);
    assert!(fs::read(&machine.config().disks[0].path).unwrap() == contents());
    drop(machine);

    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    let cancel = AtomicBool::new(true);
    let cancelled = finish_disks(&machine, Control { cancel: &cancel, ..Control::default() });
    assert!(matches!(cancelled, Err(FinishError::Cancelled)));
    assert_eq!(absent(&machine), DATA);
    machine.stop();
    finish_disks(&machine, Control::default()).unwrap();
    let file = machine.config().disks[0].path.clone();
    drop(machine);
    assert!(fs::read(file).unwrap() == contents());
}

#[test]
fn a_machine_is_dropped_while_its_disks_are_still_being_brought() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    for _ in 0..10 {
        drop(back(dir.path(), &path, DiskLoad::Lazy));
    }
}

#[test]
fn a_capture_of_a_disk_that_is_still_being_brought_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    write(&machine, 3 * CHUNK + 512, &[9; 512]);
    let mut expected = contents();
    expected[3 * CHUNK + 512..][..512].fill(9);
    let again = dir.path().join("again");
    take(&machine, &again, None);
    assert!(captured_bytes(&again) == expected);
}

#[test]
fn a_difference_of_a_lazily_restored_disk_loads_nothing_that_was_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    write(&machine, 3 * CHUNK + 512, &[9; 512]);
    read(&machine, 20 * CHUNK, 512);
    // What was not there is not brought to be discarded.
    let disk = TrackedDisk::new(granules(&machine, "root").clone());
    disk.discard(10 * CHUNK as u64, 2 * CHUNK as u64).unwrap();
    let absent_before = absent(&machine);
    assert_eq!(absent_before, DATA - 4);
    let diff = dir.path().join("diff");
    let captured = take(&machine, &diff, Some(&path));
    // The last chunk is a short one, whose digest nobody asks for.
    assert_eq!(absent(&machine), absent_before - 1);
    let image = &captured.disks[0].1;
    assert!(image.stored < 1000, "{} bytes", image.stored);
    let mut expected = contents();
    expected[3 * CHUNK + 512..][..512].fill(9);
    expected[10 * CHUNK..12 * CHUNK].fill(0);
    assert!(captured_bytes(&diff) == expected);
    let index = ImageReader::open_index(&Snapshot::open(&diff).unwrap(), "disk-root").unwrap();
    assert_eq!([index.record(10), index.record(11)], [Record::Zero, Record::Zero]);
    assert!(matches!(index.record(3), Record::Patch { .. }));
    assert!(matches!(index.record(20), Record::Parent { .. }));
}

/// Makes the frame of `chunk` of the captured disk another one.
fn damage(path: &Path, chunk: usize) {
    let index = ImageReader::open_index(&Snapshot::open(path).unwrap(), "disk-root").unwrap();
    let Record::Data { offset, .. } = index.record(chunk as u64) else { panic!("no data") };
    let file = path.join("disk-root.zst");
    let mut bytes = fs::read(&file).unwrap();
    bytes[offset as usize + 20] ^= 1;
    fs::write(&file, bytes).unwrap();
}

#[test]
fn a_damaged_chunk_ends_the_machine_that_touches_it_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    damage(&path, 12);
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    machine.resume().unwrap();
    assert_eq!(read(&machine, 11 * CHUNK, CHUNK), contents()[11 * CHUNK..12 * CHUNK]);
    let error = try_read(&machine, 12 * CHUNK, 512).unwrap_err().to_string();
    assert!(error.contains("disk `root`") && error.contains("disk-root.zst: chunk 12"), "{error}");
    let Outcome::Damaged(damage) = machine.wait() else { panic!("{:?}", machine.state()) };
    assert!(damage.why.contains("disk-root.zst: chunk 12"), "{damage}");
    // The thread that brings the rest meets it too.
    let machine = back(dir.path(), &path, DiskLoad::Lazy).machine;
    let Outcome::Damaged(damage) = machine.wait() else { panic!("{:?}", machine.state()) };
    assert!(damage.why.contains("disk-root.zst: chunk 12"), "{damage}");
    // And a capture does not store anything else in its place.
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    let again = dir.path().join("again");
    let error = capture(&machine, &again, &frames()).unwrap_err().to_string();
    assert!(error.contains("disk-root.zst: chunk 12"), "{error}");
    assert!(!again.exists());
}

#[test]
fn a_damaged_chunk_that_is_overwritten_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    damage(&path, 12);
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    write(&machine, 12 * CHUNK, &[1; CHUNK]);
    finish_disks(&machine, Control::default()).unwrap();
    assert_eq!(machine.state(), RunState::Paused);
    assert_eq!(read(&machine, 12 * CHUNK, CHUNK), [1; CHUNK]);
}

/// Writes to a chunk of the disk's file behind the machine's back, so that reading it again would show.
pub(crate) fn behind_its_back(machine: &Machine, disk: usize, chunk: usize) {
    let file = fs::File::options().write(true).open(&machine.config().disks[disk].path).unwrap();
    file.write_all_at(b"nobody reads this", (chunk * CHUNK) as u64).unwrap();
}

#[test]
fn only_what_was_written_since_the_last_capture_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    assert_eq!(changed(&machine, "root").len() as u64, COUNT);
    take(&machine, &first, None);
    assert!(changed(&machine, "root").is_empty());
    write(&machine, 4 * CHUNK + 512, &[3; 512]);
    assert_eq!(changed(&machine, "root"), [4]);
    behind_its_back(&machine, 0, 6);
    take(&machine, &second, Some(&first));
    let mut expected = contents();
    expected[4 * CHUNK + 512..][..512].fill(3);
    assert!(captured_bytes(&second) == expected);
}

#[test]
fn a_disk_that_is_referenced_again_is_digested_where_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let disks = BTreeMap::from([("root".to_owned(), DiskMode::Reference)]);
    let options = CaptureOptions { disks, ..frames() };
    let digest = || digest_file(&dir.path().join("root"), Control::default()).unwrap().digest;
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    let captured = capture(&machine, &first, &options).unwrap();
    assert!(captured.disks.is_empty());
    let found = record(&first, "root");
    assert_eq!((found.storage, found.digest), (DiskStorage::Reference(Scheme::Runs), digest()));
    assert!(changed(&machine, "root").is_empty());
    write(&machine, 2 * CHUNK - 512, &[5; 1024]);
    write(&machine, SIZE - 512, &[6; 512]);
    assert_eq!(changed(&machine, "root"), [1, 2, COUNT - 1]);
    let right = digest();
    behind_its_back(&machine, 0, 6);
    behind_its_back(&machine, 1, 6);
    capture(&machine, &second, &options).unwrap();
    assert_eq!(record(&second, "root").digest, right);
    assert_eq!(record(&second, "data").digest, record(&first, "data").digest);
}

#[test]
fn a_disk_that_was_checked_at_its_restore_is_not_digested_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
    behind_its_back(&machine, 1, 6);
    let again = dir.path().join("again");
    take(&machine, &again, None);
    assert_eq!(record(&again, "data").digest, record(&path, "data").digest);
}

#[test]
fn a_captured_disk_of_any_chunk_size_is_known_again_where_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    let guest = machine(dir.path());
    for chunk_size in [16 << 10, 64 << 10, 256 << 10] {
        let path = dir.path().join(format!("of-{chunk_size}"));
        let image = ImageOptions { chunk_size, ..ImageOptions::default() };
        capture(&guest, &path, &CaptureOptions { image, ..frames() }).unwrap();
        // The first machine has the disk itself.
        let copy = dir.path().join("copy");
        fs::copy(dir.path().join("root"), &copy).unwrap();
        let disk_places = BTreeMap::from([("root".to_owned(), copy)]);
        let options = RestoreOptions {
            disk_places,
            allowed_disks: vec![dir.path().to_owned()],
            ..RestoreOptions::default()
        };
        drop(restore(&path, &options, Box::new(std::io::sink())).unwrap());
        // And it comes back from chunks of that size.
        let machine = back(dir.path(), &path, DiskLoad::Demand).machine;
        write(&machine, 5 * CHUNK, &[1; 4096]);
        let mut expected = contents();
        expected[5 * CHUNK..][..4096].fill(1);
        assert!(read(&machine, 0, SIZE) == expected);
    }
}

#[test]
fn a_capture_that_fails_forgets_no_write() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    take(&machine, &first, None);
    write(&machine, 4 * CHUNK, &[3; 512]);
    // Room for memory and a part of the disk, or for all but the manifest.
    let stored = take(&machine, &dir.path().join("whole"), Some(&first)).stored;
    write(&machine, 6 * CHUNK, &[4; 512]);
    for limit in [0, 1000, stored - 10] {
        let parent = Some(first.clone());
        let options = CaptureOptions { parent, limit: Some(limit), ..frames() };
        capture(&machine, &second, &options).unwrap_err();
        assert_eq!(changed(&machine, "root"), [6]);
    }
    take(&machine, &second, Some(&first));
    let mut expected = contents();
    expected[4 * CHUNK..][..512].fill(3);
    expected[6 * CHUNK..][..512].fill(4);
    assert!(captured_bytes(&second) == expected);
}

/// Overwrites all of the disk when memory is read: in a live capture the guest runs then.
struct Overtaken<'a> {
    machine: &'a Machine,
    done: Mutex<bool>,
}

impl Observer for Overtaken<'_> {
    fn begin(&self, phase: &Phase) {
        if *phase == Phase::Memory {
            assert_eq!(self.machine.state(), RunState::Running);
            (0..SIZE / 4096).for_each(|at| write(self.machine, at * 4096, &[0xff; 4096]));
            *self.done.lock() = true;
        }
    }
}

#[test]
fn a_live_capture_holds_the_disk_of_the_moment() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let restored = |disks| back(dir.path(), &path, disks).machine;
    let machines =
        [restored(DiskLoad::Eager), restored(DiskLoad::Lazy), restored(DiskLoad::Demand)];
    for (at, machine) in machines.iter().enumerate() {
        machine.resume().unwrap();
        let observer = Overtaken { machine, done: Mutex::default() };
        let run = Run { observer: &observer, ..Run::default() };
        let live = dir.path().join(format!("live-{at}"));
        let options = CaptureOptions { live: true, run, ..frames() };
        capture(machine, &live, &options).unwrap();
        assert!(*observer.done.lock());
        assert!(captured_bytes(&live) == contents());
        assert_eq!(changed(machine, "root").len() as u64, COUNT);
        let next = dir.path().join(format!("next-{at}"));
        take(machine, &next, Some(&live));
        assert!(captured_bytes(&next) == [0xff; SIZE]);
    }
}

#[test]
fn a_guest_that_outruns_a_live_capture_of_its_disk_waits_and_is_not_corrupted() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Arc::new(machine(dir.path()));
    machine.resume().unwrap();
    struct Outrun {
        machine: Arc<Machine>,
        writer: Mutex<Option<thread::JoinHandle<()>>>,
    }
    impl Observer for Outrun {
        fn begin(&self, phase: &Phase) {
            if *phase == Phase::Memory {
                let machine = Arc::clone(&self.machine);
                let work = move || (0..32).for_each(|at| write(&machine, at * CHUNK, &[1; 512]));
                *self.writer.lock() = Some(thread::spawn(work));
                // Room for two: the third is not written to before something has been read.
                let done = || changed(&self.machine, "root").len();
                wait_for(|| done() == 2);
                thread::sleep(Duration::from_millis(20));
                assert_eq!(done(), 2);
            }
        }
    }
    let observer = Outrun { machine: Arc::clone(&machine), writer: Mutex::default() };
    let run = Run { observer: &observer, ..Run::default() };
    let live = dir.path().join("live");
    let aside = 2 * CHUNK as u64;
    let options = CaptureOptions { live: true, aside, run, ..frames() };
    let captured = capture(&*machine, &live, &options).unwrap();
    assert!(captured.timings.throttled > 0);
    observer.writer.into_inner().unwrap().join().unwrap();
    assert!(captured_bytes(&live) == contents());
    let mut expected = contents();
    (0..32).for_each(|at| expected[at * CHUNK..][..512].fill(1));
    assert!(read(&machine, 0, SIZE) == expected);
}
