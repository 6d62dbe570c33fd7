//! Snapshots of every released format version are read for ever.

use std::{env, path::Path, sync::Arc};

use crate::common::{self, Bytes, Target};
use squib_formats::{
    digest::Digest,
    image::{Control, ImageOptions, ImageReader, digest_reader, write_diff},
    manifest::Operation,
    publish::{Existing, Staging},
    sections::{Sections, write_sections},
    snapshot_dir::Snapshot,
    verify::verify,
};

/// The directory of golden snapshots, one a format version.
fn golden() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

/// The id that the golden snapshot of format 1.0 had when it was written.
const ID_1_0: &str = "aeb091e61ea140d1ed0a01936a869da59eb6f030077a9e32c5f7b1eba6668270";

#[test]
fn the_snapshot_of_format_1_0_reads_back_as_written() {
    let path = golden().join("1.0");
    let verified =
        verify(&path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    let snapshot = verified.snapshot;
    assert_eq!(snapshot.id().to_string(), ID_1_0);
    assert_eq!((snapshot.header().major, snapshot.header().minor), (1, 0));
    assert_eq!(verified.unlisted, [""; 0]);
    let manifest = snapshot.manifest();
    assert_eq!(manifest.created, 1_767_225_600_000_000_000);
    assert_eq!(manifest.machine.name, "golden");
    assert_eq!(manifest.machine.disks.len(), 2);
    assert_eq!(manifest.cpu.id_registers, [(0xc000, 0x410f_d083), (0xc020, 0x11)]);
    let mut sections = Sections::read(&snapshot).unwrap();
    for section in common::sections() {
        assert_eq!(sections.take(&section.kind, &section.instance).unwrap(), section);
    }
    sections.finish().unwrap();
    for (name, expected) in [("memory", common::memory()), ("disk-root", common::disk())] {
        let target = Target::new(expected.len(), 0);
        ImageReader::open(&snapshot, name).unwrap().load(&target, Control::default()).unwrap();
        assert!(target.bytes.into_inner().unwrap() == expected, "{name}");
    }
}

/// The id that the golden difference of format 1.1 had when it was written.
const ID_1_1: &str = "fd1c3a08cb1b0b6785ff7afc5be313717423f9ca7e00081169acf3969d54c0c4";

#[test]
fn the_difference_of_format_1_1_reads_back_as_written() {
    let path = golden().join("1.1/diff");
    let verified =
        verify(&path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    let snapshot = verified.snapshot;
    assert_eq!(snapshot.id().to_string(), ID_1_1);
    assert_eq!((snapshot.header().major, snapshot.header().minor), (1, 1));
    assert_eq!(snapshot.manifest().parent_hint.as_deref(), Some("../parent"));
    // The parent is, to the bit, the snapshot of format 1.0: a full snapshot needs nothing newer.
    assert_eq!(snapshot.parent().unwrap().id().to_string(), ID_1_0);
    for (name, expected) in [("memory", changed_memory()), ("disk-root", common::disk())] {
        let target = Target::new(expected.len(), 0);
        ImageReader::open(&snapshot, name).unwrap().load(&target, Control::default()).unwrap();
        assert!(target.bytes.into_inner().unwrap() == expected, "{name}");
    }
}

/// The ids that the golden snapshots of format 1.2 had when they were written.
const IDS_1_2: [&str; 2] = [
    "bf7eb1f31f98696ff20abcfdc930ad7e336d7b242253930ec16d9bdcbbfe52a3",
    "747bcfe65303bdcb22252e08777f8bf509fbcfab0c6331ff13d63764ad1683ff",
];

#[test]
fn the_snapshots_of_format_1_2_read_back_as_written() {
    for (name, id) in ["full", "diff"].into_iter().zip(IDS_1_2) {
        let path = golden().join("1.2").join(name);
        let verified =
            verify(&path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
        let snapshot = verified.snapshot;
        assert_eq!(snapshot.id().to_string(), id);
        assert_eq!((snapshot.header().major, snapshot.header().minor), (1, 2));
        assert_eq!(verified.unlisted, [""; 0]);
        assert_eq!(snapshot.parent().is_some(), name == "diff");
        let (memory, disk) = match name {
            "full" => (common::memory(), common::raw_disk()),
            _ => (changed_memory(), changed_raw_disk()),
        };
        for (name, expected) in [("memory", memory), ("disk-root", disk)] {
            let target = Target::new(expected.len(), 0);
            ImageReader::open(&snapshot, name).unwrap().load(&target, Control::default()).unwrap();
            assert!(target.bytes.into_inner().unwrap() == expected, "{name}");
        }
    }
}

/// The id that the golden snapshot of format 1.3 had when it was written.
const ID_1_3: &str = "f1d6e862d5c80672b6f86f23951fb1fc2fc35a11b629cea9726676f4158aef89";

#[test]
fn the_snapshot_of_format_1_3_reads_back_as_written() {
    let path = golden().join("1.3");
    let verified =
        verify(&path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    let snapshot = verified.snapshot;
    assert_eq!(snapshot.id().to_string(), ID_1_3);
    assert_eq!((snapshot.header().major, snapshot.header().minor), (1, 3));
    assert_eq!(snapshot.manifest().host_backend, Some(common::host_backend()));
    assert_eq!(snapshot.manifest().cpu.backend, "hvf");
    let target = Target::new(common::memory().len(), 0);
    ImageReader::open(&snapshot, "memory").unwrap().load(&target, Control::default()).unwrap();
    assert!(target.bytes.into_inner().unwrap() == common::memory());
}

/// The ids that the golden snapshots of format 1.4 had when they were written.
const IDS_1_4: [(&str, &str); 3] = [
    ("full", "2a694bdc00d6392ffa6dddb2510c214e06665d053d78d1f28ca6e9951c368fe9"),
    ("diff", "d00026181622df3344d0903344c95b18bc7ad3f74ac14732b776f1e110cdd472"),
    ("host", "8870079b37e26ac5c5efff63f1d4f7f8a49649c7fd828b4b4541f4fb2d301779"),
];

#[test]
fn the_snapshots_of_format_1_4_read_back_as_written() {
    for (name, id) in IDS_1_4 {
        let path = golden().join("1.4").join(name);
        let verified =
            verify(&path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
        let snapshot = verified.snapshot;
        assert_eq!(snapshot.id().to_string(), id);
        assert_eq!((snapshot.header().major, snapshot.header().minor), (1, 4));
        assert_eq!(verified.unlisted, [""; 0]);
        assert_eq!(snapshot.parent().is_some(), name == "diff");
        let manifest = snapshot.manifest();
        let host = (name == "host").then(common::host_backend);
        assert_eq!(manifest.host_backend, host);
        assert_eq!(manifest.operation, Some(Operation::default()));
        let (memory, disk) = match name {
            "full" => (common::memory(), common::raw_disk()),
            "diff" => (changed_memory(), changed_raw_disk()),
            _ => (common::memory(), common::disk()),
        };
        for (name, expected) in [("memory", memory), ("disk-root", disk)] {
            let target = Target::new(expected.len(), 0);
            ImageReader::open(&snapshot, name).unwrap().load(&target, Control::default()).unwrap();
            assert!(target.bytes.into_inner().unwrap() == expected, "{name}");
        }
        // The same state has the same image digest for ever.
        let digest = digest_reader("memory", &mut &common::memory()[..]).unwrap().digest;
        assert_eq!(manifest.image("memory").unwrap().digest == digest, name != "diff");
    }
}

/// The sample's raw disk with its noise gone to zeros.
fn changed_raw_disk() -> Vec<u8> {
    let mut disk = common::raw_disk();
    disk[..1 << 16].fill(0);
    disk
}

/// Writes golden snapshots of the current version: `SQUIB_GOLDEN=DIR cargo test -p squib-formats
/// --test it golden -- --ignored`.
#[test]
#[ignore = "writes a new golden snapshot"]
fn write_the_golden_snapshot() {
    let dir = env::var_os("SQUIB_GOLDEN").expect("SQUIB_GOLDEN names the new directory");
    let dir = Path::new(&dir);
    println!("{}", common::publish_raw(&dir.join("full")));
    println!("{}", raw_difference(&dir.join("diff"), &dir.join("full")));
    println!("{}", common::publish_of_host(&dir.join("host")));
}

/// The sample's memory with one page of noise inverted, a chunk gone to zeros and a new one.
fn changed_memory() -> Vec<u8> {
    let mut memory = common::memory();
    memory[(2 << 16) + 8192..(2 << 16) + 12288].iter_mut().for_each(|byte| *byte = !*byte);
    memory[5 << 16..6 << 16].fill(0);
    memory[14 << 16..15 << 16].fill(0x33);
    memory
}

/// Publishes a difference to the sample with a raw disk at `parent`, with a raw disk of its own.
fn raw_difference(path: &Path, parent: &Path) -> Digest {
    let parent = Snapshot::open(parent).unwrap();
    let layer = Arc::new(common::Copies);
    let mut staging = Staging::with_layer(path, Existing::Refuse, layer).unwrap();
    let mut manifest = parent.manifest().clone();
    manifest.sections = write_sections(&mut staging, &common::sections()).unwrap();
    let base = ImageReader::open(&parent, "memory").unwrap();
    let (source, options) = (Bytes(changed_memory()), ImageOptions::default());
    let control = Control::default();
    let memory = write_diff(&mut staging, "memory", &source, &base, options, control).unwrap();
    let disk = common::write_raw(&mut staging, "disk-root", &changed_raw_disk(), control).unwrap();
    manifest.machine.disks[0].digest = disk.digest;
    manifest.images = vec![memory.record, disk];
    manifest.parent = Some(parent.id());
    manifest.parent_hint = Some("../full".into());
    staging.publish(manifest).unwrap()
}
