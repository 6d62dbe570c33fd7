//! Debian's userland on the software CPU.

use std::time::Duration;

use squib_tests::debian::{self, CHECKS, DEBUG, Disks, Program};

/// Longer than the slowest host takes.
const PATIENCE: Duration = Duration::from_secs(1200);

fn run_on(vcpus: u32, program: &Program) {
    let name = std::thread::current().name().unwrap_or("this test").to_owned();
    let kit = squib::kit::Kit::cached().expect("the kit's folder can be read");
    let Some(kit) = kit.filter(|kit| kit.rootfs.is_some()) else {
        println!("skipped: {name}: no root file system; `squib kit fetch --rootfs` makes it");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let disks = Disks::make(&kit, program, folder.path()).unwrap();
    let printed = debian::run(&kit, program, &disks, vcpus, PATIENCE).unwrap();
    for (ours, theirs) in printed.lines().zip(program.under_qemu.lines()) {
        assert_eq!(ours, theirs, "squib's guest printed the left, QEMU's the right");
    }
    assert_eq!(printed.lines().count(), program.under_qemu.lines().count());
}

#[test]
fn debian_python_prints_what_it_prints_under_qemu_on_one_vcpu() {
    run_on(1, &CHECKS);
}

#[test]
fn debian_python_prints_what_it_prints_under_qemu_on_two_vcpus() {
    run_on(2, &CHECKS);
}

/// ptrace's steps, breakpoints and watchpoints, perf's, uprobes and kprobes.
#[test]
fn debuggers_of_a_guest_see_what_they_see_under_qemu_on_one_vcpu() {
    run_on(1, &DEBUG);
}

#[test]
fn debuggers_of_a_guest_see_what_they_see_under_qemu_on_two_vcpus() {
    run_on(2, &DEBUG);
}
