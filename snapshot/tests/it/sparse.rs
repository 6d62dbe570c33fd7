//! Machines with disks and memory of which hardly anything is used.

use std::{fs, os::unix::fs::FileExt, path::Path};

use squib_devices::{
    granules::Store,
    virtio::block::{Disk, DiskGranules, TrackedDisk},
};
use squib_formats::{
    image::{Control, HEADER_LEN, ImageReader, RECORD_LEN, digest_file},
    snapshot_dir::Snapshot,
};
use squib_snapshot::{
    capture::{CaptureOptions, DiskMode, capture},
    diff::diff,
    inspect::inspect,
    restore::{DiskLoad, finish_disks},
    verify::verify,
};
use squib_vmm::machine::Machine;
use vm_memory::VolatileSlice;

use crate::{
    disks::{back, machine},
    guest::Still,
};

const TIB: u64 = 1 << 40;

fn make_large(path: &Path) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(TIB).unwrap();
    file.write_all_at(b"far behind", TIB - 4096).unwrap();
}

fn length(path: &Path, name: &str) -> u64 {
    fs::metadata(path.join(name)).unwrap().len()
}

fn write(machine: &Machine, at: u64, bytes: &[u8]) {
    let disk = TrackedDisk::new(granules(machine).clone());
    disk.write_at(at, &[VolatileSlice::from(&mut bytes.to_vec()[..])]).unwrap();
}

fn granules(machine: &Machine) -> &std::sync::Arc<DiskGranules> {
    machine.disk_granules("root").unwrap()
}

#[test]
fn a_disk_of_a_tebibyte_is_captured_restored_and_compared_by_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    make_large(guest.disk_path(0));
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    // As frames, whatever the file system of the test can clone.
    let options = CaptureOptions { reflink: false, ..CaptureOptions::default() };
    capture(&guest, &first, &options).unwrap();
    let stored = |path| length(path, "disk-root.idx") + length(path, "disk-root.zst");
    assert!(stored(&first) < 100 << 10, "{}", stored(&first));
    verify(&first, &[], Control::default()).unwrap();
    let image = ImageReader::open_index(&Snapshot::open(&first).unwrap(), "disk-root").unwrap();
    let digest = digest_file(guest.disk_path(0), Control::default()).unwrap().digest;
    let record = Snapshot::open(&first).unwrap().manifest().image("disk-root").unwrap().clone();
    assert_eq!((image.size(), record.digest), (TIB, digest));
    let shown = inspect(&first, &[]).unwrap();
    let shown = shown.images.iter().find(|image| image.record.name == "disk-root").unwrap();
    assert_eq!((shown.chunks, shown.zero_chunks), (TIB >> 16, (TIB >> 16) - 2));

    let file = fs::File::options().write(true).open(guest.disk_path(0)).unwrap();
    file.write_all_at(b"more", TIB / 2).unwrap();
    let options = CaptureOptions { parent: Some(first.clone()), ..options };
    capture(&guest, &second, &options).unwrap();
    let found = diff(&first, &second, &[], Control::default()).unwrap();
    let disk = found.images.iter().find(|image| image.name == "disk-root").unwrap();
    assert_eq!((disk.changed_chunks, disk.changed_pages), (1, Some(1)));
    assert_eq!((disk.regions[0].offset, disk.regions.len()), (TIB / 2, 1));

    // One that stays where it is has its digests kept by runs.
    let outside = dir.path().join("outside");
    let mut options = CaptureOptions::default();
    options.disks.insert("root".into(), DiskMode::Reference);
    capture(&guest, &outside, &options).unwrap();
    let found = Snapshot::open(&outside).unwrap().manifest().machine.disks[0].digest;
    assert_eq!(found, digest_file(guest.disk_path(0), Control::default()).unwrap().digest);
}

#[test]
fn a_restored_disk_of_a_tebibyte_brings_what_is_in_it_and_is_captured_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = machine(dir.path());
    drop(source);
    make_large(&dir.path().join("root"));
    let config = {
        let disk = |id: &str, read_only: bool| squib_vmm::config::DiskConfig {
            id: id.to_owned(),
            path: dir.path().join(id),
            read_only,
        };
        squib_vmm::config::MachineConfig {
            memory: 64 << 20,
            disks: vec![disk("root", false)],
            deterministic: Some(Default::default()),
            ..squib_vmm::config::MachineConfig::new("idle", dir.path().join("Image"))
        }
    };
    let source = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    let (first, again) = (dir.path().join("first"), dir.path().join("again"));
    let options = CaptureOptions { reflink: false, ..CaptureOptions::default() };
    capture(&source, &first, &options).unwrap();
    drop(source);

    let machine = back(dir.path(), &first, DiskLoad::Demand).machine;
    // Of zeros nothing is to be brought.
    let disk = granules(&machine);
    let absent = |disk: &DiskGranules| {
        let next = |at: &u64| disk.next_absent(at + 1);
        std::iter::successors(disk.next_absent(0), next).count()
    };
    assert!((1..40).contains(&absent(disk)), "{}", absent(disk));
    write(&machine, TIB / 2 + 512, &[7; 512]);
    // A capture before all is there knows what it has not read.
    let options = CaptureOptions { parent: Some(first.clone()), ..options };
    let captured = capture(&machine, &again, &options).unwrap();
    let (_, root) = &captured.disks[0];
    assert_eq!(root.zero + root.parent, TIB - (64 << 10));
    // Data at the start, one of data, and at the end, with zeros between; each chunk of the start is another.
    let runs = (length(&again, "disk-root.idx") as usize - HEADER_LEN) / RECORD_LEN;
    assert!(runs < 45, "{runs}");
    finish_disks(&machine, Control::default()).unwrap();
    assert_eq!(absent(granules(&machine)), 0);
    let path = &machine.config().disks[0].path;
    let digest = digest_file(path, Control::default()).unwrap().digest;
    let snapshot = Snapshot::open(&again).unwrap();
    assert_eq!(digest, snapshot.manifest().image("disk-root").unwrap().digest);
}

#[test]
fn memory_that_nobody_has_touched_is_not_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Still::new(dir.path());
    guest.config.memory = 16 << 30;
    guest.ram = squib_devices::memory::GuestRam::new(guest.config.memory).unwrap();
    let at = vm_memory::GuestAddress(guest.ram.base() + (11 << 30) + 5);
    vm_memory::Bytes::write_slice(&guest.ram, b"touched", at).unwrap();
    let path = dir.path().join("snap");
    let captured = capture(&guest, &path, &CaptureOptions::default()).unwrap();
    // A huge page may have come for a byte, and is zeros but for that.
    assert_eq!(captured.memory.zero, guest.config.memory - (64 << 10));
    assert_eq!(length(&path, "memory.idx"), (HEADER_LEN + 3 * RECORD_LEN) as u64);
    // Nobody has touched it since.
    let touched = guest.ram.granules().store().data(0..11 << 30).unwrap();
    assert_eq!(touched, None, "reading it would have given it pages");
}
