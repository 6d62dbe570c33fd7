//! Debian's userland on the software CPU.

use std::time::Duration;

use squib_tests::debian::{self, Disks};

/// What the same kernel and root file system printed under QEMU
/// (`versus python --record tests/guest/checks.out`).
const UNDER_QEMU: &str = include_str!("../guest/checks.out");
/// Longer than the slowest host takes.
const PATIENCE: Duration = Duration::from_secs(1200);

fn python_on(vcpus: u32) {
    let name = std::thread::current().name().unwrap_or("this test").to_owned();
    let kit = squib::kit::Kit::cached().expect("the kit's folder can be read");
    let Some(kit) = kit.filter(|kit| kit.rootfs.is_some()) else {
        println!("skipped: {name}: no root file system; `squib kit fetch --rootfs` makes it");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let disks = Disks::make(&kit, folder.path()).unwrap();
    let printed = debian::run_checks(&kit, &disks, vcpus, PATIENCE).unwrap();
    for (ours, theirs) in printed.lines().zip(UNDER_QEMU.lines()) {
        assert_eq!(ours, theirs, "squib's guest printed the left, QEMU's the right");
    }
    assert_eq!(printed.lines().count(), UNDER_QEMU.lines().count());
}

#[test]
fn debian_python_prints_what_it_prints_under_qemu_on_one_vcpu() {
    python_on(1);
}

#[test]
fn debian_python_prints_what_it_prints_under_qemu_on_two_vcpus() {
    python_on(2);
}
