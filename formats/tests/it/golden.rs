//! Snapshots of every released format version are read for ever.

use std::{env, path::Path};

use crate::common::{self, Target};
use squib_formats::{
    image::{Control, ImageReader},
    sections::Sections,
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
    let verified = verify(&path, Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
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

/// Writes the golden snapshot of the current version: `SQUIB_GOLDEN=DIR cargo test -p squib-formats
/// --test it golden -- --ignored`.
#[test]
#[ignore = "writes a new golden snapshot"]
fn write_the_golden_snapshot() {
    let dir = env::var_os("SQUIB_GOLDEN").expect("SQUIB_GOLDEN names the new directory");
    println!("{}", common::publish(Path::new(&dir)));
}
